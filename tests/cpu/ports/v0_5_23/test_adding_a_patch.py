"""The layer fusion of `docs/adding-a-patch.md`, built file by file as the page says, and its tests run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.conftest import REPOSITORY, warm

PAGE = (REPOSITORY / "docs" / "adding-a-patch.md").read_text()
SECTION = "## A fusion inside a layer"
# In a process that comes from the repository's tests, with the copy's. What speeds up Triton's
# interpreter is in.
PYTEST = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
    if name != "tests.interpreter":
        del sys.modules[name]
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
LARGE = shutil.ignore_patterns("__pycache__", "gpu", "*.so")


def blocks() -> Iterator[tuple[str, str, str]]:
    """Of the section: the file that a block is for, named at the end of a line; its language; itself."""
    section = PAGE[PAGE.index(SECTION) :].split("\n## ")[0]
    name = ""
    for found in re.finditer(r"`([\w/]+\.py)`:$|^```(\w+)\n(.*?)^```$", section, re.M | re.S):
        if found[1]:
            name = found[1]
        elif found[2]:
            yield name, found[2], found[3]


def changed(source: str, diff: str) -> str:
    """The source with one hunk applied, which must fit at one place."""
    before, after = "", ""
    for line in diff.splitlines():
        sign, text = line[:1] or " ", f"{line[1:]}\n"
        before += text if sign in " -" else ""
        after += text if sign in " +" else ""
    assert source.count(before) == 1, f"{source.count(before)} places for:\n{diff}"
    return source.replace(before, after)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """The repository's package and tests with all that the page adds."""
    for folder in ("gemma4_turbo", "tests"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=LARGE)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for name, language, text in blocks():
        path = tmp_path / name
        if language == "diff":
            path.write_text(changed(path.read_text(), text))
        else:
            assert not path.exists(), name
            path.write_text(text)
    return tmp_path


def test_the_page_builds_a_patch(built: Path, environment: dict[str, str]) -> None:
    """Every file that it names, and no other; they pass the page's own tests, and the linter."""
    names = [name for name, _, _ in blocks()]
    assert [Path(name).parts[1] for name in dict.fromkeys(names)] == [
        *("kernels", "fusions", "ports", "ports", "ports", "ports", "catalogue.py", "cpu")
    ]
    there: Any = {
        **{"env": {**environment, "PYTHONPATH": str(built), "TRITON_INTERPRET": "1"}},
        **{"cwd": str(built), "timeout": 600},
    }
    for command in ("check", "format --check"):
        lint = [sys.executable, "-m", "ruff", *command.split(), *set(names)]
        done = subprocess.run(lint, **there, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    options = ["-q", "-n", "0", "-p", "no:cacheprovider"]
    done = warm(environment).run(code=PYTEST, arguments=[*options, names[-1]], **there)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout
