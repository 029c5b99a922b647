"""A dense MLP of a few tokens: both products in one launch against two launches of `skinny_gemm`.

    python bench/mlp_few.py --out mlp-few.csv

Every call is one of a replayed CUDA graph, with dependent launch, over weights of several layers in turn, so
that none comes from the L2 cache: the norm before the MLP, the MLP, the norms at the layer's end. Rows of
the result: ``two launches``, and ``at once`` for each cut of `gemma4_turbo.kernels.mlp_few`, as its `Tiles`.
``gb_per_s`` counts the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

# Scripts have their folder on the path, and transformers looks for a package called kernels.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402

from bench.common import cuts  # noqa: E402
from bench.common.provenance import provenance  # noqa: E402
from gemma4_turbo.cli.tuning.timing import L2_BYTES, timed  # noqa: E402
from gemma4_turbo.kernels import mlp_few as kernel  # noqa: E402
from gemma4_turbo.kernels import pdl, skinny_gemm  # noqa: E402
from gemma4_turbo.kernels.dataflow import Product  # noqa: E402
from gemma4_turbo.kernels.mlp_few import Tiles  # noqa: E402
from gemma4_turbo.kernels.norms import layer_norms, layer_tail  # noqa: E402
from gemma4_turbo.kernels.norms.rmsnorm import Kind  # noqa: E402
from gemma4_turbo.kernels.skinny_gemm import Epilogue  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

CALLS = 16
DEVICE = "cuda"
EPS = 1e-6
DEFAULT = kernel.TILES
# One matrix at a time: more rows or more of K in a thread, then lines within a warp's half.
CUTS = (
    DEFAULT,
    DEFAULT._replace(gate_up=Product(2, 2, 256)),
    DEFAULT._replace(gate_up=Product(4, 1, 256)),
    DEFAULT._replace(gate_up=Product(1, 4, 256)),
    DEFAULT._replace(gate_up=Product(4, 1, 128)),
    DEFAULT._replace(down=Product(2, 1, 256)),
    DEFAULT._replace(down=Product(4, 2, 256)),
    DEFAULT._replace(down=Product(2, 4, 256)),
    DEFAULT._replace(down=Product(8, 1, 256)),
    Tiles(Product(4, 1, 256), Product(4, 2, 256)),
)


def widths(model: str) -> list[tuple[int, int]]:
    """Hidden size and the MLP's, of a model's dense layers."""
    g = geometry.GEOMETRIES[model]
    return [(g.hidden, mlp) for mlp in sorted({g.mlp, 2 * g.mlp if g.double_wide_mlp else g.mlp})]


class Layers:
    """Weights of several layers of one shape, and inputs for one number of tokens."""

    def __init__(self, hidden: int, width: int, count: int = 0) -> None:
        generator = self.generator = torch.Generator(DEVICE).manual_seed(0)
        self.hidden = hidden
        self.bytes = 6 * hidden * width

        def drawn(*shape: int) -> torch.Tensor:
            made = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
            return made.normal_(0, shape[-1] ** -0.5, generator=generator)

        count = count or max(2, -(-L2_BYTES // self.bytes))
        self.weights = [(drawn(2 * width, hidden), drawn(hidden, width)) for _ in range(count)]
        self.norm = 1 + drawn(hidden)
        self.one = torch.ones(1, dtype=torch.bfloat16, device=DEVICE)
        self.zeros = torch.zeros(16384, dtype=torch.int32, device=DEVICE)

    def draw(self, tokens: int) -> None:
        """New activations."""

        def rows() -> torch.Tensor:
            made = torch.empty(tokens, self.hidden, dtype=torch.bfloat16, device=DEVICE)
            return made.normal_(generator=self.generator)

        self.attention = [rows() for _ in range(CALLS)]
        self.residual = [rows() for _ in range(CALLS)]

    def around(
        self, i: int, mlp: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """An MLP with the norms before and behind it."""
        x = layer_norms.launch_layer_norms(
            self.attention[i], self.residual[i], self.norm, EPS, self.norm, EPS, None, Kind.CUTE
        )[0]
        after = layer_tail.NextNorm(self.norm, EPS, Kind.CUTE)
        y = mlp(x, *self.weights[i % len(self.weights)])
        return layer_tail.launch_layer_tail(
            y, self.norm, EPS, self.residual[i], self.one, None, after
        )[0]

    def apart(self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """The MLP alone, a launch for each product."""
        for weight, epilogue in ((gate_up, Epilogue.GELU_AND_MUL), (down, Epilogue.NONE)):
            cut = skinny_gemm.cut(weight, epilogue)
            x = skinny_gemm.launch_skinny_gemm(x, weight, cut, epilogue, None, self.zeros)
        return x

    def few(
        self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, tiles: Tiles
    ) -> torch.Tensor:
        """The MLP alone, in one launch."""
        return kernel.launch_mlp_few(x, gate_up, down, self.zeros[-kernel.COUNTS :], tiles)

    def two_launches(self, i: int) -> torch.Tensor:
        """As the patch `skinny_gemm` has it."""
        return self.around(i, self.apart)

    def at_once(self, tiles: Tiles) -> Callable[[int], torch.Tensor]:
        """One launch."""
        return lambda i: self.around(i, partial(self.few, tiles=tiles))


def _compile(job: tuple[int, int, int, Tiles]) -> str:
    """Fill Triton's cache, in a process of its own; returns why it cannot run, or nothing."""
    hidden, width, tokens, tiles = job

    def run() -> None:
        pdl.wanted = True
        layers = Layers(hidden, width, 1)
        layers.draw(tokens)
        layers.at_once(tiles)(0)
        torch.cuda.synchronize()

    return cuts.problem(run)


def measured(
    layers: Layers, tokens: int, replays: int, base: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows for one shape and number of tokens."""
    layers.draw(tokens)
    calls: dict[tuple[str, str], Callable[[int], torch.Tensor]] = {
        ("two launches", ""): layers.two_launches
    }
    calls |= {("at once", cuts.text(tiles)): layers.at_once(tiles) for tiles in CUTS}
    us = timed(calls, CALLS, replays)
    return cuts.rows(us, "two launches", layers.bytes, base | {"tokens": tokens})


def main(
    models: Annotated[str, typer.Option(help="Comma list")] = "e2b,e4b,12b,31b",
    tokens: Annotated[str, typer.Option(help="Comma list")] = "1,2",
    workers: Annotated[int, typer.Option(help="Processes that compile")] = 10,
    replays: Annotated[int, typer.Option(help="Readings per measurement")] = 9,
    out: Annotated[Path, typer.Option(help="CSV to write")] = Path("mlp-few.csv"),
) -> None:
    """Measure."""
    counts = [int(value) for value in tokens.split(",")]
    pdl.wanted = True
    shapes = [(model, *shape) for model in models.split(",") for shape in widths(model)]
    jobs = [
        (hidden, width, count, tiles)
        for _, hidden, width in shapes
        for count in {1 << (count - 1).bit_length(): count for count in counts}.values()
        for tiles in CUTS
    ]
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        cuts.tell(jobs, pool.map(_compile, jobs))
        for model, hidden, width in shapes:
            layers = Layers(hidden, width)
            base = provenance() | {"model": model, "hidden": hidden, "width": width}
            for count in counts:
                rows += measured(layers, count, replays, base)
                pd.DataFrame(rows).to_csv(out, index=False)
            del layers
    shown = ["model", "width", "tokens", "what", "cut", "us", "ratio", "gb_per_s"]
    print(pd.DataFrame(rows)[shown].to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
