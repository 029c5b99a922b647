"""Hardware counters of attention and of a decode step's products, what they replace beside them: what bounds them.

    python bench/counters.py                        # runs itself under Nsight Compute (ncu)
    python bench/counters.py sliding_4096 decode/26b-a4b/sliding/32 product/e4b/down/8

Cases:

* a shape of `attention.py`, and ``decode/<model>/<kind>/<batch>``: attention, ``stock`` and ``patched``;
* ``product/<model>/<which>/<rows>``, which is qkv, o, gate_up or down: ``stock`` is torch's linear and what
  follows it, ``patched`` is `gemma4_turbo.kernels.skinny_gemm`; each shape that the model has of it, N x K;
* ``feed_forward/<model>/<rows>``: ``apart`` are the launches of `skinny_gemm`, `router_few` and `experts_few`,
  ``at_once`` is `gemma4_turbo.kernels.feed_forward_few`;
* ``mlp/<model>/<rows>``: ``apart`` are two launches of `skinny_gemm`, ``at_once`` is
  `gemma4_turbo.kernels.mlp_few`; each width that the model has.

Every case is called twice and counted in the second call, K, V and weights cold as in a layer (ncu empties the
caches before each kernel). A kernel is a row of the table: ``DRAM %`` is its share of the memory's peak, ``waits
for`` its three largest reasons to stall. ncu runs one kernel at a time, so ours are launched without dependent
launch. Clocks are left alone, so durations are those of a GPU at rest: read the percentages, take times from
`attention.py`, `decode_attention.py`, `tune_skinny_gemm.py`, `feed_forward_few.py` and `mlp_few.py`. Needs ncu with
access to the counters, SGLang, torch, triton, typer, pandas and rich.
"""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

# This folder holds a kernels.py; transformers looks for a package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from bench import attention, decode_attention, feed_forward_few, mlp_few  # noqa: E402
from gemma4_turbo.cli.tuning import decode, extend, linear  # noqa: E402
from gemma4_turbo.fusions import feed_forward_few as feed_forward_fusion  # noqa: E402
from gemma4_turbo.fusions import mlp_few as mlp_fusion  # noqa: E402
from gemma4_turbo.kernels import skinny_gemm  # noqa: E402
from gemma4_turbo.kernels.attention.decode import MAX_BATCH  # noqa: E402
from gemma4_turbo.models.geometry import GEOMETRIES  # noqa: E402

CASES = (
    "sliding_4096,full_4096,e2b_sliding,verify_sliding,verify_full_32k,"
    "decode/26b-a4b/sliding/32,decode/26b-a4b/full/32,decode/31b/sliding/32,"
    "product/26b-a4b/qkv/1,feed_forward/26b-a4b/1,mlp/e4b/1"
)
FORMS = (
    "decode/<model>/<kind>/<batch>",
    "product/<model>/<which>/<rows>",
    "feed_forward/<model>/<rows>",
    "mlp/<model>/<rows>",
)
CASES_HELP = f"{CASES} without any. A shape of attention.py, or {', '.join(FORMS)}"
DEVICE = "cuda"
PRODUCTS = {"qkv": "QKV", "o": "O", "gate_up": "gate and up", "down": "down"}
"""Of a product: the role, as `linear.layers` calls it, before the comma."""
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
ISSUED = "selected"  # counted among the stalls, but no reason to wait
TOLD = 2  # reasons why something was not counted
OURS, ENDED = "counters.py: ", "The application returned an error code"

Calls = dict[str, Callable[[], object]]
"""By what a table calls them: of a case, each variant's call."""


