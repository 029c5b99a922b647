"""`skinny_gemm` at the models' shapes against fp64 and cuBLAS, and the same bits at every run."""

from __future__ import annotations

import pytest
import torch

from gemma4_turbo.kernels import skinny_gemm as kernel
from gemma4_turbo.kernels.skinny_gemm import Epilogue

SHAPES = [
    (20480, 2560, Epilogue.GELU_AND_MUL),
    (24576, 1536, Epilogue.GELU_AND_MUL),
    (4224, 2816, Epilogue.GELU_AND_MUL),
    (2560, 10240, Epilogue.NONE),
    (2816, 2112, Epilogue.NONE),
    (3072, 2560, Epilogue.NONE),
    (10240, 2816, Epilogue.NONE),
    (2560, 256, Epilogue.NONE),
    (256, 2560, Epilogue.GELU_TIMES),
    (256, 1536, Epilogue.GELU_TIMES),
]


def check(
    n: int,
    k: int,
    epilogue: Epilogue,
    rows: int,
    dtype: torch.dtype,
    shared_memory: int = 227 * 1024,
    runs: int = 20,
) -> None:
    """No farther from fp64 than cuBLAS, and the same bits at every run."""
    with torch.no_grad():
        generator = torch.Generator("cuda").manual_seed(rows)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", generator=generator)

        weight = (randn(n, k) / k**0.5).to(dtype)
        x = randn(rows, k + 64).to(dtype)[:, :k]
        extra = randn(rows, n).to(dtype) if epilogue == Epilogue.GELU_TIMES else None
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        config = kernel.choose(weight.shape, epilogue, processors, rows, shared_memory)
        arrived = torch.zeros(
            kernel.tiles(weight, epilogue, config), dtype=torch.int32, device="cuda"
        )
        found = kernel.skinny_gemm(x, weight, config, epilogue, extra, arrived)
        stock = kernel.reference_skinny_gemm(x, weight, epilogue, extra)
        exact = kernel.reference_skinny_gemm(
            x.double(), weight.double(), epilogue, None if extra is None else extra.double()
        )
        ours, theirs = ((y.double() - exact).norm() / exact.norm() for y in (found, stock))
        assert float(ours) <= 1.1 * float(theirs)
        for _ in range(runs):
            again = kernel.skinny_gemm(x, weight, config, epilogue, extra, arrived)
            assert torch.equal(again.view(torch.int16), found.view(torch.int16))
        assert int(arrived.sum()) == 0


@pytest.mark.parametrize(("n", "k", "epilogue"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_farther_from_fp64_than_cublas(n, k, epilogue, rows, dtype):
    check(n, k, epilogue, rows, dtype)


# The memory of a CTA on sm_86, sm_89 and sm_120, and on sm_80: fewer stages. The rows have a tile each.
@pytest.mark.parametrize(("n", "k", "epilogue"), SHAPES)
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("kib", [99, 163])
def test_stages_for_less_shared_memory(n, k, epilogue, rows, kib):
    check(n, k, epilogue, rows, torch.bfloat16, kib * 1024, runs=3)
