"""A comparison with stock, or a first launch, that cannot end a server.

It may run out of memory, meet a kernel that does not compile on this GPU, or a symbol that SGLang
does not have. Then the patch is `failed`, with the exception, and stock runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from gemma4_turbo.engine import states

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

logger = logging.getLogger("gemma4_turbo")
T = TypeVar("T")


def one_line(error: BaseException) -> str:
    """An exception in one line of bounded length: compilers write pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def attempt(
    run: PatchRun | None, what: str, function: Callable[[], T]
) -> tuple[T | None, str | None]:
    """``(function(), None)``, or ``(None, why it could not be done)``.

    Args:
        run: becomes `failed` then; None: nobody does.
        what: the subject of the reason, e.g. ``self-check``.
        function: what is tried.
    """
    try:
        return function(), None
    except Exception as error:
        logger.debug("gemma4_turbo: %s", what, exc_info=True)
        reason = f"{what} could not be done: {one_line(error)}"
        if run is not None:
            run.set(states.FAILED, reason)
        return None, reason