@contextmanager
def counted() -> Iterator[None]:
    """What ncu looks at."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    yield
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def bad(case: str, why: str) -> typer.BadParameter:
    """For the command line."""
    return typer.BadParameter(f"{case!r}: {why}", param_hint="cases")


def prepared(case: str) -> Callable[[], Calls]:
    """What makes the calls of a case, with their operands on the GPU.

    Raises:
        typer.BadParameter: there is no such case; the message says what would be one.
    """
    kind, *words = case.split("/")
    form = next((form for form in FORMS if form.startswith(f"{kind}/")), None)
    if form is None:
        if case in attention.SHAPES:
            return partial(prefill, attention.SHAPES[case])
        raise bad(case, f"must be one of {', '.join((*attention.SHAPES, *FORMS))}")
    if len(words) != form.count("/"):
        raise bad(case, f"must be {form}")

    def one(what: str, word: str, choices: Iterable[str]) -> str:
        if word not in choices:
            raise bad(case, f"{what} must be one of {', '.join(choices)}, got {word!r}")
        return word

    def whole(what: str, most: int) -> int:
        word = words[-1]
        if not (word.isascii() and word.isdigit() and 1 <= int(word) <= most):
            raise bad(case, f"{what} must be a whole number from 1 to {most}, got {word!r}")
        return int(word)

    if kind == "decode":
        known = decode_attention.shapes()
        name = one("model and kind", "/".join(words[:2]), known)
        return partial(decode_step, known[name], whole("batch", MAX_BATCH))
    if kind == "product":
        model = one("model", words[0], GEOMETRIES)
        role = PRODUCTS[one("which", words[1], PRODUCTS)]
        return partial(product, model, role, whole("rows", skinny_gemm.MAX_ROWS))
    experts = kind == "feed_forward"
    model = one(
        "model", words[0], [name for name, g in GEOMETRIES.items() if bool(g.experts) == experts]
    )
    if experts:
        return partial(feed_forward, whole("rows", feed_forward_fusion.MOST_TOKENS))
    return partial(mlp, model, whole("rows", mlp_fusion.MOST_TOKENS))


def prefill(shape: extend.Shape) -> Calls:
    """Stock's and our attention of many tokens."""
    case = extend.Case(shape)
    function = extend.stock_function()
    if function is None:
        raise RuntimeError("needs SGLang")
    return {"stock": partial(case.stock, function), "patched": case.ours}


def decode_step(shape: decode.Shape, batch: int) -> Calls:
    """Stock's and our attention of one token a sequence."""
    point = decode.Point(shape, batch, 4096, False)
    arena = decode.Arena(point)
    ours = arena.ours(decode_attention.chosen_cut(point))
    return {"stock": partial(arena.stock(), 0), "patched": partial(ours, 0)}


def product(model: str, role: str, rows: int) -> Calls:
    """Stock's and our calls of a linear layer, of each shape that has the role."""
    found: Calls = {}
    for layer in linear.layers(GEOMETRIES[model]):
        if layer.role.split(",")[0] == role and layer.most == skinny_gemm.room(rows):
            bench = linear.LinearBench(layer, rows, DEVICE, 1)
            cut = skinny_gemm.cut(bench.weights[0], layer.epilogue, layer.most)
            shape = f"{layer.n}x{layer.k}"
            found[f"stock {shape}"] = partial(bench.stock(), 0)
            found[f"patched {shape}"] = partial(bench.ours(cut), 0)
    return found


def feed_forward(rows: int) -> Calls:
    """26B-A4B's router, dense MLP and experts."""
    layers = feed_forward_few.Layers(1, feed_forward_few.EXPERTS)
    layers.draw(rows)
    inputs = layers.inputs(0)
    return {
        "apart": lambda: layers.apart(0, inputs),
        "at_once": lambda: layers.few(0, inputs, feed_forward_few.DEFAULT),
    }


def mlp(model: str, rows: int) -> Calls:
    """A dense MLP, of each width."""
    found: Calls = {}
    for hidden, width in mlp_few.widths(model):
        layers = mlp_few.Layers(hidden, width, 1)
        layers.draw(rows)
        operands = layers.attention[0], *layers.weights[0]
        found[f"apart {width}"] = partial(layers.apart, *operands)
        found[f"at_once {width}"] = partial(layers.few, *operands, mlp_few.DEFAULT)
    return found


def count(case: str) -> None:
    """A case's calls, each once before; its name and the variant as an NVTX range."""
    for variant, call in prepared(case)().items():
        call()
        with torch.cuda.nvtx.range(f"{case}:{variant}"), counted():
            call()


