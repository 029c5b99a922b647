"""What the tables are written with."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from gemma4_turbo.catalogue import BITWISE, by_name


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short(gpu: str) -> str:
    """A GPU's name without its maker and memory, for a table whose foot has the whole name."""
    return gpu.removeprefix("NVIDIA ").split()[0]


def origin(frame: pd.DataFrame) -> str:
    """Device and versions of a run, which must be one."""
    first = frame.iloc[0]
    return (
        f"{first['gpu']}, SGLang {first['sglang']}, torch {first['torch']}, "
        f"Triton {first['triton']}, {first['timestamp'][:10]}"
    )


def origins(frame: pd.DataFrame) -> str:
    """Devices and versions of several runs."""
    return "; ".join(dict.fromkeys(origin(run) for _, run in frame.groupby("timestamp")))


def sources(frames: Iterable[pd.DataFrame]) -> str:
    """The same of frames that stand side by side, in their order."""
    return "; ".join(origins(frame) for frame in frames)


def newest_rows(rows: pd.DataFrame, *each: str) -> pd.DataFrame:
    """Those of the newest run; with ``each``, columns, of the newest run of every value of these."""
    times = rows["timestamp"]
    last = rows.groupby(list(each))["timestamp"].transform("max") if each else times.max()
    return rows[times == last]


def weights(rows: pd.DataFrame) -> pd.Series:
    """What each row's weights were quantised to, "none" where a file's older rows do not say."""
    if "quantization" not in rows:
        return pd.Series("none", index=rows.index)
    return rows["quantization"].fillna("none")


def not_bitwise(names: list[str]) -> list[str]:
    """Those of these patches."""
    return [name for name in names if by_name(name).numerics != BITWISE]


def chosen(patches: str) -> str:
    """The patches of a run: how many `bitwise` ones, and the others by name; "all" is all by default."""
    names = patches.split("+")
    if names[0] == "all":
        return ", ".join(["all", *(f"`{name}`" for name in names[1:])])
    others = not_bitwise(names)
    bitwise = [name for name in names if name not in others]
    if len(bitwise) < 4:
        return ", ".join(f"`{name}`" for name in names)
    return ", ".join([f"{len(bitwise)} `bitwise`", *(f"`{name}`" for name in others)])


def change(stock: float, patched: float, *, digits: int) -> str:
    """Stock, patched and their ratio."""
    return f"{stock:.{digits}f} -> {patched:.{digits}f} ({patched / stock:.3f})"


def decimal(count: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} MB"


def medians(run: pd.DataFrame) -> pd.DataFrame:
    """Medians by quantity and size, a column per variant."""
    return run.groupby(["quantity", "x", "variant"])["value"].median().unstack("variant")


def differing(counts: pd.Series, what: str) -> str:
    """How many of a comparison's tokens or logprobs differ; "-" where they were not compared."""
    if f"{what}s" not in counts:
        return "-"
    return f"{counts[f'{what}_diffs']:,.0f} of {counts[f'{what}s']:,.0f}"
