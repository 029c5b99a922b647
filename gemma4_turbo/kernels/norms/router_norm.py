"""The router's norm and scale in one launch, with the bits of stock's two.

For ``x`` ``[M, N]``::

    router_input = round(rmsnorm(x, 1) * round(router_scale * root_size))

The scale is multiplied here at every call, so that a weight update reaches it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.norms.rmsnorm import mul, rms_scale
from gemma4_turbo.kernels.rounding import round_to, rounded

INTERPRETED = norms.INTERPRETED


@triton.jit
def _router_norm_kernel(
    x_ptr,
    scale_ptr,
    root_size_ptr,
    out_ptr,
    stride_x,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    pdl.launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < N
    x_ptr += row * stride_x
    scale = tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scale = rounded(scale * tl.load(root_size_ptr).to(tl.float32), dtype, PTX)
    pdl.wait(PDL)
    x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    s = rms_scale(x, x_ptr, eps, N, BLOCK, KIND, WARPS, PTX)
    x = rounded(mul(x, s, KIND, PTX), dtype, PTX)
    tl.store(out_ptr + row * N + column, round_to(x * scale, dtype, PTX), mask=inside)


def unfit(x: torch.Tensor, scale: torch.Tensor, root_size: torch.Tensor) -> str | None:
    """Why `router_norm` does not take these arguments, or None. Host checks only."""
    reason = norms.rows_unfit("x", x) or norms.weight_unfit("scale", scale, x)
    if reason is None and (
        root_size.numel() != 1 or root_size.dtype != x.dtype or root_size.device != x.device
    ):
        reason = f"root_size must be one {x.dtype} on {x.device}, got {root_size.dtype} on {root_size.device}"
    return reason


def router_norm(
    x: torch.Tensor, scale: torch.Tensor, root_size: torch.Tensor, eps: float, *, kind: int
) -> torch.Tensor:
    """The equation of this module.

    Args:
        x: ``[M, N]``, bf16 or fp16, contiguous rows, M may be 0.
        scale: ``[N]``, the router's, in ``x``'s dtype.
        root_size: a scalar of ``x``'s dtype.
        eps: added to the mean square.
        kind: a `norms.Kind`, stock's RMSNorm that is followed.

    Raises:
        ValueError: naming the argument, for anything `unfit` declines.
    """
    reason = unfit(x, scale, root_size)
    if reason is not None:
        raise ValueError(reason)
    return launch_router_norm(x, scale, root_size, eps, kind)


def launch_router_norm(
    x: torch.Tensor, scale: torch.Tensor, root_size: torch.Tensor, eps: float, kind: int
) -> torch.Tensor:
    """`router_norm` without its checks."""
    rows, width = x.shape
    out = x.new_empty((rows, width))
    if rows:
        _router_norm_kernel[(rows,)](
            x,
            scale,
            root_size,
            out,
            x.stride(0),
            eps,
            N=width,
            BLOCK=triton.next_power_of_2(width),
            KIND=int(kind),
            WARPS=norms.warps(width, kind),
            PTX=not INTERPRETED,
            num_warps=norms.warps(width, kind),
            **pdl.options(x),
        )
    return out


def reference_router_norm(
    x: torch.Tensor, scale: torch.Tensor, root_size: torch.Tensor, eps: float
) -> torch.Tensor:
    """The same in plain torch, rounding where stock rounds."""
    return norms.reference_rmsnorm(x, torch.ones_like(scale), eps) * (scale * root_size)
