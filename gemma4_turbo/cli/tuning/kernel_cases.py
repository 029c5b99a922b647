"""Kernels without tiles beside stock's own calls, at the models' shapes: for ``tune`` and ``bench/kernels.py``.

A case draws its operands when its turn comes, so that only those are in the GPU's memory. Calls that
overwrite their input have one each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.fusions import layer_norms as norms_between
from gemma4_turbo.fusions import layer_tail, norm_kinds, ple_tail, qkv
from gemma4_turbo.fusions import router_norm as routers_norm
from gemma4_turbo.kernels import moe_align, step_prologue
from gemma4_turbo.kernels import router as router_kernel
from gemma4_turbo.kernels import router_few as few_kernel
from gemma4_turbo.kernels.norms.layer_norms import Router
from gemma4_turbo.kernels.norms.layer_tail import COMPILED_SUM_ROWS, Experts, NextNorm
from gemma4_turbo.kernels.norms.rmsnorm import Kind
from gemma4_turbo.kernels.qkv import Mode, Rope, Store
from gemma4_turbo.models.geometry import (
    GEOMETRIES,
    HEAD_DIM_FULL,
    HEAD_DIM_SLIDING,
    VOCABULARY,
    Geometry,
)
from gemma4_turbo.ports.any.decode_step import attention
from gemma4_turbo.ports.any.stock import Embedding, Projection, text_model

if TYPE_CHECKING:
    from gemma4_turbo.fusions.fusion import A, Fusion, R

Call = Callable[[], Any]

EPS = 1e-6
MODELS = {name: GEOMETRIES[name] for name in ("26b-a4b", "e4b", "e2b")}
Models = dict[str, Geometry]
ROWS = (1, 8, 32, 64, 4096)
DECODE_ROWS = (1, 8, 32, 64)
ROUTER_ROWS = (1, 8, 32, 64, 256, 1024, 4096, 16384)
ALIGN_BLOCK = 16
"""BLOCK_SIZE_M that stock's configurations choose for 26B-A4B up to 32 tokens."""
POSITIONS = SLOTS = 8192  # of the rotation's table and of the KV pool, more than any case has rows


class CannotMeasureError(Exception):
    """Stock does what no kernel of ours follows."""


class Calls(NamedTuple):
    """A case with its operands. Each call returns all that it computes."""

    ours: Call
    stock: Call
    bytes: int  # by ours: every operand read once, every result written once


class Case(NamedTuple):
    """A kernel at one shape."""

    kernel: str  # the patch
    case: str
    tokens: int  # rows
    build: Callable[[str], Calls]  # for a device


def moved(*tensors: torch.Tensor) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Draw:
    """Random operands, bf16 unless said otherwise, the same in every run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def rows(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Normally distributed."""
        drawn = torch.empty(shape, device=self.device, dtype=dtype)
        return drawn.normal_(generator=self.generator)

    def weight(self, width: int) -> torch.Tensor:
        """Around 1."""
        return (self.rows(width).float().tanh() * 0.5 + 1.0).bfloat16()

    def scalar(self, value: float, *shape: int) -> torch.Tensor:
        """One element."""
        return torch.full(shape, value, device=self.device, dtype=torch.bfloat16)

    def below(self, end: int, count: int) -> torch.Tensor:
        """Different integers."""
        return torch.randperm(end, generator=self.generator, device=self.device)[:count]


def kind_of(x: torch.Tensor) -> int:
    """The RMSNorm that stock runs for rows like ``x``; `CannotMeasureError` if ours follows none of it."""
    lines.stock()  # which the kinds are compared with
    kinds = norm_kinds.find(x)
    if kinds.reason is not None:
        raise CannotMeasureError(kinds.reason)
    return kinds.eager


def beside(fusion: Fusion[A, R], mine: A, stocks: A, kind: int, size: int) -> Calls:
    """A fusion's kernel and stock's calls, each with operands of its own; ``size`` in bytes."""
    theirs = fusion.repeated(lines.stock(), stocks)

    def ours() -> Any:
        return fusion.written(mine, fusion.launch(mine, kind))

    def stock() -> Any:
        return fusion.written(stocks, theirs())

    return Calls(ours, stock, size)


# -- norms ------------------------------------------------------------------------------------------


