"""Attention backends other than Triton's on SGLang's own text model: the same check for every line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from gemma4_turbo.cli import small_model
from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from tests.cpu import forward_batch

ATTENTION = "sglang.srt.layers.attention"
BACKENDS = {  # --attention-backend: module and class; without one the module wants a GPU's libraries
    "trtllm_mha": ("trtllm_mha_backend", "TRTLLMHAAttnBackend"),
    "flashinfer": ("flashinfer_backend", "FlashInferAttnBackend"),
    "fa3": (None, "FlashAttentionBackend"),
    "fa4": (None, "FlashAttentionBackend"),
}
# Only a decode step may store K and V without its backend. What experts have more asks for no backend: once.
CASES = [
    *((name, mode, "ple") for name in BACKENDS for mode in ("DECODE", "EXTEND")),
    ("trtllm_mha", "DECODE", "moe"),
]
OURS = ("extend_attention", "decode_attention")
ELSEWHERE = {  # by model: what works all the same
    "moe": {"layer_norms", "input_norm", "rope_store", "skinny_gemm"},
    "ple": {"ple_tail", "input_norm", "rope_store", "skinny_gemm"},
}
TOKENS = 4
Run = Callable[[Any, tuple[Any, ...], Any], torch.Tensor]
"""The model on its inputs, whose third is the batch, with a backend."""


def backend(name: str, pool: Any, asked: list[bool]) -> Any:
    """SGLang's, made without a server; its attention returns its queries, and notes who stores."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    module, known = BACKENDS[name]
    base: Any = AttentionBackend
    if module is not None:
        base = getattr(importlib.import_module(f"{ATTENTION}.{module}"), known)

    def attend(
        self: Any,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        batch: Any,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        asked.append(save_kv_cache)
        assert k is not None
        assert v is not None
        return q.reshape(q.shape[0], -1)

    made = type(
        known, (base,), dict.fromkeys(("forward", "forward_extend", "forward_decode"), attend)
    )
    made.__abstractmethods__ = frozenset()
    found = object.__new__(made)
    found.fa_impl_ver = 4 if name == "fa4" else 3
    # All that a store asks for but the backend's type.
    found.token_to_kv_pool, found.dcp_size = pool, 1
    found.forward_metadata = SimpleNamespace()
    return found


def step(model: Any, mode: str, given: Any, run: Run) -> torch.Tensor:
    """One of `CASES`' modes with a backend."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch = forward_batch.prefill(out_cache_loc=torch.arange(TOKENS))
    batch.forward_mode = ForwardMode[mode]
    inputs: tuple[Any, ...] = torch.arange(TOKENS) % 64, torch.arange(TOKENS), batch
    if model.hidden_size_per_layer_input:
        wide = torch.linspace(-1, 1, TOKENS * len(model.layers) * 256).bfloat16()
        inputs = (*inputs, None, wide.view(TOKENS, len(model.layers), 256))
    with torch.no_grad():
        return run(model, inputs, given)


def check(name: str, mode: str, kind: str, pool: Callable[[], Any], run: Run) -> None:
    """The attention kernels stand aside, the backend stores, and everything else works. Stock at first."""
    model = small_model.build(kind, uniform=False)
    theirs: list[bool] = []
    expected = step(model, mode, backend(name, pool(), theirs), run)
    ENGINE.apply()
    runs = ENGINE.runs
    before = {patch: made.counters.engaged for patch, made in runs.items()}
    ours: list[bool] = []
    found = step(model, mode, backend(name, pool(), ours), run)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
    assert ours == theirs == [True, True]  # the backend stores what it is given
    done = {patch for patch, made in runs.items() if made.counters.engaged > before[patch]}
    assert done.isdisjoint(OURS)
    assert done >= ELSEWHERE[kind]
    assert [made.reason for made in runs.values() if made.state == states.FAILED] == []
