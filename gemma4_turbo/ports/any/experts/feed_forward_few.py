"""`feed_forward_few` in a layer: one launch computes the router, the dense MLP and the experts.

SGLang's experts are called as ever, with the logits of that launch: its routing function is given what the
launch has found, and its fused experts, where they are called with that very routing, the layer's own
weights and input, compute nothing. What they would have written, the layer takes from the launch. Whoever
hooks, records or changes something in between sees stock's tensors with stock's meaning; where the call is
any other, the experts run, and only the launch was for nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from gemma4_turbo.fusions import feed_forward_few
from gemma4_turbo.fusions.site import UNPROVEN, Site, eager_site_of, renewed
from gemma4_turbo.kernels import feed_forward_few as kernel
from gemma4_turbo.ports.any import linear, sglang_types
from gemma4_turbo.ports.any.experts import router_few
from gemma4_turbo.runtime import handed
from gemma4_turbo.runtime.custom_ops import TRACED, capturing

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import MLP, DecoderLayer, MoE

FEED_FORWARD_FEW = feed_forward_few.FeedForwardFew("feed_forward_few")
NAME = "feed_forward_few"

TOO_MANY_TOKENS = f"more than {feed_forward_few.MOST_TOKENS} tokens"
NOT_ASKED = "SGLang did not run its fused experts on this routing and the layer's own weights"
NO_NORMS = "layer_norms did not make the layer's inputs"
SUMMED = "the layer sums over several GPUs"
INFERENCE = "inference mode: its tensors do not tell of a change in place"
WENT_ON = "somebody goes on with the experts' output before the layer gets it"


@dataclasses.dataclass
class Handed:
    """What the newest launch has found, while its layer's experts run."""

    x: torch.Tensor  # the experts' input
    weights: kernel.Weights
    found: kernel.Found
    versions: tuple[int | None, ...]  # of the ids, their weights and the input
    taken: bool = False


_slot: list[Handed | None] = [None]


def unfit(layer: DecoderLayer) -> str | None:
    """Why a layer's feed-forward cannot be one launch, or None."""
    moe, mlp = layer.moe, layer.mlp
    reason = (
        sglang_types.experts_unfit(moe)
        or sglang_types.rules().parallel_unfit(moe)
        or sglang_types.reduction_unfit(moe.experts)
        or router_few.unfit(layer)
    )
    if reason is None and type(mlp) is not sglang_types.types().mlp:
        reason = f"the dense MLP is a {sglang_types.name(mlp)}"
    reason = reason or linear.module_unfit(mlp.gate_up_proj) or linear.module_unfit(mlp.down_proj)
    if reason is not None:
        return reason
    for name in ("w13_weight", "w2_weight"):
        if type(getattr(moe.experts, name, None)) is not torch.nn.Parameter:
            return f"the experts' {name} is a {sglang_types.name(getattr(moe.experts, name, None))}"
    return None


def _weights(mlp: MLP, moe: MoE, router: torch.Tensor) -> kernel.Weights:
    experts = moe.experts
    return kernel.Weights(
        mlp.gate_up_proj.weight,
        mlp.down_proj.weight,
        router,
        moe.per_expert_scale,
        experts.w13_weight,
        experts.w2_weight,
    )


class FeedForwardSite(Site):
    """What a layer's dense MLP, router and experts allow, looked at once. Kept on the experts' block."""

    def __init__(self, moe: MoE, layer: DecoderLayer) -> None:
        self.feed_forward_few: str | None = unfit(layer) or UNPROVEN
        key: tuple[object, ...] = ()
        if self.feed_forward_few is UNPROVEN:
            mlp, router = layer.mlp, layer.router
            self.weights = _weights(mlp, moe, router.proj.weight)
            shapes = tuple(tuple(weight.shape) for weight in self.weights)
            kinds = self.weights.gate_up.dtype, self.weights.scale.dtype, moe.topk.topk_config.top_k
            key = (shapes, *kinds, str(self.weights.gate_up.device))
        super().__init__(key, None)
        self.layer = layer  # another one may have the same block
        self.depends_on((layer, "mlp"), (layer, "router"), (layer, "moe"), (moe, "experts"))
        if self.feed_forward_few is not UNPROVEN:
            return
        products = mlp.gate_up_proj, mlp.down_proj, router.proj
        experts, topk = moe.experts, moe.topk
        self.cover(NAME, mlp, *products, mlp.act_fn, router, moe, topk, experts)
        for product in products:
            self.depends_on(*sglang_types.linear_parts(product))
        self.depends_on(
            *((mlp, name) for name in ("gate_up_proj", "down_proj", "act_fn")),
            *((router, name) for name in ("norm", "proj")),
            *((moe, name) for name in ("topk", "per_expert_scale")),
            *(
                (experts, name)
                for name in ("w13_weight", "w2_weight", "quant_method", "dispatcher")
            ),
            (topk, "topk_config"),
            (topk.topk_config, "custom_routing_function"),
            *sglang_types.reduction_parts(experts),
        )


