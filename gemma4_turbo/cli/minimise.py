"""A smallest set of names that makes a predicate true, in few questions.

One search finds the last name that is needed: the names before it pass, with it they fail. What
follows it is not needed. The next search goes through the names before it with that one on, and so
on, until those found fail alone. Among forty names two take at most 13 questions, three 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

# Questions about an answer of so many names: with none on, all on and the workaround 16 and 25 runs.
_MOST = {2: 13, 3: 22}

Fails = Callable[[frozenset[str]], bool]


def minimise(
    names: Sequence[str], fails: Fails, left: Callable[[int], None] = lambda count: None
) -> list[str]:
    """A subset of ``names``, in their order, that fails and needs every one of its names.

    Where every superset of a failing set fails too and there is one culprit, single or several
    together, exactly that is returned. That each of its names is needed is asked last; only where
    that would make the search long, the answer is taken from a larger set that passed.

    Args:
        names: ``fails`` must be true for all of them, and false for none of them.
        fails: may be asked for a set more than once, let it remember its answers.
        left: told before each question how many are about to come, that one included.
    """
    asked = _Asked(fails)
    rest, needed = list(names), list[str]()
    while True:
        low, high = 0, len(rest)  # the first `low` of the rest pass with those needed, `high` fail
        while high - low > 1:
            middle = (low + high) // 2 if needed else _cut(low, high)[0]
            left(_bits(high - low) + 1)
            if asked(frozenset((*needed, *rest[:middle]))):
                high = middle
            else:
                low = middle
        needed.insert(0, rest[low])
        del rest[low:]
        left(1)
        if not rest or asked(frozenset(needed)):
            return _needed(needed, asked, left)


@cache
def _cut(low: int, high: int) -> tuple[int, int]:
    """Where to ask next, and how many questions that takes at most with one more search after it.

    The later the last name needed is, the longer takes the search through the names before it: not
    the middle, but where the worse of both sides costs least.
    """
    if high - low == 1:
        return low, _bits(low)
    half = (low + high) // 2
    best = min(
        range(low + 1, high),
        key=lambda at: (max(_cut(low, at)[1], _cut(at, high)[1]), abs(at - half)),
    )
    return best, 1 + max(_cut(low, best)[1], _cut(best, high)[1])


def _bits(count: int) -> int:
    """Questions that find one of ``count``."""
    return math.ceil(math.log2(count)) if count else 0


def expected(count: int) -> int:
    """How many questions a single culprit among ``count`` takes."""
    return _bits(count) + 1


class _Asked:
    """The questions so far and their answers."""

    def __init__(self, fails: Fails) -> None:
        self._fails = fails
        self._answers: dict[frozenset[str], bool] = {}

    def __call__(self, on: frozenset[str]) -> bool:
        if on not in self._answers:
            self._answers[on] = self._fails(on)
        return self._answers[on]

    def needless(self, name: str, names: Sequence[str], sure: bool) -> bool:
        """Whether ``names`` fail without ``name`` as well; ``sure``: however long the search was."""
        rest = frozenset(names) - {name}
        long = len(self._answers) >= _MOST.get(len(names), math.inf)
        if long and not sure and rest not in self._answers:
            return not any(rest <= on for on, fails in self._answers.items() if not fails)
        return self(rest)


def _needed(names: list[str], asked: _Asked, left: Callable[[int], None]) -> list[str]:
    """``names`` without those that are not needed: there are none, unless one hides what others do."""
    hidden = False
    while len(names) > 1:
        left(len(names))
        out = next((name for name in names if asked.needless(name, names, hidden)), None)
        if out is None:
            break
        names, hidden = [name for name in names if name != out], True
    return names
