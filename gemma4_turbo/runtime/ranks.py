"""One answer for all processes that compute a layer together: they run a kernel, or none of them does.

Where a kernel's numbers are not stock's bits, a process that takes stock's path beside one that does not
has other hidden states: it routes tokens to other experts, and samples other tokens, after which the
processes wait for each other for ever. What a comparison finds on one GPU therefore counts on all of them.

The processes answer through the store that they met in, never by a collective: one that does not come to
the question, because it has declined earlier, is waited for no longer than `PATIENCE_S`, and then all have
declined. The first decision that is written down is everybody's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from gemma4_turbo.runtime.attempts import told

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

PATIENCE_S = 60.0
"""For the slowest of the others. SGLang ends a server whose step takes 300 s, PyTorch after 600 s."""
PAUSE_S = 0.01
YES = "yes"


class Group(NamedTuple):
    """Processes that compute layers together."""

    name: str  # the same for its members, and no other group's
    rank: int
    size: int


_group_of: list[Callable[[], Group | None]] = []
_asked: Counter[str] = Counter()  # a question that is asked again, after `revert`, is another one


def told_by(group_of: Callable[[], Group | None]) -> None:
    """Who knows the group of this process: a port. None: it computes alone."""
    _group_of[:] = [group_of]


def agreed(question: str, unfit: str | None) -> str | None:
    """What all processes of the group go by: None, where every one of them has found nothing against it.

    Args:
        question: the same text in all of them, and asked as often.
        unfit: what this one has found, or None.

    Returns:
        None, or the reason of the first process that had one, or that waited in vain.
    """
    group = _group_of[0]() if _group_of else None
    if group is None or group.size < 2:
        return unfit
    try:
        return _decided(_store(), group, question, unfit)
    except Exception as error:  # the others wait in vain, and decline as well
        return unfit or f"the GPUs of the model could not agree: {told(error)}"


def _store() -> Store:
    """That the processes met in."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _decided(store: Store, group: Group, question: str, unfit: str | None) -> str | None:
    _asked[question] += 1
    key = f"gemma4_turbo/{group.name}/{question}/{_asked[question]}"
    decision = f"{key}/decision"
    if unfit is not None:
        return _said(_first(store, decision, f"GPU {group.rank} of {group.size}: {unfit}"))
    if store.add(f"{key}/{YES}", 1) == group.size:
        return _said(_first(store, decision, YES))
    deadline = time.monotonic() + PATIENCE_S
    while not store.check([decision]):
        if time.monotonic() > deadline:
            waited = f"GPU {group.rank} of {group.size} waited {PATIENCE_S:.0f} s for the others"
            return _said(_first(store, decision, waited))
        time.sleep(PAUSE_S)
    return _said(store.get(decision))


def _first(store: Store, key: str, value: str) -> bytes:
    """Write a value where there is none yet; returns the one that is there then."""
    return store.compare_set(key, "", value)


def _said(decision: bytes | str) -> str | None:
    text = decision if isinstance(decision, str) else decision.decode()
    return None if text == YES else text
