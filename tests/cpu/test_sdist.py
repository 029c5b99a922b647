"""The source distribution: `make demo`, `make test` and `make lint` work from it, unpacked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.conftest import REPOSITORY

# For whoever has the repository alone.
LEFT_OUT = {".gitignore"}


def tracked() -> list[str]:
    """What git knows, but for files that were deleted and are still in its index."""
    command = ["git", "ls-files", "-z"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (
        OSError,
        subprocess.CalledProcessError,
    ) as error:  # none here, or a folder of another user
        told = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"git does not answer: {told.strip()[:200]}")
    names = done.stdout.split("\0")
    return [name for name in names if name and os.path.lexists(REPOSITORY / name)]


def listed(root: Path) -> set[str]:
    """What setuptools would pack of the project in ``root``."""
    done = subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "egg_info"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set((root / "gemma4_turbo.egg-info" / "SOURCES.txt").read_text().splitlines())


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="compares with a git checkout")
def test_every_file_is_packed(tmp_path: Path) -> None:
    names = tracked()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name, follow_symlinks=False)
    packed = listed(tmp_path)

    def is_packed(name: str) -> bool:
        if not os.path.isdir(REPOSITORY / name):
            return name in packed
        return any(one.startswith(f"{name}/") for one in packed)  # a link to a folder: its files

    assert {name for name in names if not is_packed(name)} == LEFT_OUT
