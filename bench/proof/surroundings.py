"""What a server finds when it starts, by the run's name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.common.variants import PATCHED
from bench.proof.foreign import bad_path, foreign_files, give_away, without_root_rights

REPOSITORY = Path(__file__).resolve().parents[2]

EXACT, HOSTILE, SQUATTED = "exact", "hostile folder", "taken folder"


@dataclass
class Surroundings:
    """What a server finds when it starts."""

    environment: dict[str, str] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)  # in front of PYTHONPATH
    watched: list[Path] = field(default_factory=list)  # nothing in these may change
    prefix: list[str] = field(default_factory=list)  # in front of the command
    notes: list[str] = field(default_factory=list)


def entry_point(scratch: Path) -> Path:
    """A folder that makes the package look installed: SGLang finds its entry point there."""
    folder = scratch / "entry"
    metadata = folder / "gemma4_turbo-0.1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: gemma4-turbo\nVersion: 0.1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ngemma4_turbo = gemma4_turbo.plugin:register\n"
    )
    return folder


EXACTLY = {"GEMMA4_TURBO_PROFILE": "exact"}  # so that every bit must be stock's


def plain(scratch: Path, path: list[str]) -> Surroundings:
    """Nothing but a state folder of the server's own."""
    return Surroundings({"GEMMA4_TURBO_STATE_DIR": str(scratch / "state")})


def exact(scratch: Path, path: list[str]) -> Surroundings:
    """As `plain`, with bitwise patches only."""
    found = plain(scratch, path)
    found.environment |= EXACTLY
    return found


def hostile(scratch: Path, path: list[str]) -> Surroundings:
    """The state folder is everybody's and full; PYTHONPATH is full of what is no folder."""
    state, outside = scratch / "everybody", scratch / "outside"
    outside.mkdir()
    victim = outside / "victim.json"
    victim.write_text('{"mine": true}\n')
    foreign_files(state, victim)
    found = Surroundings({"GEMMA4_TURBO_STATE_DIR": str(state), **EXACTLY})
    give_away(state, found.notes)
    if not os.geteuid():
        os.chown(state, 0, 0)
    state.chmod(0o777)
    found.path, locked = bad_path(scratch)
    found.prefix = without_root_rights(locked, path, found.notes)
    found.watched = [state, outside, scratch / "path"]
    return found


def squatted(scratch: Path, path: list[str]) -> Surroundings:
    """The default state folder is another user's; the package also comes by sitecustomize."""
    temporary, outside = scratch / "t", scratch / "outside"
    for made in (temporary, outside):
        made.mkdir()
    temporary.chmod(0o1777)
    victim = outside / "victim.json"
    victim.write_text('{"mine": true}\n')
    folder = temporary / f"gemma4_turbo-{os.getuid()}"
    foreign_files(folder, victim)
    found = Surroundings({"TMPDIR": str(temporary), **EXACTLY})
    folder.chmod(0o777)
    give_away(folder, found.notes)
    entries, locked = bad_path(scratch)
    found.path = [str(REPOSITORY / "sitecustomize_example"), *entries]
    found.prefix = without_root_rights(locked, path, found.notes)
    found.watched = [folder, outside, scratch / "path"]
    return found


SURROUNDINGS: dict[str, Callable[[Path, list[str]], Surroundings]] = {
    PATCHED: plain,
    EXACT: exact,
    HOSTILE: hostile,
    SQUATTED: squatted,
}
