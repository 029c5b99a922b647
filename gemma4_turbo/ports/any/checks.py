"""What ``verify`` draws: each fusion against stock's calls on a GPU, against plain torch without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import feed_forward_few as feeding
from gemma4_turbo.fusions import layer_norms as norms_between
from gemma4_turbo.fusions import layer_tail, norm_kinds, ple_tail, qkv, router_norm
from gemma4_turbo.fusions import router_few as routed
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.fusions.stock import followed
from gemma4_turbo.kernels import feed_forward_few as at_once
from gemma4_turbo.kernels import router_few as few
from gemma4_turbo.kernels import skinny_gemm as skinny
from gemma4_turbo.kernels.norms.layer_norms import Router
from gemma4_turbo.kernels.norms.layer_tail import Experts, NextNorm
from gemma4_turbo.kernels.qkv import Rope
from gemma4_turbo.ports.any import sglang_types

if TYPE_CHECKING:
    from gemma4_turbo.fusions.fusion import A, R

EPS = 1e-6


def _rows(device: str, width: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    rows = 512 if device == "cuda" else 6
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, device=device)
    scale = torch.logspace(-2, 1.5, rows, device=device)[:, None]
    return (x * scale).to(dtype)


def _weight(device: str, width: int, seed: int) -> torch.Tensor:
    return (_rows(device, width, seed)[-1].float().tanh() + 1.5).bfloat16()


def _root(device: str, width: int) -> torch.Tensor:
    return torch.tensor(width**-0.5, device=device, dtype=torch.bfloat16)


def _scalar(device: str) -> torch.Tensor:
    return torch.tensor([0.7], device=device, dtype=torch.bfloat16)


def _check(fusion: Fusion[A, R], what: str, device: str, draw: Callable[[], A]) -> Check:
    """One fusion on operands that are drawn twice: both sides may overwrite them."""
    args, others = draw(), draw()
    unfit = fusion.unfit(args)
    if unfit is not None:
        raise ValueError(unfit)
    kind = norm_kinds.find(fusion.like(args)).eager
    ours = fusion.written(args, fusion.launch(args, kind))
    on_gpu = device == "cuda"
    result = fusion.theirs(followed(), others) if on_gpu else fusion.reference(others)
    pairs = [
        (a.contiguous(), b.contiguous())
        for a, b in zip(ours, fusion.written(others, result), strict=True)
        if a is not None and b is not None
    ]
    bits = sum(int((a.view(torch.int16) != b.view(torch.int16)).sum()) for a, b in pairs)
    if on_gpu:
        against, allowed, passed = "stock's calls on this GPU", "not one bit", bits == 0
    else:
        # The order of a sum shifts a value by an ulp of fp32 and now and then flips a rounding.
        against, allowed = "plain torch", "2 ulp"
        slack = 2 * torch.finfo(torch.bfloat16).eps
        passed = all(torch.allclose(a.float(), b.float(), rtol=slack, atol=1e-2) for a, b in pairs)
    count = sum(a.numel() for a, _ in pairs)
    return Check(fusion.patch, what, against, count, bits, allowed, passed)


def layer_norms(device: str) -> list[Check]:
    """Widths of 26B-A4B (with router) and E4B (without)."""

    def draw(width: int, with_router: bool) -> norms_between.Args:
        x, r = _rows(device, width, 1), _rows(device, width, 2).flip(0).contiguous()
        w = [_weight(device, width, seed) for seed in (3, 4, 5, 6)]
        router = Router(w[2], _root(device, width), EPS, w[3], EPS) if with_router else None
        return norms_between.Args(x, r, w[0], EPS, w[1], EPS, router)

    fusion = norms_between.LayerNorms("layer_norms")
    return [
        _check(fusion, f"width {width}, scales 0.01 to 30", device, partial(draw, width, router))
        for width, router in ((2816, True), (2560, False))
    ]


def router_norms(device: str) -> list[Check]:
    """Width of 26B-A4B."""

    def draw() -> router_norm.Args:
        x, scale = _rows(device, 2816, 1), _weight(device, 2816, 2)
        return router_norm.Args(x, scale, _root(device, 2816), EPS)

    fusion = router_norm.RouterNorm("router_norm")
    return [_check(fusion, "width 2816, scales 0.01 to 30", device, draw)]


def ple_tails(device: str) -> list[Check]:
    """Widths of E2B and E4B: both ends and the gate between them, then the end with the next norm."""

    def three(width: int) -> ple_tail.Args:
        x, r = _rows(device, width, 1), _rows(device, width, 2).flip(0).contiguous()
        w, last = _weight(device, width, 3), _weight(device, width, 7)
        gate, factor = _rows(device, 256, 5), _rows(device, 256, 6)
        after = _rows(device, width, 8)
        return ple_tail.Args(x, w, EPS, r, gate, factor, after, last, EPS, _scalar(device))

    def end(width: int) -> ple_tail.NormAdd:
        x, r = _rows(device, width, 1), _rows(device, width, 2).flip(0).contiguous()
        w, after = _weight(device, width, 3), _weight(device, width, 4)
        return ple_tail.NormAdd(x, w, EPS, r, _scalar(device), after, EPS)

    checks = []
    for width in (1536, 2560):
        tail, following = ple_tail.PleTail("ple_tail"), ple_tail.PleInputNorm("ple_tail")
        checks.append(_check(tail, f"width {width}", device, partial(three, width)))
        what = f"width {width}, with the next norm"
        checks.append(_check(following, what, device, partial(end, width)))
    return checks


def input_norm(device: str) -> list[Check]:
    """26B-A4B's tail with the next norm."""
    return _tail(layer_tail.LayerTail("input_norm"), device, summed=True)


