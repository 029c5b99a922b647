"""`mlp_stream`: the dense MLP beside the experts, on a second stream of the CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.checks import Check
from gemma4_turbo.forwards import decoder_layer, steps

if TYPE_CHECKING:
    from gemma4_turbo.patching import PatchRun


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The shared forward, with this step on."""
    return decoder_layer.enable(decoder_layer.MLP_STREAM, run)


def undo(run: PatchRun) -> None:
    """Switch the step off; the shared forward may live on for other patches."""
    decoder_layer.MLP_STREAM.run = None
    steps.forget("mlp_stream")


def verify(run: PatchRun, device: str) -> list[Check]:
    """No arithmetic of its own: nothing to compare outside an engine."""
    return []
