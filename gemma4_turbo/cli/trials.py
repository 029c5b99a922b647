"""Runs of a command with some of the patches on, and the verdict on each set of patches.

Each run is announced in a line of its own when it starts, with an estimate of what is left, and its
verdict follows in another one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from gemma4_turbo.catalogue import Patch
from gemma4_turbo.cli import process_group, report
from gemma4_turbo.cli.report import Console
from gemma4_turbo.engine import switches

REPEAT = "--repeat 5 runs each set up to 5 times"
LISTED = 4  # a line lists so many patches, and counts more


class Run(NamedTuple):
    """One run of the command."""

    number: int
    on: tuple[str, ...]
    outcome: process_group.Outcome
    stdout: Path
    stderr: Path


def standing(
    names: Collection[str], patches: Iterable[Patch], idle: Collection[str] = ()
) -> frozenset[str]:
    """``names`` without the patches that stay off because one that they require is off.

    Those of ``idle`` are on.
    """
    needs = {patch.name: frozenset(patch.requires).difference(idle) for patch in patches}
    on = frozenset(names)
    while (kept := frozenset(name for name in on if on.issuperset(needs[name]))) != on:
        on = kept
    return on


class Trials:
    """Runs the command with some of the patches on, each set once, and remembers the verdicts.

    Those of ``idle`` cannot be active. They are switched on wherever a patch is, for the patches that
    require them, and are in no set.
    """

    def __init__(
        self,
        command: Sequence[str],
        patches: Sequence[Patch],
        folder: Path,
        console: Console,
        timeout: float | None = None,
        repeat: int = 1,
        idle: Collection[str] = (),
    ) -> None:
        self.command, self.patches, self.folder, self.console = command, patches, folder, console
        self.timeout, self.repeat, self.idle = timeout, repeat, frozenset(idle)
        self.runs: list[Run] = []
        self.verdicts: dict[frozenset[str], bool] = {}  # True: fails
        self.flaky: dict[frozenset[str], int] = {}  # how often the set passed before it failed
        self.sets_left = 0  # about, the next one included; the search keeps it

    def fails(self, names: frozenset[str]) -> bool:
        """Whether any of the runs with exactly ``names`` on fails."""
        on = self.standing(names)
        if on not in self.verdicts:
            self.verdicts[on] = self._fails(on)
        return self.verdicts[on]

    def standing(self, names: Collection[str]) -> frozenset[str]:
        """``names`` without those that stay off because one that they require is off."""
        return standing(names, self.patches, self.idle)

    def _fails(self, on: frozenset[str]) -> bool:
        for attempt in range(self.repeat):
            if not self._run(on, attempt).passed:
                if attempt:
                    self.flaky[on] = attempt
                return True
        return False

    def _run(self, on: frozenset[str], attempt: int) -> process_group.Outcome:
        number = len(self.runs) + 1
        names = self.ordered(on)
        stdout, stderr = (self.folder / f"run-{number:02}.{name}" for name in ("stdout", "stderr"))
        label = f"run {number}" + (f" ({attempt + 1} of {self.repeat})" if self.repeat > 1 else "")
        say(self.console, f"{label}: {self._what(names)}{self._estimate(attempt)}")
        with self.console.status(report.plain(label)):
            environment = self.environment(on)
            outcome = process_group.run(self.command, environment, stdout, stderr, self.timeout)
        self.runs.append(Run(number, names, outcome, stdout, stderr))
        verdict, style = ("passes", "green") if outcome.passed else ("fails", "red")
        say(self.console, f"{label} {verdict}: {outcome.how}, {outcome.seconds:.1f} s", style)
        return outcome

    def _what(self, names: Sequence[str]) -> str:
        if not names:
            return f"no patch on ({switches.MASTER}=0)"
        if len(names) <= LISTED:
            return f"on: {', '.join(names)}"
        return f"{len(names)} of {len(self.patches) - len(self.idle)} patches on"

    def _estimate(self, attempt: int) -> str:
        runs = self.sets_left * self.repeat - attempt
        if runs <= 0:
            return ""
        noun = "run" if runs == 1 else "runs"
        told = f"; about {runs} {noun} left, this one included"
        taken = [run.outcome.seconds for run in self.runs]
        return f"{told}: {duration(runs * sum(taken) / len(taken))}" if taken else told

    def environment(self, on: Collection[str]) -> dict[str, str]:
        """Ours, with every patch switched explicitly: that wins over profile and aliases."""
        chosen = {
            patch.env: "1" if patch.name in {*on, *self.idle} else "0" for patch in self.patches
        }
        return {**os.environ, **chosen, **({} if on else {switches.MASTER: "0"})}

    def ordered(self, names: Collection[str]) -> tuple[str, ...]:
        """In the catalogue's order."""
        return tuple(patch.name for patch in self.patches if patch.name in names)

    def last_failure(self) -> Run | None:
        """The last run that failed."""
        return next((run for run in reversed(self.runs) if not run.outcome.passed), None)

    def doubts(self) -> list[str]:
        """What speaks against taking the verdicts at their word, one sentence each."""
        found = [
            f"flaky: with {self._listed(on)} on, only run {passes + 1} of {self.repeat} failed"
            for on, passes in self.flaky.items()
        ]
        failing = sorted((on for on, fails in self.verdicts.items() if fails), key=len)
        passing = sorted((on for on, fails in self.verdicts.items() if not fails), key=len)
        for less, more in ((less, more) for less in failing for more in passing if less < more):
            found.append(
                f"inconsistent: it fails with {self._listed(less)} on but passes with "
                f"{self._listed(more)} on: a patch hides the failure of another one, or the command "
                f"is flaky ({REPEAT})"
            )
            break
        ways = {
            run.outcome.how: run.number for run in reversed(self.runs) if not run.outcome.passed
        }
        if len(ways) > 1:
            told = "; ".join(f"run {number}: {how}" for how, number in sorted(ways.items()))
            found.append(f"it failed in different ways ({told}): two causes, or flaky ({REPEAT})")
        return found

    def _listed(self, names: Collection[str]) -> str:
        return ", ".join(self.ordered(names)) or "nothing"


def duration(seconds: float) -> str:
    """About how long, for people."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def say(console: Console, line: str, style: str = "") -> None:
    """One line, however long, as it is."""
    console.print(report.plain(line, style), soft_wrap=True)
