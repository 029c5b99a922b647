"""Tables of README and docs, written between markers: measurements, patches, releases.

python bench/tables.py            # rewrite README.md and the pages in docs/
python bench/tables.py --check    # exit 1 if one of them differs

Measurements come from the CSV files in ``bench/results``, patches from the catalogue.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.rendering import catalogue as tables_catalogue
from bench.rendering import engines as tables_engines
from bench.rendering import peers as tables_peers
from bench.rendering import quality as tables_quality
from bench.rendering.text import (
    change,
    chosen,
    decimal,
    differing,
    markdown,
    medians,
    newest_rows,
    not_bitwise,
    origin,
    origins,
    short,
    sources,
)
from gemma4_turbo.models.geometry import GEOMETRIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
BATCHES = (1, 8, 32)
PREFILL = 4096
KERNEL_ROWS = (1, 32, 4096)


def engine() -> str:
    """Whole engine: medians of the rounds, stock and patched, and their ratio."""
    frame = pd.read_csv(RESULTS / "router-engine.csv")
    timed = frame[frame["unit"].isin(["ms", "launches"])]
    medians = timed.pivot_table(
        index=["quantity", "x", "unit"], columns="variant", values="value", aggfunc="median"
    ).reset_index()
    rows = []
    for _, row in medians.iterrows():
        what = f"{row['quantity']}, batch {row['x']}, ms"
        if row["unit"] == "launches":
            what = "launches per layer and decode step, batch 32"
        stock, patched = row["stock"], row["patched"]
        rows.append([what, f"{stock:.2f}", f"{patched:.2f}", f"{patched / stock:.3f}"])
    model, layers = frame.iloc[0]["model"], frame.iloc[0]["layers"]
    rounds = frame["round"].nunique()
    table = markdown(["", "stock", "patched", "ratio"], rows)
    return (
        f"{table}\n\n{model} geometry, {layers} layers, random weights, CUDA graphs on, medians of "
        f"{rounds} alternating rounds of one run: {origin(frame)}."
    )


def equality() -> str:
    """Greedy tokens and logprobs of whole engines, bit by bit."""
    rows = []
    for name, label in (
        ("router-engine.csv", "CUDA graphs on"),
        ("router-engine-nographs.csv", "CUDA graphs off"),
    ):
        frame = pd.read_csv(RESULTS / name)
        counts = frame[frame["unit"] == "count"].set_index(["variant", "quantity"])["value"]
        for pair in ("stock vs patched", "stock vs stock again"):
            rows.append(
                [
                    f"{label}, {frame.iloc[0]['layers']} layers",
                    pair,
                    f"{counts[pair, 'token_diffs']:.0f} of {counts[pair, 'tokens']:,.0f}",
                    f"{counts[pair, 'logprob_diffs']:.0f} of {counts[pair, 'logprobs']:,.0f}",
                ]
            )
    frame = pd.read_csv(RESULTS / "router-engine.csv")
    table = markdown(["engine", "compared", "tokens differing", "logprobs differing"], rows)
    return f"{table}\n\n64 prompts of 4 to 700 tokens, 64 greedy tokens each: {origin(frame)}."


def exact() -> str:
    """The kernel against stock's own closure, a row per GPU."""
    # keep_default_na: one kind is called nan
    frames = [
        pd.read_csv(path, keep_default_na=False)
        for path in sorted(RESULTS.glob("router-exact*.csv"))
    ]
    frame = pd.concat(frames)
    frame["kind"] = frame["kind"].where(~frame["kind"].str.startswith("random"), "random")
    adversarial = ", ".join(kind for kind in frame["kind"].unique() if kind != "random")
    frame["kind"] = frame["kind"].where(frame["kind"] == "random", "adversarial")
    keys = ["gpu", "dtype", "kind"]
    sums = frame.groupby(keys)[["rows", "rows_differing"]].sum().reset_index()
    rows = [
        [row["gpu"], row["dtype"], row["kind"], f"{row['rows']:,}", f"{row['rows_differing']:,}"]
        for _, row in sums.iterrows()
    ]
    table = markdown(["GPU", "logits", "rows", "compared", "differing in any bit"], rows)
    experts = ", ".join(map(str, sorted(frame["experts"].unique())))
    topk = ", ".join(map(str, sorted(frame["topk"].unique())))
    return f"{table}\n\nE in {experts}; K in {topk}; adversarial: {adversarial}. {sources(frames)}."


