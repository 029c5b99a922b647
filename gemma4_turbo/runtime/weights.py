"""When weights were written: what was read of their values before is void.

A verdict about data belongs to one layer and to the values that it has now. SGLang writes weights when
it loads a model and in its ``update_weights_from_*``; `gemma4_turbo.ports.any.launch.model_gates` counts these. Code that
writes to a tensor in place by itself shows in the tensor's own version, unless it writes through
``.data``, which nothing on the host shows: no result of ours may depend on that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Stamp = tuple[Any, ...]


class _Writes:
    count = 0


def written() -> None:
    """Somebody has written weights, or may have."""
    _Writes.count += 1


def stamp(tensors: Iterable[Any]) -> Stamp:
    """Equal to an earlier one as long as none of the tensors was replaced or is known to be written to."""
    return _Writes.count, *((id(t), t._version) for t in tensors)
