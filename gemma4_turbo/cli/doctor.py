"""``doctor``: versions, GPU and the state of every patch, here and in running servers."""

from __future__ import annotations

import json
import os
from typing import Any

from rich.console import Console

from gemma4_turbo.cli import report
from gemma4_turbo.cli.modules import import_targets
from gemma4_turbo.engine import state_folder, states
from gemma4_turbo.engine.counters import live_processes
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any import advice


def examine() -> dict[str, Any]:
    """Apply the patches to the installed SGLang in this process and report.

    Keys: ``versions``, ``device``, ``patches``, ``problems`` (of the environment; in strict mode
    also of the state folder), ``notes`` (on the installation), ``bootstrap`` (by which ways spawned
    processes get the patches), ``state_folder`` (why it cannot be used, else None), ``servers``
    (running patched processes).
    """
    ENGINE.bootstrap()
    # SGLang takes long to import, and an off patch is off whatever it says.
    unimportable = import_targets(
        row.name for row in ENGINE.status(below=False) if row.state != states.OFF
    )
    rows = [
        row._replace(reason="; ".join(unimportable)) if row.state == states.WAITING else row
        for row in ENGINE.status()
    ]
    switches = ENGINE.switches()
    unfit = state_folder.problem()
    from gemma4_turbo.ports.any.routes import bootstrap_routes

    return {
        "versions": report.versions(),
        "device": report.device(),
        "patches": report.as_records(rows),
        "problems": [*switches.problems, *([unfit] if unfit and switches.strict else [])],
        "notes": advice.on_installation(),
        "bootstrap": bootstrap_routes(),
        "state_folder": unfit,
        "servers": [
            {"pid": other.pid, "command": other.command, "patches": other.patches}
            for other in live_processes()
            if other.pid != os.getpid()
        ],
    }


def exit_code(found: dict[str, Any]) -> int:
    """2: a variable is wrong. 1: a patch that is on cannot work. 0: all well."""
    if found["problems"]:
        return 2
    bad = any(patch["state"] in states.REFUSED_WHEN_STRICT for patch in found["patches"])
    return 1 if bad else 0


def run(as_json: bool) -> int:
    """The command."""
    found = examine()
    if as_json:
        print(json.dumps(found, indent=1))
        return exit_code(found)
    console = Console()
    names = ", ".join(f"{k} {v or 'not installed'}" for k, v in found["versions"].items())
    console.print(report.plain(names))
    console.print(report.plain(f"GPU: {found['device'] or 'none'}"))
    routes = " and ".join(found["bootstrap"]) or "nothing: they would stay stock"
    console.print(report.plain(f"Spawned processes get the patches by: {routes}"))
    if found["state_folder"]:
        line = f"Other processes cannot be seen: {found['state_folder']}"
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(report.table(found["patches"]))
    for server in found["servers"]:
        title = f"Running: pid {server['pid']}: {server['command']}"
        console.print(report.table(server["patches"], title))
    for note in found["notes"]:
        console.print(report.plain("note: ", "yellow").append_text(report.plain(note)))
    for problem in found["problems"]:
        console.print(report.plain("error: ", "red").append_text(report.plain(problem)))
    return exit_code(found)
