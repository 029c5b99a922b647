"""What ``verify`` compares: each kernel with stock's calls on a GPU, with plain torch without one."""

from __future__ import annotations

from typing import Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.kernels import qkv
from gemma4_turbo.kernels import skinny_gemm as skinny
from gemma4_turbo.kernels.norms import layer_norms as layer_norms_kernel
from gemma4_turbo.kernels.norms import layer_tail, ple_tail
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.norms import router_norm as router_norm_kernel
from gemma4_turbo.ports.v0_5_12 import stock

EPS = 1e-6
Pair = tuple[torch.Tensor, torch.Tensor]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _rows(device: str, width: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    rows = 512 if device == "cuda" else 6
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, device=device)
    scale = torch.logspace(-2, 1.5, rows, device=device)[:, None]
    return (x * scale).to(dtype)


def _weight(device: str, width: int, seed: int) -> torch.Tensor:
    return (_rows(device, width, seed)[-1].float().tanh() + 1.5).bfloat16()


def _rmsnorm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return norms.reference_rmsnorm(x, weight, EPS)
    return stock.eager_norms().rmsnorm(x, weight, EPS)


def _kind(like: torch.Tensor) -> int:
    return norm_kinds.find(like).eager


def _check(patch: str, what: str, device: str, pairs: list[Pair]) -> list[Check]:
    bits = sum(int((a.view(torch.int16) != b.view(torch.int16)).sum()) for a, b in pairs)
    if device == "cuda":
        against, allowed, passed = "stock's calls on this GPU", "not one bit", bits == 0
    else:
        # The order of a sum shifts a value by an ulp of fp32 and now and then flips a rounding.
        against, allowed = "plain torch", "2 ulp"
        slack = 2 * torch.finfo(torch.bfloat16).eps
        passed = all(torch.allclose(a.float(), b.float(), rtol=slack, atol=1e-2) for a, b in pairs)
    return [Check(patch, what, against, sum(a.numel() for a, _ in pairs), bits, allowed, passed)]


def layer_norms(device: str) -> list[Check]:
    """Widths of 26B-A4B (with router) and E4B (without)."""
    checks = []
    for width, with_router in ((2816, True), (2560, False)):
        x, r = _rows(device, width, 1), _rows(device, width, 2).flip(0).contiguous()
        w = [_weight(device, width, seed) for seed in (3, 4, 5, 6)]
        root = torch.tensor(width**-0.5, device=device, dtype=torch.bfloat16)
        router = layer_norms_kernel.Router(w[2], root, EPS, w[3], EPS) if with_router else None
        ours_r = r.clone()
        ours = layer_norms_kernel.layer_norms(
            x, ours_r, w[0], EPS, w[1], EPS, router, kind=_kind(x)
        )
        if device == "cuda":
            first = _rmsnorm(x, w[0])
            stock.eager_norms().fused_add_rmsnorm(first, r, w[1], EPS)
            expected: tuple[Any, ...] = (first, None, None)
            if with_router:
                normed = _rmsnorm(r, torch.ones_like(w[0])) * (w[2] * root)
                expected = (first, normed, _rmsnorm(r, w[3]))
        else:
            expected = layer_norms_kernel.reference_layer_norms(x, r, w[0], EPS, w[1], EPS, router)
        pairs = [(ours_r, r)]
        pairs += [(a, b) for a, b in zip(ours, expected, strict=True) if a is not None]
        checks += _check("layer_norms", f"width {width}, scales 0.01 to 30", device, pairs)
    return checks


def router_norm(device: str) -> list[Check]:
    """Width of 26B-A4B."""
    x, scale = _rows(device, 2816, 1), _weight(device, 2816, 2)
    root = torch.tensor(2816**-0.5, device=device, dtype=torch.bfloat16)
    ours = router_norm_kernel.router_norm(x, scale, root, EPS, kind=_kind(x))
    expected = _rmsnorm(x, torch.ones_like(scale)) * (scale * root)
    return _check("router_norm", "width 2816, scales 0.01 to 30", device, [(ours, expected)])


def ple_tail_pairs(device: str, width: int) -> list[Pair]:
    """Both ends and the gate between them."""
    x, r = _rows(device, width, 1), _rows(device, width, 2).flip(0).contiguous()
    w, after = _weight(device, width, 3), _weight(device, width, 4)
    scalar = torch.tensor([0.7], device=device, dtype=torch.bfloat16)
    first, _ = ple_tail.norm_add(x, w, EPS, r, kind=_kind(x))
    last, following = ple_tail.norm_add(x, w, EPS, r, scalar, after, EPS, kind=_kind(x))
    gate, factor = _rows(device, 256, 5), _rows(device, 256, 6)
    expected = (_rmsnorm(x, w) + r) * scalar
    assert following is not None
    return [
        (first, _rmsnorm(x, w) + r),
        (last, expected),
        (following, _rmsnorm(expected, after)),
        (ple_tail.gelu_mul(gate, factor), ple_tail.reference_gelu_mul(gate, factor)),
    ]


def ple_tail_checks(device: str) -> list[Check]:
    """Widths of E2B and E4B."""
    return [
        check
        for width in (1536, 2560)
        for check in _check("ple_tail", f"width {width}", device, ple_tail_pairs(device, width))
    ]


def input_norm(device: str) -> list[Check]:
    """26B-A4B's tail with the next norm."""
    return _tail("input_norm", device, summed=True)


def experts_sum(device: str) -> list[Check]:
    """26B-A4B's tail with the sum over eight experts."""
    return _tail("experts_sum", device, summed=False)


