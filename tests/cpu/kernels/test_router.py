"""The router kernel in Triton's interpreter against CUDA's order of ties, simulated in numpy."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_turbo.kernels import router as kernel
from gemma4_turbo.kernels.topk_order import cuda_topk_ids
from tests.router_inputs import KINDS, logits

pytestmark = pytest.mark.skipif(
    not kernel.INTERPRETED, reason="with a GPU, tests/gpu compares with stock itself"
)

RECORDED = Path(__file__).with_name("cuda_topk_orders.json")
DTYPES = kernel.LOGIT_DTYPES


def round_to(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """fp32 rounded to nearest even in ``dtype``, as fp32."""
    return torch.from_numpy(values).to(dtype).float().numpy()


def oracle(x: torch.Tensor, scale: torch.Tensor, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and ids in numpy: CUDA's order, then softmax and scale with stock's roundings."""
    ids = cuda_topk_ids(x.float().numpy(), topk)
    top = np.take_along_axis(x.float().numpy(), ids, axis=1)
    with np.errstate(invalid="ignore"):
        exps = np.exp((top - top[:, :1]).astype(np.float32))
        padded = np.zeros((len(top), 32), np.float32)
        padded[:, :topk] = exps
        width = 1 << (topk - 1).bit_length() if topk > 1 else 1
        total = padded[:, :width]
        while total.shape[1] > 1:  # the butterfly of one warp
            half = total.shape[1] // 2
            total = total[:, :half] + total[:, half:]
        weights = round_to(exps / total, x.dtype)
        scale = scale.float().to(x.dtype).float().numpy()
        return round_to(weights * scale[ids], x.dtype), ids.astype(np.int32)


def check(x: torch.Tensor, scale: torch.Tensor, topk: int) -> None:
    """Ids equal, weights equal in every bit but a NaN's payload, which is the CPU's own."""
    weights, ids = kernel.fused_routing(x, scale, topk)
    expected, expected_ids = oracle(x, scale, topk)
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    both_nan = np.isnan(expected) & weights.isnan().numpy()
    got_bits = np.where(both_nan, 0, weights.numpy().view(np.int32))
    expected_bits = np.where(both_nan, 0, expected.view(np.int32))
    np.testing.assert_array_equal(got_bits, expected_bits)


@st.composite
def tied_rows(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A few rows drawn from very few values, so that ties are everywhere."""
    experts = draw(st.integers(1, 40))
    topk = draw(st.integers(1, min(experts, 12)))
    pool = draw(
        st.lists(
            st.sampled_from((0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, -1e-40, 3e38, inf, -inf, nan)),
            min_size=1,
            max_size=4,
        )
    )
    rows = draw(
        st.lists(
            st.lists(st.sampled_from(pool), min_size=experts, max_size=experts),
            min_size=1,
            max_size=2,
        )
    )
    return torch.tensor(rows).to(draw(st.sampled_from(DTYPES))), topk


@settings(max_examples=60, deadline=None)
@given(tied_rows())
def test_rows_full_of_ties(case):
    x, topk = case
    check(x, torch.linspace(0.5, 1.5, x.shape[1]), topk)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_rows(dtype, kind):
    generator = torch.Generator().manual_seed(5)
    x = logits(kind, 2, 128, 8, dtype, generator)
    check(x, torch.randn(128, generator=generator).to(dtype), 8)


# The sizes in one dtype; in the other those that are odd in both ways. A row of the largest takes seconds.
@pytest.mark.parametrize(
    ("dtype", "experts", "topk"),
    [
        *((torch.bfloat16, *size) for size in ((1, 1), (2, 2), (5, 5), (60, 6), (33, 17))),
        *((torch.bfloat16, *size) for size in ((40, 32), (300, 8))),
        *((torch.float32, *size) for size in ((5, 5), (60, 6))),
    ],
    ids=str,
)
def test_odd_sizes(dtype, experts, topk):
    rows = 1 if topk == 32 else 2
    x = logits("few values", rows, experts, topk, dtype, torch.Generator().manual_seed(6))
    check(x, torch.linspace(-1, 1, experts), topk)


@pytest.mark.parametrize("scale_dtype", kernel.SCALE_DTYPES, ids=str)
def test_every_scale_dtype(scale_dtype):
    x = logits("few values", 2, 64, 8, torch.bfloat16, torch.Generator().manual_seed(7))
    check(x, (torch.linspace(-3, 3, 64) * 1e3).to(scale_dtype), 8)


def test_views_and_no_rows():
    x = logits("few values", 8, 128, 8, torch.bfloat16, torch.Generator().manual_seed(8))
    scale = torch.linspace(0.5, 2, 64)
    check(x[:, ::2], scale, 8)
    check(x[::3, 5:69], scale, 8)
    check(x[:, :8].t().contiguous().t()[:2], scale[:8].contiguous(), 4)
    weights, ids = kernel.fused_routing(x[:0, :64], scale, 8)
    assert weights.shape == ids.shape == (0, 8)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)


def test_oracle_gives_the_orders_recorded_on_a_gpu():
    """The numpy oracle against what torch.topk returned on a real GPU for rows full of ties."""
    recorded = json.loads(RECORDED.read_text())
    assert recorded["gpu"].startswith("NVIDIA")
    by_index = 0
    for case in recorded["cases"]:
        found = cuda_topk_ids(np.array(case["rows"], np.float32), case["topk"])
        np.testing.assert_array_equal(found, case["ids"])
        by_index += (np.sort(found, axis=1) == found).all()
    assert by_index < len(recorded["cases"]) / 4  # "lower id first" would be wrong


def test_reference_is_the_eager_path():
    """Without ties the plain torch reference and the kernel agree on the CPU too."""
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(9))
    scale = torch.linspace(0.5, 1.5, 128)
    weights, ids = kernel.fused_routing(x, scale, 8)
    expected, expected_ids = kernel.reference_routing(x, scale, 8)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("logits_", "scale", "topk", "named"),
    [
        (torch.zeros(4), torch.ones(4), 2, "router_logits"),
        (torch.zeros(2, 4, dtype=torch.float64), torch.ones(4), 2, "router_logits"),
        (torch.zeros(2, 4), torch.ones(5), 2, "per_expert_scale"),
        (torch.zeros(2, 4), torch.ones(4, dtype=torch.int32), 2, "per_expert_scale"),
        (torch.zeros(2, 4), torch.ones(8)[::2], 2, "per_expert_scale"),
        (torch.zeros(2, 4), torch.ones(4), 5, "topk"),
        (torch.zeros(2, 4), torch.ones(4), 0, "topk"),
        (torch.zeros(2, 64), torch.ones(64), 33, "topk"),
        (torch.zeros(2, 513), torch.ones(513), 8, "router_logits"),
        (torch.zeros(800, 300), torch.ones(300), 8, "router_logits"),
        (torch.zeros(2, 4, requires_grad=True), torch.ones(4), 2, "gradient"),
    ],
)
def test_declines_name_the_argument(logits_, scale, topk, named):
    with pytest.raises(ValueError, match=named):
        kernel.fused_routing(logits_, scale, topk)


def test_oracle_refuses_a_wrong_k():
    with pytest.raises(ValueError, match="topk"):
        cuda_topk_ids(np.zeros((1, 4)), 5)
