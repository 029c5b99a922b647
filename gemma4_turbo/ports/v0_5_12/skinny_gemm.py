"""`skinny_gemm`: the linear layers for up to 64 tokens, activations in the launch of the product before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import steps
from gemma4_turbo.ports.v0_5_12 import attention, decoder_layer, linear
from gemma4_turbo.ports.v0_5_12 import checks as checks_of

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The shared forwards of layer and attention, with these steps on."""
    replaced = attention.enable(linear.SKINNY_GEMM, run, stock)
    return replaced | decoder_layer.enable(linear.SKINNY_GEMM, run)


def undo(run: PatchRun) -> None:
    """Switch the step off; the shared forwards may live on for other patches."""
    linear.SKINNY_GEMM.run = None
    steps.forget("skinny_gemm")


def verify(run: PatchRun, device: str) -> list[Check]:
    """Kernel against cuBLAS and fp64."""
    return checks_of.skinny_gemm(device)
