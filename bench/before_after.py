"""Versions of this package in SGLang's own engine: decode steps and prefill, stock beside them.

    git worktree add .carry/old COMMIT
    python bench/before_after.py .carry/old --model 26b-a4b --layers 12
    python bench/before_after.py .carry/old .carry/other --model 26b-a4b --stock apart
    python bench/before_after.py .carry/old --model e4b --patches exact --equality 64 --batches '' --prefill ''

All engines are alive at once on one GPU and measured in turn, in another order every round; with
``--stock apart`` stock's comes after the others, where all models do not fit. Reported are medians and the
ratio of this version, "after", to each other one, which is called as its folder. Rows of the CSV are those of ``engine.py``.
Eager prefill of short prompts is bound by CPU overhead: two processes of one version differ there
by up to 30 % for as long as they live, and decode steps of one to four tokens where several engines live.

``--busy`` adds what a decode step's CUDA graph takes on the GPU, which the host has no part in: a kernel's
gain at batch 1 to 4. It is read from a profiler's trace, after all rounds without one, and compared with
other such readings alone: a trace makes kernels somewhat longer.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402

from bench.common.comparing import differences  # noqa: E402
from bench.common.engines import Engine, end_on_sigterm, engines  # noqa: E402
from bench.common.options import parse_prefill, patches_of  # noqa: E402
from bench.common.ports import own_port  # noqa: E402
from bench.common.results import Results, append  # noqa: E402
from bench.common.variants import ARGUMENTS, PATCHED, STOCK  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

AFTER = "after"


class Stock(StrEnum):
    """When stock's engine runs."""

    TOGETHER = "together"
    APART = "apart"
    NONE = "none"


