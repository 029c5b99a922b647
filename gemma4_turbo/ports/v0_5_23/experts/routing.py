"""``gemma4_fused_routing``, SGLang's routing of the router's logits: what `router_few` or `feed_forward_few`
has found already.

Stock's routing function, a closure of ``Gemma4MoE.__init__``, calls it for logits on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.decode_step import layer_steps
from gemma4_turbo.ports.any.experts import router_few

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.fusion import Step

TARGET = "sglang.kernels.ops.moe.gemma4_routing:gemma4_fused_routing"

Routing = tuple[torch.Tensor, torch.Tensor]
"""Weights and ids."""


def enable(fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement, which the patches share."""
    layer_steps.enable(fusions, run)
    return {TARGET: _replacement(stock[TARGET])}


@functools.cache
def _replacement(route: Callable[..., Routing]) -> Callable[..., Routing]:
    """The same for each patch: they share it."""

    @functools.wraps(route)
    def gemma4_fused_routing(
        gating_output: torch.Tensor, per_expert_scale: torch.Tensor, topk: int
    ) -> Routing:
        found = None
        if not torch.compiler.is_compiling():
            found = router_few.routed(gating_output, per_expert_scale, topk)
        return route(gating_output, per_expert_scale, topk) if found is None else found

    return gemma4_fused_routing
