"""Operators that ``torch.compile`` keeps as they are.

Dynamo must not look into a Triton launch or a counter. Traced code calls
``torch.ops.gemma4_turbo.<name>``, which is opaque to it; everything else calls the function itself,
because the dispatcher costs microseconds per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gemma4_turbo.engine.run import peer

_registered: dict[str, Callable[..., Any]] = {}
_cuda = False  # whether CUDA was ever initialized
_library: list[Any] = []  # a registration lives as long as its library object


def register(
    patch: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    counted: bool = True,
) -> Callable[..., Any]:
    """Register ``torch.ops.gemma4_turbo.<name>`` once per process and return it.

    Call it while a patch is built, never from traced code.

    Args:
        patch: whose counter a call adds to.
        schema: with name, e.g. ``"fused_routing(Tensor logits, int topk) -> (Tensor, Tensor)"``.
        function: what runs; it mutates what the schema says and nothing else.
        fake: shapes and dtypes of the results.
        counted: False if the function counts its calls itself.
    """
    name = schema.partition("(")[0]
    if name in _registered:
        return _registered[name]
    if not _library:
        _library.append(torch.library.Library("gemma4_turbo", "FRAGMENT"))
    library = _library[0]
    library.define(schema)

    def run(*args: Any) -> Any:
        if counted:
            peer(patch).engaged(capturing())
        return function(*args)

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gemma4_turbo::{name}", fake, lib=library)
    _registered[name] = getattr(torch.ops.gemma4_turbo, name).default
    return _registered[name]


TRACED = "torch.compile traces SGLang's own code here"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def not_traced(patch: str, reason: str = TRACED) -> bool:
    """Count a call that is traced as stock's. For traced code: it runs once, while Dynamo traces.

    Returns:
        True, which is what the trace keeps.
    """
    peer(patch).declined(reason, True)
    return True


def cut_names(schema: str) -> tuple[str, str]:
    """How SGLang may find the operator in what Dynamo traced: with its overload or without."""
    name = f"gemma4_turbo.{schema.partition('(')[0]}"
    return name, f"{name}.default"


def nothing(x: torch.Tensor) -> torch.Tensor:
    """An operator's output that was not asked for: no element."""
    return x.new_empty((0,))


def capturing() -> bool:
    """Whether this thread's current stream is being captured into a CUDA graph."""
    global _cuda
    if not _cuda:
        _cuda = torch.cuda.is_initialized()
    return _cuda and torch.cuda.is_current_stream_capturing()
