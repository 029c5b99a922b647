"""Whole engines with the decode patches: steps, prefill, equality."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from packaging.version import Version

from bench.rendering.text import (
    change,
    chosen,
    differing,
    markdown,
    medians,
    newest_rows,
    not_bitwise,
    origins,
    short,
    weights,
)
from gemma4_turbo.models.geometry import GEOMETRIES

BATCHES = (1, 8, 32)
PREFILL = 4096
ENGINE = [
    *("SGLang", "model", "GPU", "patches"),
    *(f"decode, batch {size}, ms" for size in BATCHES),
    *("launches per layer", "prefill, ms", "tokens differing", "logprobs differing"),
    *("KL divergence, nats", "rounds"),
]


def engine_runs(results: Path, quantised: bool = False) -> list[pd.DataFrame]:
    """The newest run of each file of whole engines with the decode patches, the newest SGLang first.

    Of a file's weights in bf16; ``quantised``: instead of each format and model.
    """
    frames = []
    for path in sorted(results.glob("decode-*-engine.csv")):
        rows = pd.read_csv(path).assign(graphs="nographs" not in path.name)
        rows = rows.assign(quantization=weights(rows))
        own = rows[(rows["quantization"] != "none") == quantised]
        if quantised:
            kinds = own.groupby(["quantization", "sglang", "model", "layers", "gpu"], sort=False)
            frames += [newest_rows(run) for _, run in kinds]
        elif len(own):
            frames.append(newest_rows(own))
    return sorted(frames, key=lambda frame: Version(str(frame.iloc[0]["sglang"])), reverse=True)


def headline(results: Path) -> str | None:
    """A row per SGLang, model and GPU: its newest run of every batch with patches of any numerics."""
    found: dict[tuple[str, str, int, str], pd.DataFrame] = {}
    for frame in sorted(engine_runs(results), key=lambda frame: frame.iloc[0]["timestamp"]):
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


def decode_engine(results: Path) -> str | None:
    """Whole engines with the decode patches, a row per measurement; None if there is none."""
    frames = engine_runs(results)
    rows = [engine_row(frame) for frame in frames]
    if not rows:
        return None
    return (
        f"{markdown(ENGINE, rows)}\n\nStock -> patched (ratio), medians of alternating rounds of one run each; "
        "random weights; tokens and logprobs of stock against patched. KL divergence of the next-token "
        "distributions of 12 prompts of up to 6000 tokens, stock against patched; in brackets stock "
        "against itself with other batches or chunks. "
        f"{origins(pd.concat(frames))}."
    )


def quantised_engine(results: Path) -> str | None:
    """Whole engines with quantised weights, a row per format and model; None if there is none."""
    frames = engine_runs(results, quantised=True)
    if not frames:
        return None
    rows = [[f"`{frame.iloc[0]['quantization']}`", *engine_row(frame)] for frame in frames]
    return (
        f"{markdown(['weights', *ENGINE], rows)}\n\nStock -> patched (ratio), as in the table of bf16 "
        f"weights; both engines' random weights quantised by SGLang. {origins(pd.concat(frames))}."
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


def differences(frame: pd.DataFrame, what: str) -> str:
    """Tokens or logprobs that differ from stock's, and in an engine with the bitwise patches alone (``--bits``)."""

    def cell(pair: str) -> str:
        return differing(frame[frame["variant"] == pair].set_index("quantity")["value"], what)

    bits = cell("stock vs patched, bitwise")
    return cell("stock vs patched") + ("" if bits == "-" else f"; `bitwise` alone: {bits}")


SHARE = ", share of a {} step"


def step_shares(results: Path) -> str | None:
    """What part of a step norms take, and sums over GPUs; None if there is no such row."""
    rows, used = [], []
    for frame in engine_runs(results) + engine_runs(results, quantised=True):
        table = medians(frame[frame["unit"] == "%"]).droplevel("x")
        for step in ("decode", "prefill"):
            cells = []
            for kind in ("norms", "sums over GPUs"):
                quantity = kind + SHARE.format(step)
                if quantity not in table.index:
                    cells.append("-")
                    continue
                row = table.loc[quantity]
                cells.append(f"{row['stock']:.1f} -> {row['patched']:.1f}")
            if set(cells) != {"-"}:
                first = frame.iloc[0]
                patches = chosen(first["patches"])
                if first["quantization"] != "none":
                    patches += f"; `{first['quantization']}` weights"
                rows.append([str(first["sglang"]), *engine_name(first), patches, step, *cells])
                used.append(frame)
    if not rows:
        return None
    header = ["SGLang", "model", "GPU", "patches", "step", "norms, %", "sums over GPUs, %"]
    return (
        f"{markdown(header, rows)}\n\nStock -> patched, of the time from a step's first kernel to its "
        f"last one's end, in a profiler's trace of the first GPU. {origins(pd.concat(used))}."
    )


def engine_row(frame: pd.DataFrame) -> list[str]:
    """One run of ``bench/engine.py``; "-" where it did not measure something."""
    timed = frame[frame["unit"].isin(["ms", "launches"])]
    table = medians(timed)
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
        differences(frame, "token"),
        differences(frame, "logprob"),
        divergence,
        str(timed["round"].nunique()),
    ]
