"""A call of ours that raises: stock's result, one failed patch, and no second try."""

from __future__ import annotations

from typing import Any

import pytest

from gemma4_turbo.engine import states
from gemma4_turbo.runtime.fallback import DeclinedError, Fallback


class Run:
    """As much of a patch's run as is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def set(self, state: str, reason: str) -> None:
        self.said.append((state, reason))

    def engaged(self, captured: bool) -> None:
        self.said.append("engaged")

    def declined(self, reason: str) -> None:
        self.said.append(reason)


def raises(error: Exception) -> Any:
    def call() -> str:
        raise error

    return call


def test_a_call_that_is_done_counts():
    run: Any = Run()
    assert Fallback("it").call(run, lambda: "ours", lambda: "stock") == "ours"
    assert run.said == ["engaged"]


def test_a_call_that_raises_is_stocks_and_is_not_tried_again():
    """For its key; the reason is bounded."""
    run: Any = Run()
    fallback = Fallback("the launch")
    bad = raises(RuntimeError("no\n" * 4000))
    assert fallback.call(run, bad, lambda: "stock", "a") == "stock"
    (state, reason), declined = run.said
    assert state == states.FAILED
    assert reason == declined
    assert reason.startswith("the launch could not be done: RuntimeError: no no")
    assert len(reason) < 400
    run.said.clear()
    assert fallback.call(run, raises(AssertionError()), lambda: "stock", "a") == "stock"
    assert run.said == [reason]
    assert fallback.call(run, lambda: "ours", lambda: "stock", "b") == "ours"
    fallback.clear()
    assert fallback.call(run, lambda: "ours", lambda: "stock", "a") == "ours"


def test_an_error_of_the_arguments_is_stocks_own():
    run: Any = Run()
    fallback = Fallback("it")
    with pytest.raises(ZeroDivisionError):
        fallback.call(run, raises(IndexError()), lambda: str(1 // 0))
    assert not run.said
    assert fallback.unfit() is None


def test_who_declines_has_not_failed():
    run: Any = Run()
    fallback = Fallback("it")
    assert fallback.call(run, raises(DeclinedError("too long")), lambda: "stock") == "stock"
    assert run.said == ["too long"]
    assert fallback.unfit() is None


def test_what_is_to_come_through_comes_through():
    run: Any = Run()
    with pytest.raises(MemoryError):
        Fallback("it").call(run, raises(MemoryError()), lambda: "stock", through=MemoryError)
    assert not run.said


def test_who_declines_is_never_let_through():
    run: Any = Run()
    declines = raises(DeclinedError("too long"))
    assert Fallback("it").call(run, declines, lambda: "stock", through=Exception) == "stock"
    assert run.said == ["too long"]


def test_what_fails_before_all_others_wait_is_stocks():
    run: Any = Run()
    fallback = Fallback("it")

    def call(prepared: Any) -> Any:
        return fallback.call(
            run, lambda: fallback.prepared(run, prepared), lambda: "stock", through=Exception
        )

    assert call(lambda: "ours") == "ours"
    assert call(raises(DeclinedError("too long"))) == "stock"
    assert fallback.unfit() is None
    for _ in range(2):
        assert call(raises(IndexError("no such thing"))) == "stock"
    assert fallback.unfit() == "it could not be done: IndexError: no such thing"
