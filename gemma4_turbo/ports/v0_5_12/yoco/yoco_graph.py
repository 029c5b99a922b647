"""`yoco_graph`: the layers behind `yoco`'s cut in CUDA graphs.

A step of the shared forward of the text model, as the cut is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.ports.v0_5_12.yoco import tail_graph

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The model's loop, which hands the cut rows on to the graphs."""
    from gemma4_turbo.ports.v0_5_12 import text_model

    tail_graph.YOCO_GRAPH.run = run
    return {text_model.TARGET: text_model.forward}


def undo(run: PatchRun) -> None:
    """Switch the step off and drop the graphs; the shared forward may live on for `yoco`."""
    tail_graph.YOCO_GRAPH.run = None
    tail_graph.drop_all()


def verify(run: PatchRun, device: str) -> list[Check]:
    """Nothing without a model: the same kernels run."""
    return []
