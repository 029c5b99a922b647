"""From layer to layer: what one is told, so that its result is normed for the next one in its last launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.ports.any.decode_step import layer_steps
from gemma4_turbo.runtime.hooks import FOR_ALL

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import DecoderLayer, Module, RMSNorm, TextModel


NOT_DIRECT = "a layer or the one after it has forward hooks, or is not SGLang's own"

_forward: list[Callable[..., Any]] = []


def use(forward: Callable[..., Any]) -> None:
    """The line's forward of a layer, which knows what it is told."""
    _forward[:] = [forward]


def between(
    self: TextModel, every: list[DecoderLayer], index: int, normed: torch.Tensor | None
) -> dict[str, torch.Tensor | RMSNorm]:
    """What a layer is told beside stock's arguments: its normed input, and the norm after it.

    A hook on a layer sees, and may change, hidden states that nobody has gone on from: neither the
    layer itself nor the next one may have any. It gets stock's arguments, and gives stock's results.
    """
    if layer_steps.INPUT_NORM.run is None:
        return {}
    layer = every[index]
    last = index + 1 == len(every)
    after: Any = self.norm if last else every[index + 1]
    told: dict[str, torch.Tensor | RMSNorm] = {}
    if normed is not None:
        told["normed"] = normed
    if _direct(layer, after, last):
        told["following"] = after if last else after.input_layernorm
    else:
        layer_steps.INPUT_NORM.declined(NOT_DIRECT)
    return told


def _direct(layer: Module, after: Module, last: bool) -> bool:
    """Whether what a layer returns goes to SGLang's next layer, or the last norm, as it is."""
    kind = sglang_types.types().layer
    if type(layer) is not kind or kind.forward is not _forward[0]:
        return False  # a wrapper around the forward gets stock's result
    return (last or type(after) is kind) and not _hooked(layer, after)


def _hooked(layer: Module, after: Module) -> bool:
    """As `gemma4_turbo.runtime.hooks.hooked`, where Dynamo looks on too."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or after._forward_pre_hooks
        or after._forward_hooks
        or FOR_ALL[0]
        or FOR_ALL[1]
        or "forward" in layer.__dict__
        or "forward" in after.__dict__
        or layer._compiled_call_impl is not None
        or after._compiled_call_impl is not None
    )
