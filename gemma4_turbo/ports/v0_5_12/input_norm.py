"""`input_norm`: the next layer's input norm in the launch of a layer's end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import steps
from gemma4_turbo.ports.v0_5_12 import checks as checks_of
from gemma4_turbo.ports.v0_5_12 import decoder_layer

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The shared forward of the layer, and the model's loop that tells a layer its successor."""
    from gemma4_turbo.ports.v0_5_12 import text_model

    layer = decoder_layer.enable(decoder_layer.INPUT_NORM, run)
    return {**layer, text_model.TARGET: text_model.forward}


def undo(run: PatchRun) -> None:
    """Switch the step off; the shared forward may live on for other patches."""
    decoder_layer.INPUT_NORM.run = None
    steps.forget("input_norm")


def verify(run: PatchRun, device: str) -> list[Check]:
    """Kernel against stock's calls."""
    return checks_of.input_norm(device)