def experts_sum(device: str) -> list[Check]:
    """26B-A4B's tail with the sum over eight experts."""
    return _tail(layer_tail.LayerTail("experts_sum"), device, summed=False)


def _tail(fusion: layer_tail.LayerTail, device: str, summed: bool) -> list[Check]:
    width = 2816

    def draw() -> layer_tail.Args:
        x, r = _rows(device, width, 1)[:32], _rows(device, width, 2)[:32]
        choices = torch.stack([_rows(device, width, 10 + k)[:32] for k in range(8)], dim=1)
        w = [_weight(device, width, seed) for seed in (3, 4, 5, 6)]
        output = choices.float().sum(1).bfloat16() if summed else choices.contiguous()
        experts = Experts(output, w[1], EPS, w[0], EPS, sglang_types.rules().sums_from_zero())
        return layer_tail.Args(x, w[2], EPS, r, _scalar(device), experts, NextNorm(w[3], EPS, 0))

    return [_check(fusion, f"{len(draw().residual)} rows of width {width}", device, draw)]


def qkv_norm(device: str) -> list[Check]:
    """Both head sizes, norms alone."""
    return [check for d in (256, 512) for check in _qkv("qkv_norm", device, d, rope=False)]


def rope_store(device: str) -> list[Check]:
    """Both head sizes, with rotation."""
    return [check for d in (256, 512) for check in _qkv("rope_store", device, d, rope=True)]


def _qkv(patch: str, device: str, head_dim: int, rope: bool) -> list[Check]:
    heads, kv_heads = 4, 2

    def draw() -> qkv.Args:
        whole = _rows(device, (heads + 2 * kv_heads) * head_dim, 7)
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        q, k, v = torch.split(whole, sizes, dim=-1)
        weights = _weight(device, head_dim, 3), _weight(device, head_dim, 4)
        angles = torch.arange(4096.0)[:, None] * torch.logspace(0, -4, head_dim // 2)
        cache = torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
        positions = torch.arange(q.shape[0], device=device) * 7 % 4096
        turn = Rope(positions, cache) if rope else None
        return qkv.Args(q, k, v, *weights, EPS, head_dim, turn, None)

    return [_check(qkv.Qkv(patch), f"head size {head_dim}", device, draw)]


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


def router_few(device: str) -> list[Check]:
    """The product against fp64, and the routing of its logits against plain torch, 26B-A4B's shape."""
    experts, hidden = (128, 2816) if device == "cuda" else (16, 64)
    checks = []
    for tokens in (1, few.MAX_TOKENS):
        x = _rows(device, hidden, 1)[-tokens:] / 30
        generator = torch.Generator(device).manual_seed(3)
        w = torch.randn(experts, hidden, generator=generator, device=device) / hidden**0.5
        scale = torch.rand(experts, generator=generator, device=device).bfloat16() * 2
        w = w.bfloat16()
        found, stock = few.router_few(x, w, scale, 8), few.reference_router_few(x, w, scale, 8)
        exact = x.double() @ w.double().T
        error, allowed = (
            float((y.logits.double() - exact).norm() / exact.norm()) for y in (found, stock)
        )
        weights, ids = few.reference_routing(found.logits, scale, 8)
        bound = routed.WEIGHTS
        near = bool(((found.weights - weights).abs() <= weights.abs() * bound).all())
        checks.append(
            Check(
                "router_few",
                f"{tokens} tokens, {experts} experts of {hidden}",
                "fp64, and plain torch for the routing",
                found.logits.numel() + ids.numel() + weights.numel(),
                int((found.logits != stock.logits).sum()),
                f"relative error {1.1 * allowed:.2e} (stock's plus 10 %), is {error:.2e}; ids of these "
                f"logits; {bound:.1e} of a weight",
                error <= 1.1 * allowed and torch.equal(found.ids, ids) and near,
            )
        )
    return checks


def feed_forward_few(device: str) -> list[Check]:
    """The whole launch against plain torch with stock's roundings, 26B-A4B's shape with few experts."""
    hidden, width, narrow, experts = (2816, 2112, 704, 9) if device == "cuda" else (64, 16, 8, 5)
    topk = 8 if device == "cuda" else 2
    generator = torch.Generator(device).manual_seed(5)
    x = torch.randn(3, at_once.MAX_TOKENS, hidden, generator=generator, device=device).bfloat16()
    weights = feeding.random_weights(hidden, width, narrow, experts, x, torch.float32)
    checks = []
    for tokens in (1, at_once.MAX_TOKENS):
        inputs = at_once.Inputs(*x[:, :tokens].unbind())
        found = at_once.feed_forward_few(inputs, weights, topk)
        pairs = (
            (found.mlp_output, at_once.reference_mlp(inputs, weights)),
            (found.experts_output, at_once.reference_experts(inputs, weights, found.routed)),
        )
        far = feeding.wrong(found, inputs, weights, topk)
        checks.append(
            Check(
                "feed_forward_few",
                f"{tokens} tokens, a dense MLP of {width} and {topk} of {experts} experts of {narrow}",
                "plain torch with stock's roundings",
                2 * tokens * hidden,
                sum(int((ours != theirs).sum()) for ours, theirs in pairs),
                f"{feeding.OUTPUT:.1e} of a row's largest, ids of these logits; {far} further",
                far == 0,
            )
        )
    return checks


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
