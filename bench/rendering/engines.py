"""Tables of whole engines doing one thing: long prompts, pictures, full pools, speculation.

Each function takes the folder with the CSV files, and returns None where nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from bench.rendering.text import (
    change,
    chosen,
    differing,
    markdown,
    medians,
    newest_rows,
    origins,
    short,
    weights,
)

KEYS = ["sglang", "model", "layers", "patches"]
SERVED = (
    "output throughput",
    "time to first token, median",
    "time to first token, 99th percentile",
    "whole request, median",
    "time per output token, median",
)


def read(path: Path) -> pd.DataFrame | None:
    """A CSV file, if there is one, without rows of quantised weights."""
    if not path.exists():
        return None
    rows = pd.read_csv(path)
    return rows[weights(rows) == "none"]


def runs(frame: pd.DataFrame, *more: str) -> Iterator[tuple[list[str], pd.DataFrame]]:
    """SGLang, model, patches and rows of each run, the newest one of a kind."""
    for _, run in frame.groupby([*KEYS, *more], sort=False):
        newest = newest_rows(run)
        yield named(newest), newest


def named(run: pd.DataFrame) -> list[str]:
    """SGLang, model and patches of a run."""
    first = run.iloc[0]
    model = f"{first['model']}, {first['layers']} layers"
    return [str(first["sglang"]), model, chosen(first["patches"])]


def yoco(results: Path) -> str | None:
    """Long prompts and a few tokens, stock and patched."""
    frame = read(results / "yoco-engine.csv")
    if frame is None:
        return None
    rows = []
    for names, run in runs(frame):
        table = medians(run)
        (timed,) = [key for key in table.index if key[0].startswith("prefill of")]
        what = timed[0].removeprefix("prefill of ")
        far = run[run["quantity"] == "KL divergence"].set_index("variant")["value"]
        counts = run[run["variant"] == "stock vs patched"].set_index("quantity")["value"]
        own = far.drop("stock vs patched", errors="ignore")
        rows.append(
            [
                *names,
                f"{timed[1]} x {what}: {change(*table.loc[timed, ['stock', 'patched']], digits=0)}",
                differing(counts, "token"),
                f"{far['stock vs patched']:.1e} ({own.iloc[0]:.1e})" if len(own) else "-",
            ]
        )
    header = ["SGLang", "model", "patches", "ms", "tokens differing", "KL divergence, nats"]
    return (
        f"{markdown(header, rows)}\n\nStock -> patched (ratio), random weights: `python bench/engine.py "
        "--prefill 30x7000+10 --unit-norms --no-prompt-logprobs`, with the KL divergence of the first token "
        "of 12 prompts, in brackets stock against itself, one prompt at a time; `--prefill 4x4096`. "
        f"{origins(frame)}."
    )


PIECEWISE = {"stock": "as in stock", "patched": "in the patched engine", "neither": "none"}


def short_prompts(results: Path) -> str | None:
    """Prefill of a few tokens, where the host may be slower than the GPU."""
    frame = read(results / "short-engine.csv")
    if frame is None:
        return None
    measured = [
        (names, run, medians(run)[["stock", "patched"]])
        for names, run in runs(frame, "piecewise", "gpu")
    ]
    shapes = sorted(
        {(int(q.split()[-1]), x) for _, _, table in measured for q, x in table.index},
    )
    rows = []
    for names, run, table in measured:
        cells = [
            change(*table.loc[key], digits=1)
            if (key := (f"prefill of {length}", count)) in table.index
            else "-"
            for length, count in shapes
        ]
        first = run.iloc[0]
        rows.append([*names, PIECEWISE[first["piecewise"]], short(first["gpu"]), *cells])
    header = ["SGLang", "model", "patches", "piecewise graphs", "GPU"]
    header += [f"{count} x {length}, ms" for length, count in shapes]
    return (
        f"{markdown(header, rows)}\n\nStock -> patched (ratio), random weights, from the request to the "
        "first token: `python bench/engine.py --piecewise patched --batches '' --prefill "
        f"{','.join(f'{count}x{length}' for length, count in shapes)}`. {origins(frame)}."
    )


def vision(results: Path) -> str | None:
    """The vision encoder alone, a row per variant."""
    frame = read(results / "vision-h200.csv")
    if frame is None:
        return None
    rows = []
    for per_call, run in frame.groupby("per_call", sort=False):
        table = run.groupby("variant", sort=False)[["ms", "peak_mib", "distance"]].median()
        inactive = run.groupby("variant")["inactive"].first().fillna("")
        calls = run.iloc[0]["images"] / per_call
        rows += [
            [
                str(per_call),
                label(str(variant), inactive[variant]),
                change(table.loc["stock", "ms"] / calls, row["ms"] / calls, digits=1),
                f"{row['peak_mib']:.0f}",
                f"{row['distance']:.1e}",
            ]
            for variant, row in table.iterrows()
        ]
    first = frame.iloc[0]
    header = ["images a call", "patches", "ms a call", "peak, MiB", "largest distance from stock"]
    return (
        f"{markdown(header, rows)}\n\nEncoder and projection, images of {first['patches']} patches, "
        f"attention by {first['attention']}: `python bench/vision.py`. Stock -> patched (ratio). "
        f"{origins(frame)}."
    )


def label(variant: str, inactive: str) -> str:
    """Name of a variant, and what of it ran stock's code."""
    name = variant if variant in ("stock", "all") else f"`{variant}`"
    return f"{name}, with stock's code for `{inactive}`" if inactive else name


