"""bench/kernels.py without a GPU: its cases at a small size, the bytes it counts, its CSV and CLI.

Stock's CUDA kernels are replaced by plain torch here. What is left of stock are its own sequences.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import kernels as bench
from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.cli import lines
from gemma4_turbo.cli.tuning import kernel_cases as cases
from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.kernels import moe_align, qkv
from gemma4_turbo.kernels.norms import layer_tail
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.qkv import Mode
from gemma4_turbo.models.geometry import GEOMETRIES
from gemma4_turbo.ports.any.decode_step import attention
from tests.cpu.conftest import REPOSITORY

MOE = GEOMETRIES["26b-a4b"]._replace(hidden=256, layers=2, experts=16)
PLE = GEOMETRIES["e4b"]._replace(hidden=256, layers=2)
HEADS = cases.Heads(4, 2, 128, Mode.QKV)
SMALL = {
    "router": partial(cases.router, torch.float32, MOE),
    "step_prologue": partial(cases.prologue, PLE, vocabulary=16),
    "moe_align": partial(cases.align, MOE),
    "layer_norms, experts": partial(cases.layer_norms, MOE),
    "layer_norms": partial(cases.layer_norms, PLE),
    "router_norm": partial(cases.router_norm, MOE),
    "ple_tail": partial(cases.ple_tail_launches, PLE),
    "input_norm, experts": partial(cases.input_norm, MOE),
    "input_norm": partial(cases.input_norm, PLE),
    "router_few": partial(cases.router_few, MOE),
    "experts_sum": partial(cases.experts_sum, False, MOE),
    "experts_sum, input_norm": partial(cases.experts_sum, True, MOE),
    **{
        f"qkv_norm, {mode.name}": partial(cases.qkv_norm, HEADS._replace(mode=mode))
        for mode in Mode
    },
    **{
        f"rope_store, {mode.name}, {stored}": partial(
            cases.rope_store, HEADS._replace(mode=mode), stored
        )
        for mode in Mode
        for stored in (False, True)
        if mode != Mode.Q or not stored
    },
}
for name in list(SMALL):
    patch = name.partition(",")[0]
    if patch != "qkv_norm" and lines.patch_unfit(patch) is not None:  # its kernel is in every line
        del SMALL[name]


def fused_add_rmsnorm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, eps: float) -> None:
    total = x.float() + r.float()
    r.copy_(total)
    x.copy_(norms.reference_rmsnorm(total, w, eps))


def qkv_rmsnorm(
    q: Any, k: Any, v: Any, qw: Any, kw: Any, heads: int, kv_heads: int, size: int, eps: float
) -> None:
    assert q.shape[1] == heads * size
    assert k is None or k.shape[1] == v.shape[1] == kv_heads * size
    found = qkv.reference_qkv(q, k, v, qw, kw, eps, size)
    for tensor, normed in zip((q, k, v), found, strict=True):
        if tensor is not None:
            tensor.copy_(normed.flatten(1))


def dual_norm_residual(
    x1: Any, w1: Any, x2: Any, w2: Any, w3: Any, r: Any, scalar: Any, eps: Any
) -> torch.Tensor:
    experts = layer_tail.Experts(x2, w2, eps[1], w1, eps[0])
    return layer_tail.reference_layer_tail(x1, w3, eps[2], r, scalar, experts)[0]


def rotate(positions: Any, q: Any, k: Any, cos_sin_cache: Any) -> None:
    cos, sin = cos_sin_cache[positions][:, None].chunk(2, dim=-1)
    for x in (q, k):
        a, b = x.float().chunk(2, dim=-1)
        x.copy_(torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's kernels in plain torch."""
    if not norms.INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    functions = norm_kinds.Functions(norms.reference_rmsnorm, fused_add_rmsnorm)
    in_torch = {
        "eager_norms": lambda: functions,
        "qkv_rmsnorm": qkv_rmsnorm,
        "dual_norm_residual": dual_norm_residual,
        "rotate": rotate,
        "sum_experts": lambda x, out: out.copy_(x.float().sum(1)),
        "align": partial(moe_align.reference_align, multiple=lines.align_multiple()),
    }
    for name, function in in_torch.items():
        monkeypatch.setattr(lines.stock(), name, function)


