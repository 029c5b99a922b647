"""What comparisons of a kernel with stock, on the GPU at hand, have come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states
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
        """Why a kernel may not run for this key, or None. A look-up but for the first time.

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
            self[key] = found or broken
            if found is not None:
                run.set(states.FAILED, found)
        return self[key]
