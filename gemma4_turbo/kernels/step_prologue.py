"""Gemma 4's per-layer inputs (models with per-layer embeddings: E2B, E4B), one launch each half.

For every token with id ``i``, L layers and D = 256::

    per_layer_inputs = round(W[i if 0 <= i < vocab else 0] * embed_scale)           # gather
    x = round(projection * projection_scale)                                        # projection
    y = round(x * rsqrt(mean(x**2) + eps) * weight)          over each of the L rows of D
    out = round(round(y + per_layer_inputs) * input_scale)

Everything is fp32 and rounded to the tensors' dtype where stock stores a tensor; eager PyTorch does
the same. `reference_gather` and `reference_project` are that eager path, 7 and 4 launches.

The order of the additions under the square root is the order of the kernel that stock runs, and
there are three (`gemma4_turbo.kernels.norms.rmsnorm.Kind`), all with 32 threads a row, each adding the squares of 8 neighbours one
after the other. They differ in the order of the butterfly over the 32, and in whether subnormals
are flushed. Squares of bf16 and fp16 numbers and a 256th of the sum are exact in fp32, so fused or
not fused multiply-adds give the same bits. Sources: flashinfer's ``norm.cuh`` and its CuTe
``RMSNormKernel``, and the machine code of the wheels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels.interpreted import to_float
from gemma4_turbo.kernels.norms.rmsnorm import MIN_EPS, Kind, flushed, mul, rsqrt_approx
from gemma4_turbo.kernels.rounding import round_to

WIDTH = 256
"""D, the width of one layer's input."""

DTYPES = (torch.bfloat16, torch.float16)
RMSNormFunction = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


class Placeholders(NamedTuple):
    """Token ids of images, videos and audio, embedded as the padding token."""

    image: int
    video: int
    audio: int
    pad: int


# -- gather ----------------------------------------------------------------------------------------


