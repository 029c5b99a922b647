"""The states of a patch, and the row that reports one."""

from __future__ import annotations

from typing import NamedTuple

ACTIVE = "active"  # installed; `engaged` says whether its code has run
OFF = "off"  # switched off; the reason names what did it
WAITING = "waiting"  # SGLang has not imported the target yet
UPSTREAMED = "upstreamed"  # this SGLang release ships it
UNSUPPORTED = "unsupported"  # SGLang release, GPU or configuration does not take it
DRIFTED = "drifted"  # the target's source differs from every known one
CONFLICT = "conflict"  # the attribute is not stock's, or no longer ours
FAILED = "failed"  # with the exception

STATES = SEVERITY = (WAITING, OFF, ACTIVE, UPSTREAMED, UNSUPPORTED, DRIFTED, CONFLICT, FAILED)
REFUSED_WHEN_STRICT = (DRIFTED, CONFLICT, FAILED)
ALONE = "only this process is counted"  # in a reason, where the state folder cannot be used


class NotNeededError(Exception):
    """Raised by a patch's ``build``: this SGLang does not have the defect that the patch mends."""


class PatchStatus(NamedTuple):
    """One patch as it stands.

    ``engaged`` counts the calls that ran the patch's code on the host: eager calls and CUDA
    graph captures, not graph replays.
    """

    name: str
    state: str
    reason: str
    targets: tuple[str, ...]
    engaged: int
