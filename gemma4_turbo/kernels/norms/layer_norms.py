"""Everything between attention and feed-forward in one launch, with the bits of stock's calls.

With ``a`` the attention's output, ``r`` the residual, all bf16 or fp16, ``[M, N]``::

    n              = rmsnorm(a, post_attention_weight)
    f              = float(n) + float(r);   residual = round(f)           # in place, as stock
    mlp_input      = rmsnorm(f, pre_feedforward_weight)                   # of the unrounded sum
    router_input   = round(rmsnorm(residual, 1) * round(router_scale * root_size))
                 or  rmsnorm(residual, router_scale)                      # without root_size
    experts_input  = rmsnorm(residual, pre_feedforward_2_weight)

The last two only with experts: five launches become one there, two become one without. The norms
are those of `gemma4_turbo.kernels.norms.rmsnorm`; every rounding to the activations' dtype is where stock
stores. The router's scale is multiplied here at every call, so that a weight update reaches it; later
releases keep the product as the weight of the router's norm, which rounds once less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.norms.rmsnorm import rms_scale, scale_of, scaled
from gemma4_turbo.kernels.rounding import round_to, rounded

INTERPRETED = norms.INTERPRETED


@triton.jit
def _layer_norms_kernel(
    attention_ptr,
    residual_ptr,
    post_attention_weight_ptr,
    pre_feedforward_weight_ptr,
    router_scale_ptr,
    root_size_ptr,
    pre_feedforward_2_weight_ptr,
    mlp_input_ptr,
    router_input_ptr,
    experts_input_ptr,
    stride_attention,
    stride_residual,
    post_attention_eps,
    pre_feedforward_eps,
    router_eps,
    pre_feedforward_2_eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    FOLDED: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    pdl.launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < N
    attention_ptr += row * stride_attention
    residual_ptr += row * stride_residual
    mlp_input_ptr += row * N
    w1 = tl.load(post_attention_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(pre_feedforward_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = attention_ptr.dtype.element_ty
    if EXPERTS:
        scale = tl.load(router_scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if not FOLDED:
            root = tl.load(root_size_ptr).to(tl.float32)
            scale = rounded(scale * root, dtype, PTX)
        w3 = tl.load(pre_feedforward_2_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)

    pdl.wait(PDL)
    a = tl.load(attention_ptr + column, mask=inside, other=0.0)
    r = tl.load(residual_ptr + column, mask=inside, other=0.0)
    x = a.to(tl.float32)
    scale1 = rms_scale(x, attention_ptr, post_attention_eps, N, BLOCK, KIND, WARPS, PTX)
    n = round_to(scaled(x, scale1, w1, KIND, PTX), dtype, PTX)
    f = norms.add(n.to(tl.float32), r.to(tl.float32), KIND, PTX)
    residual = round_to(f, dtype, PTX)
    x = residual.to(tl.float32)
    if KIND == 1:
        # The output's own place holds n until the sums are known; nobody may overwrite before that.
        tl.store(mlp_input_ptr + column, n, mask=inside)
        tl.debug_barrier()
        total_f, total = norms.sums_of_squares_in_memory(
            mlp_input_ptr, residual_ptr, N, True, WARPS, PTX
        )
        tl.debug_barrier()
    else:
        total_f = norms.sum_of_squares(f, BLOCK)
        total = total_f
        if EXPERTS:
            total = norms.sum_of_squares(x, BLOCK)
    tl.store(residual_ptr + column, residual, mask=inside)
    scale2 = scale_of(total_f, pre_feedforward_eps, N, KIND, PTX)
    mlp_input = round_to(scaled(f, scale2, w2, KIND, PTX), dtype, PTX)
    tl.store(mlp_input_ptr + column, mlp_input, mask=inside)
    if EXPERTS:
        s = scale_of(total, router_eps, N, KIND, PTX)
        if FOLDED:
            router_input = round_to(scaled(x, s, scale, KIND, PTX), dtype, PTX)
        else:
            normed = rounded(norms.mul(x, s, KIND, PTX), dtype, PTX)
            router_input = round_to(normed * scale, dtype, PTX)
        out = row * N + column
        tl.store(router_input_ptr + out, router_input, mask=inside)
        s = scale_of(total, pre_feedforward_2_eps, N, KIND, PTX)
        experts_input = round_to(scaled(x, s, w3, KIND, PTX), dtype, PTX)
        tl.store(experts_input_ptr + out, experts_input, mask=inside)


class Router(NamedTuple):
    """What the experts' two inputs need."""

    scale: torch.Tensor  # [N]
    root_size: torch.Tensor | None  # a scalar of the activations' dtype; None: in the scale already
    eps: float
    pre_feedforward_2_weight: torch.Tensor  # [N]
    pre_feedforward_2_eps: float


Outputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def unfit(
    attention_output: torch.Tensor,
    residual: torch.Tensor,
    post_attention_weight: torch.Tensor,
    pre_feedforward_weight: torch.Tensor,
    router: Router | None,
) -> str | None:
    """Why `layer_norms` does not take these arguments, or None. Host checks only."""
    reason = (
        norms.rows_unfit("attention_output", attention_output)
        or norms.rows_unfit("residual", residual, attention_output)
        or norms.weight_unfit("post_attention_weight", post_attention_weight, attention_output)
        or norms.weight_unfit("pre_feedforward_weight", pre_feedforward_weight, attention_output)
    )
    if reason is None and router is not None:
        reason = norms.weight_unfit(
            "router.scale", router.scale, attention_output
        ) or norms.weight_unfit(
            "router.pre_feedforward_2_weight", router.pre_feedforward_2_weight, attention_output
        )
        root = router.root_size
        if (
            reason is None
            and root is not None
            and (root.numel() != 1 or root.dtype != attention_output.dtype)
        ):
            reason = f"router.root_size must be one {attention_output.dtype}, got {root.dtype}"
        if reason is None and root is not None and root.device != attention_output.device:
            reason = f"router.root_size is on {root.device}"
    return reason


def layer_norms(
    attention_output: torch.Tensor,
    residual: torch.Tensor,
    post_attention_weight: torch.Tensor,
    post_attention_eps: float,
    pre_feedforward_weight: torch.Tensor,
    pre_feedforward_eps: float,
    router: Router | None = None,
    *,
    kind: int,
) -> Outputs:
    """The equations of this module. ``residual`` is overwritten, as stock overwrites it.

    Args:
        attention_output: ``[M, N]``, bf16 or fp16, contiguous rows, M may be 0.
        residual: the same.
        post_attention_weight: ``[N]``, as all weights, in the activations' dtype.
        post_attention_eps: added to the mean square.
        pre_feedforward_weight: ``[N]``.
        pre_feedforward_eps: added to the mean square.
        router: None for layers without experts.
        kind: a `norms.Kind`, stock's RMSNorm that is followed.

    Returns:
        ``mlp_input``, ``router_input``, ``experts_input``, each ``[M, N]``; the last two None
        without ``router``.

    Raises:
        ValueError: naming the argument, for anything `unfit` declines.
    """
    reason = unfit(
        attention_output, residual, post_attention_weight, pre_feedforward_weight, router
    )
    if reason is not None:
        raise ValueError(reason)
    return launch_layer_norms(
        attention_output,
        residual,
        post_attention_weight,
        post_attention_eps,
        pre_feedforward_weight,
        pre_feedforward_eps,
        router,
        kind,
    )


def launch_layer_norms(
    attention_output: torch.Tensor,
    residual: torch.Tensor,
    post_attention_weight: torch.Tensor,
    post_attention_eps: float,
    pre_feedforward_weight: torch.Tensor,
    pre_feedforward_eps: float,
    router: Router | None,
    kind: int,
) -> Outputs:
    """`layer_norms` without its checks."""
    rows, width = attention_output.shape
    mlp_input = attention_output.new_empty((rows, width))
    router_input = experts_input = None
    if router is not None:
        router_input = attention_output.new_empty((rows, width))
        experts_input = attention_output.new_empty((rows, width))
    if rows:
        _layer_norms_kernel[(rows,)](
            attention_output,
            residual,
            post_attention_weight,
            pre_feedforward_weight,
            router.scale if router else attention_output,
            attention_output if router is None or router.root_size is None else router.root_size,
            router.pre_feedforward_2_weight if router else attention_output,
            mlp_input,
            router_input if router else mlp_input,
            experts_input if router else mlp_input,
            attention_output.stride(0),
            residual.stride(0),
            post_attention_eps,
            pre_feedforward_eps,
            router.eps if router else 0.0,
            router.pre_feedforward_2_eps if router else 0.0,
            N=width,
            BLOCK=triton.next_power_of_2(width),
            KIND=int(kind),
            WARPS=norms.warps(width, kind),
            EXPERTS=router is not None,
            FOLDED=router is not None and router.root_size is None,
            PTX=not INTERPRETED,
            num_warps=norms.warps(width, kind),
            **pdl.options(attention_output),
        )
    return mlp_input, router_input, experts_input


def reference_layer_norms(
    attention_output: torch.Tensor,
    residual: torch.Tensor,
    post_attention_weight: torch.Tensor,
    post_attention_eps: float,
    pre_feedforward_weight: torch.Tensor,
    pre_feedforward_eps: float,
    router: Router | None = None,
) -> Outputs:
    """The same in plain torch, rounding where stock rounds. ``residual`` is overwritten."""
    n = norms.reference_rmsnorm(attention_output, post_attention_weight, post_attention_eps)
    f = n.float() + residual.float()
    residual.copy_(f)
    scale = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + pre_feedforward_eps)
    mlp_input = (f * scale * pre_feedforward_weight.float()).to(residual.dtype)
    if router is None:
        return mlp_input, None, None
    if router.root_size is None:
        router_input = norms.reference_rmsnorm(residual, router.scale, router.eps)
    else:
        ones = torch.ones_like(router.scale)
        normed = norms.reference_rmsnorm(residual, ones, router.eps)
        router_input = normed * (router.scale * router.root_size)
    return (
        mlp_input,
        router_input,
        norms.reference_rmsnorm(
            residual, router.pre_feedforward_2_weight, router.pre_feedforward_2_eps
        ),
    )