def images(results: Path) -> str | None:
    """Prompts with pictures through the real server."""
    frame = read(results / "images.csv")
    if frame is None:
        return None
    rows = []
    for names, run in runs(frame):
        table = medians(run[run["unit"] == "ms"])
        counts = run[run["variant"] == "stock vs patched"].set_index("quantity")["value"]
        times = [
            change(*table.loc[key, ["stock", "patched"]], digits=0) if key in table.index else "-"
            for key in (("first token, alone", 1), ("first token, median", 16), ("all prompts", 16))
        ]
        rows.append([*names, *times, differing(counts, "logprob")])
    header = [
        "SGLang",
        "model",
        "patches",
        "first token alone, ms",
        "median of 16, ms",
        "all 16, ms",
    ]
    return (
        f"{markdown([*header, 'logprobs differing'], rows)}\n\n16 prompts with 6 images of 480 pixels "
        "each, over HTTP: `python bench/images.py`. Stock -> patched (ratio), the processor's time on "
        "the CPU included; no times where other servers were starting on the same GPU. "
        f"{origins(frame)}."
    )


def serving(results: Path) -> str | None:
    """The real server under `sglang.bench_serving`."""
    frame = read(results / "serving.csv")
    if frame is None:
        return None
    rows, shown = [], []
    for names, run in runs(frame, "gpu"):
        shown.append(run)
        table = medians(run).droplevel("x")[["stock", "patched"]]
        cells = [change(*table.loc[quantity], digits=0) for quantity in SERVED[:-1]]
        rounds = run.groupby("variant")["round"].nunique()[["stock", "patched"]]
        rows.append([
            *names, short(run.iloc[0]["gpu"]), " / ".join(map(str, rounds)),
            *cells, change(*table.loc[SERVED[-1]], digits=1),
        ])  # fmt: skip
    header = [
        "SGLang",
        "model",
        "patches",
        "GPU",
        "rounds",
        "output, tokens/s",
        "first token, median, ms",
    ]
    header += ["99th percentile, ms", "whole request, median, ms", "time per token, median, ms"]
    return (
        f"{markdown(header, rows)}\n\nThe real server, 80 prompts of 1024 tokens and 256 new ones, 8 "
        "requests a second, at most 64 at once (`sglang.bench_serving`): "
        "`python bench/serving.py --gpus 0,1`. Stock -> patched (ratio), a server on each of two GPUs, rounds in turn, medians of so many. "
        f"{origins(pd.concat(shown))}."
    )


CHUNKS = "stock vs stock, chunks of "
ALONE = "stock vs stock, one at a time"
PATCHED = "stock vs patched"
DIVERGENCES = ("KL divergence", "KL divergence, decode")


