"""The router: whole engine, equality, the kernel's bits and times."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench.rendering.text import markdown, origin, short, sources


def engine(results: Path) -> str:
    """Whole engine: medians of the rounds, stock and patched, and their ratio."""
    frame = pd.read_csv(results / "router-engine.csv")
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


def equality(results: Path) -> str:
    """Greedy tokens and logprobs of whole engines, bit by bit."""
    rows = []
    for name, label in (
        ("router-engine.csv", "CUDA graphs on"),
        ("router-engine-nographs.csv", "CUDA graphs off"),
    ):
        frame = pd.read_csv(results / name)
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
    frame = pd.read_csv(results / "router-engine.csv")
    table = markdown(["engine", "compared", "tokens differing", "logprobs differing"], rows)
    return f"{table}\n\n64 prompts of 4 to 700 tokens, 64 greedy tokens each: {origin(frame)}."


def exact(results: Path) -> str:
    """The kernel against stock's own closure, a row per GPU."""
    # keep_default_na: one kind is called nan
    frames = [
        pd.read_csv(path, keep_default_na=False)
        for path in sorted(results.glob("router-exact*.csv"))
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


def kernels(results: Path) -> str:
    """GPU time of one call, columns per GPU."""
    frames = [pd.read_csv(path) for path in sorted(results.glob("router-kernels*.csv"))]
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
