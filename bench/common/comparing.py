"""How far two engines' answers are from each other: tokens, logprobs, distributions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gemma4_turbo.models import geometry

VOCABULARY = geometry.VOCABULARY
NOTHING_RAN = "no patch's code ran in the patched engine: stock was compared with stock"


def any_ran(processes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any patch's code ran, in any process of a report."""
    return any(row["engaged"] for process in processes for row in process["patches"])


def require_any_ran(script: str, processes: Iterable[Mapping[str, Any]]) -> None:
    """SystemExit, if no patch's code ran: whatever was equal, nothing is proven."""
    if not any_ran(processes):
        raise SystemExit(f"{script}: {NOTHING_RAN}")


def differences(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, int]:
    """How many tokens and logprobs differ in any bit between two engines' answers."""
    count = {"sequences": len(a), "tokens": 0, "token_diffs": 0, "logprobs": 0, "logprob_diffs": 0}
    for one, other in zip(a, b, strict=True):
        count["tokens"] += len(one["ids"])
        count["token_diffs"] += sum(x != y for x, y in zip(one["ids"], other["ids"], strict=True))
        for key in ("input", "output", "top"):
            flat_one = json.dumps(one[key]).replace("[", "").replace("]", "").split(", ")
            flat_other = json.dumps(other[key]).replace("[", "").replace("]", "").split(", ")
            count["logprobs"] += len(flat_one)
            count["logprob_diffs"] += abs(len(flat_one) - len(flat_other)) + sum(
                x != y for x, y in zip(flat_one, flat_other, strict=False)
            )
    return count


def distances(one: dict[str, Any], other: dict[str, Any], strict: bool = True) -> list[float]:
    """Distances of logprobs over the leading tokens that two answers have in common.

    ``strict``: the answers must be of one length, or ValueError.
    """
    found = []
    tokens = zip(one["output"], other["output"], one["ids"], other["ids"], strict=strict)
    for x, y, id_x, id_y in tokens:
        if id_x != id_y:
            break
        found.append(abs(float.fromhex(x) - float.fromhex(y)))
    return found


def distance(one: dict[str, Any], other: dict[str, Any], strict: bool = True) -> tuple[int, float]:
    """Leading tokens in common, and the largest of their `distances`."""
    found = distances(one, other, strict)
    return len(found), max(found, default=0.0)


def divergence(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, float]:
    """KL divergence of two engines' next-token distributions, estimated, mean over positions.

    ``sum(p (r - 1 - log r))``, r = q / p, over all tokens is the divergence: each of its terms is at
    least 0, so a random sample of the tokens gives a steady estimate. Of the generated tokens only
    those up to the first in which the engines differ have the same tokens before them; the first of
    them ends the prefill, the others are decoding. With each its standard error, from the prompts.
    """
    terms: dict[str, list[Any]] = {"KL divergence": [], "KL divergence, decode": []}
    for one, other in zip(a, b, strict=True):
        same = zip(one["ids"], other["ids"], strict=True)
        valid = next((i + 1 for i, (x, y) in enumerate(same) if x != y), len(one["ids"]))
        for name, p_steps, q_steps in (
            (
                "KL divergence",
                one["before"] + one["after"][:1],
                other["before"] + other["after"][:1],
            ),
            ("KL divergence, decode", one["after"][1:valid], other["after"][1:valid]),
        ):
            p, q = np.array(p_steps), np.array(q_steps)
            if p.shape != q.shape:
                raise ValueError("the engines answered for different positions")
            log_r = q - p
            terms[name].append((np.exp(p) * (np.expm1(log_r) - log_r)).ravel())
    found = {}
    for name, parts in terms.items():
        means = [part.mean() for part in parts if part.size]
        if means:
            found[name] = float(np.concatenate(parts).mean()) * VOCABULARY
        if len(means) > 1:
            error = np.std(means, ddof=1) / len(means) ** 0.5
            found[f"{name}, standard error"] = float(error) * VOCABULARY
    return found
