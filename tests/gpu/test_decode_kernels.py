"""The kernels of a decode step against stock's own calls on the GPU: every bit; and against fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.engine import run
from gemma4_turbo.fusions import layer_norms as norms_between
from gemma4_turbo.fusions import layer_tail as layers_end
from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.fusions import ple_tail as ple_end
from gemma4_turbo.fusions import qkv as heads
from gemma4_turbo.fusions import router_norm as routers_norm
from gemma4_turbo.fusions.ple_tail import gelu_mul_op, norm_add_op
from gemma4_turbo.fusions.stock import Stock
from gemma4_turbo.kernels import qkv
from gemma4_turbo.kernels.norms import layer_norms, layer_tail, ple_tail, router_norm
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.ports.any.decode_step import attention, layer_steps
from tests.gpu.lines import patch
from tests.runs import unpublished

stock = lines.stock()

EPS = 1e-6
DTYPE = torch.bfloat16
KINDS = ("0.01", "1", "30", "zeros", "infinities", "nan rows", "subnormal")
each_width = pytest.mark.parametrize("width", [1536, 2560, 2816, 5376])
each_count = pytest.mark.parametrize("rows", [0, 1, 7, 32, 64, 257, 4096])
each_kind = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("mode", ["eager", "traced"])


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(kind: str, rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, width, device="cuda", generator=generator)
    if kind[0].isdigit():
        return (x * float(kind)).to(DTYPE)
    if kind == "zeros":
        return torch.where(x < 0, -0.0, 0.0).to(DTYPE)
    if kind == "subnormal":
        return (x * 2.0**-130).to(DTYPE)
    x[::3, seed % width] = float("inf") if kind == "infinities" else float("nan")
    return x.to(DTYPE)


def weight(width: int, seed: int) -> torch.Tensor:
    return (draw("1", 1, width, seed)[0].float().tanh() + 1.5).to(DTYPE)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], device="cuda", dtype=DTYPE)


def same(*pairs: tuple[Any, Any]) -> None:
    """Equal bits; a NaN may carry another payload."""
    for found, expected in pairs:
        assert found.shape == expected.shape
        a, b = found.contiguous().view(torch.int16), expected.contiguous().view(torch.int16)
        wrong = (a != b) & ~(found.isnan() & expected.isnan())
        assert int(wrong.sum()) == 0


def stocks(mode: str, like: torch.Tensor) -> tuple[Stock, int]:
    """Stock's calls as they are in eager mode or under Dynamo, and the kind that follows their norms."""
    kinds = norm_kinds.find(like)
    if mode == "eager":
        assert kinds.reason is None
        return stock, kinds.eager
    assert kinds.traced_reason is None
    traced, norms = copy.copy(stock), stock.traced_norms()
    traced.eager_norms = lambda: norms
    return traced, kinds.traced


