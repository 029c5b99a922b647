"""Hardware counters of the attention kernels, stock's beside ours: what bounds them.

    python bench/counters.py                        # runs itself under Nsight Compute (ncu)
    python bench/counters.py sliding_4096 decode/26b-a4b/sliding/32

Every case is called twice and counted in the second call, K and V cold as in a layer (ncu empties the
caches before each kernel). Clocks are left alone, so durations are those of a GPU at rest: read the
percentages, take times from `attention.py` and `decode_attention.py`. Needs ncu with access to the
counters, SGLang, torch, triton, typer, pandas and rich.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

# This folder holds a kernels.py; transformers looks for a package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

CASES = (
    "sliding_4096,full_4096,e2b_sliding,verify_sliding,verify_full_32k,"
    "decode/26b-a4b/sliding/32,decode/26b-a4b/full/32,decode/31b/sliding/32"
)
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
COLUMNS = {  # of the table, from the counters' names
    "ns": ("gpu__time_duration.sum",),
    "SM %": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "tensor %": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",),
    "DRAM %": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "L2 %": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "L1 %": ("l1tex__throughput.avg.pct_of_peak_sustained_active",),
    "L2 hit %": ("lts__t_sector_hit_rate.pct",),
    "warps/SM": ("sm__warps_active.avg.per_cycle_active",),
    "issue %": ("smsp__issue_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
    "shared": ("launch__shared_mem_per_block",),
    "grid": ("launch__grid_size",),
}  # fmt: skip
STALL, PER_ISSUE = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"


@contextmanager
def counted() -> Iterator[None]:
    """What ncu looks at."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    yield
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def calls(case: str) -> dict[str, Callable[[], object]]:
    """Stock's and our call of a case."""
    from bench import attention, decode_attention
    from gemma4_turbo.cli.tuning import decode, extend

    if case.startswith("decode/"):
        _, model, kind, batch = case.split("/")
        shape = decode_attention.shapes()[f"{model}/{kind}"]
        point = decode.Point(shape, int(batch), 4096, False)
        arena = decode.Arena(point)
        ours, theirs = arena.ours(decode_attention.chosen_cut(point)), arena.stock()
        return {"stock": lambda: theirs(0), "patched": lambda: ours(0)}
    prepared = extend.Case(attention.SHAPES[case])
    function = extend.stock_function()
    assert function is not None, "counters.py needs SGLang"
    return {"stock": lambda: prepared.stock(function), "patched": prepared.ours}


def work(cases: list[str]) -> None:
    """Inside ncu: every case, its name and variant as NVTX ranges."""
    import torch

    with torch.no_grad():
        for case in cases:
            for variant, call in calls(case).items():
                call()
                torch.cuda.nvtx.range_push(f"{case}:{variant}")
                with counted():
                    call()
                torch.cuda.nvtx.range_pop()
            torch.cuda.empty_cache()


def number(value: object) -> float:
    """A counter's value; ncu writes thousands with commas."""
    try:
        return float(str(value).replace(",", ""))
    except ValueError:
        return float("nan")


def table_of(raw: pd.DataFrame) -> Table:
    """The counters that tell what bounds a kernel, and its three largest reasons to wait."""
    table = Table(title="per kernel; % of peak; stalls in warps per issue")
    for column in ("range", "kernel", *COLUMNS, "waits for"):
        table.add_column(column, overflow="fold")
    ranges = next((name for name in raw.columns if "Push/Pop_Range" in name), None)
    for _, row in raw.iterrows():
        found = []
        for names in COLUMNS.values():
            name = next((name for name in names if name in raw.columns), None)
            found.append("" if name is None else f"{number(row[name]):.4g}")
        stalls = {
            name[len(STALL) : -len(PER_ISSUE)]: number(row[name])
            for name in raw.columns
            if name.startswith(STALL) and name.endswith(PER_ISSUE) and "not_issued" not in name
        }
        largest = sorted(stalls, key=lambda name: -stalls[name])[:3]
        waits = ", ".join(f"{name} {stalls[name]:.1f}" for name in largest)
        where = "" if ranges is None else ":".join(str(row[ranges]).split(":")[1:3])
        table.add_row(where, str(row["Kernel Name"])[:40], *found, waits)
    return table


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="All without")] = None,
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
    out: Annotated[Path, typer.Option(help="CSV with all counters")] = Path("counters.csv"),
) -> None:
    """Count."""
    wanted = cases or CASES.split(",")
    if worker:
        work(wanted)
        return
    ncu = shutil.which("ncu")
    if ncu is None:
        raise typer.BadParameter("ncu (Nsight Compute) is not on the PATH")
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
               "--nvtx", "--print-nvtx-rename", "none"]  # fmt: skip
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, __file__, "--worker", *wanted]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        print(result.stdout[-3000:], result.stderr[-3000:], file=sys.stderr)
        raise typer.Exit(1)
    text = "\n".join(line for line in lines[start:] if line.startswith('"'))
    raw = pd.read_csv(io.StringIO(text), skiprows=[1], dtype=str)  # the second line is units
    raw.to_csv(out, index=False)
    Console(width=240).print(table_of(raw))


if __name__ == "__main__":
    typer.run(main)
