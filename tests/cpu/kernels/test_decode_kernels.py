"""The kernels of a decode step in Triton's interpreter against their plain torch references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.kernels import qkv
from gemma4_turbo.kernels.norms import layer_norms, layer_tail, ple_tail, router_norm
from gemma4_turbo.kernels.norms import rmsnorm as norms

pytestmark = pytest.mark.skipif(not norms.INTERPRETED, reason="needs Triton's interpreter")

EPS = 1e-6
POISON = 123.0
KIND = norms.Kind.FAST_MATH
HALF, BF16 = torch.float16, torch.bfloat16

Pair = tuple[torch.Tensor | None, torch.Tensor | None]
# Kind and dtype choose the code, so all of them, of the narrowest row, which a program finishes soonest.
# The width decides masks, warps and the order of the sums, of which there are two; no row, and one.
SHAPES = [
    *((3, 256, kind, dtype) for kind in norms.Kind for dtype in (BF16, HALF)),
    *((2, width, kind, BF16) for width in (1536, 2816) for kind in (KIND, norms.Kind.CUTE)),
    (0, 256, KIND, BF16),
    (1, 256, norms.Kind.CUTE, BF16),
]


def named(value: Any) -> str | None:
    """How a parameter is called in a test's name."""
    return value.name if isinstance(value, norms.Kind) else str(value)