def layer_norms(model: Geometry, rows: int, device: str) -> Calls:
    """Between attention and feed-forward."""
    draw = Draw(device)
    x, r = draw.rows(rows, model.hidden), draw.rows(rows, model.hidden)
    w = [draw.weight(model.hidden) for _ in range(4)]
    root = None if lines.router_scale_is_folded() else draw.scalar(model.hidden**-0.5)
    router = Router(w[2], root, EPS, w[3], EPS) if model.experts else None
    args = norms_between.Args(x, r, w[0], EPS, w[1], EPS, router)
    read, written = [x, r, w[0], w[1]], [r, x]
    if router is not None:
        read, written = [*read, w[2], w[3]], [*written, x, x]
        if root is not None:
            read.append(root)
    fusion = norms_between.LayerNorms("layer_norms")
    stocks = args._replace(residual=r.clone())
    return beside(fusion, args, stocks, kind_of(x), moved(*read, *written))


def router_norm(model: Geometry, rows: int, device: str) -> Calls:
    """What the router's projection reads."""
    draw = Draw(device)
    x, w = draw.rows(rows, model.hidden), draw.weight(model.hidden)
    args = routers_norm.Args(x, w, draw.scalar(model.hidden**-0.5), EPS)
    fusion = routers_norm.RouterNorm("router_norm")
    return beside(fusion, args, args, kind_of(x), moved(x, w, args.root_size, x))


# -- ends of a layer --------------------------------------------------------------------------------


def ple_tail_launches(model: Geometry, rows: int, device: str) -> Calls:
    """Three launches; the GEMMs between them are stock's on both sides and left out."""
    draw = Draw(device)
    m, r, c = (draw.rows(rows, model.hidden) for _ in range(3))
    gate = draw.rows(rows, model.per_layer_width)
    p = draw.rows(rows, model.layers, model.per_layer_width)[:, 1]  # one layer's part
    w, last, scalar = draw.weight(model.hidden), draw.weight(model.hidden), draw.scalar(0.7, 1)
    args = ple_tail.Args(m, w, EPS, r, gate, p, c, last, EPS, scalar)
    first = moved(m, w, r, r)  # the last of each line stands for the result, which has its size
    second = moved(gate, p, gate)
    third = moved(c, last, r, scalar, r)
    return beside(ple_tail.PleTail("ple_tail"), args, args, kind_of(m), first + second + third)


def input_norm(model: Geometry, rows: int, device: str) -> Calls:
    """A layer's end with the next layer's norm; with per-layer inputs it is `ple_tail`'s last launch."""
    draw = Draw(device)
    x, r = draw.rows(rows, model.hidden), draw.rows(rows, model.hidden)
    w, after, scalar = draw.weight(model.hidden), draw.weight(model.hidden), draw.scalar(0.7, 1)
    kind = kind_of(x)
    if not model.experts:
        end = ple_tail.NormAdd(x, w, EPS, r, scalar, after, EPS)
        size = moved(x, w, r, scalar, after, x, x)
        return beside(ple_tail.PleInputNorm("input_norm"), end, end, kind, size)
    e, w1, w2 = draw.rows(rows, model.hidden), draw.weight(model.hidden), draw.weight(model.hidden)
    experts, following = Experts(e, w2, EPS, w1, EPS), NextNorm(after, EPS, kind)
    args = layer_tail.Args(x, w, EPS, r, scalar, experts, following)
    size = moved(x, w1, e, w2, w, r, scalar, after, x, x)
    return beside(layer_tail.LayerTail("input_norm"), args, args, kind, size)


def experts_sum(following: bool, model: Geometry, rows: int, device: str) -> Calls:
    """A layer's end with the sum over a token's experts; ``following``: and the next layer's norm."""
    draw = Draw(device)
    x, r = draw.rows(rows, model.hidden), draw.rows(rows, model.hidden)
    e = draw.rows(rows, model.topk, model.hidden)
    w, w1, w2, after = (draw.weight(model.hidden) for _ in range(4))
    scalar = draw.scalar(0.7, 1)
    experts = Experts(e, w2, EPS, w1, EPS, lines.rules().sums_from_zero())
    kind = kind_of(x) if following else int(Kind.PRECISE)  # nobody asks for one
    next_norm = NextNorm(after, EPS, kind) if following else None
    args = layer_tail.Args(x, w, EPS, r, scalar, experts, next_norm)
    size = moved(x, w1, e, w2, w, r, scalar, x) + (moved(after, x) if following else 0)
    return beside(layer_tail.LayerTail("experts_sum"), args, args, kind, size)


# -- attention --------------------------------------------------------------------------------------


class Heads(NamedTuple):
    """A layer's attention."""

    q: int
    kv: int
    size: int
    mode: Mode


