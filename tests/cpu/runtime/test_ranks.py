"""Several processes, one answer: the other ones are played by what they write into the store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.runtime import ranks
from gemma4_turbo.runtime.verdicts import Verdicts

KEY = "gemma4_turbo/0-1/skinny_gemm (4, 4)/1"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    """Where the two meet; this process is the first of them."""
    found = HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: found)
    monkeypatch.setattr(ranks, "_group_of", [lambda: ranks.Group("0-1", 0, 2)])
    monkeypatch.setattr(ranks, "_asked", type(ranks._asked)())
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.05)
    return found


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody knows of a group."""
    monkeypatch.setattr(ranks, "_group_of", [])
    return None


def ask(unfit: str | None = None) -> str | None:
    return ranks.agreed("skinny_gemm (4, 4)", unfit)


def test_all_have_nothing_against_it(store: HashStore):
    store.add(f"{KEY}/yes", 1)
    assert ask() is None
    assert store.get(f"{KEY}/decision") == b"yes"


def test_the_other_one_has_a_reason(store: HashStore):
    store.set(f"{KEY}/decision", "GPU 1 of 2: out of memory")
    assert ask() == "GPU 1 of 2: out of memory"


def test_this_one_has_a_reason_and_tells_it(store: HashStore):
    store.add(f"{KEY}/yes", 1)
    assert ask("differs") == "GPU 0 of 2: differs"
    assert store.get(f"{KEY}/decision") == b"GPU 0 of 2: differs"


def test_who_waits_in_vain_decides_for_who_comes_later(store: HashStore):
    started = time.monotonic()
    waited = ask()
    assert time.monotonic() - started < 5
    assert waited is not None
    assert "waited" in waited
    assert store.get(f"{KEY}/decision").decode() == waited
    # The other one comes now, as the last: it reads the decision.
    assert ranks._decided(_of_the_other(store), ranks.Group("0-1", 1, 2), "q", None) is not None


def _of_the_other(store: HashStore) -> Any:
    """The store, where the question's first round is decided."""
    store.set("gemma4_turbo/0-1/q/1/decision", "GPU 0 of 2 waited 0 s for the others")
    store.add("gemma4_turbo/0-1/q/1/yes", 1)
    return store


def test_a_question_that_is_asked_again_is_another_one(store: HashStore):
    store.set(f"{KEY}/decision", "GPU 1 of 2: out of memory")
    assert ask() is not None
    store.add(f"{KEY[:-1]}2/yes", 1)
    assert ask() is None


def test_a_store_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch, store: HashStore):
    def gone() -> Any:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(ranks, "_store", gone)
    assert "could not agree: RuntimeError: Connection reset" in str(ask())
    assert ask("differs") == "differs"


@pytest.mark.parametrize("unfit", [None, "differs"])
def test_alone_nobody_is_asked(alone: None, unfit: str | None):
    assert ask(unfit) == unfit


@pytest.mark.parametrize(
    ("patch", "asked"), [("skinny_gemm", True), ("layer_norms", False), ("router_few", True)]
)
def test_who_is_asked_about_what(monkeypatch: pytest.MonkeyPatch, patch: str, asked: bool):
    """A verdict on a kernel without stock's bits is everybody's, and names no number of a GPU."""
    questions: list[str] = []

    def agreed(question: str, unfit: str | None) -> str | None:
        questions.append(question)
        return "GPU 1 of 2: out of memory"

    monkeypatch.setattr(ranks, "agreed", agreed)
    run, verdicts = ENGINE.runs[patch], Verdicts()
    monkeypatch.setattr(run, "state", states.ACTIVE)
    for number in range(2):
        key = ((4, 4), torch.bfloat16, f"cuda:{number}", torch.device("cuda", number))
        found = verdicts.unfit(run, key, None, lambda: None)
        assert found == verdicts.unfit(run, key, None, lambda: "not compared again")
        assert found == ("GPU 1 of 2: out of memory" if asked else None)
    assert questions == [f"{patch} (4, 4) torch.bfloat16 cuda cuda"] * (2 if asked else 0)
    assert run.state == states.ACTIVE  # the fault is another process's


def test_what_waits_for_the_end_of_a_capture_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "agreed", lambda *args: pytest.fail("asked"))
    run = ENGINE.runs["skinny_gemm"]
    assert Verdicts().unfit(run, ("k",), "a capture", lambda: None) == "a capture"