def engine_class(checkout: Path) -> Any:
    """The class of engines that import the package from this checkout.

    Its script gets the checkout's own modules, which may be laid out otherwise than ours.
    """
    path = checkout.resolve() / "bench" / "engine.py"
    spec = importlib.util.spec_from_file_location("engine_before", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise typer.BadParameter(f"{path} is not there")
    module, kept = importlib.util.module_from_spec(spec), sys.path[:]
    ours_loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    try:
        sys.path.insert(0, str(checkout.resolve()))
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = kept
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(ours_loaded)
    return module.Engine


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("bench", "gemma4_turbo")


def main(
    old: Annotated[list[Path], typer.Argument(help="Checkouts of other versions")],
    model: Annotated[str, typer.Option(help=" | ".join(geometry.GEOMETRIES))] = "26b-a4b",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all")] = 0,
    batches: Annotated[str, typer.Option(help="Decode batch sizes")] = "1,8,32,64",
    prefill: Annotated[str, typer.Option(help="Comma list of BATCHxLENGTH")] = "1x1024,8x4096",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    stock: Annotated[Stock, typer.Option(help="When stock's engine runs")] = Stock.TOGETHER,
    patches: Annotated[
        str, typer.Option(help="Comma list; exact: all bitwise ones; empty: the defaults")
    ] = "",
    equality: Annotated[
        int,
        typer.Option(help="Prompts whose tokens and logprobs are compared bit for bit; 0: none"),
    ] = 0,
    busy: Annotated[
        bool, typer.Option(help="Also the GPU's time of a decode step, from traces of CUDA graphs")
    ] = False,
    max_total_tokens: Annotated[int, typer.Option(help="Size of the KV pool")] = 49152,
    mem_fraction: Annotated[float, typer.Option(help="SGLang's mem_fraction_static")] = 0.85,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-before-after.csv"),
) -> None:
    """Other versions against this one, whole engine."""
    end_on_sigterm()
    sizes = [int(size) for size in batches.split(",") if size]
    prefills = [parse_prefill(text) for text in prefill.split(",") if text]
    chosen = patches_of(patches)
    results = Results(model, layers or None, chosen)
    os.environ.setdefault("BENCH_WEIGHT_RANGE", "0.03")
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    arguments: dict[str, Any] = {
        "model_path": str(geometry.write_model(scratch / "model", model, layers or None)),
        **ARGUMENTS,
        "disable_radix_cache": True,
        "sleep_on_idle": True,  # else the schedulers whose turn it is not take CPU time from the one
        "max_total_tokens": max_total_tokens,
        "mem_fraction_static": mem_fraction,
        "cuda_graph_max_bs": max([*sizes, equality, 1]),
    }
    if geometry.GEOMETRIES[model].kv_shared_layers:
        # Stock 0.5.12.post1 cannot start models that share KV with piecewise graphs.
        arguments["disable_piecewise_cuda_graph"] = True
    names = [path.resolve().name for path in old]
    if len({*names, AFTER, STOCK}) < len(names) + 2:
        raise typer.BadParameter(f"checkouts need names of their own, got {', '.join(names)}")
    classes = dict(zip(names, map(engine_class, old), strict=True))
    if busy:  # asked for by our worker, which may run on any version's package
        script = str(HERE / Engine.script)
        classes = {n: type(n, (made,), {"script": script}) for n, made in classes.items()}
    classes |= {AFTER: Engine, STOCK: Engine}

    def make(name: str) -> Any:
        log = out.with_name(f"{out.stem}-{model}-{name}.log").resolve()
        given = {**arguments, "nccl_port": own_port()}  # an older checkout's engine asks for none
        return classes[name](STOCK if name == STOCK else PATCHED, chosen, given, log)

    def steps(engine: Any, do: str, quantity: str, round_: int) -> list[tuple[str, int, Any]]:
        asked = [(size, 128 if size == 1 else 512) for size in sizes]
        return [
            (quantity, size, engine(do, batch=size, length=length, seed=round_ + 1)["value"])
            for size, length in asked
        ]

    def on_the_gpu(name: str, engine: Any, round_: int) -> None:
        for quantity, x, value in steps(engine, "busy", "decode step on the GPU", round_):
            if value is None:
                print(f"{name}: no CUDA graph in the trace of a decode step, batch {x}")
            else:
                results.add(name, quantity, x, round_, value, "ms")

    def measure(name: str, engine: Any, round_: int) -> None:
        """Round -1 only compiles what is compiled on first use."""
        found = steps(engine, "decode", "decode step", round_)
        for count, length, new in prefills:
            asked = {"batch": count, "length": length, "seed": round_ + 1, "new": new}
            found.append((f"prefill of {length}", count, engine("prefill", **asked)["value"]))
        for quantity, x, value in found if round_ >= 0 else []:
            results.add(name, quantity, x, round_, value, "ms")

    # `yoco` declines logprobs of prompts: no tail.
    compared = {"count": equality, "new": 64, "seed": 99, "tail": 0}
    answers: dict[str, list[dict[str, Any]]] = {}
    groups = [[*names, AFTER]]
    if stock is Stock.TOGETHER:
        groups = [[*names, AFTER, STOCK]]
    elif stock is Stock.APART:
        groups.append([STOCK])
    try:
        for group in groups:
            with engines(make, group) as live:
                for name in group if equality else []:
                    answers[name] = live[name]("tokens", **compared)["rows"]
                turns = [(measure, round_) for round_ in range(-1, rounds)]
                # Last: nothing of a profiler is in the process before.
                turns += [(on_the_gpu, round_) for round_ in range(rounds if busy else 0)]
                for do, round_ in turns:
                    turned = round_ % len(group)
                    for name in group[turned:] + group[:turned]:
                        do(name, live[name], round_)
    finally:  # where a limit on its time cuts a run off, what there is still counts
        for other in (*names, STOCK):
            if {AFTER, other} <= set(answers):
                count = differences(answers[other], answers[AFTER])
                print(
                    f"{other} / {AFTER}: {count['token_diffs']} of {count['tokens']} tokens, "
                    f"{count['logprob_diffs']} of {count['logprobs']} logprobs differ"
                )
        if results.rows:
            table = results.summary()
            for other in (*names, STOCK):
                if {AFTER, other} <= set(table.columns):
                    table[f"{AFTER} / {other}"] = table[AFTER] / table[other]
            print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
            append(results.frame(), out)


if __name__ == "__main__":
    typer.run(main)