def norm64(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w.double()


def close(found: torch.Tensor, exact: torch.Tensor, roundings: int, terms: float = 0.0) -> None:
    """Half an ulp per rounding, of the result or of the greatest term of a sum, and fp32's error."""
    bound = (roundings * 2.0**-8 + 2.0**-16) * (exact.abs() + terms) + 1e-37
    assert bool(((found.double() - exact).abs() <= bound).all())


def finite(kind: str, followed: int | None = None) -> bool:
    """Whether fp64 is near: fast math counts subnormal activations as zero, in stock as in ours."""
    if kind == "subnormal" and followed == norms.Kind.FAST_MATH:
        return False
    return kind not in ("infinities", "nan rows")


@each_width
@each_count
@each_kind
@each_mode
@pytest.mark.parametrize("folded", [False, True], ids=["scale", "folded scale"])
def test_layer_norms_and_router_norm(width, rows, kind, mode, folded):
    """The router's scale applied to its normed input, or in its norm's weight already."""
    x, r = draw(kind, rows, width, 1), draw(kind, rows, width, 2)
    calls, followed = stocks(mode, x)
    w = [weight(width, seed) for seed in (3, 4, 5, 6)]
    root = torch.tensor(width**-0.5, device="cuda", dtype=DTYPE)
    residual = r.clone()
    router = layer_norms.Router(w[2], None if folded else root, EPS, w[3], EPS)
    found = layer_norms.layer_norms(x, residual, w[0], EPS, w[1], EPS, router, kind=followed)
    alone = router_norm.router_norm(residual, w[2], root, EPS, kind=followed)
    if not rows:
        assert all(y is not None and y.shape == x.shape for y in found)
        return
    before = calls.eager_norms().rmsnorm(x, w[0], EPS).double() + r.double()
    args = norms_between.Args(x, r, w[0], EPS, w[1], EPS, router)
    expected = norms_between.LayerNorms("layer_norms").theirs(calls, args)
    same((residual, r), *zip(found, expected, strict=True))
    args = routers_norm.Args(r, w[2], root, EPS)
    same((alone, routers_norm.RouterNorm("router_norm").theirs(calls, args)))
    if finite(kind, followed):
        close(found[0], norm64(before, w[1]), 1)
        if folded:
            close(found[1], norm64(r, w[2]), 1)
        else:
            close(found[1], norm64(r, w[2]) * root.double(), 3)
        close(found[2], norm64(r, w[3]), 1)


@each_width
@each_count
@each_kind
@each_mode
def test_ple_tail(width, rows, kind, mode):
    x, r = draw(kind, rows, width, 1), draw(kind, rows, width, 2)
    calls, followed = stocks(mode, x)
    w, after, s = weight(width, 3), weight(width, 4), scalar(0.7)
    out, normed = ple_tail.norm_add(x, w, EPS, r, s, after, EPS, kind=followed)
    gate, factor = draw(kind, rows, 256, 5), draw(kind, rows, 256, 6)
    closed = ple_tail.gelu_mul(gate, factor)
    assert closed.shape == gate.shape
    if rows:
        end = ple_end.NormAdd(x, w, EPS, r, s, after, EPS)
        expected = ple_end.PleInputNorm("input_norm").theirs(calls, end)
        same(*zip((out, normed), expected, strict=True))
        three = ple_end.Args(x, w, EPS, r, gate, factor, x, after, EPS, s)
        same((closed, ple_end.PleTail("ple_tail").theirs(calls, three)[1]))
        if finite(kind, followed):
            exact = norm64(x, w)
            terms = (exact.abs() + r.double().abs()).amax(-1, keepdim=True)
            close(out, (exact + r.double()) * s.double(), 3, terms)


@each_width
@each_count
@each_kind
@each_mode
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_layer_tail(width, rows, kind, mode, experts):
    x, r, e = (draw(kind, rows, width, seed) for seed in (1, 2, 7))
    calls, followed = stocks(mode, x)
    w, s = [weight(width, seed) for seed in (3, 4, 5, 6)], scalar(0.7)
    branch = layer_tail.Experts(e, w[1], EPS, w[0], EPS) if experts else None
    after = layer_tail.NextNorm(w[3], EPS, followed)
    out, normed = layer_tail.layer_tail(x, w[2], EPS, r, s, branch, after)
    if not rows:
        assert out.shape == x.shape
        return
    args = layers_end.Args(x, w[2], EPS, r, s, branch, after)
    expected = layers_end.LayerTail("input_norm").theirs(calls, args)
    same(*zip((out, normed), expected, strict=True))
    if finite(kind):
        exact = norm64(norm64(x, w[0]) + norm64(e, w[1]) if experts else x, w[2])
        terms = (exact.abs() + r.double().abs()).amax(-1, keepdim=True)
        close(out, (exact + r.double()) * s.double(), 1, terms)


@each_count
@each_kind
@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize("turned", [False, True], ids=["norms", "rope"])
def test_qkv(rows, kind, head_dim, turned):
    sizes = [4 * head_dim, 2 * head_dim, 2 * head_dim]
    ours = draw(kind, rows, sum(sizes), 7).split(sizes, dim=-1)
    q, k, v = draw(kind, rows, sum(sizes), 7).split(sizes, dim=-1)
    before = q.double()
    qw, kw = weight(head_dim, 3), weight(head_dim, 4)
    angle = torch.arange(4096.0)[:, None] * torch.logspace(0, -4, head_dim // 2)
    cache = torch.cat([angle.cos(), angle.sin()], dim=-1).cuda()
    positions = torch.arange(rows, device="cuda") * 7 % 4096
    rope = qkv.Rope(positions, cache) if turned else None
    found = qkv.qkv(*ours, qw, kw, EPS, head_dim, rope)
    if not rows:
        return
    args = heads.Args(q, k, v, qw, kw, EPS, head_dim, rope, None)
    same(*zip(found, heads.Qkv("rope_store").theirs(stock, args), strict=True))
    if finite(kind) and not turned:
        exact = norm64(before.view(rows, 4, head_dim), qw).flatten(1)
        close(found[0], exact, 1)


def traced(name: str) -> tuple[Any, list[Any]]:
    x, r, w = draw("1", 7, 1536, 1), draw("1", 7, 1536, 2), weight(1536, 3)
    one = scalar(0.7)
    q, k, v = (draw("1", 7, n * 256, n) for n in (4, 2, 3))
    if name == "router_norm":
        return patch(name).ROUTER_NORM.operator, [x, w, one, EPS, 0]
    return {
        "layer_norms": (
            layer_steps.LAYER_NORMS.operator,
            [x, r, w, EPS, w, EPS, w, one, EPS, w, EPS, 0],
        ),
        "layer_norms, folded": (
            layer_steps.LAYER_NORMS.operator,
            [x, r, w, EPS, w, EPS, w, None, EPS, w, EPS, 0],
        ),
        "norm_add": (norm_add_op, [x, w, EPS, r, one, w, EPS, 0]),
        "gelu_mul": (gelu_mul_op, [x, r]),
        "layer_tail": (
            layer_steps.INPUT_NORM.operator,
            [x, w, EPS, r, one, r, w, EPS, w, EPS, w, EPS, 0],
        ),
        "qkv": (
            attention.QKV_NORM.operator,
            [q, k, v[:, :512], weight(256, 3), weight(256, 4), EPS, 256, None, None],
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        *("layer_norms", "layer_norms, folded", "router_norm", "norm_add", "gelu_mul"),
        *("layer_tail", "qkv"),
    ],
)
def test_operators_survive_fullgraph(name, monkeypatch):
    """Same outputs and same changes in place, compiled and not."""
    counted = ("layer_norms", "router_norm", "ple_tail", "input_norm", "qkv_norm")
    runs = {patch: unpublished(patch) for patch in counted}
    monkeypatch.setattr(run, "RUNS", runs)
    make, eager = traced(name)
    _, mine = traced(name)
    op = make()
    torch._dynamo.reset()
    expected, found = op(*eager), torch.compile(lambda *a: op(*a), fullgraph=True)(*mine)
    many = [(a, b) for a, b in zip(mine, eager, strict=True) if isinstance(a, torch.Tensor)]
    if isinstance(found, torch.Tensor):
        many.append((found, expected))
    elif found is not None:
        many += zip(found, expected, strict=True)
    same(*many)
