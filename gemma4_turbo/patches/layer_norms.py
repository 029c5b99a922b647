"""`layer_norms`: the norms between attention and feed-forward in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.checks import Check
from gemma4_turbo.forwards import checks as checks_of
from gemma4_turbo.forwards import decoder_layer, steps

if TYPE_CHECKING:
    from gemma4_turbo.patching import PatchRun


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
