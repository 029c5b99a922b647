"""SGLang's triton backend over its own KV pools, on the CPU: two layers of Gemma 4's kinds, three requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

HEADS = 4
SLIDING, FULL = 0, 1  # layers: 2 KV heads of 256, 1 of 512
DIMS, KV_HEADS = (256, 512), (2, 1)
WINDOW = 15  # of the layer and of the backend, one less than the model's, as in Gemma 4
LONGEST = 100
REQUESTS = 3
DRAFT = 4


class World:
    """A `TritonAttnBackend` made without a server's arguments, its pools, translator and layers."""

    def __init__(self, window: int | None = WINDOW, dtype: torch.dtype = torch.float16) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        self.generator = torch.Generator().manual_seed(0)
        self.pool = SWAKVPool(
            size=400,
            size_swa=350,
            page_size=1,
            dtype=dtype,
            head_num=KV_HEADS[FULL],
            head_dim=DIMS[FULL],
            swa_attention_layer_ids=[SLIDING],
            full_attention_layer_ids=[FULL],
            device="cpu",
            swa_head_num=KV_HEADS[SLIDING],
            swa_head_dim=DIMS[SLIDING],
            swa_v_head_dim=DIMS[SLIDING],
            v_head_dim=DIMS[FULL],
        )
        for buffer in self.buffers():
            buffer.copy_(self.randn(*buffer.shape).to(buffer.dtype))
        self.map_slots(400, 350, dtype, REQUESTS)
        self.backend = self.make_backend(window)
        self.layers = [
            RadixAttention(
                HEADS, DIMS[SLIDING], 0.06, KV_HEADS[SLIDING], SLIDING, sliding_window_size=WINDOW
            ),
            # A full layer's window is -1 in the model, too.
            RadixAttention(HEADS, DIMS[FULL], 0.04, KV_HEADS[FULL], FULL, sliding_window_size=-1),
        ]

    def some_slots(self) -> torch.Tensor:
        return torch.randperm(340, generator=self.generator)[: REQUESTS * LONGEST] + 1

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).half()

    def buffers(self) -> list[torch.Tensor]:
        parts = (self.pool.full_kv_pool, self.pool.swa_kv_pool)
        return [buffer for part in parts for buffer in (*part.k_buffer, *part.v_buffer)]

    def map_slots(self, size: int, sliding: int, dtype: torch.dtype, requests: int) -> None:
        """The pool's allocator, the table of the requests' slots, and the translator that reads it."""
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
        from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator

        self.allocator = SWATokenToKVPoolAllocator(
            size, sliding, 1, dtype, "cpu", kvcache=self.pool, need_sort=False
        )
        slots = self.some_slots()
        self.allocator.full_to_swa_index_mapping[slots] = self.some_slots()
        self.table = slots.view(requests, -1).int()
        self.translator = KVIndexTranslator(
            req_to_token=self.table,
            token_to_kv_pool_allocator=self.allocator,
            token_to_kv_pool=self.pool,
            page_size=1,
            device="cpu",
        )

    def make_backend(self, window: int | None) -> Any:
        """The fields that `TritonAttnBackend.__init__` sets, with their values on such a server."""
        from sglang.kernels.ops.attention import decode_attention, extend_attention
        from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

        backend: Any = TritonAttnBackend.__new__(TritonAttnBackend)
        requests = 8
        fields: dict[str, Any] = {
            "decode_attention_fwd": decode_attention.decode_attention_fwd,
            "extend_attention_fwd": extend_attention.extend_attention_fwd,
            "enable_lean_attention": False,
            "skip_prefill": False,
            "sliding_window_size": window,
            "req_to_token_pool": SimpleNamespace(size=requests, req_to_token=self.table),
            "token_to_kv_pool": self.pool,
            "req_to_token": self.table,
            "token_to_kv_pool_allocator": self.allocator,
            "use_sliding_window_kv_pool": True,
            "page_size": 1,
            "kv_index_translator": self.translator,
            "num_draft_tokens": DRAFT,
            "dllm_block_size": None,
            "target_verify_num_tokens_per_req": DRAFT,
            "speculative_num_steps": 3,
            "topk": 1,
            "use_verify_splitkv": False,
            "use_verify_shared_kv": False,
            "use_mla": False,
            "dcp_size": 1,
            "dcp_rank": 0,
            "num_head": HEADS,
            "num_kv_head": KV_HEADS[SLIDING],
            "use_dense_fp8_chunked_prefill": False,
            "v_head_dim": DIMS[FULL],
            "swa_v_head_dim": DIMS[SLIDING],
            "max_context_len": LONGEST,
            "device": "cpu",
            "device_core_count": 0,
            "lean_total_programs": 1,
            "lean_block_m": 16,
            "static_kv_splits": False,
            "max_kv_splits": 4,
            "use_pdl": False,
            "allow_bidirectional_attention_in_extend": False,
            "enable_deterministic": False,
            "split_tile_size": None,
            "kv_indptr": torch.zeros(requests + 1, dtype=torch.int32),
            "window_kv_indptr": torch.zeros(requests + 1, dtype=torch.int32),
            "qo_indptr": torch.zeros(requests + 1, dtype=torch.int64),
            "mask_indptr": torch.zeros(requests + 1, dtype=torch.int64),
            "forward_metadata": None,
            "is_draft_runner": False,
            "_verify_mask": None,
        }
        for name, value in fields.items():
            setattr(backend, name, value)
        return backend

    # -- batches ------------------------------------------------------------------------------------

    def batch(self, mode: str, new: list[int], old: list[int]) -> Any:
        """A batch of so many new tokens on so many cached ones, bound to its plan; no metadata yet."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        places = [self.table[i, o : o + n] for i, (n, o) in enumerate(zip(new, old, strict=True))]
        batch = SimpleNamespace(
            forward_mode=ForwardMode[mode],
            batch_size=len(new),
            req_pool_indices=torch.arange(len(new)),
            seq_lens=torch.tensor(old) + torch.tensor(new),
            seq_lens_sum=sum(new) + sum(old),
            spec_info=None,
            out_cache_loc=torch.cat(places).long(),
            extend_seq_lens=torch.tensor(new),
            extend_seq_lens_cpu=new,
            extend_prefix_lens=torch.tensor(old),
            extend_prefix_lens_cpu=old,
            mha_one_shot=False,
            _attn_output=None,
            tokens=sum(new),
        )
        self.translator.own_plan(batch).bind(batch, self.translator)
        return batch

    def decode(self, lengths: list[int]) -> Any:
        """A decode step of sequences that have so many tokens with the new one."""
        batch = self.batch("DECODE", [1] * len(lengths), [length - 1 for length in lengths])
        self.backend.init_forward_metadata(batch)
        return batch

    def extend(self, new: list[int], old: list[int]) -> Any:
        """A prefill of ``new`` tokens on ``old`` cached ones."""
        batch = self.batch("EXTEND", new, old)
        self.backend.init_forward_metadata(batch)
        return batch

    def verify(self, old: list[int]) -> Any:
        """A verification of a draft tree after ``old`` tokens."""
        batch = self.batch("TARGET_VERIFY", [DRAFT] * len(old), old)
        batch.seq_lens = torch.tensor(old)
        batch.seq_lens_sum = sum(old)
        parts = []
        for length in old:
            tree = torch.rand(DRAFT, length + DRAFT, generator=self.generator) < 0.5
            tree[:, length:] |= torch.eye(DRAFT, dtype=torch.bool)
            parts.append(tree.flatten())
        batch.spec_info = SimpleNamespace(
            custom_mask=torch.cat(parts), draft_token_num=DRAFT, num_tokens_per_req=DRAFT
        )
        self.backend.init_forward_metadata(batch)
        return batch

    # -- calls --------------------------------------------------------------------------------------

    def inputs(self, layer: int, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q contiguous, k and v slices of the projection's result."""
        dim, kv_heads = DIMS[layer], KV_HEADS[layer]
        sizes = [HEADS * dim, kv_heads * dim, kv_heads * dim]
        q, k, v = self.randn(batch.tokens, sum(sizes)).split(sizes, -1)
        return q.contiguous(), k.unflatten(-1, (-1, dim)), v.unflatten(-1, (-1, dim))

    def both(
        self, ours: Any, stock: Any, layer: int, batch: Any, *arguments: Any, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output and pools of ours, output and pools of stock, the pools put back in between."""
        kept = [buffer.clone() for buffer in self.buffers()]
        results = []
        for call in (ours, stock):
            for buffer, before in zip(self.buffers(), kept, strict=True):
                buffer.copy_(before)
            found = call(self.backend, *arguments, self.layers[layer], batch, **keywords)
            results += [found, torch.cat([buffer.flatten() for buffer in self.buffers()])]
        return results[0], results[1], results[2], results[3]
