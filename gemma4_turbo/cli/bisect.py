"""``bisect -- COMMAND``: which patches make a command fail."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma4_turbo.catalogue import CATALOGUE, Patch
from gemma4_turbo.cli import outlook, report
from gemma4_turbo.cli.minimise import expected, minimise
from gemma4_turbo.cli.modules import CannotRunError
from gemma4_turbo.cli.process_group import interruptible
from gemma4_turbo.cli.report import Console
from gemma4_turbo.cli.trials import REPEAT, Trials, say, standing
from gemma4_turbo.engine import gpu_profile, switches
from gemma4_turbo.engine.imports import installed_release
from gemma4_turbo.instance import ENGINE

CULPRIT = "culprit"
NOT_OURS = "fails without any patch"
NOTHING = "passes with all patches"
INTERRUPTED = "interrupted"
EXIT = {CULPRIT: 0, NOT_OURS: 1, NOTHING: 1, INTERRUPTED: 130}
TAIL_LINES, TAIL_BYTES = 20, 1 << 16


@dataclass
class Findings:
    """What the search knows so far."""

    result: str = INTERRUPTED
    culprits: list[list[str]] = field(default_factory=list)  # each fails by itself
    workaround: list[str] = field(default_factory=list)  # patches off; the rest on passes


def catalogue() -> tuple[Patch, ...]:
    """The patches that there are."""
    return CATALOGUE


def search(trials: Trials, names: Sequence[str], found: Findings) -> None:
    """Fill ``found``: every culprit, until the command passes with the workaround."""
    whole = expected(len(names))
    trials.sets_left = whole + 3  # with none, with all, and the check of the workaround
    if trials.fails(frozenset()):
        found.result = NOT_OURS
        return
    on = list(names)
    trials.sets_left = whole + 2
    if not trials.fails(frozenset(on)):
        found.result = NOTHING
        return
    while trials.fails(frozenset(on)):
        culprit = minimise(on, trials.fails, lambda left: setattr(trials, "sets_left", left + 1))
        found.culprits.append(culprit)
        # Of patches that fail only together, the last goes; one that stands on another before it.
        kept = {name: frozenset(culprit) - {name} for name in reversed(culprit)}
        standalone = (n for n in kept if trials.standing(kept[n]) == kept[n])
        off = next(standalone, culprit[-1])
        found.workaround.append(off)
        on.remove(off)
        trials.sets_left = 1
    found.result = CULPRIT


def run(
    command: Sequence[str], timeout: int | None, repeat: int, as_json: bool, logs: Path | None
) -> int:
    """The command. Progress goes to stderr, the verdict to stdout."""
    console = Console(stderr=True)
    patches = catalogue()
    try:
        reasons, idle = _decide(patches)
        names = [name for name, reason in reasons.items() if reason is None]
        with _folder(logs) as folder, interruptible():
            found = Findings()
            trials = Trials(command, patches, folder, console, timeout, repeat, idle)
            say(console, _who_takes_part(reasons, idle))
            try:
                search(trials, names, found)
            except KeyboardInterrupt:
                found.result = INTERRUPTED
            _explain(console, trials, found, logs is not None)
            if as_json:
                print(json.dumps(_record(trials, found, reasons, logs is not None), indent=1))
            else:
                say(Console(), _verdict(trials, found))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CannotRunError(str(error)) from None
    return EXIT[found.result]


def _decide(patches: Sequence[Patch]) -> tuple[dict[str, str | None], dict[str, str]]:
    """Why each patch takes no part, None if it does; and the state of those that are on in vain.

    `CannotRunError` if none takes part.
    """
    selection = switches.Selection.decode(os.environ.get(switches.SELECTION, ""))
    measured = gpu_profile.decisions()
    read = switches.read(selection=selection, catalogue=patches, measured=measured)
    if read.problems:
        raise CannotRunError("; ".join(read.problems))
    reasons = {
        name: None if decision.on else decision.reason for name, decision in read.decisions.items()
    }
    wanted = [name for name, reason in reasons.items() if reason is None]
    with report.Progress() as progress:
        found = outlook.inactive([name for name in wanted if name in ENGINE.runs], progress)
    idle = {name: state for name, (state, _) in found.items()}
    reasons |= {name: f"{state}: {reason}" for name, (state, reason) in found.items()}
    may_run = [name for name in wanted if name not in idle]
    on = standing(may_run, patches, idle)
    reasons |= {name: "a patch that it requires is off" for name in may_run if name not in on}
    if not on:
        raise CannotRunError(f"no patch is on, nothing to bisect: {_left_out(reasons)}")
    return reasons, idle


def _left_out(reasons: Mapping[str, str | None]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())


def _who_takes_part(reasons: Mapping[str, str | None], idle: Mapping[str, str]) -> str:
    count = sum(reason is None for reason in reasons.values())
    off = _left_out({name: reason for name, reason in reasons.items() if name not in idle})
    vain = _left_out(idle)
    return (
        f"{count} patches take part"
        + (f"; left out, always off: {off}" if off else "")
        + (f"; cannot be active with SGLang {installed_release()}: {vain}" if vain else "")
    )


@contextlib.contextmanager
def _folder(logs: Path | None) -> Iterator[Path]:
    """Where the runs' output goes."""
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        if any(logs.iterdir()):
            raise CannotRunError(f"--logs: {logs} is not empty: name a new folder")
        yield logs
        return
    with tempfile.TemporaryDirectory(prefix="gemma4_turbo-bisect-") as scratch:
        yield Path(scratch)


