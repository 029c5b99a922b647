"""A small Gemma 4 whose last layers share KV, over SGLang's real pools and Triton attention, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.cli import sglang_process, small_model

SHARED_FROM = 3
TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2
HEAD = {"sliding_attention": 64, "full_attention": 128}
SLOTS, CONTEXT, WINDOW = 256, 96, 7  # WINDOW: keys before a token's own, in its layer
VOCAB = 64
DTYPE = torch.float16  # of bf16 the interpreter multiplies the bits, in the kernels of SGLang


def config(shared: int = SHARED_FROM, ple: bool = True) -> Any:
    """Text configuration with the head fields as SGLang renames them."""
    from transformers import Gemma4TextConfig

    made = Gemma4TextConfig(
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=len(TYPES),
        layer_types=TYPES,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD["full_attention"],
        global_head_dim=HEAD["full_attention"],
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=256 if ple else 0,
        num_kv_shared_layers=shared,
        sliding_window=WINDOW,
        max_position_embeddings=CONTEXT,
    )
    made.swa_head_dim = made.swa_v_head_dim = HEAD["sliding_attention"]
    made.swa_num_key_value_heads = 1
    return made


def build(shared: int = SHARED_FROM, ple: bool = True) -> Any:
    """SGLang's text model with random weights."""
    from sglang.srt.models.gemma4_causal import Gemma4TextModel

    sglang_process.prepare_sglang()
    with small_model.constructing(DTYPE):
        model = Gemma4TextModel(config(shared, ple))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        low = 0.5 if "norm" in name or "scale" in name else -0.1
        parameter.data.uniform_(low, low + 0.2 if low < 0 else 1.5, generator=generator)
    for layer in model.layers:
        layer.layer_scalar.fill_(0.75)
        rope = layer.self_attn.rotary_emb
        rope.cos_sin_cache = rope.cos_sin_cache.float()  # as on a GPU
    return model


class Memory:
    """KV pools, allocator and attention backend of one engine."""

    def __init__(
        self,
        size: int = SLOTS,
        layers: tuple[list[int], list[int]] | None = None,
        requests: int = 8,
    ) -> None:
        """``layers``: full and sliding ones that get buffers; None: all."""
        from sglang.srt.configs.model_config import AttentionArch
        from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool, SWATokenToKVPoolAllocator

        full, sliding = layers or (
            [i for i, t in enumerate(TYPES) if t == "full_attention"],
            [i for i, t in enumerate(TYPES) if t == "sliding_attention"],
        )
        common = {"page_size": 1, "dtype": DTYPE, "device": "cpu"}
        self.kv = SWAKVPool(
            size=size,
            size_swa=size,
            head_num=1,
            head_dim=HEAD["full_attention"],
            swa_head_num=1,
            swa_head_dim=HEAD["sliding_attention"],
            swa_v_head_dim=HEAD["sliding_attention"],
            swa_attention_layer_ids=sliding,
            full_attention_layer_ids=full,
            enable_kvcache_transpose=False,
            **common,
        )
        self.allocator = SWATokenToKVPoolAllocator(
            size=size, size_swa=size, kvcache=self.kv, need_sort=False, **common
        )
        self.requests = ReqToTokenPool(requests, CONTEXT, "cpu", enable_memory_saver=False)
        self.clear()
        arguments = SimpleNamespace(
            speculative_num_draft_tokens=None,
            speculative_num_steps=None,
            triton_attention_num_kv_splits=4,
            triton_attention_split_tile_size=None,
            disable_cuda_graph=True,
            chunked_prefill_size=32,
            enable_deterministic_inference=False,
        )
        model_config = SimpleNamespace(
            attention_arch=AttentionArch.MHA,
            num_attention_heads=2,
            get_num_kv_heads=lambda ranks: 1,
            v_head_dim=HEAD["full_attention"],
            swa_v_head_dim=HEAD["sliding_attention"],
            context_len=CONTEXT,
            is_encoder_decoder=False,
        )
        runner = SimpleNamespace(
            req_to_token_pool=self.requests,
            sliding_window_size=WINDOW - 1,  # as get_attention_sliding_window_size has it
            token_to_kv_pool_allocator=self.allocator,
            token_to_kv_pool=self.kv,
            server_args=arguments,
            model_config=model_config,
            hybrid_gdn_config=None,
            kimi_linear_config=None,
            linear_attn_model_spec=None,
            device="cpu",
            gpu_id=0,
        )
        with pytest.MonkeyPatch.context() as patch:
            name = "sglang.srt.layers.attention.triton_backend.get_device_core_count"
            patch.setattr(name, lambda gpu: 0)
            self.backend = TritonAttnBackend(runner)

    def clear(self) -> None:
        """No request has a slot. Slots come out of order, and not the same ones in both pools."""
        self.allocator.clear()
        self.requests.req_to_token.zero_()
        self.allocator.alloc(5)
        self.allocator.swa_attn_allocator.alloc(9)

    def prefill(self, lengths: dict[int, int], prefixes: dict[int, int], **changes: Any) -> Any:
        """A batch that extends request ``r`` by ``lengths[r]`` tokens after ``prefixes[r]``.

        The backend's metadata are made, as a model runner does before the model's forward.
        """
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        order = list(lengths)
        before = [prefixes.get(request, 0) for request in order]
        new = [lengths[request] for request in order]
        slots = []
        for request, start, length in zip(order, before, new, strict=True):
            taken = self.allocator.alloc(length).flip(0)
            self.requests.req_to_token[request, start : start + length] = taken.to(torch.int32)
            slots.append(taken)
        totals = [a + b for a, b in zip(before, new, strict=True)]
        where = torch.cat(slots)
        fields = {
            "forward_mode": ForwardMode.EXTEND,
            "batch_size": len(order),
            "input_ids": torch.cat(
                [
                    (torch.arange(n) * 7 + r * 11 + s) % VOCAB
                    for r, n, s in zip(order, new, before, strict=True)
                ]
            ),
            "req_pool_indices": torch.tensor(order),
            "seq_lens": torch.tensor(totals),
            "seq_lens_cpu": torch.tensor(totals),
            "seq_lens_sum": sum(totals),
            "out_cache_loc": where,
            "out_cache_loc_swa": self.allocator.translate_loc_from_full_to_swa(where),
            "positions": torch.cat(
                [torch.arange(s, s + n) for s, n in zip(before, new, strict=True)]
            ),
            "extend_num_tokens": sum(new),
            "extend_seq_lens": torch.tensor(new),
            "extend_prefix_lens": torch.tensor(before),
            "extend_seq_lens_cpu": new,
            "extend_prefix_lens_cpu": before,
            "attn_backend": self.backend,
            "token_to_kv_pool": self.kv,
            "req_to_token_pool": self.requests,
            "num_token_non_padded_cpu": sum(new),
        }
        batch = ForwardBatch(**fields | changes)
        self.kv.set_swa_loc(batch.out_cache_loc_swa)
        self.backend.init_forward_metadata(batch)
        return batch


