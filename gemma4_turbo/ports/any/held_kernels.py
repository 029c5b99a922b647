"""Stock's kernels as an attention backend holds them: on the object, where anybody may put another."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.protocols import TritonBackend

_SEEN = "_gemma4_turbo_held"


def unfit(backend: TritonBackend, name: str, module: str) -> str | None:
    """Why going round the function that ``backend`` holds as ``name`` would bypass somebody, or None.

    The backend holds what ``torch.compiler.disable`` made of the function of that name in ``module``.
    Looked at once for each function that it holds.
    """
    fields = backend.__dict__
    held = fields.get(name)
    if held is not None and fields.get(_SEEN, {}).get(name) is held:
        return None
    stock = getattr(sys.modules.get(module), name, None)
    if held is None or getattr(held, "_torchdynamo_orig_callable", held) is not stock:
        return f"the attention backend's {name} is not SGLang's"
    fields.setdefault(_SEEN, {})[name] = held
    return None