def _explain(console: Console, trials: Trials, found: Findings, kept: bool) -> None:
    """Everything but the verdict: the last failure, the number of runs, minimality, doubts."""
    failure = trials.last_failure()
    if failure is not None:
        what = f"Last failing run: {failure.number}, {failure.outcome.how}"
        say(console, f"{what}: {failure.stdout}, {failure.stderr}" if kept else what)
        for path in () if kept else (failure.stdout, failure.stderr):
            for line in _tail(path):
                say(console, f"  {path.suffix[1:]}: {line}")
    runs, sets = len(trials.runs), len(trials.verdicts)
    say(console, f"Runs: {runs}, of {sets} different sets of patches")
    for culprit in found.culprits:
        need = (
            "with it alone the command failed, with every patch off it passed"
            if len(culprit) == 1
            else "with these alone the command failed, without any one of them it passed"
        )
        say(console, f"Minimal: {', '.join(culprit)}: {need}")
    for doubt in trials.doubts():
        say(console, f"In doubt: {doubt}", "yellow")
    if found.result == NOTHING and trials.repeat == 1:
        say(console, f"If it fails only now and then: {REPEAT}", "yellow")


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]


def _smallest_failing(trials: Trials) -> tuple[str, ...]:
    failing = [on for on, fails in trials.verdicts.items() if fails]
    return trials.ordered(min(failing, key=len)) if failing else ()


def _verdict(trials: Trials, found: Findings) -> str:
    """The last line."""
    failure = trials.last_failure()
    if found.result == NOT_OURS and failure is not None:
        return (
            f"The command fails without any patch ({switches.MASTER}=0, {failure.outcome.how}): "
            "it is not gemma4_turbo"
        )
    if found.result == NOTHING:
        return "The command passes with all patches on: nothing to find"
    if found.result == INTERRUPTED:
        smallest = ", ".join(_smallest_failing(trials))
        known = f"the smallest set that failed: {smallest}" if smallest else "no failure seen yet"
        return f"Interrupted; {known}"
    together = [
        culprit[0] if len(culprit) == 1 else f"{' and '.join(culprit)} together"
        for culprit in found.culprits
    ]
    noun = "Culprit" if len(together) == 1 else "Culprits"
    variables = " ".join(f"{name}={value}" for name, value in _workaround(trials, found).items())
    return f"{noun}: {'; '.join(together)}. The command passes with {variables}"


def _workaround(trials: Trials, found: Findings) -> dict[str, str]:
    return {patch.env: "0" for patch in trials.patches if patch.name in found.workaround}


def _record(
    trials: Trials, found: Findings, reasons: Mapping[str, str | None], kept: bool
) -> dict[str, Any]:
    runs = [
        {
            "number": run.number,
            "on": list(run.on),
            **run.outcome._asdict(),
            "stdout": str(run.stdout) if kept else None,
            "stderr": str(run.stderr) if kept else None,
        }
        for run in trials.runs
    ]
    return {
        "result": found.result,
        "culprits": found.culprits,
        "workaround": _workaround(trials, found) if found.result == CULPRIT else {},
        "smallest_failing": list(_smallest_failing(trials)),
        "doubts": trials.doubts(),
        "took_part": [name for name, reason in reasons.items() if reason is None],
        "left_out": {name: reason for name, reason in reasons.items() if reason},
        "runs": runs,
    }
