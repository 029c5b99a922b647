"""The all-reduces that stock's layer boundaries make under tensor parallelism, for a layer's forward.

Attention's output projection, the dense MLP and the experts leave a partial sum on each GPU. Stock
all-reduces attention's at the entry of the feed-forward, before the norm after attention, and the other two
in ``_next_stream``, each before its own norm. The all-reduces here are the same, by the same functions of
SGLang's, in the same order, on the same tensors: a layer of ours on one GPU and one of stock's on another
still meet in every collective.

Stock has no fused all-reduce and norm for these layers: the norm after attention comes between. Should a
server choose one, the boundary's entry differs from the one that is expected here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any.decode_step import layer_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from gemma4_turbo.ports.v0_5_23.protocols import LayerBatch, StagedLayer

_attention: list[Any] = []  # SGLang's module with the function for attention's sum
_groups: list[Any] = []  # SGLang's names for who sums


def load() -> None:
    """Look SGLang's functions up. While a patch is built, never from traced code."""
    from sglang.srt.layers.layer_boundary import layout, prepare

    _attention[:], _groups[:] = [prepare], [layout.SumGroup]


def many() -> bool:
    """Whether there is anything to sum: tensor parallelism."""
    from sglang.srt.runtime_context import get_parallel

    return bool(get_parallel().tp_size > 1)


def parallel_unfit() -> str | None:
    """Why GPUs share the work otherwise than by plain tensor parallelism, or None.

    The server's arguments decide, so every GPU's process has the same answer.
    """
    from sglang.srt.runtime_context import get_flags, get_lora, get_parallel

    parallel = get_parallel()
    if parallel.pp_group.world_size > 1:
        return "pipeline parallelism: the residual stream goes from GPU to GPU"
    if parallel.tp_size == 1:
        return None
    if parallel.attn_tp_size != parallel.tp_size:
        return "attention is not spread over all GPUs of the model alike"
    if parallel.moe_ep_size > 1 or parallel.moe_dp_size > 1:
        return "whole experts are spread over several GPUs"
    if get_flags().sp.enabled:
        return "sequence parallelism: each GPU has rows of its own"
    if get_lora().enable_lora:
        return "tensor parallelism with LoRA"
    return None


def boundary_unfit(layer: StagedLayer) -> str | None:
    """Why stock's boundaries would make other sums than the three that are made here, or None."""
    if not many():
        return None
    attn, ffn = layer.attn_boundary.plan, layer.ffn_boundary.plan
    if not [variant.name for variant in attn.paths] == ["ORDINARY"] == [v.name for v in ffn.paths]:
        return "the layer's boundaries move rows between GPUs"
    (given,), (path,) = attn.paths.values(), ffn.paths.values()
    entry, produced = path.entry, given.output
    step = getattr(entry.prepare, "keywords", {}).get("step")
    asked = getattr(step, "keywords", {})
    if (
        getattr(step, "func", None) is not _attention[0]._reduce_update_read
        or asked.get("fusions") != ()
        or asked.get("read_fusions") != ()
        or asked.get("gathers_residual") is not False
        or asked.get("group") is not _groups[0].ATTN_TP
        or entry.input_move is not None
        or produced.sum_impl is not None
        or not produced.always_partial
    ):
        return "attention's sum over the GPUs is made in another way than by an all-reduce"
    if given.entry.declared_sum is not None or path.output.group is not None:
        return "the layer leaves a sum over the GPUs to the next one"
    return None


def attention(layer: StagedLayer, output: torch.Tensor, forward_batch: LayerBatch) -> torch.Tensor:
    """Attention's output, summed over the GPUs as by stock's entry of the feed-forward."""
    quantised = layer.attn_boundary.declaration.update.quantized_sum
    summed: torch.Tensor = _attention[0].attn_tp_all_reduce(
        output, forward_batch, may_quantize=quantised
    )
    return summed


def later(layer: StagedLayer, forward_batch: LayerBatch) -> layer_steps.Sums:
    """The dense MLP's and the experts', as in stock's ``_next_stream``."""

    def over(group: object) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda part: layer.ffn_boundary.sum_part(part, forward_batch, group)

    groups = _groups[0]
    return layer_steps.Sums(over(groups.TP), over(groups.MOE_OUTPUT))
