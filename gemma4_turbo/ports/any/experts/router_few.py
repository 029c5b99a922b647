"""`router_few` in a layer: the launch of the router's product routes as well, and is asked for it later.

The layer hands its logits to the experts, as stock does, and SGLang asks a routing function for their
top-k. That function is given what the launch has found, where it is asked for the very logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from gemma4_turbo.fusions import router_few
from gemma4_turbo.fusions.site import UNPROVEN, Site, eager_site_of
from gemma4_turbo.kernels import router_few as kernel
from gemma4_turbo.ports.any import linear, sglang_types
from gemma4_turbo.runtime import handed
from gemma4_turbo.runtime.custom_ops import TRACED

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import DecoderLayer, Router

ROUTER_FEW = router_few.RouterFew("router_few")
NAME = "router_few"

TOO_MANY_TOKENS = f"more than {kernel.MAX_TOKENS} tokens"
CLOSURE = "Gemma4MoE.__init__.<locals>.routing_function"
NOT_ASKED = "SGLang did not ask its routing function for the router's logits"


class Handed(NamedTuple):
    """What the newest launch has found, for the routing function."""

    layer: DecoderLayer
    site: Site
    found: kernel.Routed
    version: int | None  # of the logits, that a change in place raises; none in inference mode
    scale: torch.Tensor
    topk: int


_slot: list[Handed | None] = [None]


def unfit(layer: DecoderLayer) -> str | None:
    """Why a layer's router and its routing cannot be one launch, or None."""
    moe = layer.moe
    if type(moe) is not sglang_types.types().moe:
        return f"the experts' block is a {sglang_types.name(moe)}"
    reason = sglang_types.router_unfit(layer.router)
    if reason is None:
        proj = layer.router.proj
        reason = sglang_types.linear_unfit(proj) or sglang_types.rules().output_unfit(proj)
    if reason is not None:
        return reason
    routing = moe.topk.topk_config.custom_routing_function
    code = getattr(routing, "__code__", None)
    # By its code: a wrapper has the name as well.
    if code is None or code.co_qualname != CLOSURE or hasattr(routing, "__wrapped__"):
        return f"the routing function is {sglang_types.name(routing)}"
    return sglang_types.weight_unfit(moe.per_expert_scale)


class RouterSite(Site):
    """What a router and the routing behind it allow, looked at once. Kept on the router, and made there
    only while the patch is in: a layer without it looks at none of these parts."""

    def __init__(self, router: Router, layer: DecoderLayer) -> None:
        moe = layer.moe
        self.router_few: str | None = unfit(layer) or UNPROVEN
        fits = self.router_few is UNPROVEN
        key: tuple[object, ...] = ()
        if fits:
            weight, scale = router.proj.weight, moe.per_expert_scale
            kinds = weight.dtype, scale.dtype, moe.topk.topk_config.top_k
            key = (tuple(weight.shape), *kinds, str(weight.device))
        super().__init__(key, None)
        self.depends_on((layer, "moe"))
        if fits:
            proj, topk = router.proj, moe.topk
            self.cover(NAME, router, proj, moe, topk)
            self.depends_on(
                *sglang_types.linear_parts(proj),
                (router, "norm"),
                (router, "proj"),
                (moe, "topk"),
                (moe, "per_expert_scale"),
                (topk, "topk_config"),
                (topk.topk_config, "custom_routing_function"),
            )


def logits(layer: DecoderLayer, x: torch.Tensor) -> torch.Tensor:
    """The router's product with its normed input; what follows from it is kept for `routed`."""
    proj, run = layer.router.proj, ROUTER_FEW.run
    if run is None:
        return linear.project(proj, x)
    if torch.compiler.is_compiling():
        ROUTER_FEW.declined(TRACED)
        return linear.project(proj, x)
    forget()  # of a layer that has ended with an exception
    if not 0 < x.shape[0] <= kernel.MAX_TOKENS:  # every prefill: no time for more
        run.declined(TOO_MANY_TOKENS if x.shape[0] else "no tokens")
        return linear.project(proj, x)
    site = eager_site_of(layer.router, RouterSite, layer)
    if ROUTER_FEW.settled(site):
        return linear.project(proj, x)
    moe, weight = layer.moe, proj.weight
    scale, topk = moe.per_expert_scale, moe.topk.topk_config.top_k
    args = router_few.Args(x, weight, scale, topk, linear.zeros_of(proj, 1, weight.device))
    declined = sglang_types.batch_invariant_unfit() or sglang_types.rules().logits_unfit()
    found = ROUTER_FEW(site, args, declined)
    if found is None:
        return linear.project(proj, x)
    hand_over(layer, site, found, scale, topk)
    return found.logits


def hand_over(
    layer: DecoderLayer, site: Site, found: kernel.Routed, scale: torch.Tensor, topk: int
) -> None:
    """What a launch has found is kept for `routed`, until `forget`."""
    _slot[0] = Handed(layer, site, found, handed.version(found.logits), scale, topk)


def forget() -> None:
    """Nothing is kept any more."""
    _slot[0] = None


def routed(
    logits: torch.Tensor, scale: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weights and ids of the very logits that the newest launch has made, or None.

    Once: who asks again, where the experts run a second time, may have written to the first ones.
    """
    kept = _slot[0]
    if kept is None or logits is not kept.found.logits or scale is not kept.scale:
        return None
    if topk != kept.topk or handed.version(logits) != kept.version:
        return None
    forget()
    return kept.found.weights, kept.found.ids


def done(layer: DecoderLayer, x: torch.Tensor) -> None:
    """The layer's experts have run. Where nobody asked, the next launch would be for nothing as well."""
    kept = _slot[0]
    if kept is not None and kept.layer is layer:
        if x.is_cuda:  # without a GPU SGLang routes in another way
            setattr(kept.site, NAME, NOT_ASKED)
        forget()
