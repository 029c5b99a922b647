"""A mixture-of-experts layer's feed-forward of a few tokens: router, dense MLP and experts in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions.comparison import too_far, two_rows
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.fusions.router_few import LOGITS, WEIGHTS
from gemma4_turbo.kernels import feed_forward_few as kernel
from gemma4_turbo.kernels import router_few
from gemma4_turbo.kernels.feed_forward_few import Found, Inputs, Weights

MOST_TOKENS = 2
"""The kernel takes more, but on an H200 gains nothing over the launches that it replaces."""
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

    def like(self, args: Args) -> torch.Tensor:
        return args.inputs.mlp

    def drawn(self, args: Args) -> Args:
        """On weights of its own, few experts: what is in a layer's says nothing of the code."""
        x, w = args.inputs.mlp, args.weights
        (hidden, width), narrow = w.down.shape, w.w2.shape[2]
        return args._replace(
            inputs=Inputs(*(two_rows(x).roll(shift, -1) for shift in range(3))),
            weights=random_weights(hidden, width, narrow, args.topk + 1, x, w.scale.dtype),
        )

    def checks(self, device: str) -> list[Check]:
        """The whole launch against plain torch with stock's roundings, 26B-A4B's shape with few experts."""
        sizes = (2816, 2112, 704, 9, 8) if device == "cuda" else (64, 16, 8, 5, 2)
        hidden, width, narrow, experts, topk = sizes
        generator = torch.Generator(device).manual_seed(5)
        x = torch.randn(3, MOST_TOKENS, hidden, generator=generator, device=device).bfloat16()
        weights = random_weights(hidden, width, narrow, experts, x, torch.float32)
        checks = []
        for tokens in (1, MOST_TOKENS):
            inputs = Inputs(*x[:, :tokens].unbind())
            found = kernel.feed_forward_few(inputs, weights, topk)
            pairs = (
                (found.mlp_output, kernel.reference_mlp(inputs, weights)),
                (found.experts_output, kernel.reference_experts(inputs, weights, found.routed)),
            )
            far = wrong(found, inputs, weights, topk)
            checks.append(
                Check(
                    self.patch,
                    f"{tokens} tokens, a dense MLP of {width} and {topk} of {experts} experts of {narrow}",
                    "plain torch with stock's roundings",
                    2 * tokens * hidden,
                    sum(int((ours != theirs).sum()) for ours, theirs in pairs),
                    f"{OUTPUT:.1e} of a row's largest, ids of these logits; {far} further",
                    far == 0,
                )
            )
        return checks

    def differing(self, args: Args, kind: int) -> int:
        """Numbers that are too far from the reference's, of each kernel that is compiled."""
        drawn, found = self.drawn(args), 0
        for rows in (1, MOST_TOKENS):
            few = drawn._replace(inputs=Inputs(*(x[:rows] for x in drawn.inputs)))
            found += wrong(self.launch(few, kind), few.inputs, few.weights, few.topk)
        return found


def random_weights(
    hidden: int, width: int, narrow: int, experts: int, like: torch.Tensor, scale: torch.dtype
) -> Weights:
    """Of a layer with so many experts, in the dtype of ``like`` but for the scale; the same every time."""
    generator = torch.Generator(like.device).manual_seed(5)

    def rows(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=like.dtype, device=like.device)
        return made.normal_(0, shape[-1] ** -0.5, generator=generator)

    return Weights(
        rows(2 * width, hidden),
        rows(hidden, width),
        rows(experts, hidden),
        rows(experts).abs().to(scale),
        rows(experts, 2 * narrow, hidden),
        rows(experts, hidden, narrow),
    )


def wrong(ours: Found, inputs: Inputs, weights: Weights, topk: int) -> int:
    """Numbers that are too far from the reference's. The experts' are compared by our own routing."""
    theirs = kernel.reference_feed_forward_few(inputs, weights, topk)
    found = too_far(ours.routed.logits, theirs.routed.logits, LOGITS)
    factors, ids = router_few.reference_routing(ours.routed.logits, weights.scale, topk)
    near = (ours.routed.weights - factors).abs() <= factors.abs() * WEIGHTS
    found += int((~near).sum()) + int((ours.routed.ids != ids).sum())
    # A logit that rounds elsewhere may choose another expert.
    experts = kernel.reference_experts(inputs, weights, ours.routed)
    found += too_far(ours.mlp_output, theirs.mlp_output, OUTPUT)
    return found + too_far(ours.experts_output, experts, OUTPUT)
