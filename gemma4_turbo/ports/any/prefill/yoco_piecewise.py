"""`yoco_piecewise`: the cut of `yoco` inside SGLang's CUDA graphs of prefill, whatever they are split at.

What is recorded ends before the first KV-shared layer. What a line has run between two graphs
stands for all that is behind. It must run whatever batch comes later: a batch that is not to be cut goes
through the layers with all its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.fusions.fusion import Step
from gemma4_turbo.ports.any.prefill import yoco_cut, yoco_graph
from gemma4_turbo.runtime.fallback import Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import TextModel

YOCO_PIECEWISE = Step()
NO_GRAPHS = "SGLang makes no CUDA graphs of prefill"

_fallback = Fallback("the cut")


def forget() -> None:
    """What has failed is tried again."""
    _fallback.clear()


def first_behind(
    run: PatchRun,
    model: TextModel,
    batch: Any,
    kwargs: dict[str, object],
    unfit: Callable[[TextModel, Any, dict[str, object]], str | None],
) -> int | None:
    """The first layer that is not to be recorded, None: all of them are. ``unfit``: the line's reasons."""
    try:
        first = yoco_cut.first_shared(model)
        none = yoco_cut.NOTHING_SHARED
        reason = _fallback.unfit() or (none if first is None else unfit(model, batch, kwargs))
    except Exception as error:
        reason = _fallback.failed(run, None, error)
    if reason is not None:
        yoco_cut.all_rows(run, reason)
        return None
    return first


def rows_only(
    model: TextModel,
    first: int,
    batch: Any,
    state: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    positions: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
    output: torch.Tensor,
    without_padding: Callable[[Any, torch.Tensor], Any],
) -> bool:
    """Whether the rows that are wanted are in ``output``; otherwise all must go through the layers.

    ``without_padding``: the batch as it was before SGLang padded it to the size of a graph, or None for
    one that is made up.
    """
    run = YOCO_PIECEWISE.run
    if run is None or yoco_cut.YOCO.run is None:
        return False  # reverted since: the graphs stay
    try:
        real = without_padding(batch, positions)
        if real is None:
            return False
        reason = _fallback.unfit()
        if reason is None:
            reason = yoco_cut.batch_unfit(model, real, real.positions, {})
        cut = yoco_cut.counted(run, model, first, real, reason)
        if cut is None:
            return False
        output.zero_()
        if cut.rows:  # else every prompt goes on in a later chunk
            tail = yoco_cut.tail(cut, real, real.positions, *state, per_layer_inputs)
            output[tail.rows] = yoco_graph.run(model, cut, tail, real)
        return True
    except Exception as error:
        run.declined(_fallback.failed(run, None, error))
        return False
