"""Find how `gemma4_turbo.kernels.skinny_gemm` cuts each linear layer of a model best.

    python bench/tune_skinny_gemm.py --models e4b,e2b,26b-a4b --rows 1,8,16,32

Every shape is timed in a CUDA graph over so many copies of the weight that none stays in the L2 cache,
against cuBLAS (and the calls that the epilogue replaces). Writes a CSV with every candidate's time and
prints the best one per shape and number of rows.
"""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# Scripts have their folder on the path, where kernels.py hides the package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

from bench.common.provenance import provenance  # noqa: E402
from gemma4_turbo.cli.tuning.timing import L2_BYTES, Call, Timer, readings  # noqa: E402
from gemma4_turbo.kernels.skinny_gemm import (  # noqa: E402
    Config,
    Epilogue,
    launch_skinny_gemm,
    reference_skinny_gemm,
    room,
    tiles,
)
from gemma4_turbo.models import geometry  # noqa: E402

REPLAYS = 7


class Shape(NamedTuple):
    """A linear layer."""

    role: str
    n: int
    k: int
    epilogue: Epilogue = Epilogue.NONE


def shapes(model: str) -> list[Shape]:
    """The linear layers of one decoder layer, both kinds of attention."""
    g = geometry.GEOMETRIES[model]
    found = []
    for kind, heads, size in (
        ("sliding", g.kv_heads_sliding, geometry.HEAD_DIM_SLIDING),
        ("full", g.kv_heads_full, geometry.HEAD_DIM_FULL),
    ):
        found.append(Shape(f"qkv {kind}", (g.heads + 2 * heads) * size, g.hidden))
        found.append(Shape(f"o {kind}", g.hidden, g.heads * size))
    for mlp in {g.mlp, 2 * g.mlp if g.double_wide_mlp else g.mlp}:
        found.append(Shape("gate_up", 2 * mlp, g.hidden, Epilogue.GELU_AND_MUL))
        found.append(Shape("down", g.hidden, mlp))
    if g.per_layer_width:
        found.append(Shape("ple gate", g.per_layer_width, g.hidden, Epilogue.GELU_TIMES))
        found.append(Shape("ple projection", g.hidden, g.per_layer_width))
    if g.experts:
        found.append(Shape("router", g.experts, g.hidden))
    return found


