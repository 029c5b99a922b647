"""`qkv_proj`: only the rows of the QKV weight that a layer needs are multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import steps
from gemma4_turbo.ports.v0_5_12 import attention
from gemma4_turbo.ports.v0_5_12 import checks as checks_of

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The shared forward, with this step on."""
    return attention.enable(attention.QKV_PROJ, run, stock)


def undo(run: PatchRun) -> None:
    """Switch the step off; the shared forward may live on for other patches."""
    attention.QKV_PROJ.run = None
    steps.forget("qkv_proj")


def verify(run: PatchRun, device: str) -> list[Check]:
    """Kernel against the whole projection."""
    return checks_of.qkv_proj(device)
