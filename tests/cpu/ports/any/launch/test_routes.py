"""Ways into the processes that SGLang starts: what is looked at, and which launches they miss."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma4_turbo.engine import gates
from gemma4_turbo.ports.any.launch import launch_gates, model_gates, routes
from gemma4_turbo.ports.any.launch.routes import ENTRY_POINT, SITECUSTOMIZE, bootstrap_routes
from tests.cpu.conftest import REPOSITORY

OURS = "import gemma4_turbo\ngemma4_turbo.bootstrap()\n"
BIG = b"x = 0\n" * (routes.MOST_BYTES // 6 + 1)


@pytest.fixture(autouse=True)
def only_sitecustomize(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The entry point is not allowed."""
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)


def folder(path: Path, code: str | bytes = OURS, name: str = "sitecustomize.py") -> Path:
    """A folder with that file in it."""
    file = path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(code.encode() if isinstance(code, str) else code)
    return path


def archive(path: Path, name: str = "sitecustomize.py", code: str | bytes = OURS) -> Path:
    """A zip with that file in it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(name, code)
    return path


def ran(pythonpath: str, cwd: Path) -> bool:
    """Whether Python itself runs a ``sitecustomize`` of ours in a process with that PYTHONPATH."""
    environ = {**os.environ, "PYTHONPATH": f"{pythonpath}:{REPOSITORY}"}
    code = "import sys; print('gemma4_turbo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=cwd, capture_output=True, timeout=60
    )
    return done.stdout.split() == [b"True"]


def unusable(tmp_path: Path) -> dict[str, str]:
    """Entries of PYTHONPATH that hold nothing to run, each of its own kind."""
    (tmp_path / "dir" / "sitecustomize.py").mkdir(parents=True)
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "sitecustomize.py")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "text").write_text("no zip")
    (tmp_path / "broken.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    folder(tmp_path / "namespace", name="sitecustomize/other.py")
    return {
        "missing": "missing",
        "a folder of that name": "dir",
        "a FIFO of that name": "fifo",
        "a FIFO": "pipe",
        "a link to itself": "loop",
        "a text file": "text",
        "an empty zip": "broken.zip",
        "a namespace package": "namespace",
        "no UTF-8": os.fsdecode(b"\xff\xfe"),
        "too long": "x" * 5000,
        "below a file": "text/sub",
    }


def test_as_python_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every kind of entry, against a real interpreter."""
    folder(tmp_path / "ours")
    folder(tmp_path / "package", name="sitecustomize/__init__.py")
    folder(tmp_path / "other", "x = 1\n")
    folder(tmp_path / "comment", '"""Not gemma4_turbo."""\n# import gemma4_turbo\n')
    folder(tmp_path / "latin", b"# coding: latin-1\nx = '\xe9'\n" + OURS.encode())
    folder(tmp_path / "broken", OURS + "def (:\n")
    folder(tmp_path / "binary", b"gemma4_turbo\0\xff\xfe")
    archive(tmp_path / "ours.zip")
    archive(tmp_path / "deep.zip", "inner/sitecustomize.py")
    archive(tmp_path / "other.zip", code="x = 1\n")
    cases = {
        "ours": True,
        "package": True,
        "ours.zip": True,
        "deep.zip/inner": True,
        "latin": True,
        "other": False,
        "comment": False,
        "broken": False,
        "binary": False,
        "other.zip": False,
        "other:ours": False,  # the first one only
        "broken:ours": False,
        "ours:other": True,
        "other.zip:ours": False,
        "ours.zip:other": True,
        ":".join([*unusable(tmp_path).values(), "ours"]): True,
    }
    for pythonpath, found in cases.items():
        monkeypatch.setenv("PYTHONPATH", pythonpath)
        assert bootstrap_routes() == ([SITECUSTOMIZE] if found else []), pythonpath
        assert not bootstrap_routes().problems
        assert ran(pythonpath, tmp_path) is found, pythonpath


@pytest.mark.parametrize("pythonpath", ["", ":nowhere", "nowhere:"])
def test_an_empty_entry_is_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pythonpath: str
) -> None:
    """An empty variable has no entries at all."""
    folder(tmp_path)
    monkeypatch.setenv("PYTHONPATH", pythonpath)
    assert bootstrap_routes() == ([SITECUSTOMIZE] if pythonpath else [])


