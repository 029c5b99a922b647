"""``Gemma4DecoderLayer.forward`` of 0.5.22 and 0.5.23.

Stock's layer boundaries write and read a residual stream, and sum over GPUs. On one GPU, and under plain
tensor parallelism, they move nothing: the stream's residual is the layer's input, and its result is written
as the stream for the next one. The sums are made as stock makes them (`sums`). Elsewhere the layer is stock's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.fusions.site import eps_of, site_of
from gemma4_turbo.kernels.norms.layer_norms import Router
from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.ports.any.decode_step import handover, layer_steps
from gemma4_turbo.ports.v0_5_23 import classes, sums
from gemma4_turbo.ports.v0_5_23.stock import STOCK as STOCK  # the fusions follow it

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.fusion import Step
    from gemma4_turbo.ports.any.model_protocols import RMSNorm
    from gemma4_turbo.ports.v0_5_23.protocols import LayerBatch, StageBoundary, StagedLayer

TARGET = "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward"

steps: list[Step] = []  # of the layer, of the patches that were in
_stock: dict[str, Callable[..., torch.Tensor]] = {}
_result: list[Any] = []  # SGLang's method that computes what a layer writes
_boundary: list[Any] = []  # the module of SGLang's that writes the stream
_classes: list[type] = []  # of a boundary
_reads: list[
    type
] = []  # of what attention reads through, then the feed-forward, and what is in that


OF_A_BOUNDARY = ("plan", "declaration")


class LayerSite(layer_steps.LayerSite):
    """And whether the layer's boundaries are stock's, with the layer's norms, and what they sum."""

    def __init__(self, layer: StagedLayer) -> None:
        super().__init__(layer)
        attn, ffn = layer.attn_boundary, layer.ffn_boundary
        self.stocks = (
            sums.parallel_unfit()
            or sglang_types.device_unfit(layer.layer_scalar)
            or _boundaries_unfit(layer)
            or _result_unfit(layer)
            or sums.boundary_unfit(layer)
        )
        self.sums = sums.many()
        self.depends_on(
            (layer, "_next_stream"),
            (layer, "attn_boundary"),
            (layer, "ffn_boundary"),
            *((of, name) for of in (attn, ffn) for name in (*OF_A_BOUNDARY, "prepare", "finish")),
            (ffn, "sum_part"),
        )


def _boundaries_unfit(layer: StagedLayer) -> str | None:
    """Why the boundaries do not run the layer's own norms, or None: they keep those they were made with."""
    attn, ffn = layer.attn_boundary, layer.ffn_boundary
    for boundary in (attn, ffn):
        if type(boundary) is not _classes[0]:
            return f"a layer's boundary is a {sglang_types.name(boundary)}"
        if not vars(boundary).keys() <= set(OF_A_BOUNDARY):
            return "a layer's boundary has a method of somebody else's"
    after = attn.declaration.output_transform
    if (
        attn.plan.norm is not layer.input_layernorm
        or ffn.plan.norm is not layer.pre_feedforward_layernorm
        or after is None
        or after.apply is not layer.post_attention_layernorm
    ):
        return "a norm was replaced, of which the layer's boundaries keep the first one"
    updates = attn.declaration.update, ffn.declaration.update
    if not updates[0].is_plain_add or not updates[1].applied_at_exit:
        return "the layer's boundaries write the residual stream in another way"
    if any(update.bind is not None for update in updates):
        return "the layer's boundaries write each batch in a way of its own"
    return _reads_unfit(attn, _reads[:1]) or _reads_unfit(ffn, _reads[1:])


def _reads_unfit(boundary: StageBoundary, kinds: list[Any]) -> str | None:
    """Why a boundary reads the stream through something else than its norm, or None.

    Stock reads through an object, which may make another one for each batch (``bind``). ``kinds``: its
    class, and that of the object in it.
    """
    for path in boundary.plan.paths.values():
        read: Any = getattr(path.entry.prepare, "keywords", {}).get("read")
        for kind in kinds:
            if type(read) is not kind:
                return f"a layer's boundary reads through a {sglang_types.name(read)}"
            if read.bind is not None:
                return f"a {kind.__name__} reads each batch in a way of its own"
            read = getattr(read, "inner", None)
    return None