def _tail(patch: str, device: str, summed: bool) -> list[Check]:
    width = 2816
    x, r = _rows(device, width, 1)[:32], _rows(device, width, 2)[:32]
    rows = x.shape[0]
    choices = torch.stack([_rows(device, width, 10 + k)[:32] for k in range(8)], dim=1)
    w = [_weight(device, width, seed) for seed in (3, 4, 5, 6)]
    scalar = torch.tensor([0.7], device=device, dtype=torch.bfloat16)
    total = choices.float().sum(1).bfloat16()
    if device == "cuda":
        stock.sum_experts(choices, total)
    output = total if summed else choices.contiguous()
    experts = layer_tail.Experts(output, w[1], EPS, w[0], EPS)
    after = layer_tail.NextNorm(w[3], EPS, _kind(x))
    ours, following = layer_tail.layer_tail(x, w[2], EPS, r, scalar, experts, after)
    if device == "cuda":
        expected = stock.dual_norm_residual(x, w[0], total, w[1], w[2], r, scalar, (EPS, EPS, EPS))
    else:
        expected, _ = layer_tail.reference_layer_tail(x, w[2], EPS, r, scalar, experts)
    assert following is not None
    what = f"{rows} rows of width {width}"
    return _check(patch, what, device, [(ours, expected), (following, _rmsnorm(expected, w[3]))])


def _heads(device: str, head_dim: int, heads: int, kv_heads: int) -> Heads:
    whole = _rows(device, (heads + 2 * kv_heads) * head_dim, 7)
    q, k, v = torch.split(
        whole, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1
    )
    return q, k, v


def qkv_norm(device: str) -> list[Check]:
    """Both head sizes, norms alone."""
    return [check for d in (256, 512) for check in _qkv("qkv_norm", device, d, rope=False)]


def rope_store(device: str) -> list[Check]:
    """Both head sizes, with rotation."""
    return [check for d in (256, 512) for check in _qkv("rope_store", device, d, rope=True)]


def skinny_gemm(device: str) -> list[Check]:
    """Against fp64, at shapes of E4B (of a toy without a GPU): no farther than cuBLAS plus 10 %."""
    checks = []
    shapes = ((20480, 2560), (2560, 10240), (256, 2560)) if device == "cuda" else ((64, 256),)
    for (n, k), epilogue in zip(shapes, (1, 0, 2), strict=False):
        x = _rows(device, k, 1)[-16:] / 30
        generator = torch.Generator(device).manual_seed(3)
        w = torch.randn(n, k, generator=generator, device=device) / k**0.5
        w = w.bfloat16()
        extra = _rows(device, n, 4)[-x.shape[0] :] / 30 if epilogue == 2 else None
        kind = skinny.Epilogue(epilogue)
        config = skinny.choose(w.shape, kind, 132)
        ours = skinny.skinny_gemm(x, w, config, kind, extra).double()
        stock = skinny.reference_skinny_gemm(x, w, kind, extra).double()
        wide = None if extra is None else extra.double()
        exact = skinny.reference_skinny_gemm(x.double(), w.double(), kind, wide).double()
        error, allowed = (float((y - exact).norm() / exact.norm()) for y in (ours, stock))
        passed = error <= 1.1 * allowed
        checks.append(
            Check(
                "skinny_gemm",
                f"[{x.shape[0]}, {k}] x [{n}, {k}], {kind.name.lower()}",
                "fp64",
                ours.numel(),
                int((ours != stock).sum()),
                f"relative error {1.1 * allowed:.2e} (stock's plus 10 %), is {error:.2e}",
                passed,
            )
        )
    return checks


def _qkv(patch: str, device: str, head_dim: int, rope: bool) -> list[Check]:
    ours, theirs = _heads(device, head_dim, 4, 2), _heads(device, head_dim, 4, 2)
    qw, kw = _weight(device, head_dim, 3), _weight(device, head_dim, 4)
    rows = ours[0].shape[0]
    angles = torch.arange(4096.0)[:, None] * torch.logspace(0, -4, head_dim // 2)
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
    positions = torch.arange(rows, device=device) * 7 % 4096
    turn = qkv.Rope(positions, cache) if rope else None
    expected = qkv.reference_qkv(*theirs, qw, kw, EPS, head_dim, turn)
    if device == "cuda":
        q, k, v = theirs
        stock.qkv_rmsnorm(q, k, v, qw, kw, 4, 2, head_dim, EPS)
        k = k.contiguous()
        if rope:
            stock.rotate(positions, q.view(rows, -1, head_dim), k.view(rows, -1, head_dim), cache)
        expected = (q, k, v)
    found = qkv.qkv(*ours, qw, kw, EPS, head_dim, turn)
    pairs = [
        (a.contiguous(), b.contiguous())
        for a, b in zip(found, expected, strict=True)
        if a is not None and b is not None
    ]
    return _check(patch, f"head size {head_dim}", device, pairs)


def qkv_proj(device: str) -> list[Check]:
    """Rows of the weight against the whole product, within the rounding of the output."""
    x, weight = _rows(device, 1536, 1), _rows("cpu", 1536, 2).to(device)
    weight = torch.cat([weight] * 64)[:256] * 0.02
    whole = torch.nn.functional.linear(x, weight)[:, :128]
    part = torch.nn.functional.linear(x, weight[:128])
    bits = int((whole.contiguous().view(torch.int16) != part.view(torch.int16)).sum())
    near = torch.allclose(whole.float(), part.float(), rtol=2**-7, atol=2**-7)
    return [
        Check("qkv_proj", "the first half of the rows", "the whole product", part.numel(), bits,
              "an ulp of the output", near)
    ]  # fmt: skip
