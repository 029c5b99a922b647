"""The loop over Gemma 4's decoder layers, each handed the norm that reads its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gemma4_turbo.ports.any.decode_step import handover

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import (
        ForwardBatch,
        TextModel,
    )
    from gemma4_turbo.ports.any.prefill import yoco_cut

State = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Between two layers: hidden states, residual, and the hidden states through the next norm."""


def run_tail(self: TextModel, first: int, tail: yoco_cut.Tail) -> torch.Tensor:
    """The layers from ``first`` on and the last norm over a tail's rows: ``[rows, hidden]``.

    It reads the model and the tail, nothing else: a CUDA graph of it is right as long as these are.
    """
    state = tail.hidden_states, tail.residual, tail.normed
    return run_layers(self, first, state, tail.positions, tail.per_layer_inputs, tail.batch)


def run_layers(
    self: TextModel,
    first: int,
    state: State,
    positions: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
    batch: ForwardBatch,
) -> torch.Tensor:
    """The layers from ``first`` on and the last norm: ``[rows, hidden]``."""
    rest = range(first, len(self.layers))
    return last_norm(self, layers(self, [], {}, rest, state, positions, per_layer_inputs, batch))


def layers(
    self: TextModel,
    captured: list[torch.Tensor],
    kwargs: dict[str, object],
    indices: range,
    state: State,
    positions: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
    forward_batch: ForwardBatch,
) -> State:
    """These layers, one after another; ``captured`` gets what goes into ``layers_to_capture``."""
    hidden_states, residual, normed = state
    every = list(self.layers)  # an index into a ModuleList takes microseconds
    for index in indices:
        layer = every[index]
        if index in self.layers_to_capture:
            captured.append(hidden_states)
        outputs = layer(
            positions=positions,
            hidden_states=hidden_states,
            per_layer_input=None if per_layer_inputs is None else per_layer_inputs[:, index, :],
            forward_batch=forward_batch,
            **handover.between(self, every, index, normed),
            **kwargs,
        )
        hidden_states = outputs[0]
        residual = outputs[1] if len(outputs) > 1 else None
        normed = outputs[2] if len(outputs) > 2 else None
    return hidden_states, residual, normed


def last_norm(self: TextModel, state: State) -> torch.Tensor:
    """What the model returns: the hidden states through its last norm."""
    hidden_states, residual, normed = state
    if residual is not None:
        hidden_states, _ = self.norm(hidden_states, residual)
    elif normed is not None:
        hidden_states = normed
    else:
        hidden_states = self.norm(hidden_states)
    return hidden_states
