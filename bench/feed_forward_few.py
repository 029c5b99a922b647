"""A layer's feed-forward for a few tokens of 26B-A4B: one launch against the launches that it replaces.

    python bench/feed_forward_few.py --out feed-forward-few.csv

Every call is one of a replayed CUDA graph, with dependent launch, over weights of several layers in turn, so
that none comes from the L2 cache: the norms between attention and feed-forward, the feed-forward, the
norms at the layer's end. Rows of the result, by how the feed-forward runs:

* ``two streams``: the dense MLP's two launches beside the router's and the experts' two, as the patches
  `mlp_stream`, `skinny_gemm`, `router_few` and `experts_few` have it;
* ``one stream``: the same launches one after the other;
* ``at once``: `gemma4_turbo.kernels.feed_forward_few`, a row for each cut, numbered as its `Tiles`.

``gb_per_s`` counts the weights that are read, distinct experts' once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
from gemma4_turbo.cli.tuning.timing import timed  # noqa: E402
from gemma4_turbo.kernels import experts_few, pdl, router_few, skinny_gemm  # noqa: E402
from gemma4_turbo.kernels import feed_forward_few as kernel  # noqa: E402
from gemma4_turbo.kernels.dataflow import Product  # noqa: E402
from gemma4_turbo.kernels.feed_forward_few import Inputs, Tiles, Weights  # noqa: E402
from gemma4_turbo.kernels.norms import layer_norms, layer_tail  # noqa: E402
from gemma4_turbo.kernels.norms.rmsnorm import Kind  # noqa: E402
from gemma4_turbo.kernels.skinny_gemm import Epilogue  # noqa: E402

HIDDEN, WIDTH, NARROW, EXPERTS, TOPK = 2816, 2112, 704, 128, 8
LAYERS, CALLS = 4, 16
DEVICE = "cuda"
EPS = 1e-6
DEFAULT = kernel.choose(TOPK)
# Twelve programs run at once on a multiprocessor: 4 KB on its way in each are 48 KB, and memory wants 26 at
# least. The default's other products have 2 KB.
WIDE = DEFAULT._replace(dense=Product(4, 1, 256), dense_down=Product(4, 2, 256))
# One matrix at a time, then those together that gained alone.
CUTS = (
    DEFAULT,
    DEFAULT._replace(router=Product(1, 8, 256)),
    DEFAULT._replace(dense=Product(2, 2, 256)),
    DEFAULT._replace(dense=Product(4, 1, 256)),
    DEFAULT._replace(chosen=Product(2, 2, 256)),
    DEFAULT._replace(chosen=Product(8, 1, 256)),
    DEFAULT._replace(dense_down=Product(2, 1, 256)),
    DEFAULT._replace(dense_down=Product(4, 2, 256)),
    DEFAULT._replace(dense_down=Product(8, 1, 256)),
    DEFAULT._replace(chosen_down=Product(4, 1, 256)),
    DEFAULT._replace(chosen_down=Product(4, 1, 128)),
    DEFAULT._replace(chosen_down=Product(8, 1, 64)),
    DEFAULT._replace(dense_down=Product(2, 1, 256), chosen_down=Product(4, 1, 256)),
    DEFAULT._replace(dense_down=Product(4, 2, 256), chosen_down=Product(4, 1, 256)),
    DEFAULT._replace(dense_down=Product(4, 2, 256), chosen_down=Product(8, 1, 64)),
    WIDE._replace(chosen_down=Product(4, 1, 256)),
    WIDE,
    WIDE._replace(chosen=Product(8, 1, 256)),
)


class Layers:
    """Weights of several layers, and inputs for one number of tokens."""

    def __init__(self, count: int = LAYERS, experts: int = EXPERTS) -> None:
        generator = self.generator = torch.Generator(DEVICE).manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            made = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
            return made.normal_(0, shape[-1] ** -0.5, generator=generator)

        self.weights = [
            Weights(
                drawn(2 * WIDTH, HIDDEN),
                drawn(HIDDEN, WIDTH),
                drawn(experts, HIDDEN),
                torch.ones(experts, device=DEVICE),
                drawn(experts, 2 * NARROW, HIDDEN),
                drawn(experts, HIDDEN, NARROW),
            )
            for _ in range(count)
        ]
        self.norm = 1 + drawn(HIDDEN)
        self.one = torch.ones(1, dtype=torch.bfloat16, device=DEVICE)
        self.cuts = [
            [skinny_gemm.cut(weight, epilogue) for weight, epilogue in self._products(w)]
            for w in self.weights
        ]
        self.zeros = torch.zeros(8192, dtype=torch.int32, device=DEVICE)
        self.side = torch.cuda.Stream() if DEVICE == "cuda" else None

    @staticmethod
    def _products(w: Weights) -> tuple[tuple[torch.Tensor, Epilogue], ...]:
        return (w.gate_up, Epilogue.GELU_AND_MUL), (w.down, Epilogue.NONE)

    def draw(self, tokens: int) -> None:
        """New activations."""

        def rows() -> torch.Tensor:
            made = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
            return made.normal_(generator=self.generator)

        self.tokens = tokens
        self.attention = [rows() for _ in range(CALLS)]
        self.residual = [rows() for _ in range(CALLS)]

    def inputs(self, i: int) -> Inputs:
        """Of the feed-forward, after the norms."""
        router = layer_norms.Router(self.norm, None, EPS, self.norm, EPS)
        found = layer_norms.launch_layer_norms(
            self.attention[i], self.residual[i],
            self.norm, EPS, self.norm, EPS, router, Kind.CUTE,
        )  # fmt: skip
        return Inputs(*found)  # type: ignore[arg-type]

    def end(self, i: int, mlp: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The layer's end."""
        branch = layer_tail.Experts(experts, self.norm, EPS, self.norm, EPS)
        after = layer_tail.NextNorm(self.norm, EPS, Kind.CUTE)
        return layer_tail.launch_layer_tail(
            mlp, self.norm, EPS, self.residual[i], self.one, branch, after
        )[0]

    def mlp(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The dense MLP's two launches."""
        at = i % len(self.weights)
        for (weight, epilogue), cut in zip(
            self._products(self.weights[at]), self.cuts[at], strict=True
        ):
            x = skinny_gemm.launch_skinny_gemm(x, weight, cut, epilogue, None, self.zeros)
        return x

    def experts(self, i: int, inputs: Inputs) -> torch.Tensor:
        """The router's launch and the experts' two."""
        w = self.weights[i % len(self.weights)]
        routed = router_few.launch_router_few(
            inputs.router, w.router, w.scale, TOPK, self.zeros[-1:]
        )
        return experts_few.launch_experts_few(
            inputs.experts, w.w13, w.w2, routed.weights, routed.ids, None, experts_few.choose(TOPK)
        )

    def apart(self, i: int, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of the dense MLP and of the experts, by all five launches."""
        return self.mlp(i, inputs.mlp), self.experts(i, inputs)

    def few(self, i: int, inputs: Inputs, tiles: Tiles) -> kernel.Found:
        """Likewise by one launch."""
        counts = self.zeros[-2 - kernel.COUNTS : -2]
        weights = self.weights[i % len(self.weights)]
        return kernel.launch_feed_forward_few(inputs, weights, TOPK, counts, tiles)

    def two_streams(self, i: int) -> torch.Tensor:
        """As the patches have it."""
        inputs = self.inputs(i)
        if self.side is None:
            return self.end(i, *self.apart(i, inputs))
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            mlp = self.mlp(i, inputs.mlp)
        experts = self.experts(i, inputs)
        main.wait_stream(self.side)
        return self.end(i, mlp, experts)

    def one_stream(self, i: int) -> torch.Tensor:
        """The same launches one after the other."""
        return self.end(i, *self.apart(i, self.inputs(i)))

    def at_once(self, tiles: Tiles) -> Callable[[int], torch.Tensor]:
        """One launch."""

        def run(i: int) -> torch.Tensor:
            found = self.few(i, self.inputs(i), tiles)
            return self.end(i, found.mlp_output, found.experts_output)

        return run

    def bytes(self) -> float:
        """Weights that a call reads, by the routing of the first."""
        w = self.weights[0]
        ids = router_few.reference_router_few(self.inputs(0).router, w.router, w.scale, TOPK).ids
        dense = w.gate_up.numel() + w.down.numel() + w.router.numel()
        distinct = len(ids.unique())
        return 2.0 * (dense + distinct * 3 * HIDDEN * NARROW)


def _compile(job: tuple[int, Tiles]) -> str:
    """Fill Triton's cache, in a process of its own; returns why it cannot run, or nothing."""
    tokens, tiles = job

    def run() -> None:
        pdl.wanted = True
        layers = Layers(1, EXPERTS)
        layers.draw(tokens)
        layers.at_once(tiles)(0)
        torch.cuda.synchronize()

    return cuts.problem(run)


def measured(
    layers: Layers, tokens: int, replays: int, base: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows for one number of tokens."""
    layers.draw(tokens)
    calls: dict[tuple[str, str], Callable[[int], torch.Tensor]] = {
        ("two streams", ""): layers.two_streams,
        ("one stream", ""): layers.one_stream,
    }
    for tiles in CUTS:
        calls["at once", cuts.text(tiles)] = layers.at_once(tiles)
    us = timed(calls, CALLS, replays)
    return cuts.rows(us, "two streams", layers.bytes(), base | {"tokens": tokens})


def main(
    tokens: Annotated[str, typer.Option(help="Comma list")] = "1,2",
    workers: Annotated[int, typer.Option(help="Processes that compile")] = 10,
    replays: Annotated[int, typer.Option(help="Readings per measurement")] = 9,
    out: Annotated[Path, typer.Option(help="CSV to write")] = Path("feed-forward-few.csv"),
) -> None:
    """Measure."""
    counts = [int(value) for value in tokens.split(",")]
    pdl.wanted = True
    blocks = {1 << (count - 1).bit_length(): count for count in counts}
    jobs = [(count, tiles) for tiles in CUTS for count in blocks.values()]
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        layers = Layers()
        cuts.tell(jobs, pool.map(_compile, jobs))
        for count in counts:
            rows += measured(layers, count, replays, provenance())
            pd.DataFrame(rows).to_csv(out, index=False)
    print(
        pd.DataFrame(rows)[["tokens", "what", "cut", "us", "ratio", "gb_per_s"]].to_string(
            index=False
        )
    )


if __name__ == "__main__":
    typer.run(main)