def test_a_current_folder_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python skips it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("PYTHONPATH", f":{folder(tmp_path / 'ours')}")
    assert bootstrap_routes() == [SITECUSTOMIZE]
    assert not bootstrap_routes().problems


def test_a_folder_that_this_user_may_not_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python skips it; so do we, with nothing to refuse."""
    locked = folder(tmp_path / "locked" / "inner")
    monkeypatch.setenv("PYTHONPATH", f"{locked}:{folder(tmp_path / 'ours')}")
    real = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(str(locked)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    if os.getuid():
        (tmp_path / "locked").chmod(0)
    else:  # root may search everything
        import importlib._bootstrap_external as external

        monkeypatch.setattr(external._os, "stat", stat)
    found = bootstrap_routes()
    if not os.getuid():
        monkeypatch.undo()
    (tmp_path / "locked").chmod(0o700)
    assert found == [SITECUSTOMIZE]
    assert not found.problems


def test_one_that_python_cannot_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python says so and goes on: nothing is bootstrapped, and the next one is not run."""
    unreadable = folder(tmp_path / "unreadable")
    monkeypatch.setenv("PYTHONPATH", f"{unreadable}:{folder(tmp_path / 'ours')}")

    def denied(spec: Any) -> bytes:
        raise PermissionError(13, "Permission denied", spec.origin)

    monkeypatch.setattr(routes, "_read", denied)
    assert bootstrap_routes() == []
    assert not bootstrap_routes().problems


@pytest.mark.parametrize("zipped", [False, True])
def test_a_huge_one_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, zipped: bool
) -> None:
    """It is said that it was not looked at."""
    if zipped:
        entry = archive(tmp_path / "huge.zip", code=BIG + OURS.encode())
    else:
        entry = folder(tmp_path / "huge", BIG)
        with (entry / "sitecustomize.py").open("r+b") as file:
            file.truncate(1 << 40)  # no machine has the memory
    monkeypatch.setenv("PYTHONPATH", str(entry))
    found = bootstrap_routes()
    assert found == []
    assert found.problems == caplog.messages or f"gemma4_turbo: {found.problems[0]}" in caplog.text
    assert "sitecustomize could not be looked at: ValueError: " in found.problems[0]
    assert "is larger than" in found.problems[0]


def test_thousands_of_entries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each looked at once, and none kept by Python's import system."""
    ours = folder(tmp_path / "ours")
    entries = [str(tmp_path / f"missing{n}") for n in range(2000)]
    monkeypatch.setenv("PYTHONPATH", ":".join([*entries, *entries, str(ours)]))
    assert bootstrap_routes() == [SITECUSTOMIZE]
    assert not set(entries) & set(sys.path_importer_cache)


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_flags_that_spawned_processes_inherit(tmp_path: Path, flag: str) -> None:
    """With them Python looks at no PYTHONPATH, or runs no ``sitecustomize``."""
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); sys.path += {sys.path!r}\n"
        "from gemma4_turbo.ports.any.launch import routes; print(routes._sitecustomize())"
    )
    environ = {**os.environ, "PYTHONPATH": f"{folder(tmp_path / 'ours')}:{REPOSITORY}"}
    for flags, found in (([flag], "False"), ([], "True")):
        done = subprocess.run(
            [sys.executable, *flags, "-c", code], env=environ, capture_output=True, text=True
        )
        assert done.stdout.strip() == found, done.stderr


def test_entry_points_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """One way that breaks does not hide the other."""

    def broken(**kwargs: Any) -> Any:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setattr(routes, "entry_points", broken)
    monkeypatch.setenv("PYTHONPATH", str(folder(tmp_path / "ours")))
    found = bootstrap_routes()
    assert found == [SITECUSTOMIZE]
    assert "entry point could not be looked at: UnicodeDecodeError" in found.problems[0]
    assert sum("UnicodeDecodeError" in line for line in caplog.messages) == 1


# -- launches that the ways miss ------------------------------------------------------------------


class Engine:
    """As SGLang's."""


class RayEngine(Engine):
    """As SGLang's: its schedulers are Ray actors."""


class Mine(RayEngine):
    """Somebody's own."""


def run_scheduler_process() -> None:
    """Not SGLang's."""