def outputs(
    layer: DecoderLayer,
    mlp_input: torch.Tensor,
    router_input: torch.Tensor,
    experts_input: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The dense MLP's and the experts' output, or None: nothing done, and counted as declined."""
    run = FEED_FORWARD_FEW.run
    if run is None:
        return None
    if torch.compiler.is_compiling():
        FEED_FORWARD_FEW.declined(TRACED)
        return None
    _slot[0] = None
    if (
        not 0 < mlp_input.shape[0] <= feed_forward_few.MOST_TOKENS
    ):  # every prefill: no time for more
        run.declined(TOO_MANY_TOKENS if mlp_input.shape[0] else "no tokens")
        return None
    moe = layer.moe
    site = eager_site_of(moe, FeedForwardSite, layer)
    if site.layer is not layer:
        site = renewed(moe, FeedForwardSite, layer)
    if FEED_FORWARD_FEW.settled(site):
        return None
    inputs = kernel.Inputs(mlp_input, router_input, experts_input)
    counts = linear.zeros_of(moe, kernel.COUNTS, mlp_input.device)
    topk = moe.topk.topk_config.top_k
    args = feed_forward_few.Args(inputs, site.weights, topk, counts)
    declined = (
        sglang_types.batch_invariant_unfit()
        or (
            INFERENCE if torch.is_inference_mode_enabled() or experts_input.is_inference() else None
        )
        or sglang_types.rules().routing_unfit()
        or linear.mlp_unfit(layer.mlp)
        or FEED_FORWARD_FEW.unfit(args)
    )
    if FEED_FORWARD_FEW.admit(site, declined, lambda: args) is None:
        return None
    found = FEED_FORWARD_FEW.launch(args, 0)
    routed = found.routed
    versions = tuple(map(handed.version, (routed.ids, routed.weights, experts_input)))
    kept = _slot[0] = Handed(experts_input, site.weights, found, versions)
    router_few.hand_over(layer, site, routed, site.weights.scale, topk)
    try:
        summed = moe(experts_input, routed.logits)
    finally:
        _slot[0] = None
        router_few.forget()
    if not kept.taken:
        # The experts' output is stock's, of our logits.
        if experts_input.is_cuda:  # without a GPU SGLang routes in another way
            site.feed_forward_few = NOT_ASKED
        run.declined(NOT_ASKED)
        return found.mlp_output, summed
    if not handed.same(summed, experts_input):
        # The buffer was never filled: once more, as stock.
        site.feed_forward_few = WENT_ON
        run.declined(WENT_ON)
        return found.mlp_output, moe(experts_input, routed.logits)
    run.engaged(capturing())
    return found.mlp_output, found.experts_output


def are_computed(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> bool:
    """Whether fused experts called with these are what the newest launch has computed."""
    kept = _slot[0]
    if kept is None or kept.taken:
        return False
    routed, weights = kept.found.routed, kept.weights
    pairs = (
        (x, kept.x),
        (w13, weights.w13),
        (w2, weights.w2),
        (topk_weights, routed.weights),
        (topk_ids, routed.ids),
    )
    return (
        all(handed.same(*pair) for pair in pairs)
        and tuple(map(handed.version, (topk_ids, topk_weights, x))) == kept.versions
    )


def taken(x: torch.Tensor) -> torch.Tensor:
    """The fused experts' result, ``x``, to which nothing was written: the layer knows."""
    kept = _slot[0]
    assert kept is not None
    kept.taken = True
    return x
