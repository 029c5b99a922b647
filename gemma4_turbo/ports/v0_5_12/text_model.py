"""``Gemma4TextModel.forward``: the same loop, in steps that patches can take over one by one.

Each layer is handed the norm that reads its result; before the layers that share KV the rows may be
cut (`gemma4_turbo.ports.v0_5_12.yoco.row_cut`, in piecewise CUDA graphs `gemma4_turbo.ports.v0_5_12.yoco.traced_cut`),
and what is left may run in a CUDA graph (`gemma4_turbo.ports.v0_5_12.yoco.tail_graph`).
"""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from gemma4_turbo.ports.v0_5_12 import decoder_layer, sglang_types
from gemma4_turbo.ports.v0_5_12.yoco import row_cut, tail_graph, traced_cut
from gemma4_turbo.runtime.hooks import FOR_ALL

TARGET = "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward"

State = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Between two layers: hidden states, residual, and the hidden states through the next norm."""


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

    captured: list[torch.Tensor] = []
    layers = functools.partial(_layers, self, captured, kwargs)
    start = input_embeds, None, None
    cut = None
    if torch.compiler.is_compiling():
        first = traced_cut.first_layer(self)
        if first is not None:
            state = layers(range(first), start, positions, per_layer_inputs, forward_batch)
            return traced_cut.call(self, state, positions, per_layer_inputs)
    elif not traced_cut.prepare(self, forward_batch, kwargs):
        cut = row_cut.cut(self, forward_batch, positions, kwargs)
    if cut is not None:
        state = layers(range(cut.first), start, positions, per_layer_inputs, forward_batch)
        if not cut.rows:  # every prompt goes on in a later chunk: nobody reads a row
            return torch.zeros_like(state[0])
        try:
            tail = row_cut.tail(cut, forward_batch, positions, *state, per_layer_inputs)
            return row_cut.restore(cut, tail, tail_graph.run(self, cut, tail, forward_batch))
        except Exception as error:  # the rows before the cut are as they were: all go on
            failure = error.with_traceback(None)
        found = run_layers(self, cut.first, state, positions, per_layer_inputs, forward_batch)
        row_cut.cut_failed(failure)  # had stock's way failed too, it would not be ours
        return found
    count = len(self.layers)
    state = layers(range(count), start, positions, per_layer_inputs, forward_batch)
    if count in self.layers_to_capture:
        captured.append(state[0])
    hidden_states = _last_norm(self, state)
    if not captured:
        return hidden_states
    return hidden_states, captured


def run_tail(self: Any, first: int, tail: row_cut.Tail) -> torch.Tensor:
    """The layers from ``first`` on and the last norm over a tail's rows: ``[rows, hidden]``.

    It reads the model and the tail, nothing else: a CUDA graph of it is right as long as these are.
    """
    state = tail.hidden_states, tail.residual, tail.normed
    return run_layers(self, first, state, tail.positions, tail.per_layer_inputs, tail.batch)


def run_layers(
    self: Any,
    first: int,
    state: State,
    positions: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
    batch: Any,
) -> torch.Tensor:
    """The layers from ``first`` on and the last norm: ``[rows, hidden]``."""
    rest = range(first, len(self.layers))
    return _last_norm(self, _layers(self, [], {}, rest, state, positions, per_layer_inputs, batch))


def _layers(
    self: Any,
    captured: list[torch.Tensor],
    kwargs: dict[str, Any],
    indices: range,
    state: State,
    positions: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
    forward_batch: Any,
) -> State:
    """These layers, one after another; ``captured`` gets what goes into ``layers_to_capture``."""
    hidden_states, residual, normed = state
    for index in indices:
        layer = self.layers[index]
        if index in self.layers_to_capture:
            captured.append(hidden_states)
        outputs = layer(
            positions=positions,
            hidden_states=hidden_states,
            per_layer_input=None if per_layer_inputs is None else per_layer_inputs[:, index, :],
            forward_batch=forward_batch,
            **_between(self, index, normed),
            **kwargs,
        )
        hidden_states = outputs[0]
        residual = outputs[1] if len(outputs) > 1 else None
        normed = outputs[2] if len(outputs) > 2 else None
    return hidden_states, residual, normed


def _between(self: Any, index: int, normed: torch.Tensor | None) -> dict[str, Any]:
    """What a layer is told beside stock's arguments: its normed input, and the norm after it.

    A hook on a layer sees, and may change, hidden states that nobody has gone on from: neither the
    layer itself nor the next one may have any. It gets stock's arguments, and gives stock's results.
    """
    if decoder_layer.INPUT_NORM.run is None:
        return {}
    layer = self.layers[index]
    last = index + 1 == len(self.layers)
    after = self.norm if last else self.layers[index + 1]
    told: dict[str, Any] = {}
    if normed is not None:
        told["normed"] = normed
    if _direct(layer, after, last):
        told["following"] = after if last else after.input_layernorm
    return told


def _direct(layer: Any, after: Any, last: bool) -> bool:
    """Whether what a layer returns goes to SGLang's next layer, or the last norm, as it is."""
    kind = sglang_types.types().layer
    return type(layer) is kind and (last or type(after) is kind) and not _hooked(layer, after)


def _hooked(layer: Any, after: Any) -> bool:
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


def _last_norm(self: Any, state: State) -> torch.Tensor:
    hidden_states, residual, normed = state
    if residual is not None:
        hidden_states, _ = self.norm(hidden_states, residual)
    elif normed is not None:
        hidden_states = normed
    else:
        hidden_states = self.norm(hidden_states)
    return hidden_states
