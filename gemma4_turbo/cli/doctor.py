"""``doctor``: versions, GPU and the state of every patch, here and in running servers."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from typing import Any

from gemma4_turbo.cli import outlook, report
from gemma4_turbo.cli.modules import NOT_INSTALLED, import_targets
from gemma4_turbo.cli.report import Console
from gemma4_turbo.engine import fingerprints, gpu_profile, state_folder, states, switches
from gemma4_turbo.engine.counters import live_processes
from gemma4_turbo.engine.imports import installed_release
from gemma4_turbo.engine.states import PatchStatus
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.launch import advice
from gemma4_turbo.ports.any.launch.routes import bootstrap_routes

STAY_STOCK = (
    "spawned processes would stay stock: install gemma4_turbo with pip (and let SGLANG_PLUGINS name "
    "gemma4_turbo if it is set), or PYTHONPATH=$(gemma4-turbo sitecustomize)"
)
NOTHING_WORKS = 3
WITHOUT_PROFILE = ("extend_attention", "decode_attention", "skinny_gemm", "experts_few")
"""Patches that know their tiles on Hopper alone."""


def examine(imported: bool = False) -> Iterator[tuple[str, Any]]:
    """What there is to say, part by part, the quick ones first.

    ``versions``, ``bootstrap`` (by which ways spawned processes get the patches), ``state_folder``
    (why it cannot be used, else None), ``patches``, ``servers`` (running patched processes), ``notes``
    (on the installation), ``device``, ``gpu_profile`` (its path, whether it is in use or ignored, the path
    of the package's for this GPU or None, and a sentence), ``problems`` (of the environment; in strict
    mode also of the state folder), ``obstacles`` (why nothing can work).

    Args:
        imported: import what the patches replace and install them, which takes a minute, else judge
            by the sources. Only the first sees wrappers of other packages, and modules that cannot
            be imported.
    """
    versions = report.versions()
    yield "versions", versions
    routes = bootstrap_routes()
    yield "bootstrap", list(routes)
    unfit = state_folder.problem()
    yield "state_folder", unfit
    ENGINE.bootstrap()
    rows = _imported() if imported else _judged()
    yield "patches", report.as_records(rows)
    yield (
        "servers",
        [
            {"pid": other.pid, "command": other.command, "patches": other.patches}
            for other in live_processes()
            if other.pid != os.getpid()
        ],
    )
    yield "notes", advice.on_installation()
    device = report.device()
    yield "device", device
    yield "gpu_profile", _gpu_profile(device)
    wanted = ENGINE.switches()
    yield "problems", [*wanted.problems, *([unfit] if unfit and wanted.strict else [])]
    obstacles = [] if installed_release() else [NOT_INSTALLED]
    if all(row.state == states.OFF for row in rows):
        yield "obstacles", obstacles  # it is meant to stay stock
        return
    obstacles += filter(None, [report.torch_problem()])
    if versions["wrapt"] is None and importlib.util.find_spec("wrapt") is None:
        obstacles.append("wrapt is not installed: pip install wrapt")
    yield "obstacles", [*obstacles, *([] if routes else [STAY_STOCK])]


def _gpu_profile(device: str | None) -> dict[str, Any]:
    """The profiles in use, or that there is none and what it would take."""
    where, profile, reason = gpu_profile.lookup()
    packaged = None if device is None else gpu_profile.packaged(device)
    record = {
        "path": where,
        "in_use": profile is not None,
        "ignored": bool(reason),
        "packaged": None if packaged is None else packaged.path,
    }
    measure = f"{gpu_profile.TUNE} measures, in five minutes on an idle GPU"
    theirs = ""
    if packaged is not None:
        key = packaged.profile.key
        theirs = f"the package's, measured on {key.gpu} with driver {key.driver}"
        theirs += f": {_counted(packaged.profile)}"
    if profile is not None:
        told = f"{where}: {_counted(profile)} on {profile.key.gpu}"
        for on in (True, False):
            known = (name for name in profile.patches if name in ENGINE.runs)
            names = [name for name in known if profile.patches[name].on == on]
            told += f"; {'on' if on else 'off'}: {', '.join(names)}" if names else ""
        if device not in (None, profile.key.gpu):
            told += f"; {device} takes none of the tiles"
        told += f"; for other shapes {theirs}" if theirs else ""
    elif reason:
        told = f"{theirs}; " if theirs else ""
        told += f"{where} is ignored: {reason}; {measure}"
    elif theirs:
        told = f"{theirs}; {measure}"
    elif where is None:
        told = f"none: {switches.GPU_PROFILE} says so, or there is no home folder"
    elif device is None:
        told = f"none at {where}, and no GPU to measure"
    elif _known():
        told = f"none at {where}: the package's own tiles are for this GPU; {measure}"
    else:
        without = ", ".join(WITHOUT_PROFILE)
        told = f"none at {where}: without one {without} run stock's code on this GPU; {measure}"
    return record | {"told": told}


def _counted(profile: gpu_profile.Profile) -> str:
    tiled = sum(bool(shape.tile) for shape in profile.shapes)
    return f"{tiled} tiles of {len(profile.shapes)} measurements"


def _known() -> bool:
    import torch

    from gemma4_turbo.kernels import measured

    return measured.known("x", torch.device("cuda", 0)) is None


def _imported() -> list[PatchStatus]:
    # An off patch is off whatever SGLang says.
    wanted = [row.name for row in ENGINE.status(below=False) if row.state != states.OFF]
    with report.Progress() as progress:
        unimportable = import_targets(wanted, progress)
    return [
        row._replace(reason="; ".join(unimportable)) if row.state == states.WAITING else row
        for row in ENGINE.status()
    ]


def _judged() -> list[PatchStatus]:
    """Waiting patches by their sources, which takes seconds where importing SGLang takes a minute."""
    rows = []
    definitions = fingerprints.Definitions(fingerprints.installed_source)
    with report.Progress() as progress:
        for row in ENGINE.status():
            if row.state == states.WAITING:
                progress.detail(f"judging {row.name} by SGLang's sources")
                _, told, why = row.reason.partition(f"; {states.ALONE}: ")
                state, reason = outlook.foretold(ENGINE.runs[row.name], definitions)
                row = row._replace(state=state, reason=reason + told + why)
            rows.append(row)
    return rows


def exit_code(found: dict[str, Any]) -> int:
    """3: nothing can work. 2: a variable is wrong. 1: a patch that is on cannot work. 0: all well."""
    if found.get("obstacles"):
        return NOTHING_WORKS
    if found["problems"]:
        return 2
    bad = any(patch["state"] in states.REFUSED_WHEN_STRICT for patch in found["patches"])
    return 1 if bad else 0


def run(as_json: bool, everything: bool = False, imported: bool = False) -> int:
    """The command."""
    found: dict[str, Any] = {}
    console = Console()
    for key, value in examine(imported):
        found[key] = value
        if not as_json:
            report.show(console, _lines(key, value, everything))
    if as_json:
        found["verdict"] = report.verdict(found["patches"])
        if wrong := found.get("obstacles") or found["problems"]:
            found["error"] = "; ".join(wrong)
        print(json.dumps(found, indent=1))
    else:
        last = report.closing(found["patches"])
        if found.get("obstacles"):
            last = f"nothing can work; {last}"
        style = "green" if exit_code(found) == 0 else "red"
        report.show(console, report.Listing().add(last, 0, style))
    return exit_code(found)


def _lines(key: str, value: Any, everything: bool) -> report.Listing:
    """What one part of `examine` looks like."""
    lines = report.Listing()
    if key == "versions":
        lines.add(", ".join(f"{k} {v or 'not installed'}" for k, v in value.items()), 2)
    elif key == "bootstrap":
        routes = " and ".join(value) or "nothing: they would stay stock"
        lines.add(f"Spawned processes get the patches by: {routes}", 2)
    elif key == "state_folder" and value:
        lines.add(f"Other processes cannot be seen: {value}", 2, "red")
    elif key == "patches":
        return report.table(value, calls=False, everything=everything)
    elif key == "servers":
        for server in value:
            title = f"Running: pid {server['pid']}: {server['command']}"
            lines.lines += report.process_table(server["patches"], title, everything).lines
    elif key == "device":
        lines.add(f"GPU: {value or 'none'}", 2)
    elif key == "gpu_profile":
        lines.add(f"GPU profile: {value['told']}", 2, "yellow" if value["ignored"] else "")
    elif key in ("notes", "problems", "obstacles"):
        word, style = ("note", "yellow") if key == "notes" else ("error", "red")
        for sentence in value:
            lines.add(f"{word}: {sentence}", 2, style)
    return lines