# -- cases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", SMALL)
def test_ours_and_stock_compute_the_same(name, rows, stock):
    """Same number of results, near each other, which they are not if one side misses a step."""
    calls = SMALL[name](rows, "cpu")
    ours, theirs = calls.ours(), calls.stock()
    if name == "moe_align":
        assert moe_align.difference(ours, theirs, cases.ALIGN_BLOCK) is None
        return
    compared = 0
    for found, expected in zip(ours, theirs, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(
                found.float().flatten(), expected.float().flatten(), rtol=0.02, atol=0.04
            )
            assert found.float().abs().sum() > 0
            compared += 1
    assert compared


@pytest.mark.parametrize("name", SMALL)
def test_a_case_can_be_called_again_and_again(name, stock):
    calls = SMALL[name](3, "cpu")
    for call in (calls.ours, calls.stock):
        results = [call() for _ in range(3)][-1]
        assert all(bool(x.float().isfinite().all()) for x in results if x is not None)


M, N, K, D = 5, 256, 8, 128
BYTES = {
    "router": 4 * M * 16 + 2 * 16 + M * K * (4 + 4),
    "router_few": 2 * (M * N + 16 * N + 16 + M * 16) + M * K * (4 + 4),
    "layer_norms": 2 * (4 * M * N + 2 * N),
    # The router's scale is one number more, where it is not in a weight.
    "layer_norms, experts": 2 * (6 * M * N + 4 * N + (not lines.router_scale_is_folded())),
    "router_norm": 2 * (2 * M * N + N + 1),
    "ple_tail": 2 * (3 * M * N + N) + 2 * 3 * M * 256 + 2 * (3 * M * N + N + 1),
    "input_norm": 2 * (4 * M * N + 2 * N + 1),
    "input_norm, experts": 2 * (5 * M * N + 4 * N + 1),
    "experts_sum": 2 * ((3 + K) * M * N + 3 * N + 1),
    "experts_sum, input_norm": 2 * ((4 + K) * M * N + 4 * N + 1),
    "qkv_norm, QKV": 2 * (2 * M * 8 * D + 2 * D),
    "qkv_norm, Q": 2 * (2 * M * 4 * D + D),
    "rope_store, Q, False": 2 * (2 * M * 4 * D + D) + M * (8 + 4 * D),
    "rope_store, QKV, True": 2 * (2 * M * 8 * D + 2 * D) + M * (8 + 4 * D + 8),
    "rope_store, QK, True": 2 * (M * (6 + 8) * D + 2 * D) + M * (8 + 4 * D + 8),
    "rope_store, QK, False": 2 * (M * (6 + 8) * D + 2 * D) + M * (8 + 4 * D),
    "step_prologue": 8 * M + 2 * (5 * M * 2 * 256 + 256 + 2),
}


@pytest.mark.parametrize("name", [name for name in BYTES if name in SMALL])
def test_bytes(name, stock):
    """Operands once and results once, counted by hand."""
    assert SMALL[name](M, "cpu").bytes == BYTES[name]


def test_bytes_of_the_alignment(stock):
    """Ids, all of the sorted ids, one expert for each block that is used, and the length."""
    calls = SMALL["moe_align"](M, "cpu")
    token_ids, _, padded = calls.ours()
    blocks = int(padded) // cases.ALIGN_BLOCK
    assert calls.bytes == 4 * (M * K + len(token_ids) + blocks + 1)


def test_every_patch_with_a_kernel_has_cases():
    kernels = {path.stem for path in (REPOSITORY / "gemma4_turbo" / "kernels").rglob("*.py")}
    found = {patch.name for patch in CATALOGUE if patch.name in kernels}
    found |= {"qkv_norm", "rope_store", "input_norm", "experts_sum"}  # kernels of shared files
    # Weights that must not stay in the L2 cache; shapes of prefixes, windows, pages and images: they
    # have scripts of their own.
    found -= {"skinny_gemm", "pdl", "extend_attention", "decode_attention", "vision_rope"}
    found -= {"experts_few", "feed_forward_few", "mlp_few"}
    assert set(cases.CASES) == found
    every = [case for make in cases.CASES.values() for case in make()]
    assert len({case[:3] for case in every}) == len(every)
    for name, make in cases.CASES.items():
        assert {case.kernel for case in make()} == {name}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("layer_norms", [1, 8, 32, 64, 4096]),
        ("router_norm", [1, 8, 32, 64, 4096]),
        ("ple_tail", [1, 8, 32, 64, 4096]),
        ("input_norm", [1, 8, 32, 64, 4096]),
        ("step_prologue", [1, 8, 32, 64, 4096]),
        ("rope_store", [1, 8, 32, 64, 4096]),
        ("qkv_norm", [1, 8, 32, 64]),
        ("moe_align", [rows for rows in (1, 8, 32, 64) if rows * 8 > lines.slots_of_stocks()]),
        ("experts_sum", [1, 8, 32]),
    ],
)
def test_rows_that_the_patch_takes(name, rows):
    assert sorted({case.tokens for case in cases.CASES[name]()}) == rows
    limits = {
        "qkv_norm": attention.NORM_ROWS,
        "moe_align": moe_align.MAX_SLOTS // 8,
        "experts_sum": layer_tail.COMPILED_SUM_ROWS,
    }
    assert max(rows) <= limits.get(name, max(rows))


