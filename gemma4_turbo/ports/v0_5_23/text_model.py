"""``Gemma4TextModel.forward`` of 0.5.22 and 0.5.23: the same loop, each layer handed the norm after it.

Before the KV-shared layers the rows may be cut (`gemma4_turbo.ports.any.prefill.yoco_cut`), and the tail may
run in a CUDA graph (`gemma4_turbo.ports.any.prefill.yoco_graph`). In SGLang's own prefill graphs the cut is made
between two of their segments (`gemma4_turbo.ports.v0_5_23.prefill.yoco_piecewise`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.decode_step import layer_steps
from gemma4_turbo.ports.any.prefill import yoco_cut, yoco_graph
from gemma4_turbo.ports.any.prefill.yoco_piecewise import YOCO_PIECEWISE
from gemma4_turbo.ports.v0_5_23 import classes, layer_loop
from gemma4_turbo.ports.v0_5_23.attention import triton_backend
from gemma4_turbo.ports.v0_5_23.prefill import yoco, yoco_piecewise

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.fusion import Step
    from gemma4_turbo.ports.v0_5_23.protocols import LayerBatch, TextModel

TARGET = "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward"
PIPELINE = "pipeline parallelism: the layers are spread over several GPUs"

_stock: dict[str, Callable[..., Any]] = {}


def enable(fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement."""
    _stock[TARGET] = stock[TARGET]
    classes.load()
    layer_steps.enable(fusions, run)
    return {TARGET: forward}


def enable_cut(steps: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Give the cut, or the tail's graphs, to a patch; returns the replacement."""
    _stock[TARGET] = stock[TARGET]
    classes.load()
    triton_backend.load()
    yoco_cut.use_line(yoco.LINE)
    for step in steps:
        step.enable(run)
    return {TARGET: forward}


def forward(
    self: TextModel,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: LayerBatch,
    input_embeds: torch.Tensor = None,  # type: ignore[assignment]
    per_layer_inputs: torch.Tensor | None = None,
    pp_proxy_tensors: object = None,
    **kwargs: object,
) -> object:
    """Embedding, layers, last norm. The result is stock's; ValueError as stock's."""
    from sglang.srt.layers.aux_hidden_states import AuxHiddenStateList
    from sglang.srt.layers.layer_boundary.residual import batch

    if self.pp_group.world_size > 1:
        if forward_batch.forward_mode.is_extend():
            for step in (yoco_cut.YOCO, yoco_graph.YOCO_GRAPH, YOCO_PIECEWISE):
                step.declined(PIPELINE)
        return _stock[TARGET](
            self,
            input_ids,
            positions,
            forward_batch,
            input_embeds,
            per_layer_inputs,
            pp_proxy_tensors,
            **kwargs,
        )
    if (input_ids is None) == (input_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        input_embeds = self.embed_tokens(input_ids)
        per_layer_inputs = self.get_per_layer_inputs(input_ids)
    per_layer_inputs = self.project_per_layer_inputs(input_embeds, per_layer_inputs)
    batch.start(forward_batch)

    captured = AuxHiddenStateList()
    layers = functools.partial(layer_loop.layers, self, captured, kwargs)
    start = input_embeds, None, None
    first = yoco_piecewise.first_layer(self, forward_batch, kwargs)
    if first is not None:
        state = layers(range(first), start, positions, per_layer_inputs, forward_batch)
        batch.clear(forward_batch)  # what is behind starts a stream of its own
        return yoco_piecewise.call(self, first, state, positions, per_layer_inputs)
    cut = yoco_cut.cut(self, forward_batch, positions, kwargs)
    if cut is not None:
        state = layers(range(cut.first), start, positions, per_layer_inputs, forward_batch)
        if not cut.rows:  # every prompt goes on in a later chunk: nobody reads a row
            batch.clear(forward_batch)
            return torch.zeros_like(state[0])
        try:
            found = yoco_graph.whole(self, cut, forward_batch, positions, state, per_layer_inputs)
        except Exception as error:  # the rows before the cut are as they were: all go on
            failure = error.with_traceback(None)
        else:
            batch.clear(forward_batch)  # nothing holds the whole rows any longer
            return found
        found = layer_loop.run_layers(
            self, cut.first, state, positions, per_layer_inputs, forward_batch
        )
        yoco_cut.cut_failed(failure)  # had stock's way failed too, it would not be ours
        return found
    count = len(self.layers)
    state = layers(range(count), start, positions, per_layer_inputs, forward_batch)
    if count in self.layers_to_capture:
        captured.append(state[0])
    hidden_states = layer_loop.last_norm(self, state, forward_batch)
    return (hidden_states, captured) if captured else hidden_states