# -- what tests of the cut look at --------------------------------------------------------------------


def last_rows(batch: Any) -> torch.Tensor:
    """The rows that SGLang's logits processor picks."""
    return torch.cumsum(batch.extend_seq_lens, dim=0) - 1


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A few roundings: the attention kernels add in another order, through three layers."""
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference < 0.02, float(difference)


def rows_per_layer(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled at each forward: how many rows every layer was given."""
    seen: list[int] = []
    layer = type(model.layers[0])
    stock = layer.forward

    def counted(self: Any, positions: Any, hidden_states: torch.Tensor, **rest: Any) -> Any:
        seen.append(hidden_states.shape[0])
        return stock(self, positions=positions, hidden_states=hidden_states, **rest)

    monkeypatch.setattr(layer, "forward", counted)
    return seen


# -- SGLang's configuration of models in their sizes ----------------------------------------------------

GEOMETRY = {  # layers, sliding layers to a full one, shared, KV heads
    "e4b": (42, 5, 18, 2),
    "e2b": (35, 4, 20, 1),
    "26b-a4b": (30, 5, 0, 8),
}


def model_config(folder: Path, model: str, **changed: Any) -> Any:
    """SGLang's ModelConfig with a model's layers and KV heads; the rest is small."""
    from sglang.srt.configs.model_config import ModelConfig

    layers, period, shared, heads = GEOMETRY[model]
    types = [
        "full_attention" if i % (period + 1) == period else "sliding_attention"
        for i in range(layers)
    ]
    fields = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "layer_types": types,
        "num_attention_heads": 8,
        "num_key_value_heads": heads,
        "head_dim": 512,
        "v_head_dim": 512,
        "global_head_dim": 512,
        "swa_head_dim": 256,
        "swa_v_head_dim": 256,
        "swa_num_key_value_heads": heads,
        "num_kv_shared_layers": shared,
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "max_position_embeddings": 131072,
        **changed,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return ModelConfig(str(folder))
