"""What 0.5.11 and 0.5.12 call by names of their own, or otherwise."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch

from gemma4_turbo.fusions.stock import Functions, follow
from gemma4_turbo.ports.any import stock


class Calls(stock.Calls):
    """See `gemma4_turbo.ports.any.stock`."""

    extend_kernel = "sglang.srt.layers.attention.triton_ops.extend_attention"
    decode_kernel = "sglang.srt.layers.attention.triton_ops.decode_attention"
    moe_kernel = f"{stock.TRITON_UTILS}.fused_moe_triton_kernels"

    def traced_norms(self) -> Functions:
        """What it comes to when Dynamo traces it."""

        def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            out = torch.empty_like(x)
            torch.ops.sgl_kernel.rmsnorm.default(out, x, weight, eps, False)
            return out

        def fused_add(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
            torch.ops.sgl_kernel.fused_add_rmsnorm.default(x, r, weight, eps, False)

        return Functions(rmsnorm, fused_add)

    def rope(self) -> Any:
        from sglang.jit_kernel import rope

        return rope

    def sum_experts(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``x [rows, topk, hidden]`` summed over a token's experts into ``out [rows, hidden]``."""
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        fused_moe.moe_sum_reduce_torch_compile(x, out, 1.0)

    def routing(self, logits: torch.Tensor, scale: torch.Tensor, topk: int) -> stock.Pair:
        """By the closure of ``Gemma4MoE``."""
        from sglang.srt.models.gemma4_causal import Gemma4MoE

        construct: Any = inspect.unwrap(Gemma4MoE.__init__)
        return stock_routing(construct, scale)(logits, logits, topk, True)  # type: ignore[no-any-return]


def stock_routing(construct: types.FunctionType, per_expert_scale: torch.Tensor) -> Any:
    """Stock's own closure, made from the code inside ``Gemma4MoE.__init__``, without a model.

    Args:
        construct: stock's ``Gemma4MoE.__init__``.
        per_expert_scale: what the closure closes over.

    Raises:
        LookupError: if that constructor defines no ``routing_function``.
    """
    for constant in construct.__code__.co_consts:
        if isinstance(constant, types.CodeType) and constant.co_name == "routing_function":
            cells = {"per_expert_scale": types.CellType(per_expert_scale)}
            closure = tuple(cells[name] for name in constant.co_freevars)
            return types.FunctionType(
                constant, construct.__globals__, "routing_function", None, closure
            )
    raise LookupError("Gemma4MoE.__init__ defines no routing_function")


STOCK = Calls()
follow(STOCK)  # a process has one release line
