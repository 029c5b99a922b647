"""Engines in groups, each asked in a thread of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from bench.common.engines import Engine, console, outlived, started
from bench.common.results import Results
from gemma4_turbo.engine import states


def measure(
    make: Callable[[str], Engine],
    names: list[str],
    together: int,
    talk: Callable[[Engine], None],
    more: dict[str, Callable[[Engine], None]] | None = None,
    last: Callable[[dict[str, Engine]], None] = lambda live: None,
) -> dict[str, str]:
    """Engines in groups, each asked in a thread of its own; causes of death of those that died.

    Args:
        make: starts an engine.
        names: of all engines.
        together: how many at once; 0: all.
        talk: asks an engine what every engine is asked.
        more: by name, what is asked of one when all engines have answered; it lives until then.
        last: what is asked of a group's engines at the end; one that dies ends the run.
    """
    died: dict[str, str] = {}
    more = more or {}
    size = together or len(names)
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    kept: dict[str, Engine] = {}

    def survived(name: str, cause: str | None) -> bool:
        if cause is not None:
            console.print(f"{name}: died: {cause}")
            died[name] = cause
        return cause is None

    with contextlib.ExitStack() as stack:
        for group in groups:
            console.print(f"starting {', '.join(group)}")
            live = stack.enter_context(started(make, group))
            died |= {name: "did not start" for name in group if name not in live}
            causes = _at_once(live, talk)
            live = {name: live[name] for name, cause in causes.items() if survived(name, cause)}
            kept |= {name: engine for name, engine in live.items() if name in more}
            if group is groups[-1]:
                for name, engine in kept.items():
                    if not survived(name, outlived(engine, partial(more[name], engine))):
                        live.pop(name, None)
            last(live)
            for name, engine in live.items():
                if name not in more:
                    engine.stop()
    return died


def _at_once(live: dict[str, Engine], talk: Callable[[Engine], None]) -> dict[str, str | None]:
    """Each engine in a thread of its own: what it died of, or None."""
    with ThreadPoolExecutor(max(1, len(live))) as pool:
        try:
            causes = pool.map(lambda engine: outlived(engine, partial(talk, engine)), live.values())
            return dict(zip(live, causes, strict=True))
        except BaseException:
            for engine in live.values():
                engine.process.kill()  # or its thread would wait for it
            raise


def results_of(notes: dict[str, Any], config: dict[str, Any], patches: str) -> Results:
    """Rows that say how the model was trained; from a folder's training.json and config.json."""
    made = Results(notes["model"], config["num_hidden_layers"], [patches])
    made.base |= {
        "trained_steps": notes["steps"],
        "trained_seed": notes["seed"],
        "corpus": notes["corpus"],
    }
    return made


def add_calls(results: Results, variant: str, status: dict[str, Any]) -> None:
    """How often each active patch's code ran on the host, over all processes of an engine."""
    calls: dict[str, int] = {}
    for process in status["processes"]:
        for patch in process["patches"]:
            if patch["state"] == states.ACTIVE:
                calls[patch["name"]] = calls.get(patch["name"], 0) + patch["engaged"]
    for name, count in calls.items():
        results.add(variant, f"calls of {name}", len(status["processes"]), 0, count, "calls")
