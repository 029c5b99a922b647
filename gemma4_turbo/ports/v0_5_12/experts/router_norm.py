"""`router_norm`: the router's norm and scale in one launch, where `layer_norms` has not done it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import router_norm
from gemma4_turbo.fusions.fusion import forget
from gemma4_turbo.fusions.site import UNPROVEN, Site, eps_of, site_of
from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.ports.v0_5_12 import classes

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import Router

TARGET = "sglang.srt.models.gemma4_causal:Gemma4Router.forward"

ROUTER_NORM = router_norm.RouterNorm("router_norm")
_stock: dict[str, Callable[..., torch.Tensor]] = {}


class RouterSite(Site):
    """What a router allows, looked at once."""

    def __init__(self, router: Router) -> None:
        unfit = sglang_types.router_unfit(router)
        key: tuple[object, ...] = ()
        if unfit is None:
            key = (router.scale.shape[0], router.scale.dtype, str(router.scale.device))
        super().__init__(key, router.norm)
        self.router_norm: str | None = unfit or UNPROVEN
        self.cover("router_norm", router.norm)
        self.depends_on((router, "norm"), (router, "scale"))


def forward(self: Router, x: torch.Tensor) -> torch.Tensor:
    """Router logits ``[T, E]``."""
    site = site_of(self, RouterSite)
    normed = None
    if not ROUTER_NORM.settled(site):
        args = router_norm.Args(x, self.scale.data, self.root_size, eps_of(self.norm))
        normed = ROUTER_NORM(site, args, sglang_types.batch_invariant_unfit())
    if normed is None:
        return _stock[TARGET](self, x)
    router_logits, _ = self.proj(normed)
    return router_logits


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The router's forward."""
    _stock[TARGET] = stock[TARGET]
    classes.load()
    ROUTER_NORM.enable(run)
    return {TARGET: forward}


def undo(run: PatchRun) -> None:
    """Switch the fusion off."""
    ROUTER_NORM.run = None
    forget("router_norm")


def verify(run: PatchRun, device: str) -> list[Check]:
    """Kernel against stock's calls."""
    return ROUTER_NORM.checks(device)