def work(cases: list[str]) -> None:
    """Inside ncu: every case. One that cannot run is told on stderr, and the others are counted."""
    failed = False
    with torch.no_grad():
        for case in cases:
            try:
                count(case)
                torch.cuda.empty_cache()
            except Exception as error:
                failed = True
                traceback.print_exc()  # for the log
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{OURS}{case}: {why[:200]}", file=sys.stderr, flush=True)
    if failed:
        raise typer.Exit(1)


def number(value: object) -> float:
    """A counter's value; ncu writes thousands with commas."""
    try:
        return float(str(value).replace(",", ""))
    except ValueError:
        return float("nan")


def stalls_of(row: pd.Series) -> dict[str, float]:
    """Warps that wait when an instruction is issued, by reason, the largest first."""
    found = {
        name[len(STALL) : -len(PER_ISSUE)]: number(row[name])
        for name in map(str, row.index)
        if name.startswith(STALL) and name.endswith(PER_ISSUE) and "not_issued" not in name
    }
    found.pop(ISSUED, None)
    known = {name: value for name, value in found.items() if not math.isnan(value)}
    return dict(sorted(known.items(), key=lambda item: -item[1]))


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
        stalls = stalls_of(row)
        waits = ", ".join(f"{name} {stalls[name]:.1f}" for name in list(stalls)[:3])
        where = "" if ranges is None else ":".join(str(row[ranges]).split(":")[1:3])
        table.add_row(where, str(row["Kernel Name"])[:40], *found, waits)
    return table


def read(printed: str) -> pd.DataFrame | None:
    """What ncu printed as CSV, a row for each kernel; None if no counter has a value in it."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return None
    text = "\n".join(line for line in lines[start:] if line.startswith('"'))
    raw = pd.read_csv(io.StringIO(text), skiprows=[1], dtype=str)  # the second line is units
    names = [name for names in COLUMNS.values() for name in names if name in raw.columns]
    names = [name for name in names if not name.startswith("launch__")]  # which need no access
    return None if raw[names].map(number).isna().all(axis=None) else raw


def problem(result: subprocess.CompletedProcess[str]) -> str | None:
    """Why something was not counted, in one line, as far as ncu and the process inside it say; None if all was."""
    lines = [line.strip() for line in f"{result.stdout}\n{result.stderr}".splitlines()]
    errors = [line.removeprefix("==ERROR== ") for line in lines if line.startswith("==ERROR== ")]
    told = [line for line in errors if not line.startswith(ENDED)]
    told += [line.removeprefix(OURS) for line in lines if line.startswith(OURS)]
    if told or errors:
        every = list(dict.fromkeys(told or errors))
        more = [f"{len(every) - TOLD} more like this"] if len(every) > TOLD else []
        return "; ".join([*every[:TOLD], *more])
    return f"ncu ended with {result.returncode}" if result.returncode else None


def main(
    cases: Annotated[list[str] | None, typer.Argument(help=CASES_HELP)] = None,
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
    out: Annotated[Path, typer.Option(help="CSV with all counters")] = Path("counters.csv"),
) -> None:
    """Count."""
    wanted = cases or CASES.split(",")
    for case in wanted:
        prepared(case)
    if worker:
        work(wanted)
        return
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("bench/counters.py: ncu (Nsight Compute) is not on the PATH")
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
               "--nvtx", "--print-nvtx-rename", "none"]  # fmt: skip
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, __file__, "--worker", *wanted]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    raw, why = read(result.stdout), problem(result)
    if raw is not None:
        raw.to_csv(out, index=False)
        Console(width=240).print(table_of(raw))
    elif why is None:
        why = "ncu counted no kernel"
    if why is not None:
        log = out.with_suffix(".log")
        log.write_text(result.stdout + result.stderr)
        raise SystemExit(f"bench/counters.py: {why}; all that ncu said lies in {log}")


if __name__ == "__main__":
    typer.run(main)
