"""Pixels that are converted on the GPU are those that SGLang converts on the host."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_conversion_rounds_as_on_the_host(dtype: torch.dtype):
    """Any bits of fp32 but NaN, whose payload each device chooses."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32)
    pixels = torch.cat([bits.view(torch.float32), torch.rand(1 << 20, generator=generator)])
    pixels = pixels[~pixels.isnan()]
    host = pixels.to("cuda", dtype).view(torch.int16)
    assert torch.equal(pixels.to("cuda").to(dtype).view(torch.int16), host)
