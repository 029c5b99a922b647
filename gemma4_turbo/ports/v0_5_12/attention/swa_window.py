"""`swa_window`: sliding layers get the window less one, as attention backends count it.

A backend's window is how many tokens before its own a token attends to; a model's window counts the
token itself. Stock gives the model's number to the layers, and the right one only to the metadata
of the step, so that sliding layers attend to one token too many wherever the layer's number decides.
Later releases give both the same. This changes what the model computes, beyond as many tokens as
the window has, so it is off unless asked for.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import Attention

TARGET = "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__"

_narrowed: weakref.WeakSet[Attention] = weakref.WeakSet()  # those whose window is ours


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The constructor, followed by the change of one number in two places."""
    construct = stock[TARGET]

    @functools.wraps(construct)
    def __init__(self: Attention, *args: object, **kwargs: object) -> None:
        construct(self, *args, **kwargs)
        try:
            reason = _narrow(self)
        except Exception as error:  # the layer is stock's
            reason = one_line(error)
            run.set(states.FAILED, reason)
        if reason is not None:
            run.declined(reason)
        elif self in _narrowed:
            run.engaged(False)

    return {TARGET: __init__}


def _narrow(attention: Attention) -> str | None:
    """Why a sliding layer keeps its window, or None."""
    window = attention.config.sliding_window
    if attention.sliding_window is None:
        return None
    if not window or not attention.sliding_window == attention.attn.sliding_window_size == window:
        return f"a sliding layer has the window {attention.attn.sliding_window_size}"
    _set_window(attention, window - 1)
    _narrowed.add(attention)
    return None


def _set_window(attention: Attention, window: int) -> None:
    attention.sliding_window = attention.attn.sliding_window_size = window


def undo(run: PatchRun) -> None:
    """Give live layers stock's window back; a captured CUDA graph keeps the one it was made with."""
    for attention in list(_narrowed):
        _set_window(attention, attention.config.sliding_window)
    _narrowed.clear()