def candidates(shape: Shape, rows: int, processors: int) -> list[Config]:
    """Cuts that fill the GPU and fit into shared memory."""
    halves = 2 if shape.epilogue == Epilogue.GELU_AND_MUL else 1
    block_m = room(rows)
    found = []
    for block_n, block_k, stages, warps in itertools.product(
        (16, 32, 64, 128), (64, 128, 256), (3, 4, 6), (4,)
    ):
        bytes_ = stages * (block_n * halves + block_m) * block_k * 2
        in_flight = (stages - 1) * block_n * halves * block_k * 2
        if shape.k % block_k or bytes_ > 200_000 or not 12_000 <= in_flight <= 150_000:
            continue
        count = -(-(shape.n // halves) // block_n)
        blocks = shape.k // block_k
        for split in (1, 2, 3, 4, 6, 8, 12, 16):
            programs = count * split
            if split > blocks or not processors // 2 <= programs <= 6 * processors:
                continue
            if split > 1 and programs > 3 * processors:
                continue
            found.append(Config(block_n, block_k, split, stages, warps))
    return found


def _compile(key: tuple[int, ...]) -> None:
    """Fill Triton's cache for one variant of the kernel, in a process of its own."""
    block_n, block_k, stages, warps, epilogue, split, rows = key
    with torch.no_grad():
        n, k = 512, block_k * 4
        weight = torch.zeros(
            n * (2 if epilogue == 1 else 1), k, device="cuda", dtype=torch.bfloat16
        )
        x = torch.zeros(rows, k, device="cuda", dtype=torch.bfloat16)
        extra = torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16) if epilogue == 2 else None
        config = Config(block_n, block_k, 2 if split else 1, stages, warps)
        arrived = torch.zeros(64, dtype=torch.int32, device="cuda")
        launch_skinny_gemm(x, weight, config, Epilogue(epilogue), extra, arrived)
        torch.cuda.synchronize()


def main(
    models: Annotated[str, typer.Option(help="Comma list")] = "26b-a4b,e4b,e2b",
    rows: Annotated[str, typer.Option(help="Comma list of numbers of tokens")] = "1,8,16,32",
    workers: Annotated[int, typer.Option(help="Processes that compile")] = 12,
    out: Annotated[Path, typer.Option(help="CSV to write")] = Path("skinny-gemm.csv"),
) -> None:
    """Tune."""
    console = Console(stderr=True)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    counts = [int(count) for count in rows.split(",")]
    wanted = {
        shape[1:]: shape for model in models.split(",") for shape in shapes(model)
    }  # equal shapes of several models once
    keys = sorted(
        {
            (c.block_n, c.block_k, c.stages, c.warps, int(shape.epilogue), int(c.split > 1), m)
            for shape in wanted.values()
            for m in {room(count) for count in counts}
            for c in candidates(shape, m, processors)
        }
    )
    console.print(f"{len(keys)} variants to compile")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in track(
            pool.map(_compile, keys), "compiling", total=len(keys), console=console, transient=True
        ):
            pass
    results = []
    with torch.no_grad():
        for shape in track(list(wanted.values()), "timing", console=console, transient=True):
            results += tune(shape, counts, processors)
    frame = pd.DataFrame(results)
    for name, value in provenance().items():
        frame[name] = value
    frame.to_csv(out, index=False)
    best = frame.loc[frame.groupby(["role", "n", "k", "rows"]).us.idxmin()]
    columns = ["role", "n", "k", "rows", "cublas_us", "us", "ratio", "gbps", "config", "worst"]
    print(best[columns].sort_values(["n", "k", "rows"]).to_string(index=False))


def graph_us(call: Call, calls: int) -> float:
    """Microseconds per call inside a replayed CUDA graph."""
    (us,) = readings([Timer(call, calls)], REPLAYS)
    return us


def tune(shape: Shape, counts: list[int], processors: int) -> list[dict[str, Any]]:
    """Every candidate for one shape."""
    copies = max(2, min(96, -(-L2_BYTES // (shape.n * shape.k * 2))))
    weights = [
        (torch.randn(shape.n, shape.k, device="cuda") / shape.k**0.5).bfloat16()
        for _ in range(copies)
    ]
    return [row for rows in counts for row in tune_rows(shape, rows, weights, processors)]


def tune_rows(
    shape: Shape, rows: int, weights: list[torch.Tensor], processors: int
) -> list[dict[str, Any]]:
    """Every candidate for one number of tokens."""
    x = torch.randn(rows, shape.k, device="cuda").bfloat16()
    extra = exact_extra = None
    if shape.epilogue == Epilogue.GELU_TIMES:
        extra = torch.randn(rows, shape.n, device="cuda").bfloat16()
        exact_extra = extra.double()
    copies = len(weights)
    stock = graph_us(lambda i: stock_calls(x, weights[i], shape.epilogue, extra), copies)
    exact = reference_skinny_gemm(x.double(), weights[0].double(), shape.epilogue, exact_extra)
    found = []
    for config in candidates(shape, rows, processors):
        count = tiles(weights[0], shape.epilogue, config)
        arrived = torch.zeros(count, dtype=torch.int32, device="cuda")

        def ours(i: int, config: Config = config, arrived: torch.Tensor = arrived) -> torch.Tensor:
            return launch_skinny_gemm(x, weights[i], config, shape.epilogue, extra, arrived)

        worst = float((ours(0).double() - exact).abs().max() / exact.abs().max())
        us = graph_us(ours, copies)
        found.append(
            {
                "role": shape.role,
                "n": shape.n,
                "k": shape.k,
                "epilogue": int(shape.epilogue),
                "rows": rows,
                "config": "/".join(map(str, config)),
                "us": round(us, 2),
                "cublas_us": round(stock, 2),
                "ratio": round(us / stock, 3),
                "gbps": round(shape.n * shape.k * 2 / us / 1e3),
                "worst": round(worst, 5),
            }
        )
    return found


def stock_calls(
    x: torch.Tensor, weight: torch.Tensor, epilogue: Epilogue, extra: torch.Tensor | None
) -> torch.Tensor:
    """cuBLAS and, with an epilogue, stock's kernels after it where SGLang is installed."""
    y = torch.nn.functional.linear(x, weight)
    if epilogue == Epilogue.GELU_AND_MUL:
        try:
            from sgl_kernel import gelu_tanh_and_mul
        except ImportError:
            return reference_skinny_gemm(x, weight, epilogue)
        out = torch.empty(x.shape[0], weight.shape[0] // 2, device=x.device, dtype=x.dtype)
        gelu_tanh_and_mul(y, out)
        return out
    if epilogue == Epilogue.GELU_TIMES:
        assert extra is not None
        return torch.nn.functional.gelu(y, approximate="tanh") * extra
    return y


if __name__ == "__main__":
    typer.run(main)
