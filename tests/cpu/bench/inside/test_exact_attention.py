"""bench/inside/exact_attention.py: stock's signatures, and the numbers of fp64 to fp32's rounding."""

from __future__ import annotations

import importlib
import inspect
import types

import pytest
import torch

from bench.inside import exact_attention
from gemma4_turbo.cli import lines
from gemma4_turbo.kernels.attention.extend import reference_extend_attention


def randn(*size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float32).bfloat16()


def test_the_signatures_take_what_stock_takes():
    stock = lines.stock()
    decode_attention, extend_attention = map(
        importlib.import_module, (stock.decode_kernel, stock.extend_kernel)
    )
    theirs = inspect.signature(extend_attention.extend_attention_fwd).parameters
    ours = inspect.signature(exact_attention.extend).parameters
    assert list(ours)[:16] == [
        {"q_extend": "q", "k_extend": "k", "v_extend": "v", "o_extend": "out"}.get(name, name)
        for name in list(theirs)[:16]
    ]
    never_given = {"skip_prefix_custom_mask", "lse_extend", "skip_prefix", "skip_extend"}
    asked_for_nothing = {"score_mod", "aux_tensors", "identity_kv_indices"}
    assert set(list(theirs)[16:]) - set(ours) <= never_given | asked_for_nothing
    theirs = inspect.signature(decode_attention.decode_attention_fwd).parameters
    ours = inspect.signature(exact_attention.decode).parameters
    assert list(ours)[:13] == ["out" if name == "o" else name for name in list(theirs)[:13]]


@pytest.mark.parametrize("window", [-1, 5])
def test_extend_is_the_reference_of_all_heads(window: int):
    q, k, v = randn(9, 4, 16, seed=1), randn(9, 2, 16, seed=2), randn(9, 2, 16, seed=3)
    k_buffer, v_buffer = randn(20, 2, 16, seed=4), randn(20, 2, 16, seed=5)
    starts = torch.tensor([0, 6, 9]), torch.tensor([0, 3, 7]), torch.tensor([7, 2, 9, 1, 4, 5, 11])
    out = torch.full_like(q, torch.nan)
    exact_attention.extend(
        q, k, v, out, k_buffer, v_buffer, *starts, None, True, None, 6, 1.0, 1.0, 0.25,
        sliding_window_size=window, window_kv_offsets=None,
    )  # fmt: skip
    expected = reference_extend_attention(
        q, k, v, k_buffer, v_buffer, *starts, sm_scale=0.25, sliding_window_size=window
    )
    assert torch.equal(out, expected.float().bfloat16())
    for more, said in (
        ({"logit_cap": 30.0}, "without cap"),
        ({"skip_prefix": True}, "skip_prefix"),
    ):
        with pytest.raises(ValueError, match=said):
            exact_attention.extend(
                q, k, v, out, k_buffer, v_buffer, *starts, None, True, None, 6, 1.0, 1.0, 0.25, **more
            )  # fmt: skip


def test_it_takes_stocks_place():
    for name, ours in exact_attention.FUNCTIONS.items():
        module = types.ModuleType(f"sglang.triton_ops.{name}")
        exact_attention.install(module)
        assert getattr(module, f"{name}_fwd") is ours


def test_decode_fills_stocks_output():
    q, k, v = randn(2, 4, 16, seed=1), randn(20, 2, 16, seed=2), randn(20, 2, 16, seed=3)
    out = torch.full_like(q, torch.nan)
    none = torch.empty(0)
    starts = torch.tensor([0, 3, 7]), torch.tensor([7, 2, 9, 1, 4, 5, 11])
    exact_attention.decode(q, k, v, out, *starts, none, none, none, 8, 0.25, 1.0, 1.0, use_pdl=True)
    scores = q[1, 3].double() @ k[[1, 4, 5, 11], 1].double().T * 0.25
    expected = scores.softmax(-1) @ v[[1, 4, 5, 11], 1].double()
    assert torch.allclose(out[1, 3].double(), expected, rtol=2**-8, atol=2**-9)
    with pytest.raises(ValueError, match="no sinks"):
        exact_attention.decode(
            q, k, v, out, *starts, none, none, none, 8, 0.25, 1.0, 1.0, sinks=q
        )  # fmt: skip
