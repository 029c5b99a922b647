"""Stock's kernels as an attention backend holds them: on the object, where anybody may put another."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.protocols import TritonBackend

_seen: weakref.WeakKeyDictionary[TritonBackend, dict[str, Any]] = weakref.WeakKeyDictionary()
"""By backend: the functions that were looked at and are SGLang's."""


def unfit(backend: TritonBackend, name: str, module: str) -> str | None:
    """Why going round the function that ``backend`` holds as ``name`` would bypass somebody, or None.

    The backend holds what ``torch.compiler.disable`` made of the function of that name in ``module``.
    Looked at once for each function that it holds.
    """
    held, seen = backend.__dict__.get(name), _seen.get(backend)
    if held is not None and seen is not None and seen.get(name) is held:
        return None
    stock = getattr(sys.modules.get(module), name, None)
    own = getattr(stock, "__module__", None) == module and not hasattr(stock, "__wrapped__")
    if held is None or not own or getattr(held, "_torchdynamo_orig_callable", held) is not stock:
        return f"the attention backend's {name} is not SGLang's"
    _seen.setdefault(backend, {})[name] = held
    return None
