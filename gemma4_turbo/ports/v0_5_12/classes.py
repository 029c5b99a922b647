"""What 0.5.11 and 0.5.12 make of SGLang's modules, for `gemma4_turbo.ports.any.sglang_types`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any import sglang_types

if TYPE_CHECKING:
    from collections.abc import Callable


def load() -> None:
    """Look the classes up. Call it while a patch is built, never from traced code."""
    sglang_types.load(sglang_types.Rules(_running, _output_unfit, _parallel_unfit, _never))


def _never() -> bool:
    return False


def _running(module: Any) -> Callable[..., Any] | None:
    method: Callable[..., Any] = module._forward_method
    return method


def _output_unfit(module: Any) -> str | None:
    if type(module) is sglang_types.types().row_linear and module.tp_size > 1:
        return "the output is reduced over several GPUs"
    if getattr(module, "gather_output", False) and module.tp_size > 1:
        return "the output is gathered from several GPUs"
    return None


def _parallel_unfit(moe: Any) -> str | None:
    if moe.tp_size > 1 or getattr(moe.experts, "moe_ep_size", 1) > 1:
        return "the experts' outputs are reduced over several GPUs"
    return None
