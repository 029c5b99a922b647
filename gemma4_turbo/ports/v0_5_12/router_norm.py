"""`router_norm`: the router's norm and scale in one launch, where `layer_norms` has not done it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import operators, steps
from gemma4_turbo.kernels.norms import router_norm as kernel
from gemma4_turbo.ports.v0_5_12 import checks as checks_of
from gemma4_turbo.ports.v0_5_12 import sglang_types
from gemma4_turbo.ports.v0_5_12.decoder_layer import batch_invariant

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

TARGET = "sglang.srt.models.gemma4_causal:Gemma4Router.forward"

NAME = "router_norm"
STEP = steps.Step()
_stock: dict[str, Any] = {}
_ops: dict[str, Any] = {}


class Plan(steps.Plan):
    """What a router allows, looked at once."""

    def __init__(self, router: Any) -> None:
        reason = sglang_types.router_unfit(router)
        key: tuple[Any, ...] = ()
        if reason is None:
            key = (router.scale.shape[0], router.scale.dtype, str(router.scale.device))
        super().__init__(key, router.norm)
        self.router_norm: str | None = reason or steps.UNPROVEN
        self.cover(NAME, router.norm)
        self.made_for((router, "norm"), (router, "scale"))


def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Router logits ``[T, E]``."""
    plan = steps.plan_of(self, Plan)
    if STEP.settled(plan, NAME):
        return _stock[TARGET](self, x)  # type: ignore[no-any-return]
    scale, eps = self.scale.data, steps.eps_of(self.norm)
    reason = batch_invariant() or kernel.unfit(x, scale, self.root_size)
    if not STEP.may_run(plan, NAME, reason, lambda: _compare(self, plan, x), x):
        return _stock[TARGET](self, x)  # type: ignore[no-any-return]
    if torch.compiler.is_compiling():
        x = _ops["router_norm"](x, scale, self.root_size, eps, plan.kinds.traced)
    else:
        x = kernel.launch_router_norm(x, scale, self.root_size, eps, plan.kinds.eager)
    router_logits, _ = self.proj(x)
    return router_logits  # type: ignore[no-any-return]


def _compare(self: Any, plan: Plan, like: torch.Tensor) -> int:
    x = steps.samples(96, like)
    eps, kind = steps.eps_of(self.norm), plan.kinds.eager
    ours = kernel.launch_router_norm(x, self.scale.data, self.root_size, eps, kind)
    return steps.differing([(ours, self.norm(x) * (self.scale * self.root_size).to(x.dtype))])


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The router's forward."""
    _stock[TARGET] = stock[TARGET]
    sglang_types.load()
    _ops["router_norm"] = operators.router_norm_op()
    STEP.run = run
    return {TARGET: forward}


def undo(run: PatchRun) -> None:
    """Switch the step off."""
    STEP.run = None
    steps.forget("router_norm")


def verify(run: PatchRun, device: str) -> list[Check]:
    """Kernel against stock's calls."""
    return checks_of.router_norm(device)