def kernels() -> str:
    """GPU time of one call, columns per GPU."""
    frames = [pd.read_csv(path) for path in sorted(RESULTS.glob("router-kernels*.csv"))]
    frames = [frame[frame["case"] == "bfloat16"].set_index("tokens") for frame in frames]
    header, rows = ["tokens"], [[str(tokens)] for tokens in frames[0].index]
    for frame in frames:
        header += [f"{short(frame.iloc[0]['gpu'])}: stock, us", "fused, us", "ratio"]
        for line, (_, row) in zip(rows, frame.iterrows(), strict=True):
            line += [
                f"{row['stock_us']:.1f} ({row['stock_launches']} launches)",
                f"{row['fused_us']:.1f} ({row['fused_launches']})",
                f"{row['fused_us'] / row['stock_us']:.2f}",
            ]
    return (
        f"{markdown(header, rows)}\n\n128 experts, top-8, bf16, kernel time by profiler. "
        f"{sources(frames)}."
    )


def engine_runs() -> list[pd.DataFrame]:
    """The newest run of each file of whole engines with the decode patches, the newest SGLang first."""
    frames = [
        newest_rows(pd.read_csv(path)).assign(graphs="nographs" not in path.name)
        for path in sorted(RESULTS.glob("decode-*-engine.csv"))
    ]
    return sorted(frames, key=lambda frame: Version(str(frame.iloc[0]["sglang"])), reverse=True)


def headline() -> str | None:
    """A row per SGLang, model and GPU: its newest run of every batch with patches of any numerics."""
    found: dict[tuple[str, str, int, str], pd.DataFrame] = {}
    for frame in sorted(engine_runs(), key=lambda frame: frame.iloc[0]["timestamp"]):
        first = frame.iloc[0]
        names = first["patches"].split("+")
        steps = set(frame[frame["quantity"] == "decode step"]["x"])
        timed = first.get("tp", 1) <= 1 and set(BATCHES) <= steps
        if timed and (names == ["all"] or not_bitwise(names)):
            found[first["sglang"], first["model"], first["layers"], first["gpu"]] = frame
    if not found:
        return None
    rows = []
    every = sorted(found.items(), key=lambda item: item[0][1:])
    for _, frame in sorted(every, key=lambda item: Version(str(item[0][0])), reverse=True):
        table = medians(frame[frame["unit"] == "ms"])
        first = frame.iloc[0]
        times = sorted(prefill_times(table), reverse=True) or [(0, "-")]
        # Rows are read side by side: the batches that all of them have.
        prefill = next((text for text in times if f" x {PREFILL}:" in text[1]), times[0])[1]
        rows.append([str(first["sglang"]), *engine_name(first), *step_times(table), prefill])
    header = [
        "SGLang",
        "model",
        "GPU",
        *(f"decode step, batch {size}, ms" for size in BATCHES),
        "prefill, ms",
    ]
    return (
        f"{markdown(header, rows)}\n\nStock SGLang -> patched (ratio), whole engine, random weights, "
        f"CUDA graphs on. {origins(pd.concat(list(found.values())))}."
    )


def decode_engine() -> str | None:
    """Whole engines with the decode patches, a row per measurement; None if there is none."""
    frames = engine_runs()
    rows = [engine_row(frame) for frame in frames]
    if not rows:
        return None
    header = ["SGLang", "model", "GPU", "patches"]
    header += [f"decode, batch {size}, ms" for size in BATCHES]
    header += ["launches per layer", "prefill, ms", "tokens differing", "logprobs differing"]
    table = markdown([*header, "KL divergence, nats", "rounds"], rows)
    return (
        f"{table}\n\nStock -> patched (ratio), medians of alternating rounds of one run each; "
        "random weights; tokens and logprobs of stock against patched. KL divergence of the next-token "
        "distributions of 12 prompts of up to 6000 tokens, stock against patched; in brackets stock "
        "against itself with other batches or chunks. "
        f"{origins(pd.concat(frames))}."
    )


