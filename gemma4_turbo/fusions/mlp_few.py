"""A dense MLP of a few tokens, both of its products in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions.comparison import telling, too_far, two_rows
from gemma4_turbo.fusions.examples import rows
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.kernels import mlp_few as kernel

MOST_TOKENS = 2
"""The kernel takes more; with each token a program holds more sums and reads no more."""
OUTPUT = 2.0**-6
"""Of the largest in a row: a rounding of bf16 in the last step, and of the activations before it."""


class Args(NamedTuple):
    """As `gemma4_turbo.kernels.mlp_few.mlp_few`."""

    x: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    counts: torch.Tensor | None


class MlpFew(Fusion[Args, torch.Tensor]):
    """`gemma4_turbo.kernels.mlp_few`. Within bounds: the order of its sums is its own."""

    follows_rmsnorm = False

    def unfit(self, args: Args) -> str | None:
        if args.counts is None:
            return "the dense MLP was not run before the capture"
        return kernel.unfit(args.x, args.gate_up, args.down)

    def launch(self, args: Args, kind: int) -> torch.Tensor:
        assert args.counts is not None
        return kernel.launch_mlp_few(args.x, args.gate_up, args.down, args.counts, kernel.TILES)

    def reference(self, args: Args) -> torch.Tensor:
        return kernel.reference_mlp_few(args.x, args.gate_up, args.down)

    def like(self, args: Args) -> torch.Tensor:
        return args.x

    def checks(self, device: str) -> list[Check]:
        """Against fp64, E4B's shape (a toy's without a GPU): no farther than stock's roundings plus 10 %."""
        hidden, width = (2560, 10240) if device == "cuda" else (256, 64)
        generator = torch.Generator(device).manual_seed(3)
        checks = []
        for tokens in (1, MOST_TOKENS):
            x = rows(device, hidden, 1)[-tokens:] / 30
            gate_up, down = (
                (torch.randn(n, k, generator=generator, device=device) / k**0.5).bfloat16()
                for n, k in ((2 * width, hidden), (hidden, width))
            )
            ours = kernel.mlp_few(x, gate_up, down).double()
            stock = kernel.reference_mlp_few(x, gate_up, down).double()
            exact = kernel.reference_mlp_few(x.double(), gate_up.double(), down.double())
            error, allowed = (float((y - exact).norm() / exact.norm()) for y in (ours, stock))
            checks.append(
                Check(
                    self.patch,
                    f"{tokens} tokens, a dense MLP of {width}",
                    "fp64",
                    ours.numel(),
                    int((ours != stock).sum()),
                    f"relative error {1.1 * allowed:.2e} (stock's plus 10 %), is {error:.2e}",
                    error <= 1.1 * allowed,
                )
            )
        return checks

    def differing(self, args: Args, kind: int) -> int:
        """Numbers that are too far from the reference's, of each kernel that is compiled."""
        found, x = 0, two_rows(args.x)
        weights = telling(args.gate_up), telling(args.down)
        for few in (x[:1], x[1:], x):
            drawn = Args(few, *weights, args.counts)
            found += too_far(self.launch(drawn, kind), self.reference(drawn), OUTPUT)
        return found
