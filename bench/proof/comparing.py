"""Two servers' answers to the same requests: tokens, ties, distances, bits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from bench.common.comparing import distances


class Comparison(NamedTuple):
    """Two servers' answers to the same requests."""

    tokens: int = 0
    equal: int = 0
    ties: int = 0  # answers whose first difference is between tokens that stock finds as good
    wrong: int = 0  # answers that differ otherwise
    distance: float = 0.0  # of logprobs, before the first difference: the farthest
    mean: float = 0.0  # of the same logprobs
    bits: bool = True  # tokens and logprobs are equal bit for bit

    def __str__(self) -> str:
        told = f"{self.equal}/{self.tokens}"
        if self.ties or self.wrong:
            told += f", {self.ties} tie(s), {self.wrong} wrong"
        return told


def compare(
    stock: list[dict[str, Any]], other: list[dict[str, Any]], tie: float
) -> tuple[Comparison, list[str]]:
    """The comparison and a line for each answer that differs.

    Args:
        tie: nats between stock's two best tokens up to which either may be the answer.
    """
    tokens = equal = ties = wrong = 0
    apart: list[float] = []
    bits, told = len(stock) == len(other), []
    for number, (one, two) in enumerate(zip(stock, other, strict=False)):
        tokens += len(one["ids"])
        bits &= all(one[key] == two[key] for key in ("ids", "output", "top"))
        same = [x == y for x, y in zip(one["ids"], two["ids"], strict=False)]
        equal += sum(same)
        apart += distances(one, two, strict=False)
        if not all(math.isfinite(float.fromhex(value)) for value in two["output"]):
            wrong += 1
            told.append(f"answer {number}: a logprob is not finite")
        elif len(one["ids"]) != len(two["ids"]):
            wrong += 1
            told.append(f"answer {number}: {len(two['ids'])} tokens, not {len(one['ids'])}")
        elif not all(same):
            first = same.index(False)
            best = {token: float.fromhex(value) for value, token in one["top"][first]}
            gap = best[one["ids"][first]] - best.get(two["ids"][first], -math.inf)
            ties, wrong = (ties + 1, wrong) if gap <= tie else (ties, wrong + 1)
            told.append(f"answer {number}: token {first} differs, {gap:.4f} nats apart for stock")
    wrong += abs(len(stock) - len(other))
    mean = sum(apart) / len(apart) if apart else 0.0
    return Comparison(tokens, equal, ties, wrong, max(apart, default=0.0), mean, bits), told


def farthest(alone: list[dict[str, Any]], crowds: list[dict[str, Any]], tie: float) -> Comparison:
    """How far other batches take stock from itself: of all of them, the farthest in each respect.

    Not their average: a batch that happens to give the same bits says nothing about rounding.

    Args:
        crowds: the same prompts in each batch, one batch after another.
    """
    draws = [
        compare(alone, crowds[start : start + len(alone)], tie)[0]
        for start in range(0, len(crowds), len(alone))
    ]
    return Comparison(
        tokens=max(draw.tokens for draw in draws),
        equal=min(draw.equal for draw in draws),
        ties=max(draw.ties for draw in draws),
        wrong=max(draw.wrong for draw in draws),
        distance=max(draw.distance for draw in draws),
        mean=max(draw.mean for draw in draws),
        bits=all(draw.bits for draw in draws),
    )
