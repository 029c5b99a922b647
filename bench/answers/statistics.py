"""Distances of distributions, right answers, and how much of a difference is chance."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binomtest

from bench.models import small_tasks


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL divergence of q from p, both log-probabilities ``[..., vocabulary]``, in nats; ``[...]``.

    ``sum p (r - 1 - log r)`` with r = q / p: equal to it where both sum to one, and without cancellation.
    """
    p, q = p.astype(np.float64), q.astype(np.float64)
    log_r = q - p
    found: np.ndarray = (np.exp(p) * (np.expm1(log_r) - log_r)).sum(-1)
    return found


def agreement(p: np.ndarray, q: np.ndarray) -> float:
    """How often both have the same likeliest token."""
    return float((p.argmax(-1) == q.argmax(-1)).mean())


def mean_and_error(by_prompt: np.ndarray) -> tuple[float, float]:
    """Of ``[prompts, positions]``: mean, and its standard error from the prompts' means."""
    means = by_prompt.mean(1)
    error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else math.nan
    return float(means.mean()), float(error)


def mcnemar(one: list[bool], other: list[bool]) -> tuple[int, int, float]:
    """Questions that only ``one`` got right, that only ``other`` did, and the exact two-sided p."""
    only_one = sum(x and not y for x, y in zip(one, other, strict=True))
    only_other = sum(y and not x for x, y in zip(one, other, strict=True))
    either = only_one + only_other
    p = float(binomtest(only_one, either).pvalue) if either else 1.0
    return only_one, only_other, p


def rights(rows: list[list[int]], questions: list[small_tasks.Question]) -> list[bool]:
    """Which answers are the right ones, EOS included."""
    return [row == one.tokens()[1] for row, one in zip(rows, questions, strict=True)]
