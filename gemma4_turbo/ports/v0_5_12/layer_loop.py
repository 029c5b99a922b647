"""The loop over Gemma 4's decoder layers, each handed the norm that reads its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any import layer_steps, sglang_types
from gemma4_turbo.runtime.hooks import FOR_ALL

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import (
        DecoderLayer,
        ForwardBatch,
        Module,
        RMSNorm,
        TextModel,
    )
    from gemma4_turbo.ports.v0_5_12.yoco import cut as yoco_cut

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
            **_between(self, every, index, normed),
            **kwargs,
        )
        hidden_states = outputs[0]
        residual = outputs[1] if len(outputs) > 1 else None
        normed = outputs[2] if len(outputs) > 2 else None
    return hidden_states, residual, normed


def _between(
    self: TextModel, every: list[DecoderLayer], index: int, normed: torch.Tensor | None
) -> dict[str, torch.Tensor | RMSNorm]:
    """What a layer is told beside stock's arguments: its normed input, and the norm after it.

    A hook on a layer sees, and may change, hidden states that nobody has gone on from: neither the
    layer itself nor the next one may have any. It gets stock's arguments, and gives stock's results.
    """
    if layer_steps.INPUT_NORM.run is None:
        return {}
    layer = every[index]
    last = index + 1 == len(every)
    after: Any = self.norm if last else every[index + 1]
    told: dict[str, torch.Tensor | RMSNorm] = {}
    if normed is not None:
        told["normed"] = normed
    if _direct(layer, after, last):
        told["following"] = after if last else after.input_layernorm
    return told


def _direct(layer: Module, after: Module, last: bool) -> bool:
    """Whether what a layer returns goes to SGLang's next layer, or the last norm, as it is."""
    kind = sglang_types.types().layer
    return type(layer) is kind and (last or type(after) is kind) and not _hooked(layer, after)


def _hooked(layer: Module, after: Module) -> bool:
    """As `gemma4_turbo.runtime.hooks.hooked`, where Dynamo looks on too."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or after._forward_pre_hooks
        or after._forward_hooks
        or FOR_ALL[0]
        or FOR_ALL[1]
        or "forward" in layer.__dict__
        or "forward" in after.__dict__
    )


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
