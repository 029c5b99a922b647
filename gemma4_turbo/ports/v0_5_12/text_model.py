"""``Gemma4TextModel.forward``: the same loop, in steps that patches can take over one by one.

Each layer is handed the norm that reads its result; before the KV-shared layers the rows may be
cut (`gemma4_turbo.ports.any.prefill.yoco_cut`, in piecewise CUDA graphs `gemma4_turbo.ports.v0_5_12.prefill.piecewise`),
and the tail may run in a CUDA graph (`gemma4_turbo.ports.any.prefill.yoco_graph`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Optional

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from gemma4_turbo.ports.any.prefill import yoco_cut, yoco_graph
from gemma4_turbo.ports.v0_5_12 import layer_loop
from gemma4_turbo.ports.v0_5_12.prefill import piecewise as yoco_piecewise

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import TextModel

TARGET = "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward"


def forward(
    self: TextModel,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: ForwardBatch,
    input_embeds: torch.Tensor = None,  # type: ignore[assignment]
    per_layer_inputs: Optional[torch.Tensor] = None,  # noqa: UP045 - SGLang reads the annotations
    **kwargs: object,
) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
    """Embedding, layers, last norm. The result is stock's; ValueError as stock's."""
    if (input_ids is None) == (input_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        input_embeds = self.embed_tokens(input_ids)
        per_layer_inputs = self.get_per_layer_inputs(input_ids)
    per_layer_inputs = self.project_per_layer_inputs(input_embeds, per_layer_inputs)

    captured: list[torch.Tensor] = []
    layers = functools.partial(layer_loop.layers, self, captured, kwargs)
    start = input_embeds, None, None
    cut = None
    if torch.compiler.is_compiling():
        first = yoco_piecewise.first_layer(self)
        if first is not None:
            state = layers(range(first), start, positions, per_layer_inputs, forward_batch)
            return yoco_piecewise.call(self, state, positions, per_layer_inputs)
    elif not yoco_piecewise.prepare(self, forward_batch, kwargs):
        cut = yoco_cut.cut(self, forward_batch, positions, kwargs)
    if cut is not None:
        state = layers(range(cut.first), start, positions, per_layer_inputs, forward_batch)
        if not cut.rows:  # every prompt goes on in a later chunk: nobody reads a row
            return torch.zeros_like(state[0])
        try:
            return yoco_graph.whole(self, cut, forward_batch, positions, state, per_layer_inputs)
        except Exception as error:  # the rows before the cut are as they were: all go on
            failure = error.with_traceback(None)
        found = layer_loop.run_layers(
            self, cut.first, state, positions, per_layer_inputs, forward_batch
        )
        yoco_cut.cut_failed(failure)  # had stock's way failed too, it would not be ours
        return found
    count = len(self.layers)
    state = layers(range(count), start, positions, per_layer_inputs, forward_batch)
    if count in self.layers_to_capture:
        captured.append(state[0])
    hidden_states = layer_loop.last_norm(self, state)
    if not captured:
        return hidden_states
    return hidden_states, captured
