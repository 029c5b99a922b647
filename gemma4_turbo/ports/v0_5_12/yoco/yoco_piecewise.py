"""`yoco_piecewise`: the cut of `yoco` also where SGLang runs the prefill in piecewise CUDA graphs.

A step of the shared forward of the text model, as `yoco` and `yoco_graph` are; the graphs are cut at
one operator more, see `gemma4_turbo.ports.v0_5_12.yoco.traced_cut`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.ports.v0_5_12.yoco import traced_cut

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The model's loop, whose trace ends before the layers that share KV."""
    from gemma4_turbo.ports.v0_5_12 import text_model

    traced_cut.register()
    traced_cut.YOCO_PIECEWISE.run = run
    return {text_model.TARGET: text_model.forward}


def undo(run: PatchRun) -> None:
    """Nothing new is cut; graphs that exist run all rows through their operator.

    As without it, they need `optional_kv` to stay.
    """
    traced_cut.YOCO_PIECEWISE.run = None
    traced_cut.unregister()
    traced_cut.forget()


def verify(run: PatchRun, device: str) -> list[Check]:
    """Nothing without a model: the rows go through SGLang's own layers."""
    return []
