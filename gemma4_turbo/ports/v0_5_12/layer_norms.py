"""`layer_norms`: the norms between attention and feed-forward in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import steps
from gemma4_turbo.ports.v0_5_12 import checks as checks_of
from gemma4_turbo.ports.v0_5_12 import decoder_layer

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The shared forward, with this step on."""
    return decoder_layer.enable(decoder_layer.LAYER_NORMS, run)


def undo(run: PatchRun) -> None:
    """Switch the step off; the shared forward may live on for other patches."""
    decoder_layer.LAYER_NORMS.run = None
    steps.forget("layer_norms")


def verify(run: PatchRun, device: str) -> list[Check]:
    """Kernel against stock's calls."""
    return checks_of.layer_norms(device)