def engine_name(first: pd.Series) -> tuple[str, str]:
    """Model and GPUs of a run of ``bench/engine.py``, from any of its rows."""
    model, gpu = first["model"], short(first["gpu"])
    if first["layers"] != GEOMETRIES[model].layers:
        model += f", {first['layers']} layers"
    if first.get("tp", 1) > 1:
        gpu = f"{first['tp']} x {gpu}"
    return model, gpu


def step_times(table: pd.DataFrame) -> list[str]:
    """A decode step of every batch, of such a run's medians; "-" for what it lacks."""
    steps = [("decode step", size) for size in BATCHES]
    return [
        change(*table.loc[step][["stock", "patched"]], digits=2) if step in table.index else "-"
        for step in steps
    ]


def prefill_times(table: pd.DataFrame) -> list[tuple[int, str]]:
    """Its prefills: how many tokens, and the cell."""
    found = []
    for (quantity, size), row in table.iterrows():
        if quantity.startswith("prefill"):
            length = int(quantity.split()[2])  # prefill of LENGTH and so many tokens
            told = f"{size} x {length}: {change(row['stock'], row['patched'], digits=0)}"
            found.append((size * length, told))
    return found


def engine_row(frame: pd.DataFrame) -> list[str]:
    """One run of ``bench/engine.py``; "-" where it did not measure something."""
    timed = frame[frame["unit"].isin(["ms", "launches"])]
    table = medians(timed)
    counts = frame[frame["variant"] == "stock vs patched"].set_index("quantity")["value"]
    first = frame.iloc[0]
    launches = "-"
    if ("launches per layer", first["layers"]) in table.index:
        row = table.loc["launches per layer", first["layers"]]
        launches = f"{row['stock']:.1f} -> {row['patched']:.1f}"
    far = frame[frame["quantity"] == "KL divergence"].set_index("variant")["value"]
    divergence = "-"
    if "stock vs patched" in far:
        own = [f"{value:.1e}" for name, value in far.items() if name != "stock vs patched"]
        divergence = f"{far['stock vs patched']:.1e} ({', '.join(own)})"
    model, gpu = engine_name(first)
    if "norms" in frame:  # older runs do not say which RMSNorm stock had
        gpu += f", {first['norms']} norms"
    return [
        str(first["sglang"]),
        model,
        gpu,
        chosen(first["patches"]) + ("" if first["graphs"] else "; graphs off"),
        *step_times(table),
        launches,
        ", ".join(told for _, told in prefill_times(table)) or "-",
        differing(counts, "token"),
        differing(counts, "logprob"),
        divergence,
        str(timed["round"].nunique()),
    ]


def decode_kernels() -> str | None:
    """Each patch's newest run in the newest CSV; None if there is none."""
    frames = [pd.read_csv(path) for path in RESULTS.glob("decode-kernels-*.csv")]
    if not frames:
        return None
    frame = max(frames, key=lambda frame: frame["timestamp"].max())
    copies = frame[frame["kernel"] == "copy"].set_index("timestamp")["gb_per_s"]
    frame = frame[frame["kernel"] != "copy"]
    frame = newest_rows(frame, "kernel")
    frame = frame[frame["tokens"].isin(KERNEL_ROWS)]
    rows = [
        [
            f"`{row['kernel']}`",
            f"{row['case']}, {row['tokens']:.0f}",
            f"{row['stock_launches']:.0f} -> {row['fused_launches']:.0f}",
            change(row["stock_us"], row["fused_us"], digits=1),
            decimal(row["bytes"]),
            f"{row['gb_per_s'] / copies[row['timestamp']]:.1%}",
        ]
        for _, row in frame.iterrows()
    ]
    header = ["patch", "model, rows", "launches", "us", "bytes moved", "of the copy bandwidth"]
    speeds = ", ".join(f"{copies[timestamp]:,.0f}" for timestamp in frame["timestamp"].unique())
    return (
        f"{markdown(header, rows)}\n\nStock -> ours (ratio), kernel time by profiler. Bytes: every "
        "operand of ours read once, every result written once. Operands that fit into the L2 cache "
        f"stay there from call to call. Copy of 1 GiB: {speeds} GB/s read and written. Stock's norms: "
        f"{', '.join(frame['norms'].unique())}. {origins(frame)}."
    )


