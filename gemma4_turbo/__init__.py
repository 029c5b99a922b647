"""gemma4_turbo: makes stock SGLang serve Gemma 4 faster, in place, patch by patch.

>>> import gemma4_turbo
>>> gemma4_turbo.apply()          # before or after SGLang is imported, in every process
>>> gemma4_turbo.status()         # what runs, what stands aside and why
>>> gemma4_turbo.revert()         # every target back, the very same object

Nothing here imports torch, triton or SGLang.
"""

from __future__ import annotations

from collections.abc import Iterable

from gemma4_turbo.engine.states import PatchStatus
from gemma4_turbo.version import __version__

__all__ = ["PatchStatus", "__version__", "apply", "bootstrap", "revert", "status"]


def apply(
    only: Iterable[str] | None = None, skip: Iterable[str] | None = None
) -> list[PatchStatus]:
    """Register the patches, in this process and in those that it spawns. Idempotent.

    A patch is installed when SGLang imports its target, at once where that has happened.
    The environment has the last word: ``GEMMA4_TURBO_<PATCH>=0`` switches a patch off even if
    it is named in ``only``.

    Args:
        only: names of the patches to switch on; all others stay off. None: the defaults.
        skip: names of patches to leave off.

    Returns:
        What `status` returns.

    Raises:
        ValueError: naming the argument, if it holds a name that is no patch.
    """
    from gemma4_turbo.instance import ENGINE

    return ENGINE.apply(only, skip)


def bootstrap() -> None:
    """What the entry point and ``sitecustomize`` call: `apply` with the caller's selection.

    Never raises, and leaves a process alone whose `revert` was called.
    """
    from gemma4_turbo.instance import ENGINE

    ENGINE.bootstrap()


def revert() -> None:
    """Put every target back, the very same object, where it is still ours.

    Processes spawned from here on stay stock too, until `apply` is called again. CUDA graphs
    that were captured with a patch keep it.
    """
    from gemma4_turbo.instance import ENGINE

    ENGINE.revert()


def status() -> list[PatchStatus]:
    """State of every patch, ``engaged`` counted over this process and its descendants."""
    from gemma4_turbo.instance import ENGINE

    return ENGINE.status()
