"""``Gemma4TextModel.forward``: the same loop, handing each layer the norm that reads its result."""

from __future__ import annotations

from typing import Any, Optional

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

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
    for index in range(count):
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
    if not captured:
        return hidden_states
    return hidden_states, captured