def heads_of(model: Geometry) -> dict[str, Heads]:
    """The kinds of layers that a model has."""
    full = Mode.QKV  # also where V is K before the norms: that is a fact about weights
    kinds = {
        "sliding": Heads(model.heads, model.kv_heads_sliding, HEAD_DIM_SLIDING, Mode.QKV),
        "full": Heads(model.heads, model.kv_heads_full, HEAD_DIM_FULL, full),
    }
    if model.kv_shared_layers:
        kinds["sliding (shared KV)"] = kinds["sliding"]._replace(mode=Mode.Q)
    return kinds


class Projected(NamedTuple):
    """Slices of a projection's output, as attention gets them."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None


def projected(whole: torch.Tensor, heads: Heads, mode: Mode) -> Projected:
    """Q, K and V, without those that the mode does not have."""
    widths = [heads.q * heads.size, heads.kv * heads.size, heads.kv * heads.size]
    q, k, v = torch.split(whole, widths, dim=-1)
    if mode == Mode.QK:  # V's rows are not multiplied
        q, k = torch.split(whole[:, : -v.shape[1]].contiguous(), widths[:2], dim=-1)
    return Projected(q, None if mode == Mode.Q else k, v if mode == Mode.QKV else None)


def stock_mode(heads: Heads) -> Mode:
    """Stock multiplies V's rows also where they are K's."""
    return Mode.QKV if heads.mode == Mode.QK else heads.mode


def projection(draw: Draw, heads: Heads, rows: int) -> torch.Tensor:
    """The output of the QKV projection."""
    whole = draw.rows(rows, (heads.q + 2 * heads.kv) * heads.size)
    if heads.mode == Mode.QK:
        k, v = whole[:, heads.q * heads.size :].chunk(2, dim=-1)
        v.copy_(k)
    return whole


def qkv_norm(heads: Heads, rows: int, device: str) -> Calls:
    """Norms alone."""
    draw, mode = Draw(device), stock_mode(heads)
    whole = projection(draw, heads, rows)
    mine, theirs = projected(whole, heads, mode), projected(whole.clone(), heads, mode)
    qw, kw = draw.weight(heads.size), draw.weight(heads.size)
    args = qkv.Args(*mine, qw, kw, EPS, heads.size, None, None)
    stocks = qkv.Args(*theirs, qw, kw, EPS, heads.size, None, None)
    present = [tensor for tensor in mine if tensor is not None]
    weights = [qw] if mode == Mode.Q else [qw, kw]
    size = moved(*present, *weights, *present)
    return beside(qkv.Qkv("qkv_norm"), args, stocks, Kind.PRECISE, size)  # it follows none


def rope_store(heads: Heads, stored: bool, rows: int, device: str) -> Calls:
    """Norms and rotation; ``stored``: and K and V into the pool, as in a decode step."""
    draw = Draw(device)
    whole = projection(draw, heads, rows)
    mine = projected(whole, heads, heads.mode)
    theirs = projected(whole.clone(), heads, stock_mode(heads))
    qw, kw = draw.weight(heads.size), draw.weight(heads.size)
    angles = torch.arange(float(POSITIONS))[:, None] * torch.logspace(0, -4, heads.size // 2)
    rope = Rope(
        draw.below(POSITIONS, rows), torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
    )
    locations = draw.below(SLOTS, rows)
    ours_pool, stock_pool = (
        [torch.zeros(SLOTS, heads.kv, heads.size, device=device).bfloat16() for _ in range(2)]
        for _ in range(2)
    )
    store = None
    if stored:
        store = Store(locations, ours_pool[0], ours_pool[1], lines.skipped_slot())
    calls, fusion = lines.stock(), qkv.Qkv("rope_store")
    args = qkv.Args(*mine, qw, kw, EPS, heads.size, rope, store)
    stocks = qkv.Args(*theirs, qw, kw, EPS, heads.size, rope, None)

    def ours() -> Any:
        found = fusion.launch(args, Kind.PRECISE)  # it follows none
        return (found[0], *ours_pool) if stored else found

    def stock() -> Any:
        q, k, v = fusion.theirs(calls, stocks, heads.kv)
        if not stored or k is None or v is None:
            return q, k, v
        kv_heads = k.view(rows, heads.kv, heads.size), v.view(rows, heads.kv, heads.size)
        calls.store_kv(*kv_heads, (stock_pool[0], stock_pool[1]), locations)
        return q, *stock_pool

    read = [tensor for tensor in mine if tensor is not None]
    read += [qw, rope.positions, rope.cos_sin_cache[:rows]]  # a row of the table for each position
    written = [mine.q]
    if mine.k is not None:
        read.append(kw)
        written += [mine.k, mine.k]  # K and V
    if stored:
        read.append(locations)
    return Calls(ours, stock, moved(*read, *written))


# -- experts ----------------------------------------------------------------------------------------


def router(dtype: torch.dtype, model: Geometry, rows: int, device: str) -> Calls:
    """Logits to weights and experts."""
    draw, stock = Draw(device), lines.stock()
    scale, x = draw.weight(model.experts), draw.rows(rows, model.experts, dtype=dtype)
    results = rows * model.topk * (4 + 4)  # weights and ids
    return Calls(
        lambda: router_kernel.fused_routing(x, scale, model.topk),
        lambda: stock.routing(x, scale, model.topk),
        moved(x, scale) + results,
    )


def router_few(model: Geometry, rows: int, device: str) -> Calls:
    """The router's normed input to weights and experts. Its weight stays in the L2 cache, for both."""
    draw, stock = Draw(device), lines.stock()
    x, scale = draw.rows(rows, model.hidden), draw.weight(model.experts)
    w = draw.rows(model.experts, model.hidden) * model.hidden**-0.5
    arrived = torch.zeros(1, dtype=torch.int32, device=device)
    results = rows * (2 * model.experts + model.topk * (4 + 4))  # logits, weights and ids
    return Calls(
        lambda: few_kernel.launch_router_few(x, w, scale, model.topk, arrived)[1:],
        lambda: stock.routing(torch.nn.functional.linear(x, w), scale, model.topk),
        moved(x, w, scale) + results,
    )


