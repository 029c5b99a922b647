"""A smallest set of names that makes a predicate true (delta debugging, Zeller's ddmin)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise


def minimise(names: Sequence[str], fails: Callable[[frozenset[str]], bool]) -> list[str]:
    """A subset of ``names``, in their order, that fails while it passes without any one of them.

    ``fails`` must be true for all of ``names`` and false for none of them. Where every superset of
    a failing set fails too and there is one culprit, single or several together, exactly that is
    returned. A set may be asked for more than once: let ``fails`` remember its answers.
    """
    rest, parts = list(names), 2
    while len(rest) > 1:
        pieces = split(rest, parts)
        smaller = next((piece for piece in pieces if fails(frozenset(piece))), None)
        if smaller is not None:
            rest, parts = smaller, 2
            continue
        remainders = [[name for name in rest if name not in piece] for piece in pieces]
        smaller = next((kept for kept in remainders if fails(frozenset(kept))), None)
        if smaller is not None:
            rest, parts = smaller, max(parts - 1, 2)
        elif parts < len(rest):
            parts = min(2 * parts, len(rest))
        else:  # pieces of one name each: no remainder fails, so every name is needed
            break
    return rest


def split(names: list[str], parts: int) -> list[list[str]]:
    """``parts`` consecutive pieces, none empty, as equal as they can be."""
    bounds = [len(names) * i // parts for i in range(parts + 1)]
    return [names[low:high] for low, high in pairwise(bounds)]
