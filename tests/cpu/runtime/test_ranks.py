"""Several processes, one answer: the other ones are played by what they write into the store, or by threads."""

from __future__ import annotations

import importlib.util
import itertools
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
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


def ask(unfit: str | None = None, question: str = "(4, 4)", patch: str = "skinny_gemm") -> Any:
    return ranks.agreed(patch, question, unfit)


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
    assert other().agreed("skinny_gemm", "(4, 4)", None) == waited


def other() -> Any:
    """The module as the second process has it, over this one's store."""
    spec = importlib.util.find_spec(ranks.__name__)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._store = ranks._store
    module._group_of = [lambda: ranks.Group("0-1", 1, 2)]
    return module


def test_a_patch_is_waited_for_once(store: HashStore, monkeypatch: pytest.MonkeyPatch):
    """And no other is held to account for it, up to so many waits of the group's."""
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.3)
    started = time.monotonic()
    answers = [ask(question=f"q{n}") for n in range(6)]
    assert time.monotonic() - started < 0.6
    assert "waited" in answers[0]
    assert set(answers[1:]) == {
        "GPU 0 of 2: a GPU did not come to an earlier question of `skinny_gemm`"
    }
    # The other one comes to them later: it reads what was decided, and waits for nobody either.
    late = other()
    late.PATIENCE_S = 60
    assert [late.agreed("skinny_gemm", f"q{n}", None) for n in range(6)] == answers
    assert "earlier question" in late.agreed("skinny_gemm", "q6", None)
    assert (
        ask(question="q6")
        == "GPU 1 of 2: a GPU did not come to an earlier question of `skinny_gemm`"
    )
    assert "waited" in ask(patch="router_few")
    assert "waited" in ask(patch="experts_few")
    assert (
        ask(patch="decode_attention") == "GPU 0 of 2: 3 earlier questions were waited for in vain"
    )
    assert "3 earlier" in late.agreed("extend_attention", "q", None)


class Turns:
    """A store, each of whose operations is made when its rank's turn has come."""

    def __init__(self, store: HashStore, order: tuple[int, ...]) -> None:
        self.store, self.order = store, list(order)
        self.next, self.running = self.order.pop(0), {0, 1}
        self.changed = threading.Condition()

    def of(self, rank: int) -> Any:
        def operation(name: str) -> Any:
            def call(*args: Any) -> Any:
                with self.changed:
                    assert self.changed.wait_for(lambda: self.next == rank, 30)
                    found = getattr(self.store, name)(*args)
                    self.pass_on()
                    return found

            return call

        return SimpleNamespace(
            **{name: operation(name) for name in ("add", "check", "get", "compare_set")}
        )

    def pass_on(self) -> None:
        wanted = self.order.pop(0) if self.order else 1 - self.next
        self.next = wanted if wanted in self.running else next(iter(self.running), wanted)
        self.changed.notify_all()

    def ended(self, rank: int) -> None:
        with self.changed:
            self.running.discard(rank)
            if self.next == rank:
                self.pass_on()


def play(order: tuple[int, ...], asked: tuple[list[Any], list[Any]]) -> list[dict[str, Any]]:
    """The answers of two processes to questions, each with what they have found themselves."""
    turns = Turns(HashStore(), order)
    answers: list[dict[str, Any]] = [{}, {}]

    def ask_all(rank: int) -> None:
        module = other()
        module._group_of = [lambda: ranks.Group("0-1", rank, 2)]
        module._store = lambda: turns.of(rank)
        module.PATIENCE_S = 1  # looks at the clock
        module.time = SimpleNamespace(
            monotonic=itertools.count().__next__, sleep=lambda pause: None
        )
        try:
            for question, unfit in asked[rank]:
                answers[rank][question] = module.agreed("p", question, unfit)
        finally:
            turns.ended(rank)

    threads = [threading.Thread(target=ask_all, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


FIT = None
CASES: dict[str, tuple[list[Any], list[Any]]] = {
    "both may": ([("a", FIT)], [("a", FIT)]),
    "one may not": ([("a", FIT)], [("a", "differs")]),
    "one skips a question": ([("a", FIT), ("b", FIT)], [("b", FIT)]),
    "in another order": ([("a", FIT), ("b", FIT)], [("b", FIT), ("a", FIT)]),
}


@pytest.mark.parametrize("case", CASES)
def test_in_every_order_of_what_they_do_both_have_one_answer(case: str):
    """The first eight operations in any order, then by turns; a wait is over after two looks at the clock."""
    asked = CASES[case]
    seen: set[tuple[str, bool]] = set()
    for order in itertools.product((0, 1), repeat=8):
        answers = play(order, asked)
        for question in {name for name, _ in (*asked[0], *asked[1])}:
            found = [of[question] for of in answers if question in of]
            assert len(set(found)) == 1, (order, answers)
            given = [unfit for of in asked for name, unfit in of if name == question]
            if given != [FIT, FIT]:  # of a question that one does not come to, there is one
                assert found[0] is not None, (order, answers)
            seen.add((question, found[0] is None))
    assert (("a", True) in seen) == (case == "both may")
    assert ("a", False) in seen


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

    def agreed(patch: str, question: str, unfit: str | None) -> str | None:
        questions.append(f"{patch} {question}")
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
