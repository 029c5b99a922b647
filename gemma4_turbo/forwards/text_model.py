"""``Gemma4TextModel.forward``: the same loop, in steps that patches can take over one by one.

Each layer is handed the norm that reads its result; before the layers that share KV the rows may be
cut (`gemma4_turbo.forwards.fast_prefill`).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from gemma4_turbo.forwards import fast_prefill

TARGET = "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward"


def forward(
    self: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: ForwardBatch,
    input_embeds: torch.Tensor = None,  # type: ignore[assignment]
    per_layer_inputs: Optional[torch.Tensor] = None,  # noqa: UP045 - SGLang reads the annotations
    **kwargs: Any,
) -> Any:
    """Embedding, layers, last norm. The result is stock's; ValueError as stock's."""
    if (input_ids is None) == (input_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        input_embeds = self.embed_tokens(input_ids)
        per_layer_inputs = self.get_per_layer_inputs(input_ids)
    per_layer_inputs = self.project_per_layer_inputs(input_embeds, per_layer_inputs)

    hidden_states = input_embeds
    residual = normed = None
    captured = []
    count = len(self.layers)
    cut = fast_prefill.cut(self, forward_batch, positions, kwargs)
    tail = None
    for index in range(count):
        if cut is not None and index == cut.first:
            if not cut.rows:  # every prompt goes on in a later chunk: nobody reads a row
                return torch.zeros_like(hidden_states)
            tail = fast_prefill.tail(
                cut, forward_batch, positions, hidden_states, normed, per_layer_inputs
            )
            positions, hidden_states, normed = tail.positions, tail.hidden_states, tail.normed
            per_layer_inputs, forward_batch = tail.per_layer_inputs, tail.batch
            residual = None if residual is None else residual[tail.rows]
        layer = self.layers[index]
        if index in self.layers_to_capture:
            captured.append(hidden_states)
        following = self.norm if index + 1 == count else self.layers[index + 1].input_layernorm
        outputs = layer(
            positions=positions,
            hidden_states=hidden_states,
            per_layer_input=None if per_layer_inputs is None else per_layer_inputs[:, index, :],
            forward_batch=forward_batch,
            normed=normed,
            following=following,
            **kwargs,
        )
        hidden_states = outputs[0]
        residual = outputs[1] if len(outputs) > 1 else None
        normed = outputs[2] if len(outputs) > 2 else None
    if count in self.layers_to_capture:
        captured.append(hidden_states)

    if residual is not None:
        hidden_states, _ = self.norm(hidden_states, residual)
    elif normed is not None:
        hidden_states = normed
    else:
        hidden_states = self.norm(hidden_states)
    if cut is not None and tail is not None:
        hidden_states = fast_prefill.restore(cut, tail, hidden_states)
    if not captured:
        return hidden_states
    return hidden_states, captured
