"""`rope_store`: rotation and KV store in the launch of the QKV norms."""

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
    return attention.enable(attention.ROPE_STORE, run, stock)


def undo(run: PatchRun) -> None:
    """Switch the step off; the shared forward may live on for other patches."""
    attention.ROPE_STORE.run = None
    steps.forget("rope_store")


def verify(run: PatchRun, device: str) -> list[Check]:
    """Kernel against stock's calls."""
    return checks_of.rope_store(device)
