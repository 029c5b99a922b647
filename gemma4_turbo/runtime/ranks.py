"""One answer for all processes that compute a layer together: they run a kernel, or none of them does.

Where a kernel's numbers are not stock's bits, a process that takes stock's path beside one that does not
has other hidden states: it routes tokens to other experts, and samples other tokens, after which the
processes wait for each other for ever. What a comparison finds on one GPU therefore counts on all of them.

The processes answer through the store that they met in, never by a collective: one may not come to a
question, because it has declined earlier. A question has one decision, which is written once and never
changed; whoever asks goes by what stands there, also where it is not what it has just tried to write.

1. Who has found something against it, writes that as the decision. It has not counted itself.
2. Who has not, counts itself. The one that completes the count writes `YES` as the decision.
3. The others wait for a decision. Who has waited `PATIENCE_S` in vain, writes that as the decision.

So all who ask have one answer, in whatever order and however late they come. A yes stands only where all
have counted themselves: none of them has written a no, and each will read the yes, if it comes too late to
complain of the wait. Once a no stands, who comes later may complete the count, and still reads the no. One
that never asks runs no kernel, and those that wait for it are given none.

Where one does not come to a question of a patch, it will hardly come to the patch's next ones. After a wait
in vain the patch's later questions are answered no by all of the group, at once, and after `WAITS` of them
those of every patch: the store keeps count, so that not even processes that wait by turns exceed a step's
time. A mark that one sees earlier than another changes who says no, and nothing else.

What this cannot help is a store that breaks off after one has counted itself: it declines, and others may
have read a yes. It is the one through which the GPUs' own collectives were set up.
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
        return unfit or f"the GPUs of the model could not agree: {told(error)}"


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
