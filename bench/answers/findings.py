"""Rows of the CSV, as engines come to tell."""

from __future__ import annotations

import math
from pathlib import Path
from threading import Lock

import numpy as np
import pandas as pd

from bench.answers.asking import Answer, Asked
from bench.answers.judge import Judge
from bench.answers.names import GENERATED, JUDGE, PROMPT
from bench.answers.statistics import agreement, divergences, mcnemar, mean_and_error, rights
from bench.common.results import Results, append
from bench.common.variants import STOCK
from bench.models import small_tasks


class Findings:
    """Rows of the CSV, as engines come to tell; what must be compared with stock waits for stock."""

    def __init__(self, results: Results, asked: Asked, judge: Judge, out: Path) -> None:
        self.results, self.asked, self.judge, self.out = results, asked, judge, out
        self.questions = asked.questions()
        self.stock: list[list[int]] = []  # its answers
        self.right: dict[str, list[bool]] = {}
        self.far: dict[tuple[str, str], np.ndarray] = {}
        self.waiting: list[tuple[str, Answer]] = []
        self.written = 0
        self.lock = Lock()
        first = len(asked.prompts[0]) - asked.tail - 1
        self.prompt = judge.distributions(asked.prompts, first)[:, :-1]

    def save(self) -> None:
        """Append to the CSV what it has not."""
        with self.lock:
            new = self.results.rows[self.written :]
            self.written += len(new)
            if new:
                append(pd.DataFrame(new), self.out)

    def add(self, variant: str, quantity: str, x: int, value: float, unit: str) -> None:
        """One row."""
        self.results.add(variant, quantity, x, 0, value, unit)

    def answered(self, variant: str, right: list[bool]) -> None:
        """Questions answered exactly, in all and by kind, and the test against stock."""
        self.right[variant] = right
        questions = self.questions[: len(right)]
        self.add(variant, "answered exactly", len(right), sum(right), "questions")
        for kind in small_tasks.KINDS:
            of_kind = [r for r, one in zip(right, questions, strict=True) if one.kind == kind]
            self.add(variant, f"answered exactly, {kind}", len(of_kind), sum(of_kind), "questions")
        if STOCK in self.right and variant != STOCK:
            ours, theirs, p = mcnemar(right, self.right[STOCK][: len(right)])
            self.add(variant, "right where stock is wrong", len(right), ours, "questions")
            self.add(variant, "wrong where stock is right", len(right), theirs, "questions")
            self.add(variant, "McNemar's p", ours + theirs, p, "probability")

    def text(self, variant: str, nats: float) -> None:
        """Loss on the held-out text."""
        count = sum(len(piece) - 1 for piece in self.asked.text)
        self.add(variant, "held-out text", count, nats, "nats a byte")
        self.add(variant, "perplexity", count, math.exp(nats), "a byte")

    def distances(self, variant: str, where: str, p: np.ndarray, q: np.ndarray) -> None:
        """From fp32, and how much more than stock's."""
        positions = p.shape[0] * p.shape[1]
        far = self.far[variant, where] = divergences(p, q)
        names = [(f"KL divergence from fp32, {where}", far)]
        if variant != STOCK and (STOCK, where) in self.far:
            names.append((f"KL divergence beyond stock's, {where}", far - self.far[STOCK, where]))
        for name, values in names:
            mean, error = mean_and_error(values)
            self.add(variant, name, positions, mean, "nats")
            self.add(variant, f"{name}, standard error", positions, error, "nats")
        self.add(variant, f"same token as fp32, {where}", positions, agreement(p, q), "part")

    def take(self, variant: str, answer: Answer) -> None:
        """A part of what an engine said."""
        if variant != STOCK and not self._stock_told(answer):
            self.waiting.append((variant, answer))
            return
        self._compare(variant, answer)
        if variant == STOCK:
            waiting, self.waiting = self.waiting, []
            for other, part in waiting:
                self.take(other, part)

    def without_stock(self) -> None:
        """What waits for a part that stock will never tell."""
        for variant, answer in self.waiting:
            self._compare(variant, answer)
        self.waiting = []

    def _stock_told(self, answer: Answer) -> bool:
        told = {"rows": bool(self.stock), "nats": True}
        told |= {where: (STOCK, where) in self.far for where in (PROMPT, GENERATED)}
        return all(getattr(answer, name) is None or there for name, there in told.items())

    def _compare(self, variant: str, answer: Answer) -> None:
        if answer.rows is not None:
            self.answered(variant, rights(answer.rows, self.questions[: len(answer.rows)]))
            if variant == STOCK:
                self.stock = answer.rows
            elif self.stock:
                pairs = zip(answer.rows, self.stock[: len(answer.rows)], strict=True)
                differing = sum(one != other for one, other in pairs)
                name = "answers that differ from stock's"
                self.add(variant, name, len(answer.rows), differing, "questions")
        if answer.nats is not None:
            self.text(variant, float(answer.nats.mean()))
        if answer.prompt is not None:
            self.distances(variant, PROMPT, self.prompt, answer.prompt)
        if answer.generated is not None and answer.ids is not None:
            rows = [
                [*prompt, *ids[:-1]]
                for prompt, ids in zip(self.asked.prompts, answer.ids, strict=True)
            ]
            first = len(self.asked.prompts[0]) - 1
            p = self.judge.distributions(rows, first)
            self.distances(variant, GENERATED, p, answer.generated)
        self.save()

    def judged(self, right: list[bool], nats: float) -> None:
        """The judge's own answers."""
        self.answered(JUDGE, right)
        self.text(JUDGE, nats)
        self.save()
