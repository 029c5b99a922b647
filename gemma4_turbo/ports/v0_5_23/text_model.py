"""``Gemma4TextModel.forward`` of 0.5.22 and 0.5.23: the same loop, each layer handed the norm after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any import handover, layer_steps
from gemma4_turbo.ports.v0_5_23 import classes

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.fusion import Step

TARGET = "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward"

_stock: dict[str, Callable[..., Any]] = {}


def enable(fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement."""
    _stock[TARGET] = stock[TARGET]
    classes.load()
    layer_steps.enable(fusions, run)
    return {TARGET: forward}


def forward(
    self: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    input_embeds: torch.Tensor = None,  # type: ignore[assignment]
    per_layer_inputs: torch.Tensor | None = None,
    pp_proxy_tensors: Any = None,
    **kwargs: Any,
) -> Any:
    """Embedding, layers, last norm. The result is stock's; ValueError as stock's."""
    from sglang.srt.layers.aux_hidden_states import AuxHiddenStateList
    from sglang.srt.layers.layer_boundary.residual import batch

    if self.pp_group.world_size > 1:
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
    hidden_states, normed = input_embeds, None
    every = list(self.layers)  # an index into a ModuleList takes microseconds
    for index, layer in enumerate(every):
        told = handover.between(self, every, index, normed)
        if index + 1 in self.layers_to_capture and index + 1 < len(every):
            told.pop("following", None)  # the next layer is stock's: it norms by itself
        outputs = layer(
            positions=positions,
            hidden_states=hidden_states,
            per_layer_input=None if per_layer_inputs is None else per_layer_inputs[:, index, :],
            forward_batch=forward_batch,
            capture_output=captured.capture if index in self.layers_to_capture else None,
            **told,
            **kwargs,
        )
        hidden_states, normed = outputs if isinstance(outputs, tuple) else (outputs, None)
    if len(every) in self.layers_to_capture:
        captured.append(hidden_states)
    if normed is None:
        hidden_states = batch.final_norm(hidden_states, forward_batch, self.norm)
    else:
        batch.take_output(hidden_states, forward_batch)
        hidden_states = normed
    return (hidden_states, captured) if captured else hidden_states