def _result_unfit(layer: StagedLayer) -> str | None:
    """Why the layer's result is computed in another way than stock's, or None."""
    # Not by the bound method's function, which in a trace is another.
    if "_next_stream" in vars(layer) or type(layer)._next_stream is not _result[0]:
        return f"a {sglang_types.name(layer)} has a _next_stream of its own"
    return None


def enable(fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement."""
    from sglang.srt.layers.layer_boundary.boundary import _TransformedRead
    from sglang.srt.layers.layer_boundary.residual import batch
    from sglang.srt.layers.layer_boundary.residual.add_norm import NormQuantReadout, NormReadout
    from sglang.srt.layers.layer_boundary.stage import StageBoundary
    from sglang.srt.models.gemma4_causal import Gemma4DecoderLayer

    _stock[TARGET], _boundary[:], _classes[:] = stock[TARGET], [batch], [StageBoundary]
    _reads[:] = [NormQuantReadout, _TransformedRead, NormReadout]
    _result[:] = [Gemma4DecoderLayer._next_stream]
    classes.load()
    sums.load()
    handover.use(forward)
    layer_steps.enable(fusions, run)
    steps.extend(fusion for fusion in fusions if fusion not in steps)
    return {TARGET: forward}


def forward(
    self: StagedLayer,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    per_layer_input: torch.Tensor,
    forward_batch: LayerBatch,
    capture_output: Callable[..., None] | None = None,
    normed: torch.Tensor | None = None,
    following: RMSNorm | None = None,
    **kwargs: object,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One layer: hidden states; where ``following`` is given and could run, also those normed by it.

    Args:
        self: the layer.
        positions: ``[rows]``.
        hidden_states: ``[rows, hidden]``; overwritten, as stock overwrites them.
        per_layer_input: ``[rows, width]`` or None.
        forward_batch: whose residual stream is ``hidden_states``.
        capture_output: given what the layer reads; then the layer is stock's.
        normed: the input already through ``input_layernorm``.
        following: the norm that reads the result.
        **kwargs: stock's, which it ignores.
    """
    site = site_of(self, LayerSite)
    stream = forward_batch.residual_stream
    unfit = site.stocks or sglang_types.rules().now_unfit()
    if unfit is None:
        if capture_output is not None:
            unfit = "the layer's input is captured for a draft model"
        elif stream is None or stream.pending is not None:
            unfit = "the layer before has left a sum to its boundary"
        elif stream.residual is not None and stream.residual is not hidden_states:
            unfit = "the layer's input is not what the residual stream holds"  # an error of stock's
    if unfit is not None:
        for step in {step.run: step for step in steps}.values():  # a patch may have several
            step.declined(unfit)
        return _stock[TARGET](
            self, positions, hidden_states, per_layer_input, forward_batch, capture_output, **kwargs
        )
    before = layer_steps.early_launches()
    attended = self.self_attn(
        positions=positions,
        hidden_states=self.input_layernorm(hidden_states) if normed is None else normed,
        forward_batch=forward_batch,
    )
    later = None
    if site.sums:
        attended = sums.attention(self, attended, forward_batch)
        later = sums.later(self, forward_batch)
    out, after = layer_steps.after_attention(
        self, site, attended, hidden_states, per_layer_input, following, _router, later
    )
    layer_steps.count_early_launches(before, hidden_states.device)
    _boundary[0].set_written(out, forward_batch)
    return out if after is None else (out, after)


def _router(self: StagedLayer) -> Router:
    router, experts = self.router, self.pre_feedforward_layernorm_2
    if not router._scale_fused:  # as stock at its first call
        router.fuse_scale()
    return Router(
        router.norm.weight.data, None, eps_of(router.norm), experts.weight.data, eps_of(experts)
    )
