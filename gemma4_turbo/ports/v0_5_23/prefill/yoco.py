"""What this line makes of a batch that `gemma4_turbo.ports.any.prefill.yoco_cut` cuts.

The backend that attends is the forward's, not the batch's: the tail runs in a forward of its own. A
batch's residual stream is the layers', so that the tail has one as well.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.prefill import mm_prefill_graph, yoco_cut
from gemma4_turbo.ports.v0_5_23 import layer_loop
from gemma4_turbo.ports.v0_5_23.attention import triton_backend

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import TextModel
    from gemma4_turbo.ports.v0_5_23.protocols import (
        ForwardMetadata,
        KVPool,
        LayerBatch,
        SWAKVPool,
        TritonBackend,
    )

_RUNNER = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner"

_WHERE = {
    "is_embedding": ("model", ""),
    "enable_lora": ("lora", ""),
    "forward_hooks": ("observability", ""),
    "debug_tensor_dump_output_folder": ("observability", ""),
    "disable_cuda_graph": ("exec", "graph"),
    "debug_cuda_graph": ("exec", "graph"),
    "enable_torch_compile": ("exec", "graph"),
    "enable_memory_saver": ("exec", "features"),
    "enable_pdmux": ("disagg", ""),
    "speculative_algorithm": ("spec", ""),
    "enable_mixed_chunk": ("schedule", ""),
    "enable_return_hidden_states": ("exec", "features"),
    "return_hidden_states_mode": ("exec", "features"),
    "enable_mis": ("exec", "features"),
}
"""The server's arguments that are asked for, in the namespaces that SGLang publishes."""


_LATE_READS = frozenset(("shared_read_ends", "_snapshot_prefill_shared_reads"))
"""Where a backend would say that it reads no slots once its metadata are made: Triton's does not, so
that the scheduler waits for the whole prefill."""


def _arguments() -> SimpleNamespace:
    from sglang.srt.runtime_context import get_context

    found = SimpleNamespace()
    for name, (space, part) in _WHERE.items():
        bag = get_context().config_bag(space)
        setattr(found, name, getattr(getattr(bag, part) if part else bag, name))
    return found


def _gpus() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_size)


def _backend(batch: LayerBatch) -> TritonBackend:
    from sglang.srt.model_executor.forward_context import get_attn_backend

    backend: TritonBackend = get_attn_backend()
    return backend


def _pool(batch: LayerBatch) -> KVPool | SWAKVPool:
    return _backend(batch).token_to_kv_pool


def _graph_unfit() -> str | None:
    from sglang.srt.model_executor.forward_context import has_forward_context
    from sglang.srt.model_executor.runner_utils.prefill_graph import is_in_prefill_graph_scope

    if is_in_prefill_graph_scope():
        return "the prefill runs in a breakable CUDA graph"
    if not has_forward_context():
        return "no attention backend is set for the forward"
    return None


def _layout_unfit(batch: LayerBatch) -> str | None:
    from sglang.srt.runtime_context import get_parallel

    if _gpus() > 1 or get_parallel().pp_group.world_size > 1:
        return "several GPUs: the layers' boundaries work on all rows of a batch"
    if batch.attn_tp_sequence_sharded or batch.attn_dcp_metadata is not None:
        return "a sequence is spread over several GPUs"
    if batch.token_indices_to_pool is not None or batch.decision_layouts is not None:
        return "embeddings or scores, no generation"
    if getattr(batch, "hisparse_coordinator", None) is not None:
        return "hierarchical sparse attention"
    return None


def _slots_unfit(batch: LayerBatch) -> str | None:
    backend = _backend(batch)
    if backend.dcp_size > 1:
        return "the KV cache is spread over several GPUs (DCP)"
    if backend.dllm_attention is not None:
        return "the attention of a diffusion language model"
    if not _LATE_READS.isdisjoint(vars(type(backend))):
        return "the scheduler may write over slots before the KV-shared layers run"
    pool = backend.token_to_kv_pool
    if type(pool) not in (triton_backend.types().pool, triton_backend.types().swa_pool):
        return f"the KV pool is a {type(pool).__name__}"
    return triton_backend.translator_unfit(backend.kv_index_translator)


def _sets_forward(model: TextModel, forward: object) -> bool:
    """Around a replay of a prefill graph; after it, what was there before stays on the instance.

    Or `mm_prefill_graph`, while one is recorded: it gives the model what SGLang's forward is given.
    """
    if getattr(forward, "__module__", "") == _RUNNER:
        return True
    if mm_prefill_graph.recording.get(model) is forward:
        return True
    return getattr(forward, "__func__", None) is type(model).forward


def _decode(made: LayerBatch, rows: torch.Tensor, backend: TritonBackend) -> None:
    made.global_num_token_non_padded_cpu = made.batch_size
    made.num_token_non_padded = made.global_num_token_non_padded = None
    made.input_embeds = made.mm_input_embeds = made._attn_output = None  # type: ignore[assignment]
    made.residual_stream = None
    _plainly(backend)


def _plainly(backend: TritonBackend) -> None:
    """A copy of SGLang's runs its usual kernel: "lean" attention wants buffers of its own."""
    backend.enable_lean_attention = False


def _slots(
    backend: TritonBackend,
    batch: LayerBatch,
    keys: torch.Tensor,
    first: torch.Tensor | None,
    indptr: torch.Tensor,
    total: int,
    sliding: bool,
) -> torch.Tensor:
    """Slots of each request's keys, one request after another."""
    indices = torch.empty(total, dtype=torch.int64, device=indptr.device)
    pool: Any = backend.token_to_kv_pool
    translator = backend.kv_index_translator
    swa = sliding and type(pool) is triton_backend.types().swa_pool
    more: dict[str, object] = {"kind": translator.window_kv_kind} if sliding else {}
    translator.pack_read_stream(
        batch.kv_loc_plan,
        req_pool_indices=batch.req_pool_indices,
        seq_lens=keys,
        indptr=indptr,
        out=indices,
        kv_start_idx=first,
        token_mapping=pool.full_to_swa_index_mapping if swa else None,
        **more,
    )
    return indices


def _metadata(theirs: ForwardMetadata, rows: torch.Tensor, **fields: object) -> object:
    """``uneven_batch``, which is left out, is read on AMD's GPUs alone."""
    from sglang.srt.layers.attention import triton_backend

    slots = theirs.swa_out_cache_loc
    kept = None if slots is None else slots[rows]
    made: object = triton_backend.ForwardMetadata(**fields, swa_out_cache_loc=kept)
    return made


def _made(like: LayerBatch, backend: TritonBackend, **fields: object) -> LayerBatch:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    _plainly(backend)
    made: LayerBatch = ForwardBatch(global_num_token_non_padded_cpu=fields["batch_size"], **fields)
    return made


LINE: yoco_cut.Line[LayerBatch, TritonBackend] = yoco_cut.Line(
    backend=_backend,
    pool=_pool,
    arguments=_arguments,
    gpus=_gpus,
    graph_unfit=_graph_unfit,
    layout_unfit=_layout_unfit,
    slots_unfit=_slots_unfit,
    sets_forward=_sets_forward,
    decode=_decode,
    slots=_slots,
    metadata=_metadata,
    made=_made,
    run=lambda model, first, tail: layer_loop.run_tail(model, first, tail),
)
