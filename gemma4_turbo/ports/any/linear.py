"""The linear layers of a decoder layer: SGLang's modules, or `skinny_gemm` for a few tokens.

Without the patch every function here makes stock's calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gemma4_turbo.fusions import skinny_gemm
from gemma4_turbo.fusions.site import UNPROVEN, Site, eager_site_of
from gemma4_turbo.kernels import skinny_gemm as kernel
from gemma4_turbo.kernels.skinny_gemm import Epilogue
from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.runtime.custom_ops import TRACED, capturing
from gemma4_turbo.runtime.hooks import hooked

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import MLP, Linear, Module

SKINNY_GEMM = skinny_gemm.SkinnyGemm("skinny_gemm")
NAME = "skinny_gemm"
ARRIVED = "_gemma4_turbo_arrived"  # on a module

TOO_MANY_ROWS = f"x must have at most {kernel.MAX_ROWS} rows"


class LinearSite(Site):
    """What one linear layer allows, looked at once."""

    def __init__(self, module: Linear, epilogue: Epilogue) -> None:
        self.skinny_gemm: str | None = module_unfit(module) or UNPROVEN
        key: tuple[object, ...] = ()
        if self.skinny_gemm is UNPROVEN:  # a quantised layer may have no weight at all
            weight = module.weight
            key = (tuple(weight.shape), weight.dtype, str(weight.device), epilogue)
            self.cuts = tuple(kernel.cut(weight, epilogue, rows) for rows in kernel.ROWS)
            # Of another GPU's profile or processors they may be others, and so the order of the sums. A
            # layer that every GPU computes as a whole must come to the same numbers on all of them.
            for rows, tiles in zip(kernel.ROWS, self.cuts, strict=True):
                key += (kernel.unfit_here(weight, epilogue, rows) or tuple(tiles),)
            self.sum = sglang_types.rules().sum_of(module)  # over GPUs, where the layer makes it
        super().__init__(key, None)
        self.cover(NAME, module)
        self.depends_on(*sglang_types.linear_parts(module))
        # Zeros that a launch leaves as zeros; one of its own for each layer, as layers of two
        # streams may run at the same time. Never made while a CUDA graph is captured.
        self.arrived: torch.Tensor | None = None


def module_unfit(module: Linear) -> str | None:
    reason = sglang_types.linear_unfit(module)
    if reason is not None:
        return reason
    reason = sglang_types.rules().output_unfit(module)
    if reason is not None:
        return reason
    from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled

    if is_batch_invariant_mode_enabled():  # set before the first forward, never unset
        return "batch-invariant mode: the order of the sums depends on the number of rows here"
    return None


def project(module: Linear, x: torch.Tensor) -> torch.Tensor:
    """``module(x)``, without the bias that it returns beside."""
    out = _run(module, x, Epilogue.NONE, None)
    if out is None:
        out, _ = module(x)
    return out


def mlp(module: MLP, x: torch.Tensor) -> torch.Tensor:
    """Gemma 4's dense MLP, its activation in the launch of the first product."""
    if SKINNY_GEMM.run is None:
        return module(x)
    if not torch.compiler.is_compiling():
        # Every call of a prefill: no time for more than its rows.
        reason = TOO_MANY_ROWS if x.shape[0] > kernel.MAX_ROWS else mlp_unfit(module)
        if reason is not None:
            SKINNY_GEMM.run.declined(reason)
            return module(x)
    hidden = _run(module.gate_up_proj, x, Epilogue.GELU_AND_MUL, None)
    if hidden is None:
        return module(x)
    return project(module.down_proj, hidden)


def mlp_unfit(module: MLP) -> str | None:
    """Why a dense MLP is to be called as a whole, or None: a few look-ups at every call."""
    if type(module) is not sglang_types.types().mlp:
        return f"the dense MLP is a {sglang_types.name(module)}"
    activation = module.act_fn
    if (
        type(activation) is not sglang_types.types().gelu_and_mul
        or activation.approximate != "tanh"
    ):
        return f"the dense MLP's activation is a {sglang_types.name(activation)}"
    if hooked(module, activation):
        return "the dense MLP has forward hooks"
    return sglang_types.method_unfit(activation)


def gate_times(
    module: Linear, x: torch.Tensor, per_layer_input: torch.Tensor
) -> torch.Tensor | None:
    """``gelu(module(x)) * per_layer_input`` in one launch, or None: nothing done."""
    return _run(module, x, Epilogue.GELU_TIMES, per_layer_input)


def _run(
    module: Linear, x: torch.Tensor, epilogue: Epilogue, extra: torch.Tensor | None
) -> torch.Tensor | None:
    if SKINNY_GEMM.run is None:
        return None
    if torch.compiler.is_compiling():
        SKINNY_GEMM.declined(TRACED)
        return None
    if x.shape[0] > kernel.MAX_ROWS:
        SKINNY_GEMM.run.declined(TOO_MANY_ROWS)
        return None
    site = eager_site_of(module, LinearSite, epilogue)
    if site.skinny_gemm is not None and site.skinny_gemm is not UNPROVEN:
        SKINNY_GEMM.run.declined(site.skinny_gemm)
        return None
    weight = module.weight
    if site.arrived is None and not capturing():
        count = max(kernel.tiles(weight, epilogue, cut) for cut in site.cuts)
        site.arrived = zeros_of(module, count, weight.device)
    args = skinny_gemm.Args(x, weight, site.cuts, epilogue, extra, site.arrived)
    found = SKINNY_GEMM(site, args)
    return found if found is None or site.sum is None else site.sum(found)


def zeros_of(module: Module, count: int, device: torch.device) -> torch.Tensor | None:
    """Zeros that launches of one module leave as zeros, one launch after the other.

    None in a capture, if there are none yet: they are never made there.
    Kept on the module for good: a CUDA graph may go on using those of a plan that has ended.
    """
    every: list[torch.Tensor]
    owner, every = module.__dict__.get(ARRIVED, (None, []))
    if owner is not module:  # a shallow copy brings its original's along, which may run beside it
        module.__dict__[ARRIVED] = module, (every := [])
    for zeros in every:
        if zeros.shape[0] >= count and zeros.device == device:
            return zeros
    if capturing():
        return None
    every.append(torch.zeros(count, dtype=torch.int32, device=device))
    return every[-1]
