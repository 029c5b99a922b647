"""`mlp_stream`: the dense MLP beside the experts, on a second stream of the CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import steps
from gemma4_turbo.ports.v0_5_12 import decoder_layer

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


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
