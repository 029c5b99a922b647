"""Kernels alone: each patch's, attention, the experts' blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from bench.rendering.text import change, decimal, markdown, newest_rows, origins, short, sources

KERNEL_ROWS = (1, 32, 4096)


def decode_kernels(results: Path) -> str | None:
    """Each patch's newest run in the newest CSV; None if there is none."""
    frames = [pd.read_csv(path) for path in results.glob("decode-kernels-*.csv")]
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


def newest(results: Path, pattern: str, *each: str) -> list[tuple[str, pd.DataFrame]]:
    """Each GPU's name and its newest run among these CSV files; of ``each``, if given, its newest."""
    frames = [pd.read_csv(path) for path in results.glob(pattern)]
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


def extend_attention(results: Path) -> str | None:
    """Stock's kernel and ours, a row per shape, columns per GPU."""
    runs = newest(results, "extend-attention-*.csv", "shape")
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


def decode_attention(results: Path) -> str | None:
    """Stock's two kernels and ours, a row per kind of layer, batch and GPU, a column per length."""
    keys = ["shape", "batch", "length"]
    runs = newest(results, "decode-attention-*.csv", *keys)
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


def moe(results: Path) -> str | None:
    """Both projections with stock's blocks and with the tuned ones, a row per number of tokens."""
    runs = newest(results, "moe-*.csv")
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