each_shape = pytest.mark.parametrize(("rows", "width", "kind", "dtype"), SHAPES, ids=named)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def activations(rows: int, width: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of scales 0.01 to 30, each followed by POISON: a view with a stride beyond its width."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((rows, width + 64), POISON, dtype=dtype)
    scale = torch.logspace(-2, 1.5, max(rows, 2))[:rows, None]
    whole[:, :width] = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
    return whole[:, :width]


def weight(width: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(width, generator=generator) + 0.5).to(dtype)


def near(*pairs: Pair, absolute: float = 0.0) -> None:
    """Within two ulp. ``absolute``: where a sum may cancel, so that its terms' ulp counts."""
    for found, expected in pairs:
        assert (found is None) == (expected is None)
        if found is None or expected is None:
            continue
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        rtol = 2 * torch.finfo(found.dtype).eps
        torch.testing.assert_close(
            found.float(), expected.float(), rtol=rtol, atol=max(1e-6, absolute * rtol)
        )


def cancelled(*terms: torch.Tensor) -> float:
    """The greatest magnitude among terms that are added."""
    return max((float(term.abs().max()) for term in terms if term.numel()), default=0.0)


def untouched(x: torch.Tensor) -> bool:
    """Whether the columns between strided rows still hold POISON."""
    width = x.shape[1]
    whole = x.as_strided((x.shape[0], width + 64), (x.stride(0), 1))
    return bool((whole[:, width:] == POISON).all())


# -- norms ----------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("experts", ["", "scale", "folded"])  # each writes its own code
def test_layer_norms(dtype, width, rows, kind, experts):
    x, r = activations(rows, width, 1, dtype), activations(rows, width, 2, dtype).flip(0)
    residual = activations(rows, width, 2, dtype)
    residual.copy_(r)
    w = [weight(width, seed, dtype) for seed in (3, 4, 5, 6)]
    root = None if experts == "folded" else torch.tensor(width**-0.5, dtype=dtype)
    router = layer_norms.Router(w[2], root, EPS, w[3], 1e-5) if experts else None
    expected = layer_norms.reference_layer_norms(x, r, w[0], EPS, w[1], 1e-5, router)
    found = layer_norms.layer_norms(x, residual, w[0], EPS, w[1], 1e-5, router, kind=kind)
    # What is normed is a sum: a flip in the rounding of its first term stays as large as that term.
    near((residual, r), *zip(found, expected, strict=True), absolute=cancelled(w[0]) * 4)
    assert untouched(x)
    assert untouched(residual)


@each_shape
def test_router_norm(dtype, width, rows, kind):
    x, scale = activations(rows, width, 1, dtype), weight(width, 2, dtype)
    root = torch.tensor(width**-0.5, dtype=dtype)
    near(
        (
            router_norm.router_norm(x, scale, root, EPS, kind=kind),
            router_norm.reference_router_norm(x, scale, root, EPS),
        )
    )
    assert untouched(x)


# -- ends of a layer --------------------------------------------------------------------------------


# The two options choose code of their own: both or neither at every shape, each alone at one.
@pytest.mark.parametrize(
    ("rows", "width", "kind", "dtype", "scaled", "following"),
    [
        *((*shape, both, both) for shape in SHAPES for both in (False, True)),
        (3, 256, KIND, BF16, True, False),
        (3, 256, norms.Kind.CUTE, BF16, False, True),
    ],
    ids=named,
)
def test_norm_add(dtype, width, rows, kind, scaled, following):
    x, r = activations(rows, width, 1, dtype), activations(rows, width, 2, dtype)
    kept = r.clone()
    scalar = torch.tensor([0.7], dtype=dtype) if scaled else None
    after = weight(width, 4, dtype) if following else None
    arguments = (x, weight(width, 3, dtype), EPS, r, scalar, after, 1e-5)
    expected = ple_tail.reference_norm_add(*arguments)
    found = ple_tail.norm_add(*arguments, kind=kind)
    near(*zip(found, expected, strict=True), absolute=6.0)
    assert torch.equal(r, kept)


# Each dtype; no row, one, several; one warp and two.
@pytest.mark.parametrize(
    ("dtype", "rows", "width"), [(BF16, 0, 256), (BF16, 1, 512), (BF16, 3, 256), (HALF, 3, 512)]
)
def test_gelu_mul(dtype, rows, width):
    gate, factor = activations(rows, width, 1, dtype), activations(rows, width, 2, dtype)
    expected = ple_tail.reference_gelu_mul(gate, factor)
    # tanh loses its relative precision near -1, where the gate is as good as closed.
    near((ple_tail.gelu_mul(gate, factor), expected), absolute=0.01)


# What the experts give and what follows choose the code: all pairs, of the narrowest row. The other
# dtype, a width with a mask, no row and one: where most of the code runs.
@pytest.mark.parametrize(
    ("dtype", "width", "rows", "choices", "following"),
    [
        *(
            (BF16, 256, 3, choices, kind)
            for choices in (None, 0, 8)
            for kind in (None, *norms.Kind)
        ),
        *((HALF, 256, 3, choices, KIND) for choices in (None, 0, 8)),
        (BF16, 2816, 2, None, norms.Kind.CUTE),
        (BF16, 2816, 2, 8, KIND),
        *((BF16, 256, rows, choices, KIND) for rows in (0, 1) for choices in (None, 8)),
    ],
    ids=named,
)
def test_layer_tail(dtype, width, rows, choices, following):
    x, r = activations(rows, width, 1, dtype), activations(rows, width, 2, dtype)
    kept = r.clone()
    w = [weight(width, seed, dtype) for seed in (3, 4, 5, 6)]
    experts = None
    if choices is not None:
        output = activations(rows, width, 9, dtype)
        if choices:
            each = [activations(rows, width, 10 + k, dtype) for k in range(choices)]
            output = torch.stack(each, dim=1).contiguous()
        experts = layer_tail.Experts(output, w[1], EPS, w[0], 1e-5)
    after = layer_tail.NextNorm(w[3], 1e-5, following) if following is not None else None
    arguments = (x, w[2], EPS, r, torch.tensor([0.7], dtype=dtype), experts, after)
    found = layer_tail.layer_tail(*arguments)
    near(
        *zip(found, layer_tail.reference_layer_tail(*arguments), strict=True),
        absolute=6.0,
    )
    assert torch.equal(r, kept)


def test_layer_tail_sums_from_zero_above_the_compiled_rows():
    """More rows than the compiled reduction takes: the other order of stock's sums, same values."""
    rows, width, dtype = layer_tail.COMPILED_SUM_ROWS + 1, 256, torch.bfloat16
    x = activations(rows, width, 1, dtype)
    output = torch.stack([x, x.flip(0), x.flip(1)], dim=1).contiguous()
    w = [weight(width, seed, dtype) for seed in (3, 4, 5)]
    experts = layer_tail.Experts(output, w[1], EPS, w[0], EPS)
    arguments = (x, w[2], EPS, x, torch.tensor([0.7], dtype=dtype), experts, None)
    near(
        *zip(
            layer_tail.layer_tail(*arguments),
            layer_tail.reference_layer_tail(*arguments),
            strict=True,
        ),
        absolute=6.0,
    )


def test_a_sum_of_negative_zeros_has_the_sign_of_where_it_starts():
    """Few rows: -0.0 from the first choice on, 0.0 from zero on, as the stock that is followed."""
    zeros = torch.full((2, 256), -0.0, dtype=torch.bfloat16)
    w, scalar = weight(256, 3, torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)
    signs = []
    for from_zero in (False, True):
        output = torch.stack([zeros, zeros], dim=1).contiguous()
        experts = layer_tail.Experts(output, w, EPS, w, EPS, from_zero)
        out, _ = layer_tail.layer_tail(zeros, w, EPS, zeros, scalar, experts, None)
        assert not out.any()
        signs.append(bool(torch.signbit(out).all()))
    assert signs == [True, False]


# -- q, k, v ----------------------------------------------------------------------------------------

HEADS, KV_HEADS, SLOTS, POSITIONS = 4, 2, 24, 64


def angles(head_dim: int) -> torch.Tensor:
    angle = torch.arange(float(POSITIONS))[:, None] * torch.logspace(0, -4, head_dim // 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def heads(rows: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Q, K and V as views into one buffer, as a projection leaves them."""
    sizes = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
    return activations(rows, sum(sizes), 7, dtype).split(sizes, dim=-1)


MODES = [
    (mode, stored)
    for mode in qkv.Mode
    for stored in (False, True)
    if mode != qkv.Mode.Q or not stored  # no K, nothing to store
]


def told(value: Any) -> str:
    """The name of a mode, else as it is."""
    return value.name if isinstance(value, qkv.Mode) else str(value)


def rope_of(rows: int, head_dim: int, integers: torch.dtype) -> qkv.Rope:
    positions = (torch.arange(rows) * 11 + 3) % POSITIONS
    return qkv.Rope(positions.to(integers), angles(head_dim))


def store_of(rows: int, head_dim: int, dtype: torch.dtype, integers: torch.dtype) -> qkv.Store:
    locations = ((torch.arange(rows) * 5 + 2) % SLOTS).to(integers)
    caches = [torch.full((SLOTS, KV_HEADS, head_dim), POISON, dtype=dtype) for _ in range(2)]
    return qkv.Store(locations, *caches)


# The mode and the rotation choose the code: all pairs, of the smallest head. The other dtype and no rows
# return other things in each mode; the other heads, one of them with integers of 32 bits; one row.
@pytest.mark.parametrize(
    ("dtype", "rows", "head_dim", "turned", "mode", "stored"),
    [
        *((BF16, 3, 128, turned, *mode) for turned in (False, True) for mode in MODES),
        *((HALF, 3, 128, True, *mode) for mode in MODES),
        *((BF16, 0, 128, True, *mode) for mode in MODES),
        *(
            (BF16, 2, dim, turned, qkv.Mode.QKV, turned)
            for dim in (256, 512)
            for turned in (False, True)
        ),
        *((BF16, 2, dim, True, qkv.Mode.QK, True) for dim in (256, 512)),
        (HALF, 1, 256, True, qkv.Mode.QKV, True),
    ],
    ids=told,
)
def test_qkv(dtype, rows, head_dim, turned, mode, stored):
    integers = torch.int32 if head_dim == 256 else torch.int64
    q, k, v = heads(rows, head_dim, dtype)
    q0, k0, v0 = (x.clone() for x in (q, k, v))
    ours: Any = (q, None, None) if mode == qkv.Mode.Q else (q, k, None if mode == 1 else v)
    plain: Any = (q0, None, None) if mode == qkv.Mode.Q else (q0, k0, None if mode == 1 else v0)
    qw, kw = weight(head_dim, 3, dtype), weight(head_dim, 4, dtype)
    rope = rope_of(rows, head_dim, integers) if turned else None
    mine = store_of(rows, head_dim, dtype, integers) if stored else None
    theirs = store_of(rows, head_dim, dtype, integers) if stored else None
    if rows:
        expected = qkv.reference_qkv(*plain, qw, kw, EPS, head_dim, rope, theirs)
    else:
        expected = q0, *((None, None) if stored or mode == qkv.Mode.Q else (k0, v0))
    found = qkv.qkv(*ours, qw, kw, EPS, head_dim, rope, mine)
    slack = 6.0 if turned else 0.0  # a rotation adds two elements
    near(*zip(found, expected, strict=True), absolute=slack)
    assert found[0].data_ptr() == q.data_ptr()
    if mode == qkv.Mode.Q:
        assert torch.equal(k, k0)
    if mode != qkv.Mode.QKV:
        assert torch.equal(v, v0)
    if mine is not None and theirs is not None:
        near((mine.k_cache, theirs.k_cache), (mine.v_cache, theirs.v_cache), absolute=slack)
        empty = torch.ones(SLOTS, dtype=torch.bool)
        empty[mine.locations.long()] = False
        assert int(empty.sum()) == SLOTS - rows
        for cache in (mine.k_cache, mine.v_cache):
            assert bool((cache[empty] == POISON).all())
            assert not bool((cache[~empty] == POISON).any())


@pytest.mark.parametrize("several", [False, True])  # a program's loop over heads has the mask too
def test_a_slot_that_is_skipped_keeps_what_it_holds(several):
    """Padding rows go to slot 0, two of them here; the other rows are stored."""
    q, k, v = heads(4, 128, BF16)
    locations = torch.tensor([0, 3, 0, 1])
    caches = [torch.full((SLOTS, KV_HEADS, 128), POISON, dtype=BF16) for _ in range(4)]
    rope, weights = rope_of(4, 128, torch.int64), (weight(128, 3, BF16), weight(128, 4, BF16))
    store, plain = qkv.Store(locations, *caches[:2], 0), qkv.Store(locations, *caches[2:])
    qkv.launch_qkv(q.clone(), k.clone(), v.clone(), *weights, EPS, 128, rope, store, several)
    qkv.launch_qkv(q, k, v, *weights, EPS, 128, rope, plain, several)
    for cache, other in zip(caches[:2], caches[2:], strict=True):
        assert bool((cache[0] == POISON).all())
        assert not bool((other[0] == POISON).any())
        assert torch.equal(cache[1:], other[1:])


# How many heads a program takes of Q and of K: 4 and 2, 2 and 1, 4 and 4. The modes differ in what a
# program of K writes.
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "mode", "stored"),
    [
        *((4, 2, *mode) for mode in MODES),
        (6, 1, qkv.Mode.QK, False),
        (4, 4, qkv.Mode.QKV, True),
    ],
    ids=told,
)
def test_several_heads_of_a_program_have_the_bits_of_one(
    q_heads, kv_heads, mode, stored, monkeypatch
):
    dim, rows = 128, 2
    dtype = torch.bfloat16
    qw, kw = weight(dim, 3, dtype), weight(dim, 4, dtype)
    rope = rope_of(rows, dim, torch.int64)
    outcomes = []
    for many in (1, 1 << 40):
        monkeypatch.setattr(qkv, "MANY_PROGRAMS", many)
        whole = activations(rows, (q_heads + 2 * kv_heads) * dim, 5, dtype)
        q, k, v = whole.split([q_heads * dim, kv_heads * dim, kv_heads * dim], -1)
        cut: Any = (q, None, None) if mode == qkv.Mode.Q else (q, k, None if mode == 1 else v)
        store = None
        if stored:
            caches = [torch.full((SLOTS, kv_heads, dim), POISON, dtype=dtype) for _ in range(2)]
            store = qkv.Store(torch.tensor([4, 0]), *caches)
        found = [*qkv.qkv(*cut, qw, kw, EPS, dim, rope, store), *(store or ())]
        outcomes.append([x.view(torch.int16) for x in found if x is not None and x.dtype == dtype])
    several, one = outcomes
    assert len(several) == len(one) > 0
    assert all(torch.equal(a, b) for a, b in zip(several, one, strict=True))