@pytest.mark.parametrize(
    ("engine", "arguments", "told"),
    [
        (RayEngine, {}, True),
        (Mine, {}, True),
        (Engine, {}, False),
        (Engine, {"use_ray": True}, False),  # that class starts processes whatever is asked
        (None, {"use_ray": True}, True),
        (None, {"use_ray": True, "grpc_mode": True}, False),  # SGLang looks at grpc_mode first
        (None, {}, False),
    ],
)
def test_ray(engine: Any, arguments: dict[str, Any], told: bool) -> None:
    """Neither way is known to reach the workers."""
    for ways in ([ENTRY_POINT], [SITECUSTOMIZE], [ENTRY_POINT, SITECUSTOMIZE]):
        found = routes.unreached_schedulers(ways, engine, SimpleNamespace(**arguments), None)
        assert bool(found) is told
        assert not told or "--use-ray" in found[0]


def test_somebody_elses_scheduler_process() -> None:
    """It may load the plugins or not."""
    theirs = SimpleNamespace(__module__="sglang.srt.managers.scheduler")
    theirs.__name__ = "run_scheduler_process"
    for starter, told in ((run_scheduler_process, True), (theirs, False), (None, False)):
        found = routes.unreached_schedulers([ENTRY_POINT], Engine, None, starter)
        assert bool(found) is told
        assert not routes.unreached_schedulers([SITECUSTOMIZE], Engine, None, starter)
        assert not told or f"{__name__}.run_scheduler_process" in found[0]


@pytest.mark.parametrize(
    ("ranks", "ways", "told"),
    [
        (1, [ENTRY_POINT], False),
        (2, [ENTRY_POINT], True),
        (2, [SITECUSTOMIZE], False),
        (2, [], True),
        ("2", [], False),
    ],
)
def test_ranks_of_an_encoder_server(ranks: Any, ways: list[str], told: bool) -> None:
    """The first is in the main process, which loads the plugins."""
    found = routes.unreached_encoders(ways, SimpleNamespace(tp_size=ranks))
    assert bool(found) is told
    assert not told or f"{ranks} ranks" in found[0]


@pytest.mark.parametrize(
    ("ways", "told"), [([ENTRY_POINT], True), ([], True), ([SITECUSTOMIZE], False)]
)
def test_replicas_of_an_encoder_server(ways: list[str], told: bool) -> None:
    """None is in the main process: SGLang asks for them only where there are several."""
    found = routes.unreached_replicas(ways, SimpleNamespace(dp_size=3))
    assert bool(found) is told
    assert not told or "--dp-size 3: every encoder" in found[0]


def source(module: str) -> str:
    """The installed SGLang's, not imported."""
    return path_of(module).read_text()


def path_of(module: str) -> Path:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], *module.split(".")[1:])
    return path.with_suffix(".py")


def test_sglang_starts_its_processes_as_said() -> None:
    """Where it loads plugins, and where it does not."""
    scheduler = source("sglang.srt.managers.scheduler")
    starter = scheduler[scheduler.index("\ndef run_scheduler_process(") :]
    assert "\n    load_plugins()\n" in starter
    assert scheduler.count("load_plugins()") == 1
    for module in (
        "sglang.srt.ray.scheduler_actor",
        "sglang.srt.ray.data_parallel_controller",
        *(target.partition(":")[0] for target in launch_gates.ENCODERS),
        "sglang.bench_one_batch",
    ):
        if not path_of(module).exists():
            continue  # of another release
        assert "load_plugins" not in source(module), module
        assert "run_scheduler_process(" not in source(module), module
    old, new = model_gates.WRITERS[:5], model_gates.WRITERS[5:]
    moved = [
        (launch_gates.ENCODERS[:2], (*launch_gates.ENCODERS[2:], launch_gates.REPLICAS)),
        (launch_gates.ENCODERS_LOADED[:1], launch_gates.ENCODERS_LOADED[1:]),
        (old, new),
    ]
    for family in moved:  # a release has all of one side
        assert any(all(map(defined, alternative)) for alternative in family), family
    elsewhere = {target for family in moved for targets in family for target in targets}
    for target in gates._GATES.keys() - elsewhere:
        assert defined(target), target


def defined(target: str) -> bool:
    """Whether SGLang's source has the function."""
    module, _, qualname = target.partition(":")
    if not path_of(module).exists():
        return False
    return f"def {qualname.rpartition('.')[2]}(" in source(module)
