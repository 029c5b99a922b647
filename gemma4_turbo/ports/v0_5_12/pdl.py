"""`pdl`: programmatic dependent launch between the package's own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.kernels import pdl
from gemma4_turbo.ports.v0_5_12 import decoder_layer

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The shared forward, whose kernels are launched this way from now on."""
    pdl.wanted = True
    return decoder_layer.enable(decoder_layer.PDL, run)


def undo(run: PatchRun) -> None:
    """Launch as usual. CUDA graphs that exist keep what they captured."""
    pdl.wanted = False
    decoder_layer.PDL.run = None


def verify(run: PatchRun, device: str) -> list[Check]:
    """No arithmetic of its own: the other patches' checks run with it."""
    return []