@triton.jit
def _gather_kernel(
    input_ids_ptr,
    weight_ptr,
    out_ptr,
    stride_token,
    vocab,
    width,
    embed_scale,
    image,
    video,
    audio,
    pad,
    PLACEHOLDERS: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,  # False in Triton's interpreter
):
    token = tl.program_id(0).to(tl.int64)
    token_id = tl.load(input_ids_ptr + token * stride_token).to(tl.int64)
    if PLACEHOLDERS:
        placeholder = (token_id == image) | (token_id == video) | (token_id == audio)
        token_id = tl.where(placeholder, pad, token_id)
    token_id = tl.where((token_id >= 0) & (token_id < vocab), token_id, 0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    row = tl.load(weight_ptr + token_id * width + column, mask=inside, other=0.0)
    scaled = round_to(to_float(row, PTX) * embed_scale, row.dtype, PTX)
    tl.store(out_ptr + token * width + column, scaled, mask=inside)


INTERPRETED = not isinstance(_gather_kernel, triton.JITFunction)
"""True when this module was imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


def reference_gather(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    embed_scale: float,
    vocab: int,
    placeholders: Placeholders | None = None,
) -> torch.Tensor:
    """The eager path of `gather_per_layer`, same arguments, ``[T, width]``."""
    token_ids = input_ids
    if placeholders is not None:
        for placeholder in placeholders[:3]:
            token_ids = torch.where(input_ids == placeholder, placeholders.pad, token_ids)
    inside = (token_ids >= 0) & (token_ids < vocab)
    rows = torch.nn.functional.embedding(torch.where(inside, token_ids, 0), weight)
    return rows * embed_scale


def gather_unfit(input_ids: torch.Tensor, weight: torch.Tensor, vocab: int) -> str | None:
    """Why `gather_per_layer` does not take these arguments, or None if it does. Host checks only."""
    if not (INTERPRETED or (weight.is_cuda and torch.version.hip is None)):
        return f"weight must be on a CUDA device, got {weight.device}"
    if weight.dtype not in DTYPES:
        return f"weight must be bf16 or fp16, got {weight.dtype}"
    if weight.dim() != 2 or not weight.is_contiguous():
        return f"weight must be a contiguous [vocab, width], got {tuple(weight.shape)}"
    if not 0 < vocab <= weight.shape[0]:
        return f"vocab must be in 1..{weight.shape[0]}, the rows of weight, got {vocab}"
    if input_ids.dim() != 1 or input_ids.dtype not in (torch.int64, torch.int32):
        return f"input_ids must be [T] int64 or int32, got {input_ids.dim()}-D {input_ids.dtype}"
    if input_ids.device != weight.device:
        return f"input_ids is on {input_ids.device}, weight on {weight.device}"
    if torch.is_grad_enabled() and weight.requires_grad:
        return "weight requires a gradient"
    return None


def gather_per_layer(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    embed_scale: float,
    vocab: int,
    placeholders: Placeholders | None = None,
) -> torch.Tensor:
    """Range check, embedding and scale in one launch. Bitwise.

    Args:
        input_ids: ``[T]``, int64 or int32, any stride, any values; T may be 0.
        weight: ``[rows, width]``, contiguous, bf16 or fp16.
        embed_scale: applied in fp32.
        vocab: ids outside ``0 .. vocab - 1`` become 0.
        placeholders: ids that become the padding token's before that, None for none.

    Returns:
        ``[T, width]`` in the dtype of ``weight``, with the bits of `reference_gather`.

    Raises:
        ValueError: naming the argument, for anything `gather_unfit` declines.
    """
    reason = gather_unfit(input_ids, weight, vocab)
    if reason is not None:
        raise ValueError(reason)
    return launch_gather(input_ids, weight, embed_scale, vocab, placeholders)


def launch_gather(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    embed_scale: float,
    vocab: int,
    placeholders: Placeholders | None = None,
) -> torch.Tensor:
    """`gather_per_layer` without its checks."""
    tokens, width = input_ids.shape[0], weight.shape[1]
    out = weight.new_empty((tokens, width))
    if tokens:
        block = 1024
        _gather_kernel[(tokens, triton.cdiv(width, block))](
            input_ids,
            weight,
            out,
            input_ids.stride(0),
            vocab,
            width,
            float(embed_scale),
            *(placeholders or (0, 0, 0, 0)),
            PLACEHOLDERS=placeholders is not None,
            BLOCK=block,
            PTX=not INTERPRETED,
            num_warps=4,
        )
    return out


# -- projection ------------------------------------------------------------------------------------


@triton.jit
def _sum_of_squares(x, ROWS: tl.constexpr, ASCENDING: tl.constexpr):
    """[ROWS, 32, 8] to [ROWS, 1, 1]: a chain over the 8, then a butterfly over the 32."""
    even, odd = tl.split(tl.reshape(x, [ROWS, 32, 4, 2]))
    even_04, even_26 = tl.split(tl.reshape(even, [ROWS, 32, 2, 2]))
    odd_15, odd_37 = tl.split(tl.reshape(odd, [ROWS, 32, 2, 2]))
    x0, x4 = tl.split(even_04)
    x2, x6 = tl.split(even_26)
    x1, x5 = tl.split(odd_15)
    x3, x7 = tl.split(odd_37)
    total = x0 * x0
    total += x1 * x1
    total += x2 * x2
    total += x3 * x3
    total += x4 * x4
    total += x5 * x5
    total += x6 * x6
    total += x7 * x7
    for s in tl.static_range(5):
        if ASCENDING:
            total = tl.sum(tl.reshape(total, [ROWS, 2 ** (4 - s), 2]), axis=2)
        else:
            total = tl.sum(tl.reshape(total, [ROWS, 2, 2 ** (4 - s)]), axis=1)
    return tl.reshape(total, [ROWS, 1, 1])


@triton.jit(do_not_specialize=["rows"])
def _project_kernel(
    projection_ptr,
    projection_scale_ptr,
    weight_ptr,
    per_layer_inputs_ptr,
    input_scale_ptr,
    out_ptr,
    rows,
    eps,
    HAS_INPUTS: tl.constexpr,
    ASCENDING: tl.constexpr,
    FLUSH: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,  # False in Triton's interpreter
):
    """ROWS rows of 256 a program, a warp a row, 8 neighbours a thread."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 32)[:, None] * 8 + tl.arange(0, 8)[None, :]
    offset = row[:, None, None] * 256 + column[None, :, :]
    inside = (row < rows)[:, None, None]

    x = tl.load(projection_ptr + offset, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype
    projection_scale = to_float(tl.load(projection_scale_ptr), PTX)
    x = to_float(round_to(to_float(x, PTX) * projection_scale, dtype, PTX), PTX)

    # Both the product and the quotient by 256 are exact: see the module's docstring.
    # All of stock's kernels use this root, on every architecture.
    rstd = rsqrt_approx(_sum_of_squares(x, ROWS, ASCENDING) * 0.00390625 + eps, PTX)
    weight = to_float(tl.load(weight_ptr + column), PTX)[None, :, :]
    if FLUSH:
        weight = flushed(weight)
    weight += 0.0  # stock's bias, which turns -0 into +0
    KIND: tl.constexpr = 0 if FLUSH else 2  # of `norms.Kind`: all that its products differ in
    y = mul(mul(x, rstd, KIND, PTX), weight, KIND, PTX)
    y = round_to(y, dtype, PTX)

    if HAS_INPUTS:
        inputs = to_float(tl.load(per_layer_inputs_ptr + offset, mask=inside, other=0.0), PTX)
        input_scale = to_float(tl.load(input_scale_ptr), PTX)
        y = round_to(to_float(y, PTX) + inputs, dtype, PTX)
        y = round_to(to_float(y, PTX) * input_scale, dtype, PTX)
    tl.store(out_ptr + offset, y, mask=inside)


def reference_rms_norm(kind: int) -> RMSNormFunction:
    """Stock's RMSNorm over rows of 256, in its order, but for the approximate rsqrt of a GPU."""

    def flushed(x: torch.Tensor) -> torch.Tensor:
        tiny = x.abs() < torch.finfo(torch.float32).tiny
        return torch.where(tiny, x * 0.0, x) if kind == Kind.FAST_MATH else x

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        threads = x32.reshape(-1, 32, 8)
        total = torch.zeros_like(threads[:, :, 0])
        for j in range(8):
            total = total + threads[:, :, j] * threads[:, :, j]
        for _ in range(5):
            half = total.shape[1] // 2
            pairs = (
                (total[:, ::2], total[:, 1::2])
                if kind == Kind.CUTE
                else (total[:, :half], total[:, half:])
            )
            total = pairs[0] + pairs[1]
        rstd = torch.rsqrt(total / WIDTH + eps)
        w = flushed(weight.float()) + 0.0
        return flushed(flushed(flushed(x32) * rstd) * w).to(x.dtype)

    return rms_norm


def reference_project(
    rms_norm: RMSNormFunction,
    projection: torch.Tensor,
    projection_scale: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    per_layer_inputs: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The eager path of `project_per_layer`, with stock's RMSNorm or another.

    Args:
        rms_norm: takes ``[T * L, 256]``, the weight and eps.
        projection: this and all others as in `project_per_layer`.
    """
    x = projection * projection_scale
    if x.numel():
        x = rms_norm(x.reshape(-1, WIDTH), weight, eps)
    x = x.reshape(projection.shape[0], projection.shape[1] // WIDTH, WIDTH)
    if per_layer_inputs is None or input_scale is None:
        return x
    return (x + per_layer_inputs) * input_scale


def project_unfit(
    projection: torch.Tensor,
    projection_scale: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    per_layer_inputs: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
) -> str | None:
    """Why `project_per_layer` does not take these arguments, or None if it does. Host checks only."""
    if not (INTERPRETED or (projection.is_cuda and torch.version.hip is None)):
        return f"projection must be on a CUDA device, got {projection.device}"
    if projection.dtype not in DTYPES:
        return f"projection must be bf16 or fp16, got {projection.dtype}"
    if projection.dim() != 2 or projection.shape[1] % WIDTH or not projection.is_contiguous():
        return f"projection must be a contiguous [T, L * 256], got {tuple(projection.shape)}"
    layers = projection.shape[1] // WIDTH
    if weight.shape != (WIDTH,) or not weight.is_contiguous():
        return f"weight must be a contiguous [256], got {tuple(weight.shape)}"
    if not eps >= MIN_EPS:
        return f"eps must be at least {MIN_EPS}, got {eps}"
    # A scale of another dtype or device would take part with another precision.
    operands = [("projection_scale", projection_scale, 0), ("weight", weight, 1)]
    if per_layer_inputs is not None:
        if input_scale is None:
            return "input_scale must be given with per_layer_inputs"
        if per_layer_inputs.shape != (projection.shape[0], layers, WIDTH):
            return (
                f"per_layer_inputs must be [T, {layers}, 256], got {tuple(per_layer_inputs.shape)}"
            )
        if not per_layer_inputs.is_contiguous():
            return "per_layer_inputs must be contiguous"
        operands += [("per_layer_inputs", per_layer_inputs, 3), ("input_scale", input_scale, 0)]
    for name, operand, dimensions in operands:
        if operand.dim() != dimensions:
            return f"{name} must have {dimensions} dimensions, got {operand.dim()}"
        if operand.dtype != projection.dtype:
            return f"{name} must be {projection.dtype}, got {operand.dtype}"
        if operand.device != projection.device:
            return f"{name} is on {operand.device}, projection on {projection.device}"
        if torch.is_grad_enabled() and operand.requires_grad:
            return f"{name} requires a gradient"
    if torch.is_grad_enabled() and projection.requires_grad:
        return "projection requires a gradient"
    return None


def project_per_layer(
    projection: torch.Tensor,
    projection_scale: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    per_layer_inputs: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    *,
    kind: int,
) -> torch.Tensor:
    """Scale, RMSNorm, addition and scale in one launch. Bitwise.

    Args:
        projection: ``[T, L * 256]``, contiguous, bf16 or fp16; T may be 0. Stock's GEMM gives it.
        projection_scale: 0-dim, same dtype and device, as everything below.
        weight: ``[256]``, of the RMSNorm.
        eps: of the RMSNorm, at least `MIN_EPS`.
        per_layer_inputs: ``[T, L, 256]``, contiguous; None leaves the addition and scale out.
        input_scale: 0-dim.
        kind: a `gemma4_turbo.kernels.norms.rmsnorm.Kind`, stock's RMSNorm that is followed.

    Returns:
        ``[T, L, 256]``, with the bits of `reference_project` with stock's RMSNorm.

    Raises:
        ValueError: naming the argument, for anything `project_unfit` declines.
    """
    arguments = (projection, projection_scale, weight, eps, per_layer_inputs, input_scale)
    reason = project_unfit(*arguments)
    if reason is not None:
        raise ValueError(reason)
    return launch_project(*arguments, kind)


def launch_project(
    projection: torch.Tensor,
    projection_scale: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    per_layer_inputs: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    kind: int,
) -> torch.Tensor:
    """`project_per_layer` without its checks."""
    tokens, columns = projection.shape
    out = projection.new_empty((tokens, columns // WIDTH, WIDTH))
    rows = tokens * (columns // WIDTH)
    if rows:
        rows_per_program = 4
        _project_kernel[(triton.cdiv(rows, rows_per_program),)](
            projection,
            projection_scale,
            weight,
            projection if per_layer_inputs is None else per_layer_inputs,
            projection_scale if input_scale is None else input_scale,
            out,
            rows,
            float(eps),
            HAS_INPUTS=per_layer_inputs is not None,
            ASCENDING=kind == Kind.CUTE,
            FLUSH=kind == Kind.FAST_MATH,
            ROWS=rows_per_program,
            PTX=not INTERPRETED,
            num_warps=rows_per_program,
        )
    return out
