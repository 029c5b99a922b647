"""What ``bench/mtp.py`` has found so far, and how it is told."""

from __future__ import annotations

import time
from typing import Any

from rich.table import Table

from bench.common.engines import Engine, console, outlived
from bench.common.results import Results
from bench.common.variants import PATCHED, STOCK
from bench.speculation.comparing import PLAIN, Rows, accept_length, compare, expected, told
from gemma4_turbo.cli import report


class Session:
    """Everything that was found so far."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.answers: dict[tuple[str, str], Rows] = {}  # by variant and how they were asked for
        self.splits: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
        self.reports: dict[str, Any] = {}
        self.stress: dict[str, str] = {}

    def timed(
        self, engine: Engine, batch: int, ids: list[list[int]], new: int, round_: int
    ) -> None:
        """Milliseconds a verify step (a token without speculation) and tokens a second."""
        answer = engine("step", ids=ids[:batch], new=new)
        if answer["steps"] <= 0 or answer["seconds"] <= 0:
            console.print(f"{engine.variant}: no time for {answer}")
            return
        ms = answer["seconds"] / answer["steps"] * 1e3
        rate = answer["tokens"] / answer["seconds"]
        self.results.add(engine.variant, "step", batch, round_, ms, "ms")
        self.results.add(engine.variant, "tokens a second", batch, round_, rate, "1/s")

    def stressed(self, engine: Engine, count: int, limit_s: float, agreement: Any) -> None:
        """Many requests; an engine that dies of them is a result too.

        With an ``agreement`` every token is known beforehand, also of a request that was aborted.
        """
        begun, answer = time.perf_counter(), {}
        words = agreement is not None

        def do() -> None:
            answer.update(engine("stress", count=count, limit_s=limit_s, seed=5, words=words))

        cause = outlived(engine, do)
        if cause is not None:
            seconds = time.perf_counter() - begun
            self.stress[engine.variant] = f"died after {seconds:.0f} s: {cause}"
            self.results.add(engine.variant, "stress: died", count, 0, 1, "count")
            return
        ended = answer["ended"]
        self.stress[engine.variant] = f"{ended}, {answer['seconds']:.0f} s"
        if agreement is not None:
            found = [(row["tokens"], row["last"]) for row in answer["rows"]]
            wrong = sum(tokens != agreement.tokens(last, len(tokens)) for tokens, last in found)
            tokens = sum(len(tokens) for tokens, _ in found)
            self.stress[engine.variant] += f", {wrong} with a wrong token, of {tokens} tokens"
            self.results.add(engine.variant, "stress: a wrong token", count, 0, wrong, "count")
        self.results.add(engine.variant, "stress: died", count, 0, 0, "count")
        for how, number in ended.items():
            self.results.add(engine.variant, f"stress: {how}"[:60], count, 0, number, "count")

    # -- telling

    def comparisons(self, agreement: Any, ids: list[list[int]], new: int) -> None:
        """Each variant against no speculation, stock against patched, batches against alone."""
        pairs = []
        for how in dict.fromkeys(how for _, how in self.answers):
            for variant in (STOCK, PATCHED):
                pairs.append(((PLAIN, how), (variant, how)))
            pairs.append(((STOCK, how), (PATCHED, how)))
        for variant in (PLAIN, STOCK, PATCHED):
            asked = [how for name, how in self.answers if name == variant]
            pairs += [((variant, asked[0]), (variant, how)) for how in asked[1:]]
        for one, other in pairs:
            if one in self.answers and other in self.answers:
                self._comparison(" ".join(one), " ".join(other), one, other)
        if agreement is not None and self.answers:
            truth = expected(agreement, ids, new)
            wanted = accept_length(truth)
            console.print(f"expected: accept length {wanted:.4f}")
            for key, rows in self.answers.items():
                found = compare(truth, rows)
                steps = sum(
                    x["verified"] != y["verified"] for x, y in zip(truth, rows, strict=True)
                )
                name = " ".join(key)
                console.print(
                    f"expected against {name}: {told(found)}; accept length {accept_length(rows)}"
                )
                self.results.add(
                    f"expected vs {name}",
                    "token_diffs",
                    len(rows),
                    0,
                    found["token_diffs"],
                    "count",
                )
                if key[0] != PLAIN:
                    self.results.add(
                        f"expected vs {name}", "verify steps differ", len(rows), 0, steps, "count"
                    )
            self.results.add("expected", "accept length", len(truth), 0, wanted or 0, "tokens")
        for (variant, how), rows in self.answers.items():
            length = accept_length(rows)
            if length is not None:
                self.results.add(variant, f"accept length, {how}", len(rows), 0, length, "tokens")

    def _comparison(self, name: str, other_name: str, one: Any, other: Any) -> None:
        found = compare(self.answers[one], self.answers[other])
        console.print(f"{name} against {other_name}: {told(found)}")
        for quantity in ("token_diffs", "tokens"):
            self.results.add(
                f"{name} vs {other_name}", quantity, found["sequences"], 0, found[quantity], "count"
            )
        margins = [first["margin"] for first in found["first"] if first["margin"] is not None]
        if margins:
            self.results.add(
                f"{name} vs {other_name}", "largest margin", len(margins), 0, max(margins), "nats"
            )

    def tables(self) -> None:
        """Splits by part, reports of the patches, stress, medians."""
        for (variant, batch), found in self.splits.items():
            steps = max((part["steps"] for part in found.values()), default=0)
            if not steps:
                console.print(f"{variant}, batch {batch}: no trace")
                continue
            table = Table(title=f"{variant}, batch {batch}: a verify step", title_justify="left")
            for heading in ("part", "GPU us", "kernels", "launches", "host us, profiled"):
                table.add_column(heading)
            for name, part in found.items():
                each = [part[key] / steps for key in ("gpu_us", "kernels", "launches", "host_us")]
                table.add_row(name, *(f"{value:.1f}" for value in each))
                label = name.removeprefix("mtp ")
                self.results.add(variant, f"{label}: GPU", batch, 0, each[0] / 1e3, "ms")
                self.results.add(variant, f"{label}: launches", batch, 0, each[2], "launches")
            console.print(table)
        self._host()
        for process in self.reports.get("processes", []):
            console.print(
                report.table(process["patches"], f"pid {process['pid']}: {process['command'][:80]}")
            )
        for variant, line in self.stress.items():
            console.print(f"stress, {variant}: {line}")
        summary = self.results.summary()
        if not summary.empty:
            columns = [*summary.columns[:3], PLAIN, STOCK, PATCHED, "ratio"]
            kept = summary[[c for c in columns if c in summary]].dropna(thresh=4)
            console.print(kept.to_string(index=False, float_format=lambda v: f"{v:.3f}"))

    def _host(self) -> None:
        """What of a step, measured without a profiler, no kernel accounts for."""
        frame = self.results.frame()
        if frame.empty or not self.splits:
            return
        timed = frame[frame["quantity"] == "step"].groupby(["variant", "x"])["value"].median()
        for (variant, batch), found in self.splits.items():
            steps = max((part["steps"] for part in found.values()), default=0)
            if steps and (variant, batch) in timed.index:
                busy = sum(part["gpu_us"] for part in found.values()) / steps / 1e3
                idle = float(timed[(variant, batch)]) - busy
                self.results.add(variant, "step without a kernel", batch, 0, idle, "ms")
