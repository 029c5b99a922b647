"""README's tables, written between its markers from the CSV files in ``bench/results``.

python bench/tables.py            # rewrite README.md
python bench/tables.py --check    # exit 1 if README.md differs
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(frame: pd.DataFrame) -> str:
    """Device and versions of a run, which must be one."""
    first = frame.iloc[0]
    return (
        f"{first['gpu']}, SGLang {first['sglang']}, torch {first['torch']}, "
        f"Triton {first['triton']}, {first['timestamp'][:10]}"
    )


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
    runs = "; ".join(origin(one) for one in frames)
    return f"{table}\n\nE in {experts}; K in {topk}; adversarial: {adversarial}. {runs}."


def kernels() -> str:
    """GPU time of one call, columns per GPU."""
    frames = [pd.read_csv(path) for path in sorted(RESULTS.glob("router-kernels*.csv"))]
    frames = [frame[frame["case"] == "bfloat16"].set_index("tokens") for frame in frames]
    header, rows = ["tokens"], [[str(tokens)] for tokens in frames[0].index]
    for frame in frames:
        name = str(frame.iloc[0]["gpu"]).removeprefix("NVIDIA ").split()[0]
        header += [f"{name}: stock, us", "fused, us", "ratio"]
        for line, (_, row) in zip(rows, frame.iterrows(), strict=True):
            line += [
                f"{row['stock_us']:.1f} ({row['stock_launches']} launches)",
                f"{row['fused_us']:.1f} ({row['fused_launches']})",
                f"{row['fused_us'] / row['stock_us']:.2f}",
            ]
    runs = "; ".join(origin(frame) for frame in frames)
    return f"{markdown(header, rows)}\n\n128 experts, top-8, bf16, kernel time by profiler. {runs}."


TABLES = {"engine": engine, "equality": equality, "exact": exact, "kernels": kernels}


def render(text: str) -> str:
    """``text`` with every table between its markers made anew."""
    for name, make in TABLES.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise SystemExit(f"bench/tables.py: README.md has no marker for the table {name!r}")
        table = make()
        text = marked.sub(lambda found, table=table: found[1] + table + "\n" + found[2], text)
    return text


def main(check: Annotated[bool, typer.Option(help="Only compare")] = False) -> None:
    """Write the tables, or compare them."""
    before = README.read_text()
    after = render(before)
    if check:
        sys.exit(before != after)
    README.write_text(after)


if __name__ == "__main__":
    typer.run(main)