def newest(pattern: str, *each: str) -> list[tuple[str, pd.DataFrame]]:
    """Each GPU's name and its newest run among these CSV files; of ``each``, if given, its newest."""
    frames = [pd.read_csv(path) for path in RESULTS.glob(pattern)]
    if not frames:
        return []
    return [
        (short(str(gpu)), newest_rows(rows, *each))
        for gpu, rows in pd.concat(frames, ignore_index=True).groupby("gpu")
    ]


def across(runs: list[tuple[str, pd.DataFrame]], *columns: str) -> list[tuple[Any, ...]]:
    """What any of the runs has in these columns, in the order of the longest run."""
    frames = sorted((run for _, run in runs), key=len, reverse=True)
    keys = pd.concat(frames)[list(columns)].drop_duplicates()
    return list(keys.itertuples(index=False, name=None))


def extend_attention() -> str | None:
    """Stock's kernel and ours, a row per shape, columns per GPU."""
    runs = newest("extend-attention-*.csv", "shape")
    if not runs:
        return None
    header, rows = ["shape"], {shape: [shape] for (shape,) in across(runs, "shape")}
    for gpu, run in runs:
        header += [f"{gpu}: us", "TFLOP/s"]
        points = run.set_index("shape")
        for shape, line in rows.items():
            if shape in points.index:
                stock, ours, rate = points.loc[shape, ["stock_us", "ours_us", "ours_tflops"]]
                line += [change(stock, ours, digits=0), f"{rate:.0f}"]
            else:
                line += ["-", "-"]
    return (
        f"{markdown(header, list(rows.values()))}\n\nStock -> ours (ratio), `python bench/attention.py`, "
        "where the shapes are. The cached prefix lies in random order; L2 cache emptied before each "
        f"call. {sources(run for _, run in runs)}."
    )


def decode_attention() -> str | None:
    """Stock's two kernels and ours, a row per kind of layer, batch and GPU, a column per length."""
    keys = ["shape", "batch", "length"]
    runs = newest("decode-attention-*.csv", *keys)
    if not runs:
        return None
    times = [(gpu, run.set_index(keys)[["stock_us", "us"]]) for gpu, run in runs]
    lengths = sorted(length for (length,) in across(runs, "length"))
    rows = []
    for layer in across(runs, "shape", "batch"):
        for gpu, us in times:
            points = [(*layer, length) for length in lengths]
            told = [change(*us.loc[one], digits=1) if one in us.index else "-" for one in points]
            if set(told) != {"-"}:
                rows.append([*map(str, layer), gpu, *told])
    header = ["layer", "batch", "GPU", *(f"{length} tokens, us" for length in lengths)]
    return (
        f"{markdown(header, rows)}\n\nStock -> ours (ratio), in a CUDA graph, keys and values outside "
        "the L2 cache: `python bench/decode_attention.py`. "
        f"{sources(run for _, run in runs)}."
    )


def moe() -> str | None:
    """Both projections with stock's blocks and with the tuned ones, a row per number of tokens."""
    runs = newest("moe-*.csv")
    if not runs:
        return None
    header = ["tokens"]
    rows = {tokens: [str(tokens)] for (tokens,) in sorted(across(runs, "tokens"))}
    for gpu, run in runs:
        widths = sorted(run["width"].unique(), reverse=True)
        names = [f"N = {width}, us" for width in widths]
        header += [f"{gpu}: {names[0]}", *names[1:]]
        stock, ours = (
            run[run[name] == 1].groupby(["tokens", "width"])["us"].sum()
            for name in ("stock", "chosen")
        )
        for tokens, line in rows.items():
            for point in ((tokens, width) for width in widths):
                line.append(
                    change(stock[point], ours[point], digits=0) if point in ours.index else "-"
                )
    return (
        f"{markdown(header, list(rows.values()))}\n\nStock -> tuned (ratio), up and down projection of "
        "128 experts, top-8, half of the routings near uniform, half skewed: "
        f"`python bench/tune_moe.py`. {sources(run for _, run in runs)}."
    )


