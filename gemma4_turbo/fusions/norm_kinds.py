"""Which of stock's RMSNorm kernels runs here, found by comparison on this very GPU.

SGLang calls flashinfer's norms, which are CuTe kernels where nvidia-cutlass-dsl is installed and CUDA
kernels where it is not; traced by Dynamo it calls sgl_kernel's. `gemma4_turbo.kernels.norms.rmsnorm` follows
each of them. The kinds differ in one to twenty of a million numbers, so the comparison takes millions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gemma4_turbo.fusions.comparison import different_bits, odd_rows
from gemma4_turbo.fusions.stock import Functions, followed
from gemma4_turbo.fusions.stock import layer_norms as stock_layer_norms
from gemma4_turbo.kernels.norms import layer_norms
from gemma4_turbo.kernels.norms.rmsnorm import Kind
from gemma4_turbo.runtime.attempts import attempt

EPS = 1e-6
ROUNDS = 8
NUMBERS = 2**21
"""Elements of each operand in a round."""

_found: dict[tuple[Any, ...], Kinds] = {}


class Kinds(NamedTuple):
    """What stock runs in eager mode and traced; a reason where none of ours agrees."""

    eager: int = Kind.PRECISE
    traced: int = Kind.PRECISE
    reason: str | None = None
    traced_reason: str | None = None


def find(like: torch.Tensor, width: int | None = None) -> Kinds:
    """The kinds for rows of ``like``'s dtype and device, and of its width or another. Cached.

    Synchronises: never call it into a CUDA graph. Off a GPU there is nothing to compare with.
    """
    if not like.is_cuda:
        return Kinds()
    key = (like.shape[-1] if width is None else width, like.dtype, like.device)
    if key not in _found:
        like = like if width is None else like.new_empty((1, width))
        stock = followed()
        eager, reason = _compared(stock.eager_norms, like, stock.norms_are_cute())
        traced, traced_reason = _compared(stock.traced_norms, like)
        _found[key] = Kinds(eager, traced, reason, traced_reason)
    return _found[key]


def _compared(
    functions: Callable[[], Functions], like: torch.Tensor, cute: bool = False
) -> tuple[int, str | None]:
    """`compare`; a comparison that cannot be made says so instead of a difference."""
    what = f"self-check of RMSNorm over {like.shape[-1]} {like.dtype}"
    found, broken = attempt(None, what, lambda: compare(functions(), like, cute))
    return (int(Kind.PRECISE), broken) if found is None else found


def forget() -> None:
    """The next `find` compares again."""
    _found.clear()


@torch.no_grad()
def compare(
    stock: Functions, like: torch.Tensor, cute: bool = False, rounds: int = ROUNDS
) -> tuple[int, str | None]:
    """The kind with which every bit agrees with stock, and None; or any kind and what differs.

    Args:
        stock: the functions in question.
        like: a tensor of the width, dtype and device in question.
        cute: whether CuTe kernels are tried first, which only spares compilations.
        rounds: how many times `NUMBERS` elements are compared.
    """
    wrong = {}
    for kind in sorted(Kind, key=lambda kind: (kind == Kind.CUTE) != cute):
        wrong[kind.name] = 0
        for seed in range(rounds):
            wrong[kind.name] += differing(stock, kind, like, seed)
            if wrong[kind.name]:
                break
        if not wrong[kind.name]:
            return int(kind), None
    counts = ", ".join(f"{count} as {name}" for name, count in wrong.items())
    return int(Kind.PRECISE), (
        f"self-check: RMSNorm over {like.shape[-1]} {like.dtype} differs from stock on "
        f"{torch.cuda.get_device_name(like.device)} ({counts})"
    )


def differing(stock: Functions, kind: Kind, like: torch.Tensor, seed: int) -> int:
    """Elements in which our norms and stock's differ, two NaN counting as equal."""
    x, residual, w1, w2, w3 = operands(like, seed)
    theirs_residual = residual.clone()
    ones = torch.ones_like(w1)
    root = torch.ones((), dtype=like.dtype, device=like.device)
    router = layer_norms.Router(ones, root, EPS, w3, EPS)
    ours = layer_norms.launch_layer_norms(x, residual, w1, EPS, w2, EPS, router, kind)
    theirs = stock_layer_norms(stock, x, theirs_residual, w1, EPS, w2, EPS, router)
    pairs = [(residual, theirs_residual), *zip(ours, theirs, strict=True)]
    return sum(different_bits(a, b) for a, b in pairs if a is not None and b is not None)


def operands(like: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """Activation, residual and three weights; zeros, subnormals, infinities and NaN among them."""
    width = like.shape[-1]
    rows = max(16, NUMBERS // width)
    generator = torch.Generator(like.device).manual_seed(seed)  # the global state stays as it is

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32)

    scale = torch.logspace(-2, 1.5, rows, device=like.device)[:, None]
    x, residual = randn(rows, width) * scale, randn(rows, width) * scale.flip(0)
    for place, some in enumerate((x, residual)):
        odd_rows(some[place::2][:10])
    weights = randn(3, width) + 1.0
    weights[:, :4] = torch.tensor([0.0, -0.0, 1e-39, -1e-39])
    return x.to(like.dtype), residual.to(like.dtype), *weights.to(like.dtype)
