"""A mixture-of-experts layer's feed-forward of a few tokens: router, dense MLP and experts in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_turbo.fusions.comparison import samples
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.fusions.router_few import LOGITS, WEIGHTS
from gemma4_turbo.kernels import feed_forward_few as kernel
from gemma4_turbo.kernels import router_few
from gemma4_turbo.kernels.feed_forward_few import Found, Inputs, Weights

OUTPUT = 2.0**-6
"""Of the largest in a row of an output: a rounding of bf16 in the last step, and of terms before it."""


class Args(NamedTuple):
    """As `gemma4_turbo.kernels.feed_forward_few.feed_forward_few`."""

    inputs: Inputs
    weights: Weights
    topk: int
    counts: torch.Tensor | None


class FeedForwardFew(Fusion[Args, Found]):
    """`gemma4_turbo.kernels.feed_forward_few`. Within bounds: the order of its sums is its own."""

    follows_rmsnorm = False

    def unfit(self, args: Args) -> str | None:
        if args.counts is None:
            return "the layer was not run before the capture"
        # Both are asked at a few launches of a server only: a CUDA graph replays the others.
        reason = kernel.weights_unfit(args.weights, args.topk)
        return reason or kernel.inputs_unfit(args.inputs, args.weights)

    def launch(self, args: Args, kind: int) -> Found:
        assert args.counts is not None
        return kernel.launch_feed_forward_few(
            args.inputs, args.weights, args.topk, args.counts, kernel.choose(args.topk)
        )

    def reference(self, args: Args) -> Found:
        return kernel.reference_feed_forward_few(*args[:3])

    def like(self, args: Args) -> torch.Tensor:
        return args.inputs.mlp

    def drawn(self, args: Args) -> Args:
        """On weights of its own, few experts: what is in a layer's says nothing of the code."""
        weights = args.weights
        experts, x = args.topk + 1, args.inputs.mlp

        def rows(seed: int, *shape: int) -> torch.Tensor:
            generator = torch.Generator(x.device).manual_seed(seed)
            made = torch.empty(shape, dtype=x.dtype, device=x.device)
            return made.normal_(0, shape[-1] ** -0.5, generator=generator)

        return Args(
            Inputs(*(samples(kernel.MAX_TOKENS, x).roll(shift, -1) for shift in range(3))),
            Weights(
                rows(0, *weights.gate_up.shape),
                rows(1, *weights.down.shape),
                rows(2, experts, weights.router.shape[1]),
                rows(3, experts).abs().to(weights.scale.dtype),
                rows(4, experts, *weights.w13.shape[1:]),
                rows(5, experts, *weights.w2.shape[1:]),
            ),
            args.topk,
            args.counts,
        )

    def differing(self, args: Args, kind: int) -> int:
        """Numbers that are too far from the reference's, of each kernel that is compiled."""
        drawn = self.drawn(args)
        return sum(
            self._differing(drawn._replace(inputs=Inputs(*(x[:rows] for x in drawn.inputs))), kind)
            for rows in (1, 2, kernel.MAX_TOKENS)
        )

    def _differing(self, drawn: Args, kind: int) -> int:
        """The experts' are compared by our own routing."""
        ours, theirs = self.launch(drawn, kind), self.reference(drawn)
        found = too_far(ours.routed.logits, theirs.routed.logits, LOGITS)
        weights, ids = router_few.reference_routing(
            ours.routed.logits, drawn.weights.scale, drawn.topk
        )
        near = (ours.routed.weights - weights).abs() <= weights.abs() * WEIGHTS
        found += int((~near).sum()) + int((ours.routed.ids != ids).sum())
        # A logit that rounds elsewhere may choose another expert.
        experts = kernel.reference_experts(drawn.inputs, drawn.weights, ours.routed)
        found += too_far(ours.mlp_output, theirs.mlp_output, OUTPUT)
        return found + too_far(ours.experts_output, experts, OUTPUT)


def too_far(ours: torch.Tensor, theirs: torch.Tensor, bound: float) -> int:
    """Numbers further apart than ``bound`` of their row's largest; a NaN is."""
    largest = theirs.float().abs().amax(-1, keepdim=True)
    return int((~((ours.float() - theirs.float()).abs() <= bound * largest)).sum())