TABLES: dict[str, Callable[[], str | None]] = {
    "headline": headline,
    "engine": engine,
    "decode-engine": decode_engine,
    "equality": equality,
    "exact": exact,
    "kernels": kernels,
    "decode-kernels": decode_kernels,
    "extend-attention": extend_attention,
    "decode-attention": decode_attention,
    "moe": moe,
    "yoco": lambda: tables_engines.yoco(RESULTS),
    "vision": lambda: tables_engines.vision(RESULTS),
    "images": lambda: tables_engines.images(RESULTS),
    "serving": lambda: tables_engines.serving(RESULTS),
    "short": lambda: tables_engines.short_prompts(RESULTS),
    "pools": lambda: tables_engines.pools(RESULTS),
    "divergence": lambda: tables_engines.divergence(RESULTS),
    "divergence-ratios": lambda: tables_engines.divergence_ratios(RESULTS),
    "mtp": lambda: tables_engines.mtp(RESULTS),
    "quality-line": lambda: tables_quality.headline(RESULTS),
    "quality": lambda: tables_quality.quality(RESULTS),
    "quality-quantised": lambda: tables_quality.quality(RESULTS, quantised=True),
    "quality-calls": lambda: tables_quality.calls(RESULTS),
    "quality-times": lambda: tables_quality.step_times(RESULTS),
    "quality-mtp": lambda: tables_quality.speculation(RESULTS),
    "quality-mtp-times": lambda: tables_quality.speculation_times(RESULTS),
    "peers": lambda: tables_peers.peers(RESULTS),
    "peers-plot": lambda: tables_peers.plot(RESULTS),
    "releases": lambda: tables_catalogue.releases(RESULTS),
    "release-defects": lambda: tables_catalogue.release_defects(RESULTS),
    "release-counts": lambda: tables_catalogue.counts(RESULTS),
    "patches": tables_catalogue.patches,
    "defects": tables_catalogue.defects,
    "patches-defects": tables_catalogue.defects_here,
    "families": tables_catalogue.families,
    **{
        f"patches-{page}": functools.partial(tables_catalogue.family, page)
        for page in tables_catalogue.FAMILIES
    },
}


def pages(root: Path = ROOT) -> list[Path]:
    """README and every page of the documentation."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def render(texts: Iterable[str]) -> list[str]:
    """The pages with every table between its markers made anew.

    A table may be on several pages and is on one at least; nothing is written where nothing is
    measured. A marker without a table, or a table without a marker, ends the program.
    """
    made: dict[str, str] = {}

    def between(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise SystemExit(f"bench/tables.py: a page has a marker for the unknown table {name!r}")
        if name not in made:
            table = TABLES[name]()
            # The empty lines end the comments, which are HTML to Markdown.
            made[name] = "" if table is None else f"\n{table}\n\n"
        return found[1] + made[name] + found[3]

    after = [MARKED.sub(between, text) for text in texts]
    lacking = TABLES.keys() - made
    if lacking:
        raise SystemExit(f"bench/tables.py: no page has a marker for {', '.join(sorted(lacking))}")
    return after


def main(check: Annotated[bool, typer.Option(help="Only compare")] = False) -> None:
    """Write the tables, or compare them."""
    paths = pages()
    before = [path.read_text(encoding="utf-8") for path in paths]
    changed = [
        (path, after)
        for path, text, after in zip(paths, before, render(before), strict=True)
        if text != after
    ]
    for path, after in changed:
        if check:
            print(f"{path.relative_to(ROOT)} is out of date: make tables")
        else:
            path.write_text(after, encoding="utf-8")
    sys.exit(check and bool(changed))


if __name__ == "__main__":
    typer.run(main)
