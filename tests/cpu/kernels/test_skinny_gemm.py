"""`skinny_gemm` in Triton's interpreter against plain torch, and how it cuts the models' layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from gemma4_turbo.kernels import measured
from gemma4_turbo.kernels import skinny_gemm as kernel
from gemma4_turbo.kernels.skinny_gemm import Config, Epilogue

pytestmark = pytest.mark.skipif(not kernel.INTERPRETED, reason="needs Triton's interpreter")

POISON = 123.0


def operands(rows: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """x as a view with a stride beyond its width, a weight, and what GELU_TIMES multiplies with."""
    generator = torch.Generator().manual_seed(rows + n + k)
    whole = torch.full((rows, k + 64), POISON, dtype=dtype)
    whole[:, :k] = torch.randn(rows, k, generator=generator).to(dtype)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
    return whole[:, :k], weight, torch.randn(rows, n, generator=generator).to(dtype)


BF16, HALF = torch.bfloat16, torch.float16
# Dtype, epilogue and split choose the code: all of them together, with tiles that are masked. The rows
# lie on both sides of each tile's height; with the epilogue that loads rows, and without. The shapes:
# tiles that are full or not, and blocks of K that a split by three divides unevenly.
CASES = [
    *((d, 17, 48, 192, epilogue, split) for d in (BF16, HALF) for epilogue in Epilogue for split in (1, 3)),
    *(
        (BF16, rows, 48, 192, epilogue, 3)
        for rows in (0, 1, 7, 16, 33, 64)
        for epilogue in (Epilogue.NONE, Epilogue.GELU_TIMES)
    ),
    *((BF16, 7, n, k, epilogue, 3) for n, k in ((64, 256), (96, 512)) for epilogue in Epilogue),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "rows", "n", "k", "epilogue", "split"),
    CASES,
    ids=lambda value: value.name if isinstance(value, Epilogue) else str(value),
)
def test_skinny_gemm(dtype, rows, n, k, epilogue, split):
    x, weight, extra = operands(rows, n, k, dtype)
    given = extra if epilogue == Epilogue.GELU_TIMES else None
    config = Config(32, 64, split, 3)
    arrived = torch.zeros(kernel.tiles(weight, epilogue, config), dtype=torch.int32)
    found = kernel.skinny_gemm(x, weight, config, epilogue, given, arrived)
    expected = kernel.reference_skinny_gemm(x, weight, epilogue, given)
    # Near zero a GELU multiplies the rounding of its argument with what it is multiplied with.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=3 * ulp, atol=8 * ulp)
    assert int(arrived.sum()) == 0


def test_the_order_of_addition_is_that_of_k(monkeypatch):
    """The partial sums are added from the first to the last: huge, tiny, minus huge."""
    weight = torch.zeros(16, 192, dtype=torch.bfloat16)
    weight[:, 0], weight[:, 64], weight[:, 128] = 2.0**100, 1.0, -(2.0**100)
    x = torch.ones(1, 192, dtype=torch.bfloat16)
    found = kernel.skinny_gemm(x, weight, Config(16, 64, 3, 3))
    assert found.tolist() == [[0.0] * 16]  # (huge + tiny) - huge, in fp32


LAYERS = [(20480, 2560), (2560, 10240), (256, 2560), (2560, 256), (128, 2816), (2816, 2112), (1536, 64)]  # fmt: skip


# What `choose` looks at, all of it together: it takes microseconds.
@pytest.mark.parametrize("processors", [78, 132])
def test_every_layer_gets_a_cut_that_the_kernel_takes(processors):
    for (n, k), epilogue, rows in itertools.product(LAYERS, Epilogue, (1, 16, 17, 64)):
        case = (n, k, epilogue.name, rows)
        config = kernel.choose((n, k), epilogue, processors, rows)
        assert k % config.block_k == 0, case
        assert 1 <= config.split <= k // config.block_k, case
        halves = 2 if epilogue == Epilogue.GELU_AND_MUL else 1
        held = config.stages * (config.block_n * halves + kernel.MAX_ROWS) * config.block_k * 2
        assert held <= 227 * 1024, case  # shared memory of a program on Hopper
        weight = torch.empty(n, k, device="meta")
        few = kernel.choose((n, k), epilogue, processors)
        tiles = kernel.tiles(weight, epilogue, config)
        assert tiles == kernel.tiles(weight, epilogue, few), case
        if config.split > 1:
            assert tiles * config.split <= 1.5 * processors, case


@pytest.mark.parametrize("kib", [99, 163])
def test_stages_fit_less_shared_memory(kib):
    for (n, k), epilogue, rows in itertools.product(LAYERS, Epilogue, (16, 64)):
        config = kernel.choose((n, k), epilogue, 108, rows, kib * 1024)
        halves = 2 if epilogue == Epilogue.GELU_AND_MUL else 1
        held = config.stages * (config.block_n * halves + rows) * config.block_k * 2
        assert held <= kib * 1024, (n, k, epilogue.name, rows)
        most = kernel.choose((n, k), epilogue, 108, rows)
        assert config == most._replace(stages=config.stages), (n, k, epilogue.name, rows)


DECLINED: list[tuple[str, dict[str, Any]]] = [
    ("weight", {"weight": torch.ones(64, 256)}),
    ("weight", {"weight": torch.ones(64, 200, dtype=torch.bfloat16)}),
    ("weight", {"weight": torch.ones(40, 256, dtype=torch.bfloat16)}),
    ("weight", {"weight": torch.ones(256, 64, dtype=torch.bfloat16).T}),
    ("x", {"x": torch.ones(2, 128, dtype=torch.bfloat16)}),
    ("x", {"x": torch.ones(65, 256, dtype=torch.bfloat16)}),
    ("x", {"x": torch.ones(2, 256, dtype=torch.float16)}),
    ("x", {"x": torch.ones(256, dtype=torch.bfloat16)}),
    ("x and weight", {"x": torch.ones(2, 257, dtype=torch.bfloat16)[:, 1:]}),
    ("extra", {"extra": torch.ones(2, 64, dtype=torch.bfloat16)}),
    ("extra", {"epilogue": Epilogue.GELU_TIMES}),
    (
        "extra",
        {"epilogue": Epilogue.GELU_TIMES, "extra": torch.ones(1, 64, dtype=torch.bfloat16)},
    ),
    ("config.block_k", {"config": Config(32, 96, 1, 3)}),
    ("config.split", {"config": Config(32, 64, 5, 3)}),
    ("arrived", {"arrived": torch.zeros(1, dtype=torch.int32)}),
]


def test_a_gpu_with_less_shared_memory_is_declined(monkeypatch):
    """Its launch would raise out of the first forward."""
    x, weight, _ = operands(2, 64, 256)
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    measured.forget()
    try:
        told = measured.known("x", torch.device("cuda", 0))
        assert "compute capability (8, 9)" in str(told)
        assert "CUDA device" in str(kernel.unfit(x, weight, Epilogue.NONE))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert measured.known("x", torch.device("cuda", 1)) is None
        monkeypatch.setattr(measured, "unfit", lambda argument, device, row: told)
        assert kernel.unfit(x, weight, Epilogue.NONE) == told
    finally:
        monkeypatch.undo()
        measured.forget()


def taken() -> dict[str, Any]:
    x, weight, _ = operands(2, 64, 256)
    return {"x": x, "weight": weight, "config": Config(32, 64, 2, 3)}


def test_what_the_cases_below_change_is_taken():
    """So that nothing but the change can be what is declined."""
    kernel.skinny_gemm(**taken())


@pytest.mark.parametrize(("argument", "changed"), DECLINED)
def test_value_error_names_the_argument(argument, changed):
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        kernel.skinny_gemm(**(taken() | changed))
