"""Fixtures of the tests that need no GPU."""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo import instance
from gemma4_turbo.catalogue import Patch
from gemma4_turbo.engine import states, swap
from gemma4_turbo.engine.run import PatchRun, ledger
from tests.cpu.synthetic import World, clean_environment
from tests.cpu.warm import Warm

REPOSITORY = Path(__file__).resolve().parents[2]
# Few tests each, of which one waits a minute and more for processes that import SGLang, or for a compiler.
LONGEST = (
    *("test_server.py", "test_commands.py", "test_compiles.py", "test_stock.py"),
    *("test_gpu_tests.py", "test_releases.py", "test_two_ranks.py"),
    "test_adding_a_patch.py",
)
_numbers = itertools.count()

Python = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker of the tests that start servers."""
    config.addinivalue_line("markers", "server: starts a real SGLang server (slow)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="module", autouse=True)
def few_modules() -> Iterator[None]:
    """A replaced function is looked for in modules of SGLang's, of ours and of tests: no other has one.

    That is shown in `tests.cpu.ports.any.test_under_sglang`. The others' names are two thirds of all, half a test's time.
    """
    there = {name.partition(".")[0] for name in sys.modules} - {
        "sglang",
        "gemma4_turbo",
        "tests",
        "bench",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap, "UNDER_SGLANG", swap.UNDER_SGLANG | there)
        patch.setattr(swap, "_under", {})
        yield


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A stand-in package of a name never used before."""
    clean_environment(monkeypatch)
    monkeypatch.setenv("GEMMA4_TURBO_STATE_DIR", str(tmp_path / "state"))
    ledger.cache_clear()
    made = World(tmp_path, f"standin{os.getpid()}_{next(_numbers)}", monkeypatch)
    yield made
    made.close()
    ledger().close()
    ledger.cache_clear()


@functools.cache
def recorded_states() -> dict[tuple[str, str], str]:
    """By release and patch."""
    with (REPOSITORY / "bench" / "results" / "releases.csv").open() as file:
        return {(row["release"], row["patch"]): row["state"] for row in csv.DictReader(file)}


def state_by_default(patch: Patch) -> str:
    """What the installed release's status says of a patch when no switch is set: as it is on record."""
    if not patch.default:
        return states.OFF
    state = recorded_states()[metadata.version("sglang"), patch.name]
    # None of the defects that patches look for by themselves is in a release.
    return states.UPSTREAMED if state == "looks" else state


@functools.cache
def _patches_there() -> list[str]:
    """Of the baseline's line all; another has not the modules of every patch. Once: they are read for it."""
    from gemma4_turbo.engine import fingerprints

    source_of = functools.cache(fingerprints.installed_source)  # patches share modules
    runs = instance.ENGINE.runs
    return [name for name, run in runs.items() if fingerprints.any_there(run.ports, source_of)]


@contextlib.contextmanager
def patched_sglang(
    tmp_path_factory: pytest.TempPathFactory, only: Sequence[str] | None = None
) -> Iterator[None]:
    """SGLang's patched modules imported with the patches applied; all put back at the end."""
    kept = {name: os.environ[name] for name in os.environ if name.startswith("GEMMA4_TURBO")}
    for name in kept:
        del os.environ[name]
    os.environ["GEMMA4_TURBO_STATE_DIR"] = str(tmp_path_factory.mktemp("state"))
    from gemma4_turbo.cli.modules import require_targets

    instance.ENGINE.apply(only=only)
    require_targets(names=_patches_there())
    yield
    instance.ENGINE.revert()
    for name in [name for name in os.environ if name.startswith("GEMMA4_TURBO")]:
        del os.environ[name]
    os.environ.update(kept)


@contextlib.contextmanager
def only_patch(name: str) -> Iterator[PatchRun]:
    """This patch on and no other, none of its calls declined so far; reverted at the end."""
    instance.ENGINE.apply(only=[name])
    run = instance.ENGINE.runs[name]
    assert run.state == states.ACTIVE, run.reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_decline_reason", "")
        yield run
        instance.ENGINE.revert()


def turn_on(name: str) -> None:
    """This patch on and no other; it must be active."""
    instance.ENGINE.apply(only=[name])
    run = instance.ENGINE.runs[name]
    assert run.state == states.ACTIVE, run.reason


@contextlib.contextmanager
def standing(name: str, ours: Callable[..., Any]) -> Iterator[PatchRun]:
    """This patch on and no other, none of its calls declined so far; it stays for the next test.

    Judging the sources takes its time. ``ours``: one of its replacements, or what is in its place.
    """
    run = instance.ENGINE.runs[name]
    if run.state != states.ACTIVE or run.port is None or ours.__module__ != run.port.module:
        instance.ENGINE.revert()
        turn_on(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_decline_reason", "")
        yield run


@pytest.fixture(scope="module")
def patch_imported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """SGLang imported with the patch that the test's module calls NAME; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=[request.module.NAME]):
        yield


@pytest.fixture
def stock_first(patch_imported: None) -> Iterator[None]:
    """A test starts with stock; `turn_on` puts the patch in."""
    instance.ENGINE.revert()
    yield
    instance.ENGINE.revert()


_warm: list[Warm] = []


def warm(environment: dict[str, str]) -> Warm:
    """The process with SGLang's libraries, one for all workers; tests that need none start none."""
    if not _warm:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # as all workers have it
        where = f"{tempfile.gettempdir()}/gemma4_turbo-{run}" if run else tempfile.mkdtemp()
        _warm.append(Warm(environment, Path(where)))
    return _warm[0]


def pytest_sessionfinish() -> None:
    """Let go of the process with SGLang's libraries."""
    while _warm:
        _warm.pop().close()


def run_scenario(module: str, environment: dict[str, str], folder: Path, timeout: float) -> Any:
    """What ``python -m module folder`` printed last, as JSON: a process of its own for SGLang."""
    done = warm(environment).run(
        module=module,
        arguments=[str(folder)],
        env={
            **environment,
            "PYTHONPATH": str(REPOSITORY),
            "TRITON_INTERPRET": "1",
            "GEMMA4_TURBO_STATE_DIR": str(folder / "state"),
        },
        cwd=str(REPOSITORY),
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For subprocesses: this environment without anything that speaks to the package.

    They keep what they compile: from nothing but sources SGLang takes twice as long to import.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GEMMA4_TURBO", "SGLANG_"))
        and name not in ("PYTHONPATH", "TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE")
    }
    return {**kept, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def python(environment: dict[str, str], tmp_path: Path) -> Python:
    """Runs code in a fresh interpreter; keyword arguments are environment variables."""

    def run(
        code: str, *arguments: str, timeout: float = 120, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        state = {"GEMMA4_TURBO_STATE_DIR": str(tmp_path / "state")}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment | state | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def warm_python(environment: dict[str, str], tmp_path: Path) -> Python:
    """As `python`, for code that imports SGLang: what that needs of others is imported already."""

    def run(
        code: str, *arguments: str, timeout: float = 120, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        state = {"GEMMA4_TURBO_STATE_DIR": str(tmp_path / "state")}
        return warm(environment).run(
            code=code,
            arguments=arguments,
            env=environment | state | variables,
            cwd=str(tmp_path),
            timeout=timeout,
        )

    return run
