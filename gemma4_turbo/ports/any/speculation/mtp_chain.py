"""`mtp_chain`: what every line's draft of one candidate per step is made of.

With ``speculative_eagle_topk`` 1 every draft is a chain: stock's softmax over the vocabulary, its
scores and its search among them choose nothing. Here the draft's token is the arg-max of the logits,
and the tree is written down.

The largest logit has the largest probability, and ``torch.max``, which stock uses too, takes the
first of equal ones. So the token is stock's unless the softmax rounds two different logits to one
probability, or the logits are infinite or NaN. Then another token may be proposed, and the target
decides about it as about any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from gemma4_turbo.engine.checks import Check

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


class Worker(Protocol):
    """What is read of SGLang's draft workers."""

    topk: int
    speculative_num_steps: int
    speculative_num_draft_tokens: int


def unfit(worker: Worker) -> str | None:
    """Why the drafts of a worker are no chains, or None."""
    if worker.topk != 1:
        return f"{worker.topk} candidates per step"
    if worker.speculative_num_draft_tokens != worker.speculative_num_steps + 1:
        return f"{worker.speculative_num_draft_tokens} of the draft's tokens are chosen by score"
    return None


def best(logits: torch.Tensor) -> torch.Tensor:
    """Index of each row's largest: ``[rows, 1]``."""
    return logits.max(dim=-1, keepdim=True).indices


def chain(rows: int, steps: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Parents and places of a tree that has one node per step, a row for each request."""
    places = torch.arange(steps, device=device)
    return (places - 1).repeat(rows, 1), places.repeat(rows, 1)


def verify(run: PatchRun, device: str) -> list[Check]:
    """The token against the one that stock's softmax gives."""
    checks = []
    generator = torch.Generator(device).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        drawn = torch.randn((64, 4096), generator=generator, device=device) * 8
        logits = drawn.to(dtype)
        stock = torch.softmax(logits, dim=-1).max(dim=-1, keepdim=True).indices
        differing = int((best(logits) != stock).sum())
        checks.append(
            Check(
                "mtp_chain",
                f"{dtype} logits".replace("torch.", ""),
                "arg-max of the softmax",
                stock.numel(),
                differing,
                "none of these rows is rounded to a tie",
                differing == 0,
            )
        )
    return checks
