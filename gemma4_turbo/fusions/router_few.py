"""The router of a few tokens: its product, and the routing that follows from it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions.comparison import samples, telling
from gemma4_turbo.fusions.examples import rows
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.kernels import router_few as kernel
from gemma4_turbo.kernels.router_few import Routed

LOGITS = 2.0**-6
"""Of the largest in a row: two roundings of bf16."""
WEIGHTS = 2.0**-18
"""Of a weight: fp32's error of a sum and an exponential."""


class Args(NamedTuple):
    """As `gemma4_turbo.kernels.router_few.router_few`."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    topk: int
    arrived: torch.Tensor | None


class RouterFew(Fusion[Args, Routed]):
    """`gemma4_turbo.kernels.router_few`. Within bounds: the order of its sums is its own."""

    follows_rmsnorm = False

    def unfit(self, args: Args) -> str | None:
        if args.arrived is None:
            return "the router was not run before the capture"
        return kernel.unfit(*args[:4])

    def launch(self, args: Args, kind: int) -> Routed:
        assert args.arrived is not None
        return kernel.launch_router_few(*args[:4], args.arrived)

    def reference(self, args: Args) -> Routed:
        return kernel.reference_router_few(*args[:4])

    def like(self, args: Args) -> torch.Tensor:
        return args.x

    def checks(self, device: str) -> list[Check]:
        """The product against fp64, and the routing of its logits against plain torch, 26B-A4B's shape."""
        experts, hidden = (128, 2816) if device == "cuda" else (16, 64)
        checks = []
        for tokens in (1, kernel.MAX_TOKENS):
            x = rows(device, hidden, 1)[-tokens:] / 30
            generator = torch.Generator(device).manual_seed(3)
            w = torch.randn(experts, hidden, generator=generator, device=device) / hidden**0.5
            scale = torch.rand(experts, generator=generator, device=device).bfloat16() * 2
            w = w.bfloat16()
            found = kernel.router_few(x, w, scale, 8)
            stock = kernel.reference_router_few(x, w, scale, 8)
            exact = x.double() @ w.double().T
            error, allowed = (
                float((y.logits.double() - exact).norm() / exact.norm()) for y in (found, stock)
            )
            weights, ids = kernel.reference_routing(found.logits, scale, 8)
            near = bool(((found.weights - weights).abs() <= weights.abs() * WEIGHTS).all())
            checks.append(
                Check(
                    self.patch,
                    f"{tokens} tokens, {experts} experts of {hidden}",
                    "fp64, and plain torch for the routing",
                    found.logits.numel() + ids.numel() + weights.numel(),
                    int((found.logits != stock.logits).sum()),
                    f"relative error {1.1 * allowed:.2e} (stock's plus 10 %), is {error:.2e}; ids of these "
                    f"logits; {WEIGHTS:.1e} of a weight",
                    error <= 1.1 * allowed and torch.equal(found.ids, ids) and near,
                )
            )
        return checks

    def differing(self, args: Args, kind: int) -> int:
        """Logits too far from the product's, and numbers of the routing that are not those of the logits."""
        drawn = args._replace(
            x=samples(kernel.MAX_TOKENS, args.x),
            weight=telling(args.weight),
            scale=telling(args.scale[None])[0],
        )
        ours, stock = self.launch(drawn, kind), self.reference(drawn)
        bound = stock.logits.float().abs().amax(-1, keepdim=True) * LOGITS
        found = int((~((ours.logits.float() - stock.logits.float()).abs() <= bound)).sum())
        weights, ids = kernel.reference_routing(ours.logits, drawn.scale, drawn.topk)
        near = (ours.weights - weights).abs() <= weights.abs() * WEIGHTS
        return found + int((~near).sum()) + int((ours.ids != ids).sum())
