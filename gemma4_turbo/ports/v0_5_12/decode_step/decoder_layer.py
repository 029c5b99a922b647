"""``Gemma4DecoderLayer.forward`` of 0.5.11 and 0.5.12."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.fusions.site import eps_of, site_of
from gemma4_turbo.kernels.norms.layer_norms import Router
from gemma4_turbo.ports.any.decode_step import handover, layer_steps
from gemma4_turbo.ports.v0_5_12 import classes, stock

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.fusion import Step
    from gemma4_turbo.ports.any.model_protocols import (
        DecoderLayer,
        ForwardBatch,
        LayerOutputs,
        RMSNorm,
    )

TARGET = "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward"
STOCK = stock  # imported: the fusions follow it


def enable(fusions: tuple[Step, ...], run: PatchRun) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement."""
    classes.load()
    handover.use(forward)
    layer_steps.enable(fusions, run)
    return {TARGET: forward}


def forward(
    self: DecoderLayer,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    per_layer_input: torch.Tensor,
    forward_batch: ForwardBatch,
    **kwargs: Any,
) -> LayerOutputs:
    """One layer. Returns hidden states, None, and the next layer's normed input or None.

    ``kwargs`` may hold ``normed``, the input already through ``input_layernorm``, and ``following``,
    the norm that reads the result; `gemma4_turbo.ports.v0_5_12.text_model` passes them.
    """
    if layer_steps.PDL.run is None:
        return _forward(self, positions, hidden_states, per_layer_input, forward_batch, **kwargs)
    before = layer_steps.early_launches()
    outputs = _forward(self, positions, hidden_states, per_layer_input, forward_batch, **kwargs)
    layer_steps.count_early_launches(before, hidden_states.device)
    return outputs


def _forward(
    self: DecoderLayer,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    per_layer_input: torch.Tensor,
    forward_batch: ForwardBatch,
    normed: torch.Tensor | None = None,
    following: RMSNorm | None = None,
    **kwargs: Any,
) -> LayerOutputs:
    site = site_of(self, layer_steps.LayerSite)
    attended = self.self_attn(
        positions=positions,
        hidden_states=self.input_layernorm(hidden_states) if normed is None else normed,
        forward_batch=forward_batch,
    )
    out, after = layer_steps.after_attention(
        self, site, attended, hidden_states, per_layer_input, following, _router
    )
    return (out, None) if after is None else (out, None, after)


def _router(self: DecoderLayer) -> Router:
    norm, experts = self.router.norm, self.pre_feedforward_layernorm_2
    return Router(
        self.router.scale.data,
        self.router.root_size,
        eps_of(norm),
        experts.weight.data,
        eps_of(experts),
    )
