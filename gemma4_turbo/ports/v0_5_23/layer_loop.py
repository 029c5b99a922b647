"""The loop over this line's decoder layers, each handed the norm that reads its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.decode_step import handover

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import TextModel
    from gemma4_turbo.ports.any.prefill import yoco_cut
    from gemma4_turbo.ports.v0_5_23.protocols import AuxHiddenStates, LayerBatch

State = tuple[torch.Tensor, None, torch.Tensor | None]
"""Between two layers: hidden states, no residual of their own, and the next norm of them."""


def layers(
    self: TextModel,
    captured: AuxHiddenStates | None,
    kwargs: dict[str, object],
    indices: range,
    state: State,
    positions: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
    forward_batch: LayerBatch,
) -> State:
    """These layers, one after another; ``captured`` gets what goes into ``layers_to_capture``."""
    hidden_states, _, normed = state
    capture = None if captured is None else captured.capture
    every = list(self.layers)  # an index into a ModuleList takes microseconds
    for index in indices:
        layer = every[index]
        told = handover.between(self, every, index, normed)
        if index + 1 in self.layers_to_capture and index + 1 < len(every):
            told.pop("following", None)  # the next layer is stock's: it norms by itself
        outputs: Any = layer(
            positions=positions,
            hidden_states=hidden_states,
            per_layer_input=None if per_layer_inputs is None else per_layer_inputs[:, index, :],
            forward_batch=forward_batch,
            capture_output=capture if index in self.layers_to_capture else None,
            **told,
            **kwargs,
        )
        hidden_states, normed = outputs if isinstance(outputs, tuple) else (outputs, None)
    return hidden_states, None, normed


def last_norm(self: TextModel, state: State, forward_batch: LayerBatch) -> torch.Tensor:
    """What the model returns: the hidden states through its last norm. The residual stream ends."""
    from sglang.srt.layers.layer_boundary.residual import batch

    hidden_states, _, normed = state
    if normed is None:
        found: torch.Tensor = batch.final_norm(hidden_states, forward_batch, self.norm)
        return found
    batch.take_output(hidden_states, forward_batch)
    return normed


def run_layers(
    self: TextModel,
    first: int,
    state: State,
    positions: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
    forward_batch: LayerBatch,
) -> torch.Tensor:
    """The layers from ``first`` on and the last norm: ``[rows, hidden]``. Nothing is captured."""
    rest = range(first, len(self.layers))
    found = layers(self, None, {}, rest, state, positions, per_layer_inputs, forward_batch)
    return last_norm(self, found, forward_batch)


def run_tail(self: TextModel, first: int, tail: yoco_cut.Tail) -> torch.Tensor:
    """The layers from ``first`` on and the last norm over a tail's rows: ``[rows, hidden]``.

    It reads the model and the tail, nothing else: a CUDA graph of it is right as long as these are.
    """
    from sglang.srt.layers.layer_boundary.residual import batch
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    batch.set_written(tail.hidden_states, tail.batch)  # the stream, as the layer before left it
    state = tail.hidden_states, None, tail.normed
    context = ForwardContext(attn_backend=tail.backend)
    with forward_context(context, forward_batch=tail.batch):
        batch_of: Any = tail.batch  # this line's
        return run_layers(self, first, state, tail.positions, tail.per_layer_inputs, batch_of)