@pytest.mark.parametrize(
    ("heads", "several", "expected"),
    [(16, True, 4), (2, True, 2), (6, True, 2), (1, True, 1), (0, True, 1), (16, False, 1)],
)
def test_heads_of_a_program(heads, several, expected):
    assert qkv.heads_of_a_program(heads, several) == expected


def test_qkv_in_place_keys_are_the_views_given():
    """Without a store, K and V come back in the projection's own buffer."""
    q, k, v = heads(3, 128, torch.bfloat16)
    qw, kw = weight(128, 3, torch.bfloat16), weight(128, 4, torch.bfloat16)
    _, key, value = qkv.qkv(q, k, v, qw, kw, EPS, 128)
    assert key is k
    assert value is v


# -- what is declined ---------------------------------------------------------------------------------


def two(dtype: torch.dtype = torch.bfloat16, width: int = 256) -> dict[str, Any]:
    return {
        "x": activations(2, width, 1, dtype),
        "r": activations(2, width, 2, dtype),
        "w": weight(width, 3, dtype),
        "scalar": torch.ones(1, dtype=dtype),
    }


def call_layer_norms(a: dict[str, Any]) -> Any:
    router = layer_norms.Router(a["w"], a["scalar"], EPS, a["w"], EPS)
    router = router._replace(**{name: a[name] for name in router._fields if name in a})
    w1 = a.get("post_attention_weight", a["w"])
    w2 = a.get("pre_feedforward_weight", a["w"])
    return layer_norms.layer_norms(a["x"], a["r"], w1, EPS, w2, EPS, router, kind=KIND)