def distances(results: Path) -> list[tuple[list[str], pd.Series]]:
    """SGLang, model and patches of each run, and its distances by pair and quantity."""
    frame = read(results / "divergence.csv")
    if frame is None:
        return []
    # Fewer chunks in one run, more in the next: of each distance, the newest.
    newest = [
        newest_rows(kind, "variant", "quantity") for _, kind in frame.groupby(KEYS, sort=False)
    ]
    return [(named(run), run.set_index(["variant", "quantity"])["value"]) for run in newest]


def divergence(results: Path) -> str | None:
    """Distances of next-token distributions: stock from itself, from patched, from fp32 attention."""
    found = distances(results)
    if not found:
        return None
    rows = []
    for names, value in found:

        def far(pair: str, value: pd.Series = value) -> str:
            told = []
            for name in DIVERGENCES:
                if (pair, name) not in value.index:
                    return "-"
                error = value.get((pair, f"{name}, standard error"))
                more = "" if error is None else f" ± {error * 1e5:.2f}"
                told.append(f"{value[(pair, name)] * 1e5:.2f}{more}")
            return "; ".join(told)

        cut = [
            f"{pair.removeprefix(CHUNKS)}: {far(pair)}"
            for pair in value.index.unique("variant")
            if pair.startswith(CHUNKS)
        ]
        exact = "stock, attention in fp32"
        rows.append([
            *names, far(PATCHED), far(ALONE),
            ", ".join(cut) or "-", far(f"{exact} vs stock"), far(f"{exact} vs patched"),
        ])  # fmt: skip
    header = ["SGLang", "model", "patches", "patched", "stock, one prompt at a time"]
    header += ["stock, chunks of so many tokens", "attention in fp32 from stock", "from patched"]
    frame = pd.read_csv(results / "divergence.csv")
    return (
        f"{markdown(header, rows)}\n\nKL divergence of next-token distributions, 1e-5 nats, the end of "
        "the prompt; decoding. From stock but for the last two columns; with standard errors where "
        "they were taken. `python bench/engine.py --unit-norms --kl 32 --kl-new 12 --kl-chunk 128 "
        f"--kl-exact`: random weights, norms around one, prompts of 16 to 6000 tokens. {origins(frame)}."
    )


def divergence_ratios(results: Path) -> str | None:
    """Patched's distance from stock over stock's own with other batches, and with other chunks."""
    found = distances(results)
    if not found:
        return None
    rows = []
    for names, value in found:
        cuts = [pair for pair in value.index.unique("variant") if pair.startswith(CHUNKS)]
        smallest = min(cuts, key=lambda pair: int(pair.removeprefix(CHUNKS)), default=None)
        cells = [
            f"{value[(PATCHED, name)] / value[(pair, name)]:.2f}"
            if pair is not None and {(PATCHED, name), (pair, name)} <= set(value.index)
            else "-"
            for pair in (ALONE, smallest)
            for name in DIVERGENCES
        ]
        rows.append([*names, *cells[:2], (smallest or "-").removeprefix(CHUNKS), *cells[2:]])
    header = ["SGLang", "model", "patches", "over stock one at a time, prompt", "decoding"]
    header += ["smallest chunks", "over stock in such chunks, prompt", "decoding"]
    frame = pd.read_csv(results / "divergence.csv")
    return (
        f"{markdown(header, rows)}\n\nKL divergence of patched from stock, divided by that of stock "
        f"from itself: ratios of the values in the table below. {origins(frame)}."
    )


