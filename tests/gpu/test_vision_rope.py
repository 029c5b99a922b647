"""The vision encoder's rotation on a GPU: every bit is that of stock's function."""

from __future__ import annotations

import pytest
import torch

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.kernels import vision_rope as kernel
from gemma4_turbo.ports.any.vision import vision_rope as patch


@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 4), (33, 2, 8), (2520, 12, 64), (900, 16, 72)])
def test_every_bit_is_stocks(dtype: torch.dtype, shape: tuple[int, int, int]):
    """Signed zeros, infinities, NaN and subnormals included."""
    sglang_process.prepare_sglang()  # a module of SGLang's cannot be imported on its own everywhere
    from sglang.srt.models.gemma4_vision import _apply_multidimensional_rope

    tokens, heads, head_dim = shape
    x, cos, sin = patch.samples("cuda", dtype, heads, head_dim, tokens)
    special = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 0.0], device="cuda")
    x[0, 0, : len(special)] = special.to(dtype)[: x.shape[-1]]
    x[-1] = -0.0
    expected = _apply_multidimensional_rope(x, cos, sin)
    assert torch.equal(
        kernel.vision_rope(x, cos, sin).view(torch.int16), expected.view(torch.int16)
    )
