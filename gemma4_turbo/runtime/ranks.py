"""One answer for all processes that compute a layer together: they run a kernel, or none of them does.

Where a kernel does not give stock's bits, a process that runs it and one that runs stock have different
hidden states: they route tokens to different experts, sample different tokens, and then deadlock in a
collective. A comparison that fails on one GPU therefore counts on all of them.

The processes agree through the store of their process group, never by a collective: a process that has
declined earlier may never ask. Each question has one decision, which is written once and never changed. A
process obeys the decision that it reads, even where it has just tried to write another one.

1. A process with a reason against the kernel writes it as the decision, and does not count itself.
2. Any other process counts itself. The one that completes the count writes `YES` as the decision.
3. The rest wait for a decision. After `PATIENCE_S` a process writes the timeout as the decision.

So all processes read one answer, in whatever order and however late they ask. A yes requires the whole count:
no process has written a no, and each will read the yes, even one whose timeout comes too late. After a no a
late process may complete the count, and still reads the no. A process that never asks runs no kernel, and
those that wait for it run none either.

A process that missed one question of a patch will hardly ask the next. After a timeout the whole group answers
the patch's later questions with no, at once, and after `WAITS` timeouts those of every patch: the store keeps
the count, so that waits in turn do not exceed a step's time limit either. If one process sees that mark earlier
than another, only the author of the no changes.

This does not cover a store that breaks after a process has counted itself: that process declines, and others
may have read a yes. It is the store through which the GPUs' own collectives were set up.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

PATIENCE_S = 60.0
"""For the slowest of the others."""
WAITS = 3
"""In vain, of one group. SGLang ends a server whose step takes 300 s, PyTorch after 600 s."""
PAUSE_S = 0.01
YES = "yes"
IN_VAIN = "in vain"


class Group(NamedTuple):
    """Processes that compute layers together."""

    name: str  # the same for its members, and no other group's
    rank: int
    size: int

    def named(self) -> str:
        """This process, for the others."""
        return f"GPU {self.rank} of {self.size}"


_group_of: list[Callable[[], Group | None]] = []
# A question that is asked again, after `revert`, is another one.
_asked: Counter[tuple[str, str]] = Counter()


def told_by(group_of: Callable[[], Group | None]) -> None:
    """Who knows the group of this process: a port. None: it computes alone."""
    _group_of[:] = [group_of]


def agreed(patch: str, question: str, unfit: str | None) -> str | None:
    """What all processes of the group go by: None, where every one of them has found nothing against it.

    Args:
        patch: whose questions are one another's fate once a wait for one was in vain.
        question: the same text in all of them, and asked as often.
        unfit: what this one has found, or None.

    Returns:
        None, or the reason of the first process that had one, or that waited in vain.
    """
    group = _group_of[0]() if _group_of else None
    if group is None or group.size < 2:
        return unfit
    try:
        return _decided(_store(), group, patch, question, unfit)
    except Exception as error:  # where this one is not counted yet, the others decline as well
        return unfit or f"the GPUs of the model could not agree: {one_line(error)}"


def _store() -> Store:
    """That the processes met in."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _decided(
    store: Store, group: Group, patch: str, question: str, unfit: str | None
) -> str | None:
    _asked[patch, question] += 1
    ours = f"gemma4_turbo/{group.name}"
    key = f"{ours}/{patch} {question}/{_asked[patch, question]}"
    decision = f"{key}/decision"
    in_vain = f"{ours}/{patch}/{IN_VAIN}", f"{ours}/{IN_VAIN}"
    unfit = unfit or _lost(patch, *(store.add(counter, 0) for counter in in_vain))
    if unfit is not None:
        return _said(_first(store, decision, f"{group.named()}: {unfit}"))
    if store.add(f"{key}/{YES}", 1) == group.size:
        return _said(_first(store, decision, YES))
    deadline = time.monotonic() + PATIENCE_S
    while not store.check([decision]):
        if time.monotonic() > deadline:
            waited = f"{group.named()} waited {PATIENCE_S:.0f} s for the others"
            found = _first(store, decision, waited)
            if found == waited.encode():
                for counter in in_vain:
                    store.add(counter, 1)
            return _said(found)
        time.sleep(PAUSE_S)
    return _said(store.get(decision))


def _lost(patch: str, of_the_patch: int, of_all: int) -> str | None:
    """Why a question is not waited for, from how many waits were in vain; or None."""
    if of_the_patch:
        return f"a GPU did not come to an earlier question of `{patch}`"
    if of_all >= WAITS:
        return f"{of_all} earlier questions were waited for in vain"
    return None


def _first(store: Store, key: str, value: str) -> bytes:
    """Write a value where there is none yet; returns the one that is there then."""
    return store.compare_set(key, "", value)


def _said(decision: bytes | str) -> str | None:
    text = decision if isinstance(decision, str) else decision.decode()
    return None if text == YES else text