def pools(results: Path) -> str | None:
    """Sizes of the KV pools, and what comes out when they are full."""
    frame = read(results / "pools.csv")
    if frame is None:
        return None
    rows = []
    for names, run in runs(frame):
        table = medians(run)

        def pair(quantity: str, size: int, table: pd.DataFrame = table) -> pd.Series:
            return table.loc[(quantity, size), ["stock", "patched"]]

        def sums(name: str, run: pd.DataFrame = run) -> str:
            each = []
            for variant in ("stock", "patched"):
                own = run[run["variant"] == f"{variant} vs stock, one at a time"]
                each.append(f"{own[own['quantity'] == name]['value'].sum():,.0f}")
            return " -> ".join(each)

        requests = int(run[run["quantity"] == "soak"]["x"].iloc[0])
        total = run[(run["quantity"] == "tokens") & run["variant"].str.startswith("patched")]
        cells = [
            change(*pair(f"pool of {kind} layers", 1), digits=0) for kind in ("full", "sliding")
        ]
        for kind in ("full", "sliding"):
            cells.append("{:.2f} -> {:.2f}".format(*pair(f"pool of {kind} layers, fullest", 1)))
        cells.append("{:.0f} -> {:.0f}".format(*pair("times requests were retracted", 1)))
        cells.append(change(*pair("soak", requests), digits=0))
        cells.append(f"{sums('common')} of {total['value'].sum():,.0f}")
        rows.append([*names, *cells])
    header = [
        "SGLang",
        "model",
        "patch",
        "tokens, full layers",
        "tokens, sliding",
        "fullest, full",
        "sliding",
    ]
    header += ["retractions logged", "96 requests, ms", "tokens as alone"]
    return (
        f"{markdown(header, rows)}\n\nStock -> patched (ratio), 3 GiB for KV, twice 96 prompts of 2000 to "
        "7000 tokens, 12 of them aborted: `python bench/pools.py`. Tokens as alone: those before the "
        "first that differs from stock with that prompt alone, of 24 requests a run; batches alone make "
        f"stock differ too. {origins(frame)}."
    )


def mtp(results: Path) -> str | None:
    """Speculation, stock and patched."""
    frame = read(results / "mtp-engine.csv")
    if frame is None:
        return None
    rows = []
    # Older rows do not have all of these, and a missing value is in no group.
    frame = frame.assign(
        **{
            name: frame[name].fillna(usual) if name in frame else usual
            for name, usual in USUAL.items()
        }
    )
    for names, run in runs(frame, "weights", *USUAL):
        table = medians(run)
        cells = []
        for size in (1, 8):
            times = table.reindex([("step", size)])[["stock", "patched"]].iloc[0]
            cells.append(change(*times, digits=2) if times.notna().all() else "-")
        for how in ("alone", "in batches of 8"):
            pair = run[run["variant"] == f"stock {how} vs patched {how}"]
            cells.append(differing(pair.set_index("quantity")["value"], "token"))
        lengths = table.xs("accept length, alone", level="quantity").iloc[0]
        known = [f"{lengths.get(v):.3f}" for v in ("stock", "patched") if lengths.notna().get(v)]
        parts = "-"
        if ("verify: GPU", 1) in table.index:
            parts = "; ".join(
                " + ".join(f"{table.loc[(f'{part}: GPU', size), 'stock']:.2f}" for part in PARTS)
                for size in (1, 8)
            )
        died = run[run["quantity"] == "stress: died"].set_index("variant")["value"]
        fates = [f"{v}: {'died' if died[v] else 'all answered'}" for v in died.index]
        cells += [", ".join(known), ", ".join(fates) or "-", parts]
        rows.append([*names, given(run.iloc[0]), *cells])
    header = ["SGLang", "target", "patches", "weights", "a step, batch 1, ms", "batch 8, ms"]
    header += [
        "tokens differing, alone",
        "in batches of 8",
        "accept length",
        "500 requests at once",
        "stock on the GPU: draft, verification, seed, ms",
    ]
    return (
        f"{markdown(header, rows)}\n\nStock's speculation -> patched (ratio), 3 steps, 4 draft tokens: "
        f"`python bench/mtp.py`. {origins(frame)}."
    )


PARTS = ("draft", "verify", "seed")
USUAL = {"kv": "auto", "kv_scales": "", "prefill_graphs": False}
"""How speculation runs, unless a row says otherwise."""


def given(first: pd.Series) -> str:
    """The weights of a run, and what else is not as in the others."""
    told = [str(first["weights"])]
    if first["kv"] != "auto":
        scales = f", scales {first['kv_scales']}" if first["kv_scales"] else ""
        told.append(f"`{first['kv']}` KV cache{scales}")
    if first["prefill_graphs"]:
        told.append("CUDA graphs of prefill")
    return "; ".join(told)
