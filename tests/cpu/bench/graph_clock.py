"""In the place of replayed CUDA graphs: calls are made, and take 10, 20, 30 us, in their order."""

from __future__ import annotations

from typing import Any

import pytest

from gemma4_turbo.cli.tuning import timing


class Clock:
    """In the place of a timer: makes the call."""

    def __init__(self, call: Any, calls: int) -> None:
        self.found = call(calls - 1)
        self.us = 10.0


def set_in(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone."""
    patch.setattr(timing, "Timer", Clock)
    in_turn = lambda timers, _: [timer.us * (i + 1) for i, timer in enumerate(timers)]  # noqa: E731
    patch.setattr(timing, "readings", in_turn)
