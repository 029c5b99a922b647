"""``gemma4_fused_routing``, SGLang's routing of the router's logits: what `router_few` or `feed_forward_few`
has found already.

Stock's routing function, a closure of ``Gemma4MoE.__init__``, calls it for logits on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any import feed_forward_few, layer_steps, router_few

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.fusion import Step

TARGET = "sglang.kernels.ops.moe.gemma4_routing:gemma4_fused_routing"

Routing = tuple[torch.Tensor, torch.Tensor]
"""Weights and ids."""


def enable(fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement, which the patches share."""
    layer_steps.enable(fusions, run)
    route = stock[TARGET]
    if not _shared or _shared[0] is not route:
        _shared[:] = [route, _replacement(route)]
    return {TARGET: _shared[1]}


_shared: list[Callable[..., Routing]] = []  # SGLang's function, and what replaces it


def _replacement(route: Callable[..., Routing]) -> Callable[..., Routing]:
    @functools.wraps(route)
    def gemma4_fused_routing(
        gating_output: torch.Tensor, per_expert_scale: torch.Tensor, topk: int
    ) -> Routing:
        found = None
        if not torch.compiler.is_compiling():
            asked = gating_output, per_expert_scale, topk
            found = feed_forward_few.routed(*asked) or router_few.routed(*asked)
        return route(gating_output, per_expert_scale, topk) if found is None else found

    return gemma4_fused_routing
