"""What 0.5.12 makes of a batch that `gemma4_turbo.ports.any.prefill.yoco_cut` cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.prefill import yoco_cut
from gemma4_turbo.ports.v0_5_12 import layer_loop

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, TextModel, TritonBackend


def _arguments() -> Any:
    from sglang.srt.server_args import get_global_server_args

    return get_global_server_args()


def _gpus() -> int:
    from sglang.srt.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


def _graph_unfit() -> str | None:
    from sglang.srt.compilation.piecewise_context_manager import get_forward_context

    if get_forward_context() is not None:
        return "the prefill runs in a piecewise CUDA graph"
    return None


def _layout_unfit(batch: ForwardBatch) -> str | None:
    # One that runs out of memory would all-reduce all rows, the others fewer.
    if _gpus() > 1:
        return "several GPUs: one of them alone may have to send all rows on"
    if batch.padded_static_len >= 0:
        return "the batch is padded"
    if batch.hisparse_coordinator is not None:
        return "hierarchical sparse attention"
    return None


def _sets_forward(model: TextModel, forward: object) -> bool:
    """For piecewise graphs."""
    return getattr(forward, "__module__", "") == "sglang.srt.compilation.compile"


def _decode(made: ForwardBatch, rows: torch.Tensor, backend: TritonBackend) -> None:
    made.num_token_non_padded_cpu = made.batch_size
    if made.out_cache_loc_swa is not None:
        made.out_cache_loc_swa = made.out_cache_loc_swa[rows]
    made.attn_backend = backend


def _slots(
    backend: TritonBackend,
    batch: ForwardBatch,
    keys: torch.Tensor,
    first: torch.Tensor | None,
    indptr: torch.Tensor,
    total: int,
    sliding: bool,
) -> torch.Tensor:
    """Slots of each request's keys, one request after another."""
    from sglang.srt.layers.attention import triton_backend

    indices = torch.empty(total, dtype=torch.int64, device=indptr.device)
    triton_backend.create_flashinfer_kv_indices_triton[(len(keys),)](
        backend.req_to_token,
        batch.req_pool_indices,
        keys,
        indptr,
        first,
        indices,
        backend.req_to_token.stride(0),
    )
    allocator: Any = backend.token_to_kv_pool_allocator
    if sliding and hasattr(allocator, "translate_loc_from_full_to_swa"):
        return allocator.translate_loc_from_full_to_swa(indices).to(torch.int64)  # type: ignore[no-any-return]
    return indices


def _metadata(theirs: object, rows: torch.Tensor, **fields: object) -> object:
    from sglang.srt.layers.attention.triton_backend import ForwardMetadata

    made: object = ForwardMetadata(**fields)
    return made


def _made(like: ForwardBatch, backend: TritonBackend, **fields: object) -> ForwardBatch:
    from sglang.srt.model_executor import forward_batch_info

    made: ForwardBatch = forward_batch_info.ForwardBatch(
        num_token_non_padded_cpu=fields["batch_size"],
        req_to_token_pool=like.req_to_token_pool,
        token_to_kv_pool=like.token_to_kv_pool,
        attn_backend=backend,
        **fields,
    )
    return made


LINE: yoco_cut.Line[ForwardBatch, TritonBackend] = yoco_cut.Line(
    backend=lambda batch: batch.attn_backend,
    pool=lambda batch: batch.token_to_kv_pool,
    arguments=_arguments,
    gpus=_gpus,
    graph_unfit=_graph_unfit,
    layout_unfit=_layout_unfit,
    slots_unfit=lambda batch: None,
    sets_forward=_sets_forward,
    decode=_decode,
    slots=_slots,
    metadata=_metadata,
    made=_made,
    run=lambda model, first, tail: layer_loop.run_tail(model, first, tail),
)
