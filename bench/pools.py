"""A KV pool filled to the brim: stock against patched, in SGLang's own engine.

    python bench/pools.py --model e2b --patches shared_kv_pool --gib 3 --together

Long prompts with common beginnings, more of them than the pool holds, some aborted on the way: the
pool fills, its radix cache evicts, requests are retracted. SGLang itself checks for lost KV memory
whenever it is idle, and dies of it. Reported are the sizes of the pools and, of every request that
was not aborted, how far its logprobs are from those of stock with that prompt alone; the same for
stock with another request's prompt shows what a wrong slot would look like.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402

from bench.common.comparing import distance, require_any_ran  # noqa: E402
from bench.common.engines import Engine, console, end_on_sigterm, engines  # noqa: E402
from bench.common.logs import RETRACTED  # noqa: E402
from bench.common.options import patches_of  # noqa: E402
from bench.common.results import Results  # noqa: E402
from bench.common.variants import ARGUMENTS, PATCHED, STOCK  # noqa: E402
from gemma4_turbo.cli import report  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

ALONE = "stock, one at a time"
SIZES = re.compile(r"full_layer_tokens=(\d+), swa_layer_tokens=(\d+)")
USAGE = re.compile(r"(full|swa) token usage: ([\d.]+)")


def pool_sizes(log: str) -> dict[str, int]:
    """Tokens for full and for sliding layers, from SGLang's log.

    Raises:
        ValueError: if the log does not tell.
    """
    found = SIZES.findall(log)
    if not found:
        raise ValueError("SGLang's log does not tell the sizes of the KV pools")
    full, sliding = found[-1]
    return {"full": int(full), "sliding": int(sliding)}


def fullest(log: str) -> dict[str, float]:
    """The largest share of each pool that was in use."""
    seen: dict[str, float] = {}
    for kind, share in USAGE.findall(log):
        name = "full" if kind == "full" else "sliding"
        seen[name] = max(seen.get(name, 0.0), float(share))
    return seen


def compare(rows: list[dict[str, Any]], alone: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Over the requests that were also answered alone.

    A request with the wrong number of tokens counts as ``short``, one with no token in common as
    ``lost``.
    """
    told = {
        "requests": 0.0,
        "tokens": 0.0,
        "common": 0.0,
        "short": 0.0,
        "lost": 0.0,
        "farthest": 0.0,
    }
    for index, expected in alone.items():
        found = rows[int(index)]
        common, largest = distance(expected, found, strict=False)  # too short is counted
        told["requests"] += 1
        told["tokens"] += len(expected["ids"])
        told["common"] += common
        told["short"] += len(found["ids"]) != len(expected["ids"])
        told["lost"] += common == 0
        told["farthest"] = max(told["farthest"], largest)
    return told


def main(
    model: Annotated[str, typer.Option(help=" | ".join(geometry.GEOMETRIES))] = "e2b",
    patches: Annotated[str, typer.Option(help="Comma list")] = "shared_kv_pool",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all")] = 0,
    requests: Annotated[int, typer.Option(min=8)] = 96,
    shortest: Annotated[int, typer.Option(min=8)] = 2000,
    longest: Annotated[int, typer.Option(min=8)] = 7000,
    new_tokens: Annotated[int, typer.Option(min=4)] = 96,
    alone: Annotated[int, typer.Option(help="Requests that stock also answers alone")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Soaks, on the same engine")] = 2,
    gib: Annotated[float, typer.Option(help="Memory for KV")] = 3.0,
    together: Annotated[bool, typer.Option(help="Both engines alive at once")] = False,
    piecewise: Annotated[
        bool, typer.Option(help="Piecewise CUDA graphs of prefill in the patched engine")
    ] = False,
    weight_range: Annotated[
        float, typer.Option(help="Random weights are uniform in +-this")
    ] = 3e-2,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-pools.csv"),
) -> None:
    """Stock against patched with a full KV pool."""
    if longest < shortest:
        raise typer.BadParameter(f"--longest must be at least --shortest, got {longest}")
    end_on_sigterm()
    chosen = patches_of(patches)
    results = Results(model, layers or None, chosen)
    os.environ["BENCH_WEIGHT_RANGE"] = str(weight_range)
    os.environ["BENCH_POOL_GIB"] = str(gib)
    os.environ["BENCH_UNIT_NORMS"] = "1"  # or what attention reads would hardly show
    folder = geometry.write_model(
        Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-")) / "model", model, layers or None
    )
    arguments: dict[str, Any] = {
        "model_path": str(folder),
        **ARGUMENTS,
        "cuda_graph_max_bs": 64,  # as many as run: larger batches decode without graphs
        "max_running_requests": 64,
        "decode_log_interval": 4,
    }
    logs = {
        variant: out.with_name(f"{out.stem}-{variant}.log").absolute()
        for variant in (STOCK, PATCHED)
    }
    soak = {"count": requests, "shortest": shortest, "longest": longest, "new": new_tokens}

    def make(variant: str) -> Engine:
        without = not (piecewise and variant == PATCHED)  # E2B's stock does not start with them
        given = {**arguments, "disable_piecewise_cuda_graph": without}
        return Engine(variant, chosen, given, logs[variant])

    expected: list[dict[str, dict[str, Any]]] = []
    comparisons: dict[str, list[dict[str, float]]] = {}
    processes: list[dict[str, Any]] = []
    try:
        for group in [[STOCK, PATCHED]] if together else [[STOCK], [PATCHED]]:
            with engines(make, group) as live:
                for variant, engine in live.items():
                    for round_ in range(rounds):
                        if variant == STOCK:
                            asked = {**soak, "seed": round_, "only": alone}
                            expected.append(engine("soak_alone", **asked)["rows"])
                        told = engine("soak", **soak, seed=round_)
                        found = compare(told["rows"], expected[round_])
                        found["left"] = sum(row["left"] for row in told["rows"])
                        comparisons.setdefault(variant, []).append(found)
                        results.add(variant, "soak", requests, round_, told["seconds"] * 1e3, "ms")
                        if variant == STOCK and round_ == 0:
                            moved = told["rows"][1:] + told["rows"][:1]
                            comparisons["stock, other prompts"] = [compare(moved, expected[0])]
                    if variant == PATCHED:
                        processes = engine("status")["processes"]
                        for process in processes:
                            rows = [row for row in process["patches"] if row["state"] == "active"]
                            if rows:
                                console.print(report.table(rows, f"pid {process['pid']}"))
    finally:
        for variant, found_rounds in comparisons.items():
            for round_, found in enumerate(found_rounds):
                console.print(f"{variant} against {ALONE}, soak {round_}: {found}")
                for name, value in found.items():
                    results.add(f"{variant} vs {ALONE}", name, requests, round_, value, "count")
        for variant, path in logs.items():
            log = path.read_text(errors="replace") if path.exists() else ""
            if not SIZES.search(log):
                continue
            for kind, tokens in pool_sizes(log).items():
                results.add(variant, f"pool of {kind} layers", 1, 0, tokens, "tokens")
            for kind, share in fullest(log).items():
                results.add(variant, f"pool of {kind} layers, fullest", 1, 0, share, "share")
            retracted = len(RETRACTED.findall(log))
            results.add(variant, "times requests were retracted", 1, 0, retracted, "times")
        summary = results.summary()
        if not summary.empty:
            kept = summary[summary["unit"] != "count"].dropna(axis=1, how="all")
            console.print(kept.to_string(index=False, float_format=lambda v: f"{v:.3f}"))
        results.save(out)
    require_any_ran("pools.py", processes)


if __name__ == "__main__":
    typer.run(main)
