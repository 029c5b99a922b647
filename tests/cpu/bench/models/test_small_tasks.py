"""bench/models/small_tasks.py: text and questions of the small models."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

from bench.models import small_tasks as tasks

WINDOW = 256


def drawn(kind: str, hard: bool, count: int = 40) -> list[tasks.Question]:
    source = random.Random(5)
    return [tasks.KINDS[kind](source, hard) for _ in range(count)]


def right(question: tasks.Question) -> bool:
    """By other means than those the answer was made with."""
    prompt, answer = question.prompt.decode(), question.answer.decode()
    asked = prompt[:-1].partition(" ")[2]
    if question.kind in ("sums", "products"):
        steps = [step.split("=") for step in answer.split(";")]
        return all(eval(one) == int(other) for one, other in steps) and int(steps[-1][1]) == eval(
            asked
        )
    if question.kind == "copying":
        return answer == asked
    if question.kind == "sorting":
        return answer.split() == sorted(asked.split(), key=int)
    if question.kind == "recall":
        table, _, key = asked.partition(";?")
        return f";{key}={answer};" in f";{table};"
    text = asked + answer
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
        text = shorter
    return text == ""


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kind", tasks.KINDS)
def test_answers_are_right(kind: str, hard: bool):
    asked = drawn(kind, hard)
    assert [question for question in asked if not right(question)] == []
    assert all(sum(map(len, question.tokens())) <= tasks.LENGTH for question in asked)


def test_hard_ones_leave_the_window():
    for question in drawn("copying", True):
        assert len(question.answer) > WINDOW
    for question in drawn("recall", True):
        key = question.prompt.split(b"?")[1]
        assert len(question.prompt) - question.prompt.index(key) > WINDOW


def test_questions_are_the_same_again_and_other_than_in_training():
    asked = tasks.questions(60, 1)
    assert asked == tasks.questions(60, 1)
    assert asked != tasks.questions(60, 2)
    assert {question.kind for question in asked} == set(tasks.KINDS)
    assert len({question.prompt for question in asked}) == 60
    short = tasks.questions(30, 1, 96)
    assert max(sum(map(len, question.tokens())) for question in short) <= 96


def test_rows_hold_whole_documents():
    made = tasks.rows(70, 3)
    assert made.tokens.shape == made.answers.shape == (70, tasks.LENGTH + 1)
    again = tasks.rows(70, 3)
    assert np.array_equal(made.tokens, again.tokens)
    assert not np.array_equal(made.tokens, tasks.rows(70, 4).tokens)
    assert (made.tokens[:, 0] == tasks.BOS).all()
    assert (made.tokens == tasks.PAD).mean() < 0.1
    for tokens, learned in zip(made.tokens[:20].tolist(), made.answers[:20].tolist(), strict=True):
        text = "".join(
            chr(token - tasks.FIRST_BYTE)
            if token >= tasks.FIRST_BYTE
            else "\n" * (token == tasks.EOS)
            for token in tokens
        )
        assert text.endswith("\n")  # the row ends with the end of an answer
        answers = [t for t, counted in zip(tokens, learned, strict=True) if counted]
        assert answers.count(tasks.EOS) == tokens.count(tasks.EOS)
        assert tasks.PAD not in answers
        assert tasks.BOS not in answers


def test_shards_are_the_same_on_one_core(monkeypatch: pytest.MonkeyPatch):
    count = 4 * tasks.SHARDS
    several = tasks.rows(count, 0)
    monkeypatch.setattr(tasks.os, "sched_getaffinity", lambda pid: {0})
    assert np.array_equal(several.tokens, tasks.rows(count, 0).tokens)


def folder_with_files(root: Path, count: int = 80) -> Path:
    for i in range(count):
        (root / f"m{i}.py").write_text(f"# {i}\n" + "abab" * 100)
    (root / "test").mkdir()
    (root / "test" / "skipped.py").write_text("SKIPPED")
    return root


def test_corpus_holds_out_whole_files(tmp_path: Path):
    made = tasks.corpus(folder_with_files(tmp_path))
    files = [path.read_bytes() for path in tmp_path.glob("*.py")]
    assert all((text in made.train) != (text in made.held_out) for text in files)
    assert b"SKIPPED" not in made.train + made.held_out
    assert made.digest == tasks.corpus(tmp_path).digest
    (tmp_path / "m3.py").write_text("other")
    assert made.digest != tasks.corpus(tmp_path).digest


def test_corpus_of_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="root must hold Python files"):
        tasks.corpus(tmp_path)


def test_windows_and_bigrams():
    text = b"ab" * 60_000
    pieces = tasks.windows(text, 3, 100)
    assert [len(piece) for piece in pieces] == [101] * 3
    assert tasks.decoded(pieces[0]) == text[:100]
    # The first byte is a or b; then each follows from the one before it.
    assert tasks.bigram_loss(text, pieces) == pytest.approx(math.log(2) / 100, rel=0.1)
    with pytest.raises(ValueError, match="at least 200000 bytes"):
        tasks.windows(text, 3, 200_000)
