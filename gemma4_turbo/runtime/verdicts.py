"""Results of comparing a kernel with stock on this GPU, kept for the process."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemma4_turbo.catalogue import BITWISE
from gemma4_turbo.engine import states
from gemma4_turbo.runtime import ranks
from gemma4_turbo.runtime.attempts import attempt

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


class Verdicts(dict[tuple[Any, ...], str | None]):
    """By what decides about the numbers (device, dtype, shape): None, or what differs."""

    def unfit(
        self,
        run: PatchRun,
        key: tuple[Any, ...],
        waiting: str | None,
        compare: Callable[[], str | None],
    ) -> str | None:
        """Why a kernel may not run for this key, or None. Cached after the first call.

        Under tensor parallelism a kernel with stock's bits may run on one GPU and not on another. For any
        other kernel the first call asks all GPUs: `gemma4_turbo.runtime.ranks`.

        Args:
            run: becomes `failed` where the comparison finds a difference, or cannot be made.
            key: what decides about the numbers.
            waiting: why it cannot be compared now, or None: a comparison synchronises, which a
                capture into a CUDA graph forbids. SGLang runs a batch before it captures it.
            compare: says what differs, or None.
        """
        if key not in self:
            if waiting is not None:
                return waiting
            import torch

            with torch.no_grad():
                found, broken = attempt(run, f"self-check for {key}", compare)
            if found is not None:
                run.set(states.FAILED, found)
            unfit = found or broken
            if run.patch.numerics != BITWISE:
                unfit = ranks.agreed(run.patch.name, _on_any_gpu(key), unfit)
            self[key] = unfit
        return self[key]


def _on_any_gpu(key: tuple[Any, ...]) -> str:
    """The key without the number of the GPU, the same text in every process."""
    return re.sub(r"\bcuda:\d+", "cuda", " ".join(str(part) for part in key))