def test_heads_of_the_models():
    found = {name: cases.heads_of(model) for name, model in cases.MODELS.items()}
    assert found == {
        "26b-a4b": {"sliding": (16, 8, 256, Mode.QKV), "full": (16, 2, 512, Mode.QKV)},
        "e4b": {
            "sliding": (8, 2, 256, Mode.QKV),
            "full": (8, 2, 512, Mode.QKV),
            "sliding (shared KV)": (8, 2, 256, Mode.Q),
        },
        "e2b": {
            "sliding": (8, 1, 256, Mode.QKV),
            "full": (8, 1, 512, Mode.QKV),
            "sliding (shared KV)": (8, 1, 256, Mode.Q),
        },
    }


def test_a_norm_that_none_of_ours_follows_is_told(monkeypatch):
    kinds = norm_kinds.Kinds(reason="self-check: 7 as CUTE")
    monkeypatch.setattr(norm_kinds, "find", lambda like: kinds)
    with pytest.raises(cases.CannotMeasureError, match="7 as CUTE"):
        cases.kind_of(torch.zeros(1, 256))


# -- measuring ----------------------------------------------------------------------------------------


def test_a_row_has_every_column(stock, monkeypatch, tmp_path):
    """Times from stand-ins: launches, ratio and bandwidth belong to the right side."""
    case = cases.Case("layer_norms", "small", 5, partial(cases.layer_norms, MOE, 5))
    sides: list[str] = []

    def kernel_us(call: Any, calls: int = 40) -> tuple[float, int]:
        sides.append(call.__name__)
        return (2.0, 1) if sides[-1] == "ours" else (8.0, 5)

    monkeypatch.setattr(bench, "kernel_us", kernel_us)
    monkeypatch.setattr(bench, "graph_us", lambda call: 3.0 if "ours" in call.__qualname__ else 9.0)
    row = bench.case_row(case, "cpu")
    assert sides == ["ours", "stock"]
    assert set(row) == set(bench.MEASURED)
    assert (row["fused_launches"], row["stock_launches"], row["ratio"]) == (1, 5, 0.25)
    assert (row["fused_graph_us"], row["stock_graph_us"]) == (3.0, 9.0)
    assert row["gb_per_s"] == pytest.approx(BYTES["layer_norms, experts"] / 2e-6 / 1e9)

    out = tmp_path / "bench.csv"
    base = {"timestamp": "2026-01-01T00:00:00+00:00", "gpu": "NVIDIA Test"}
    copied = {"kernel": bench.COPY, "case": "1 GiB", "stock_us": 700.0, "bytes": 2**31}
    bench.append([copied], base, out)
    bench.append([row], base, out)
    frame = pd.read_csv(out)
    assert list(frame) == [*base, *bench.MEASURED]
    assert list(frame["kernel"]) == ["copy", "layer_norms"]
    assert pd.isna(frame["tokens"][0])
    assert frame["tokens"][1] == 5
    bench.plot(bench.append([row, {**row, "case": "other"}], base, out), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(bench.main)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_an_unknown_name():
    done = invoke("layernorms")
    assert done.exit_code == 2
    assert "Invalid value for kernel: 'layernorms'" in done.output
    assert "layer_norms" in done.output


def test_a_csv_with_other_columns(tmp_path):
    out = tmp_path / "old.csv"
    out.write_text("timestamp,gpu\n")
    done = invoke("all", "--out", str(out))
    assert done.exit_code == 2
    assert "--out" in done.output
    assert out.read_text() == "timestamp,gpu\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("kernel", ["router", "all", "qkv_norm", "layer_norms"])
def test_without_a_gpu_it_says_so(kernel, tmp_path):
    """And of a patch that this SGLang does not take, why."""
    out = tmp_path / "none.csv"
    done = invoke(kernel, "--out", str(out))
    reason = None if kernel == "all" else lines.patch_unfit(kernel)
    assert done.exit_code == (1 if reason is None else 2)
    assert reason is None or "has it itself" in done.output
    assert not out.exists()


def test_the_list_needs_no_gpu():
    """Every case of the patches that this SGLang takes, and of the others a line."""
    done = invoke("all", "--list")
    assert done.exit_code == 0, done.output
    here = [name for name in cases.CASES if lines.patch_unfit(name) is None]
    assert len(here) >= 7
    listed = [row for row in done.stdout.splitlines() if row.endswith(" tokens")]
    assert listed == [
        f"{case.kernel}, {case.case}, {case.tokens} tokens"
        for name in here
        for case in cases.CASES[name]()
    ]
    assert done.output.count("left out: ") == len(cases.CASES) - len(here)


def test_it_is_not_taken_for_the_package_of_its_name(monkeypatch):
    """transformers imports a package `kernels`, if there is one, in every script of that folder."""
    monkeypatch.syspath_prepend(str(Path(bench.__file__).parent))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    with pytest.raises(ImportError, match=r"bench/kernels\.py is not the package kernels"):
        importlib.import_module("kernels")