def call_router_norm(a: dict[str, Any]) -> Any:
    return router_norm.router_norm(a["x"], a["w"], a["scalar"], EPS, kind=KIND)


def call_norm_add(a: dict[str, Any]) -> Any:
    after = a.get("after", a["w"])
    return ple_tail.norm_add(a["x"], a["w"], EPS, a["r"], a["scalar"], after, EPS, kind=KIND)


def call_gelu_mul(a: dict[str, Any]) -> Any:
    return ple_tail.gelu_mul(a["x"], a["r"])


def call_layer_tail(a: dict[str, Any]) -> Any:
    experts = layer_tail.Experts(a["r"], a["w"], EPS, a["w"], EPS)
    experts = experts._replace(**{name: a[name] for name in experts._fields if name in a})
    after = layer_tail.NextNorm(a.get("after", a["w"]), EPS, KIND)
    last = a.get("last", a["w"])
    return layer_tail.layer_tail(a["x"], last, EPS, a["r"], a["scalar"], experts, after)


DECLINED: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (call_layer_norms, "attention_output", {"x": torch.ones(2, 256)}),
    (call_layer_norms, "attention_output", {"x": torch.ones(2, 300, dtype=BF16)}),
    (call_layer_norms, "attention_output", {"x": torch.ones(256, 2, dtype=BF16).T}),
    (call_layer_norms, "attention_output", {"x": torch.ones(256, dtype=BF16)}),
    (call_layer_norms, "residual", {"r": torch.ones(3, 256, dtype=BF16)}),
    (call_layer_norms, "residual", {"r": torch.ones(2, 256, dtype=HALF)}),
    (call_layer_norms, "post_attention_weight", {"post_attention_weight": torch.ones(256)}),
    (
        call_layer_norms,
        "pre_feedforward_weight",
        {"pre_feedforward_weight": torch.ones(512, dtype=BF16)[::2]},
    ),
    (call_layer_norms, "router.scale", {"scale": torch.ones(255, dtype=BF16)}),
    (call_layer_norms, "router.root_size", {"root_size": torch.ones(1)}),
    (
        call_layer_norms,
        "router.pre_feedforward_2_weight",
        {"pre_feedforward_2_weight": torch.ones(256)},
    ),
    (call_router_norm, "x", {"x": torch.ones(2, 256)}),
    (call_router_norm, "x", {"x": torch.ones(2, norms.MAX_WIDTH + 256, dtype=BF16)}),
    (call_router_norm, "scale", {"w": torch.ones(256)}),
    (call_router_norm, "root_size", {"scalar": torch.ones(2, dtype=BF16)}),
    (call_norm_add, "x", {"x": torch.ones(2, 256, dtype=torch.float64)}),
    (call_norm_add, "weight", {"w": torch.ones(512, dtype=BF16)}),
    (call_norm_add, "residual", {"r": torch.ones(2, 512, dtype=BF16)[:, ::2]}),
    (call_norm_add, "scalar", {"scalar": torch.ones(1)}),
    (call_norm_add, "next_weight", {"after": torch.ones(256)}),
    (call_gelu_mul, "gate", {"x": torch.ones(2, 100, dtype=BF16)}),
    (call_gelu_mul, "per_layer_input", {"r": torch.ones(1, 256, dtype=BF16)}),
    (call_layer_tail, "mlp_output", {"x": torch.ones(2, 256)}),
    (call_layer_tail, "weight", {"last": torch.ones(256)}),
    (call_layer_tail, "residual", {"r": torch.ones(2, 256, dtype=HALF)}),
    (call_layer_tail, "scalar", {"scalar": torch.ones(2, dtype=BF16)}),
    (call_layer_tail, "following.weight", {"after": torch.ones(256)}),
    (call_layer_tail, "experts.weight", {"weight": torch.ones(256)}),
    (call_layer_tail, "experts.mlp_weight", {"mlp_weight": torch.ones(255, dtype=BF16)}),
    (call_layer_tail, "experts.output", {"output": torch.ones(2, 512, dtype=BF16)}),
    (call_layer_tail, "experts.output", {"output": torch.ones(2, 8, 256)}),
    (call_layer_tail, "experts.output", {"output": torch.ones(3, 8, 256, dtype=BF16)}),
]


@pytest.mark.parametrize("call", list(dict.fromkeys(call for call, _, _ in DECLINED)))
def test_what_the_cases_below_change_is_taken(call):
    """So that nothing but the change can be what is declined."""
    call(two())


@pytest.mark.parametrize(("call", "argument", "changed"), DECLINED)
def test_value_error_names_the_argument(call, argument, changed):
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        call(two() | changed)


def qkv_arguments() -> dict[str, Any]:
    q, k, v = heads(2, 128, BF16)
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_weight": weight(128, 3, BF16),
        "k_weight": weight(128, 4, BF16),
        "eps": EPS,
        "head_dim": 128,
        "rope": rope_of(2, 128, torch.int64),
        "store": store_of(2, 128, BF16, torch.int64),
    }


QKV_DECLINED: list[tuple[str, dict[str, Any]]] = [
    ("head_dim", {"head_dim": 64}),
    ("q", {"q": torch.ones(2, 512)}),
    ("q", {"q": torch.ones(2, 500, dtype=BF16)}),
    ("q", {"q": torch.ones(512, 2, dtype=BF16).T}),
    ("k", {"k": torch.ones(2, 256, dtype=HALF)}),
    ("k", {"k": torch.ones(3, 256, dtype=BF16)}),
    ("v", {"v": torch.ones(2, 128, dtype=BF16)}),
    ("k and k_weight", {"k": None}),
    ("k and k_weight", {"k_weight": None}),
    ("q_weight", {"q_weight": torch.ones(128)}),
    ("k_weight", {"k_weight": torch.ones(256, dtype=BF16)[::2]}),
    ("positions", {"rope": qkv.Rope(torch.arange(3), angles(128))}),
    ("positions", {"rope": qkv.Rope(torch.arange(4)[::2], angles(128))}),
    ("cos_sin_cache", {"rope": qkv.Rope(torch.arange(2), angles(128).bfloat16())}),
    ("cos_sin_cache", {"rope": qkv.Rope(torch.arange(2), angles(256))}),
    ("store", {"k": None, "v": None}),
    ("locations", {"store": store_of(3, 128, BF16, torch.int64)}),
    ("k_cache", {"store": store_of(2, 256, BF16, torch.int64)}),
    ("k_cache", {"store": store_of(2, 128, HALF, torch.int64)}),
    (
        "v_cache",
        {
            "store": store_of(2, 128, BF16, torch.int64)._replace(
                v_cache=torch.ones(SLOTS, KV_HEADS + 1, 128, dtype=BF16)[:, :KV_HEADS]
            )
        },
    ),
]


def test_what_the_cases_of_qkv_below_change_is_taken():
    qkv.qkv(**qkv_arguments())


@pytest.mark.parametrize(("argument", "changed"), QKV_DECLINED)
def test_qkv_value_error_names_the_argument(argument, changed):
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        qkv.qkv(**(qkv_arguments() | changed))