def align(model: Geometry, rows: int, device: str) -> Calls:
    """Slots grouped by expert."""
    ids = Draw(device).rows(rows, model.experts).topk(model.topk)[1].int()
    arguments = ids, ALIGN_BLOCK, model.experts
    multiple, stock = lines.align_multiple(), lines.stock()
    token_ids, expert_ids, padded = moe_align.launch_align(*arguments, multiple)
    used = expert_ids[: int(padded) // ALIGN_BLOCK]  # the others are not written
    return Calls(
        lambda: moe_align.launch_align(*arguments, multiple),
        lambda: stock.align(*arguments),
        moved(ids, token_ids, used, padded),
    )


# -- before the first layer ---------------------------------------------------------------------------


@cache
def prologue_kind(device: str) -> int:
    """`kind_of` for rows of 256."""
    return kind_of(torch.empty(1, step_prologue.WIDTH, device=device, dtype=torch.bfloat16))


def prologue(model: Geometry, rows: int, device: str, vocabulary: int = VOCABULARY) -> Calls:
    """Per-layer inputs in two launches; the GEMM between them is stock's on both sides and left out."""
    draw, width, embed_scale = Draw(device), model.per_layer_width, model.per_layer_width**0.5
    table = draw.rows(vocabulary, model.layers * width)
    projection = draw.rows(rows, model.layers * width)
    ids, weight = draw.below(vocabulary, rows), draw.weight(width)
    scale, input_scale = draw.scalar(model.hidden**-0.5), draw.scalar(0.5**0.5)
    kind = prologue_kind(device)
    calls, text = (
        lines.stock(),
        text_model(
            model.layers,
            width,
            Embedding(table, embed_scale, vocabulary),
            Projection(scale, weight, EPS, input_scale),
        ),
    )

    def ours() -> Any:
        inputs = step_prologue.launch_gather(ids, table, embed_scale, vocabulary)
        inputs = inputs.view(rows, model.layers, width)
        return inputs, step_prologue.launch_project(
            projection, scale, weight, EPS, inputs, input_scale, kind
        )

    def stock() -> Any:
        inputs = calls.per_layer_inputs(text, ids)
        return inputs, calls.project_per_layer_inputs(text, projection, inputs)

    # The table's rows, the per-layer inputs and the result are of the projection's size.
    first = moved(ids, projection, projection)
    second = moved(projection, scale, weight, projection, input_scale, projection)
    return Calls(ours, stock, first + second)


# -- all of them --------------------------------------------------------------------------------------


def over_rows(
    kernel: str, case: str, rows: tuple[int, ...], build: Callable[[int, str], Calls]
) -> list[Case]:
    """A case for each number of rows."""
    return [Case(kernel, case, count, partial(build, count)) for count in rows]


def over_models(
    kernel: str,
    build: Callable[[Geometry, int, str], Calls],
    models: Models = MODELS,
    rows: tuple[int, ...] = ROWS,
    also: str = "",
) -> list[Case]:
    """Cases for each model."""
    return [
        case
        for name, model in models.items()
        for case in over_rows(kernel, name + also, rows, partial(build, model))
    ]


def with_experts(models: Models) -> Models:
    """Those that have some."""
    return {name: model for name, model in models.items() if model.experts}


def with_per_layer_inputs(models: Models) -> Models:
    """Those that have some."""
    return {name: model for name, model in models.items() if model.per_layer_width}


def router_cases(models: Models = MODELS) -> list[Case]:
    """Logits of two dtypes. The kernel sees numbers of experts only: of equal ones the first model's."""
    return [
        case
        for model in list(with_experts(models).values())[:1]
        for dtype in (torch.bfloat16, torch.float32)
        for case in over_rows(
            "router",
            str(dtype).removeprefix("torch."),
            ROUTER_ROWS,
            partial(router, dtype, model),
        )
    ]


def router_few_cases(models: Models = MODELS) -> list[Case]:
    """Up to `router_few.MAX_TOKENS` tokens."""
    rows = tuple(count for count in (1, 2, 4, 8) if count <= few_kernel.MAX_TOKENS)
    return over_models("router_few", router_few, with_experts(models), rows)


def qkv_norm_cases(models: Models = MODELS) -> list[Case]:
    """Eager calls of the patch end at `attention.NORM_ROWS` rows."""
    rows = tuple(count for count in ROWS if count <= attention.NORM_ROWS)
    return [
        case
        for name, model in models.items()
        for kind, heads in heads_of(model).items()
        for case in over_rows("qkv_norm", f"{name} {kind}", rows, partial(qkv_norm, heads))
    ]


def rope_store_cases(models: Models = MODELS) -> list[Case]:
    """The patch stores in decode steps only, and never where KV is shared."""
    cases = []
    for name, model in models.items():
        for kind, heads in heads_of(model).items():
            label = f"{name} {kind}"
            if heads.mode == Mode.Q:
                cases += over_rows("rope_store", label, ROWS, partial(rope_store, heads, False))
                continue
            cases += over_rows("rope_store", label, DECODE_ROWS, partial(rope_store, heads, True))
            prefill = tuple(count for count in ROWS if count not in DECODE_ROWS)
            cases += over_rows(
                "rope_store", f"{label} (prefill)", prefill, partial(rope_store, heads, False)
            )
    return cases


def experts_sum_cases(models: Models = MODELS) -> list[Case]:
    """Above `COMPILED_SUM_ROWS` rows the patch leaves the sum to stock."""
    rows = tuple(count for count in ROWS if count <= COMPILED_SUM_ROWS)
    return [
        case
        for also, following in (("", False), (" (with input_norm)", True))
        for case in over_models(
            "experts_sum", partial(experts_sum, following), with_experts(models), rows, also
        )
    ]


def moe_align_cases(models: Models = MODELS) -> list[Case]:
    """The patch takes `moe_align.MAX_SLOTS` slots, and leaves to stock what it aligns in one launch."""
    own = lines.slots_of_stocks()
    return [
        case
        for name, model in with_experts(models).items()
        for case in over_rows("moe_align", name, ROWS, partial(align, model))
        if own < case.tokens * model.topk <= moe_align.MAX_SLOTS
    ]


CASES: dict[str, Callable[..., list[Case]]] = {
    "router": router_cases,
    "step_prologue": lambda models=MODELS: over_models(
        "step_prologue", prologue, with_per_layer_inputs(models)
    ),
    "moe_align": moe_align_cases,
    "layer_norms": lambda models=MODELS: over_models("layer_norms", layer_norms, models),
    "router_norm": lambda models=MODELS: over_models(
        "router_norm", router_norm, with_experts(models)
    ),
    "ple_tail": lambda models=MODELS: over_models(
        "ple_tail", ple_tail_launches, with_per_layer_inputs(models)
    ),
    "qkv_norm": qkv_norm_cases,
    "rope_store": rope_store_cases,
    "input_norm": lambda models=MODELS: over_models("input_norm", input_norm, models),
    "experts_sum": experts_sum_cases,
    "router_few": router_few_cases,
}
"""By patch, in the catalogue's order, of these models or others; `gemma4_turbo.cli.lines.patch_unfit` says which
of them SGLang does not take."""
