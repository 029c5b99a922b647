"""Kernels against the stock code they replace, one row of a CSV per measurement.

    python bench/kernels.py router       # one patch
    python bench/kernels.py all
    python bench/kernels.py all --list   # the cases, unmeasured

Times are those of the kernels on the GPU (torch profiler, medians, summed over all launches of one
call) and of a call's share of a replayed CUDA graph, which has the gaps between launches in it. Bytes
are those that our kernel must move, each operand read and each result written once; the bandwidth is
these bytes over its time. Small operands stay in the GPU's L2 cache from call to call, as in a decode
step, so it may exceed that of the copy, which is measured in every run and has a row of its own.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.progress import track
from torch._C._autograd import DeviceType

# transformers looks for a package of this name, and scripts have their folder on the path.
if __name__ == "kernels":
    raise ImportError("bench/kernels.py is not the package kernels")
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import results  # noqa: E402
from bench.common.provenance import provenance  # noqa: E402
from gemma4_turbo.cli import lines  # noqa: E402
from gemma4_turbo.cli.tuning.kernel_cases import CASES, Call, CannotMeasureError, Case  # noqa: E402
from gemma4_turbo.cli.tuning.timing import Timer, readings  # noqa: E402

ALL, COPY = "all", "copy"
COUNTS = ("tokens", "fused_launches", "stock_launches", "bytes")
MEASURED = (
    "kernel",
    "case",
    "tokens",
    "fused_us",
    "stock_us",
    "fused_launches",
    "stock_launches",
    "fused_graph_us",
    "stock_graph_us",
    "ratio",
    "bytes",
    "gb_per_s",
)
"""Columns of the CSV, after those of the GPU and the versions."""


def kernel_us(call: Call, calls: int = 40) -> tuple[float, int]:
    """Microseconds of GPU work and number of launches of one call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            found[event.name].append(event.device_time)
    launches = sum(len(times) for times in found.values())
    return sum(median(times) * len(times) / calls for times in found.values()), round(
        launches / calls
    )


def graph_us(call: Call, calls: int = 50, replays: int = 21) -> float:
    """Microseconds per call inside a replayed CUDA graph."""
    (us,) = readings([Timer(lambda _: call(), calls)], replays)
    return us


def copy_row() -> dict[str, Any]:
    """What the GPU's memory does at best: a copy of 1 GiB, which is read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us, launches = kernel_us(lambda: target.copy_(source))
    return {
        "kernel": COPY,
        "case": "1 GiB",
        "stock_us": us,
        "stock_launches": launches,
        "bytes": 2 * source.numel(),
        "gb_per_s": 2 * source.numel() / us / 1e3,
    }


def case_row(case: Case, device: str = "cuda") -> dict[str, Any]:
    """All that is measured of a case."""
    calls = case.build(device)
    fused_us, fused_launches = kernel_us(calls.ours)
    stock_us, stock_launches = kernel_us(calls.stock)
    return {
        "kernel": case.kernel,
        "case": case.case,
        "tokens": case.tokens,
        "fused_us": fused_us,
        "stock_us": stock_us,
        "fused_launches": fused_launches,
        "stock_launches": stock_launches,
        "fused_graph_us": graph_us(calls.ours),
        "stock_graph_us": graph_us(calls.stock),
        "ratio": fused_us / stock_us,
        "bytes": calls.bytes,
        "gb_per_s": calls.bytes / fused_us / 1e3,
    }


def append(rows: list[dict[str, Any]], base: dict[str, Any], out: Path) -> pd.DataFrame:
    """Add rows to the CSV; returns them."""
    frame = pd.DataFrame([base | row for row in rows], columns=[*base, *MEASURED])
    frame = frame.astype(dict.fromkeys(COUNTS, "Int64"))
    results.append(frame, out)
    return frame


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Kernel time over tokens, fused and stock, a panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(frame.groupby(["kernel", "case"], sort=False))
    columns = min(len(cases), 4)
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 4 * lines), squeeze=False)
    for panel in axes.flat[len(cases) :]:
        panel.set_axis_off()
    for panel, ((kernel, case), part) in zip(axes.flat, cases, strict=False):
        panel.loglog(part["tokens"], part["stock_us"], "o-", label="stock")
        panel.loglog(part["tokens"], part["fused_us"], "o-", label="fused")
        panel.set(title=f"{kernel}, {case}", xlabel="tokens", ylabel="us")
        panel.legend()
    figure.suptitle(frame.iloc[0]["gpu"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def chosen(kernel: str) -> list[str]:
    """The patches to measure; of all, those that this SGLang takes, and a line for each that it does not."""
    if kernel not in (*CASES, ALL):
        choices = ", ".join([*CASES, ALL])
        raise typer.BadParameter(f"{kernel!r}: choose from {choices}", param_hint="kernel")
    names = list(CASES) if kernel == ALL else [kernel]
    absent = {name: reason for name in names if (reason := lines.patch_unfit(name)) is not None}
    if absent and kernel != ALL:
        raise typer.BadParameter(absent[kernel], param_hint="kernel")
    for reason in absent.values():
        typer.echo(f"left out: {reason}", err=True)
    return [name for name in names if name not in absent]


@torch.no_grad()
def main(
    kernel: Annotated[str, typer.Argument(help=" | ".join([*CASES, ALL]))] = "router",
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-kernels.csv"),
    only_list: Annotated[bool, typer.Option("--list", help="Name the cases, measure none")] = False,
) -> None:
    """Fused against stock."""
    names = chosen(kernel)
    if only_list:
        for case in (case for name in names for case in CASES[name]()):
            print(f"{case.kernel}, {case.case}, {case.tokens} tokens")
        return
    base: dict[str, Any] = {
        **provenance(),
        # Decides which RMSNorm stock runs; a library that is only on PYTHONPATH counts too.
        "norms": "cute" if find_spec("cutlass") else "cuda",
    }
    if out.exists() and list(pd.read_csv(out, nrows=0)) != [*base, *MEASURED]:
        raise typer.BadParameter(f"{out} has other columns: name another file", param_hint="--out")
    if not torch.cuda.is_available():
        raise SystemExit("bench/kernels.py: needs a CUDA device")
    copied = append([copy_row()], base, out)
    frames = []
    for name in names:
        try:
            rows = [case_row(case) for case in track(CASES[name](), description=name)]
        except CannotMeasureError as error:
            raise SystemExit(f"bench/kernels.py: {error}") from None
        frames.append(append(rows, base, out))
    frame = pd.concat(frames)
    plot(frame, out.with_suffix(".png"))
    shown = ["kernel", "case", "tokens", "fused_us", "stock_us", "ratio", "fused_launches"]
    shown += ["stock_launches", "fused_graph_us", "stock_graph_us", "bytes", "gb_per_s"]
    print(frame[shown].round(2).to_string(index=False))
    print(f"copy of {copied.iloc[0]['case']}: {copied.iloc[0]['gb_per_s']:.0f} GB/s")


if __name__ == "__main__":
    typer.run(main)
