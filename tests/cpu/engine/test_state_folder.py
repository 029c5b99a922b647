"""The state folder: in what place and condition it is used, and what lies in it untouched."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo.engine import counters, processes, state_folder, states, summary
from gemma4_turbo.engine.counters import Ledger, descendants, live_processes
from gemma4_turbo.engine.processes import Process
from gemma4_turbo.engine.state_folder import file_head, file_name
from gemma4_turbo.engine.switches import STATE_DIR
from gemma4_turbo.ports.any.launch import launch_gates
from tests.cpu.conftest import REPOSITORY, Python
from tests.cpu.synthetic import World, only_row, record, returning

NOBODY = 1000
ROW = {"name": "one", "state": "active", "reason": "installed"}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of this test, not there yet."""
    monkeypatch.setenv(STATE_DIR, str(tmp_path / "state"))
    monkeypatch.setattr(state_folder, "_said", set())
    monkeypatch.setattr(state_folder, "_failed", {})
    return tmp_path / "state"


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    """Removes its files at the end."""
    made = Ledger()
    yield made
    made.close()


@pytest.fixture
def dead() -> Process:
    """A process that is gone, of this boot and PID namespace."""
    child = subprocess.Popen(["true"])
    child.wait()
    return processes.own()._replace(pid=child.pid, start=1)


@pytest.fixture(scope="module")
def memory() -> Iterator[int]:
    """Shared with every child of `sleeping`, under the same number there as here."""
    descriptor = os.memfd_create("test")
    yield descriptor
    os.close(descriptor)


SHARED: dict[int, int] = {}  # by process: the descriptor of its counters


@contextmanager
def sleeping(memory: int) -> Iterator[tuple[subprocess.Popen[bytes], Process]]:
    """A child that counts nothing by itself."""
    with subprocess.Popen(["sleep", "60"], pass_fds=(memory,)) as child:
        fields = processes._stat_fields(child.pid)
        assert fields is not None
        SHARED[child.pid] = memory
        yield child, processes.own()._replace(pid=child.pid, start=int(fields[19]))
        child.kill()
        del SHARED[child.pid]


@pytest.fixture
def alive(memory: int) -> Iterator[Process]:
    """Whose counters are what `leave` writes."""
    with sleeping(memory) as (_, process):
        yield process


def states_of(process: Process, *patches: Any, counters: Any = 0) -> bytes:
    """As the process would write them."""
    more = json.dumps({"counters": counters, "patches": patches})
    return file_head(process, "json") + b", " + more.encode()[1:]


def counters_of(process: Process, *cells: int) -> bytes:
    """As the process would leave them."""
    values = [*cells, *[0] * (counters._CELLS - len(cells))]
    return file_head(process, "counters").ljust(counters._HEAD, b"\0") + b"".join(
        value.to_bytes(8, "little", signed=True) for value in values
    )


def leave(folder: Path, process: Process, *cells: int) -> None:
    """The states, and the counters of one that lives."""
    memory = SHARED.get(process.pid)
    written = states_of(process, ROW, counters=memory or 0)
    (folder / file_name(process, "json")).write_bytes(written)
    if memory is not None:
        share(memory, counters_of(process, *cells))


def share(memory: int, content: bytes) -> None:
    """Whatever it held before."""
    os.ftruncate(memory, 0)
    os.pwrite(memory, content, 0)


def everything(folder: Path) -> dict[str, Any]:
    """What lies in a folder, links and all."""
    return {
        path.name: (path.lstat().st_mode, path.lstat().st_ino, path.lstat().st_size)
        for path in folder.iterdir()
    }


# -- what may be the folder ---------------------------------------------------------------------


def a_file(place: Path) -> None:
    place.write_text("not a folder")


def a_link(place: Path) -> None:
    (place.parent / "elsewhere").mkdir()
    place.symlink_to(place.parent / "elsewhere")


def a_dangling_link(place: Path) -> None:
    place.symlink_to(place.parent / "elsewhere")


def a_fifo(place: Path) -> None:
    os.mkfifo(place)


def a_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(place))


def open_to_all(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)


def open_to_the_group(place: Path) -> None:
    place.mkdir()
    place.chmod(0o720)


def sticky(place: Path) -> None:
    place.mkdir()
    place.chmod(0o1777)


def below_a_file(place: Path) -> None:
    place.with_name("file").write_text("")
    os.environ[STATE_DIR] = str(place.with_name("file") / "state")


def somebody_s(place: Path) -> None:
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)


def no_home(place: Path) -> None:
    os.environ[STATE_DIR] = "~nobody_of_this_name/state"


def in_proc(place: Path) -> None:
    os.environ[STATE_DIR] = "/proc/nowhere/state"


def too_long(place: Path) -> None:
    os.environ[STATE_DIR] = str(place.with_name("x" * 300))


UNFIT = {
    a_file: "is not a directory",
    a_link: "is a symbolic link",
    a_dangling_link: "is a symbolic link",
    a_fifo: "is not a directory",
    a_socket: "is not a directory",
    open_to_all: "can be written by others (mode 0777)",
    open_to_the_group: "can be written by others (mode 0720)",
    sticky: "can be written by others (mode 1777)",
    below_a_file: "is not a directory",
    somebody_s: f"belongs to another user: uid {NOBODY}, ours is 0",
    no_home: "names no user's home",
    in_proc: "cannot be made",
    too_long: "File name too long",
}


@pytest.fixture(
    params=[pytest.param(p, marks=needs_root if p is somebody_s else ()) for p in UNFIT],
    ids=lambda place: place.__name__,
)
def unfit(request: pytest.FixtureRequest, folder: Path) -> str:
    """A place that must not be used; why, for a comparison."""
    request.param(folder)  # may set the variable, which `folder` puts back
    return UNFIT[request.param]


def test_an_unfit_folder_is_not_used(unfit: str, tmp_path: Path, ledger: Ledger) -> None:
    """Counting goes on in memory, nothing is written anywhere, and all who ask are told why."""
    before = everything(tmp_path)
    ledger.counters(0).add_engaged(captured=False)
    ledger.publish([ROW])
    assert ledger.counters(0).engaged == 1
    for problem in (
        ledger.problem,
        ledger.look(),
        state_folder.problem(),
        state_folder.problem(trial=False),
    ):
        assert problem is not None
        assert unfit in problem
        assert problem.startswith(STATE_DIR)
    assert live_processes() == descendants() == []
    assert everything(tmp_path) == before
    for path in tmp_path.iterdir():
        assert not path.is_dir() or list(path.iterdir()) == []


def test_a_link_with_a_slash_behind_it(
    folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would follow it."""
    a_link(folder)
    monkeypatch.setenv(STATE_DIR, f"{folder}/")
    ledger.publish([ROW])
    assert "is a symbolic link" in str(ledger.problem)
    assert list((folder.parent / "elsewhere").iterdir()) == []


def test_said_once(
    folder: Path, ledger: Ledger, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """However often the folder is needed."""
    open_to_all(folder)
    with caplog.at_level(logging.WARNING, "gemma4_turbo"):
        for _ in range(3):
            ledger.publish([ROW])
            live_processes()
            state_folder.problem()
            state_folder.problem(trial=False)
    (said,) = caplog.records
    assert str(folder) in said.getMessage()
    assert said.levelno == logging.WARNING


def test_every_look_checks(folder: Path, ledger: Ledger, alive: Process) -> None:
    """What was fit may be so no longer; the file of a living child is there all the time."""
    ledger.publish([ROW])
    leave(folder, alive, 3)
    assert [found.pid for found in descendants()] == [alive.pid]
    assert state_folder.problem() is state_folder.problem(trial=False) is ledger.look() is None
    folder.chmod(0o777)
    assert live_processes() == descendants() == live_processes(folder) == []
    assert "mode 0777" in str(state_folder.problem())
    assert "mode 0777" in str(state_folder.problem(trial=False))
    assert "mode 0777" in str(ledger.look())
    folder.chmod(0o700)
    assert [found.pid for found in descendants()] == [alive.pid]
    assert state_folder.problem() is state_folder.problem(trial=False) is ledger.look() is None


def test_status_says_that_it_counts_this_process_only(
    world: World, folder: Path, alive: Process
) -> None:
    """And why; it counts no other one then."""
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    world.imported()
    engine.apply()
    engine.runs["one"].engaged(captured=False)
    leave(folder, alive, 3)
    assert (only_row(engine).reason, only_row(engine).engaged) == ("installed", 4)
    folder.chmod(0o770)
    row = only_row(engine)
    assert (row.state, row.engaged) == (states.ACTIVE, 1)
    assert row.reason.startswith(f"installed; only this process is counted: {STATE_DIR}: ")
    assert "(mode 0770)" in row.reason
    assert only_row(engine) in engine.apply()
    line = summary.summary_line([row, row._replace(name="two", state=states.OFF)])
    assert line.count("only this process is counted") == 1
    assert "two off (installed); only this process" in line
    folder.chmod(0o700)
    assert only_row(engine).reason == "installed"


def test_status_never_raises(world: World, unfit: str) -> None:
    """Nor apply, nor the gate behind the loading of a model."""
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    world.imported()
    engine.apply()
    row = only_row(engine)
    assert row.state == states.ACTIVE
    assert "only this process is counted" in row.reason
    assert unfit in row.reason
    assert launch_gates._after_load(engine)(lambda: "loaded", None, (), {}) == "loaded"


def as_nobody(function: Callable[[], Any]) -> str:
    """What ``function`` returns in a forked process of another user."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            told = f"{function()}"
        except BaseException as error:
            told = f"raised {type(error).__name__}: {error}"
        os.write(writing, told.encode()[:4096])
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as told_there:
        return told_there.read()


@needs_root
def test_below_a_folder_that_may_not_be_searched(world: World, folder: Path) -> None:
    """The status, and with it the gate, go on and tell."""
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    world.imported()
    engine.apply()
    folder.parent.chmod(0o700)

    def go() -> Any:
        assert live_processes() == live_processes(folder) == []
        assert launch_gates._after_load(engine)(lambda: "loaded", None, (), {}) == "loaded"
        return state_folder.problem(), state_folder.problem(trial=False), only_row(engine).reason

    told = as_nobody(go)
    assert not told.startswith("raised"), told
    assert told.count("Permission denied") == 3
    assert "only this process is counted" in told


@needs_root
def test_a_folder_that_may_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this user, but read-only; and one that cannot be made."""
    base = Path("/tmp", f"state-folder-test-{os.getpid()}")
    base.mkdir()
    try:
        base.chmod(0o755)
        (base / "mine").mkdir()
        os.chown(base / "mine", NOBODY, NOBODY)
        (base / "mine").chmod(0o500)
        for name, why in (("mine", "cannot be written"), ("other", "cannot be made")):
            monkeypatch.setenv(STATE_DIR, str(base / name))

            def look() -> Any:
                ledger = Ledger()
                ledger.publish([ROW])
                return ledger.problem

            assert why in as_nobody(lambda: state_folder.problem(trial=False))
            told = as_nobody(look)
            assert told.startswith(STATE_DIR)
            assert "cannot be" in told
    finally:
        shutil.rmtree(base)


# -- where it is --------------------------------------------------------------------------------


def test_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One private folder per user in the temporary directory; a blank variable is none."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for value in ("", "  "):
        monkeypatch.setenv(STATE_DIR, value)
        assert state_folder.path() == str(tmp_path / f"gemma4_turbo-{os.geteuid()}")
        state_folder.settle()
        assert os.environ[STATE_DIR] == value  # a child of another user has its own


def test_made_for_this_user_only(folder: Path, ledger: Ledger) -> None:
    """Folder and files, whatever the umask."""
    before = os.umask(0)
    try:
        ledger.publish([ROW])
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert ledger.problem is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("states", "{cwd}/states"),
        (" ./a/../b/ ", "{cwd}/b"),
        ("~/states", "{home}/states"),
        ("~", "{home}"),
        ("/x/y", "/x/y"),
    ],
)
def test_settled_before_anybody_changes_directory(
    python: Python, tmp_path: Path, given: str, meant: str
) -> None:
    """By apply and by bootstrap, for this process and for its children."""
    code = """
import os, subprocess, sys
import gemma4_turbo
getattr(gemma4_turbo, sys.argv[1])()
os.chdir("/")
from gemma4_turbo.engine import state_folder
print(state_folder.path())
print(os.environ["GEMMA4_TURBO_STATE_DIR"])
"""
    expected = meant.format(cwd=tmp_path, home=tmp_path / "home")
    for call in ("apply", "bootstrap"):
        done = python(
            code,
            call,
            PYTHONPATH=str(REPOSITORY),
            GEMMA4_TURBO_STATE_DIR=given,
            HOME=str(tmp_path / "home"),
        )
        assert done.stdout.splitlines() == [expected, expected], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_relative_temporary_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The default then depends on the directory too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", "scratch")
    monkeypatch.setenv(STATE_DIR, "")
    state_folder.settle()
    assert os.environ[STATE_DIR] == str(tmp_path / "scratch" / f"gemma4_turbo-{os.geteuid()}")


def test_relative_to_a_directory_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing raises; the problem is told."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv(STATE_DIR, "states")
    state_folder.settle()
    assert "is relative to no folder" in str(state_folder.problem())
    assert "is relative to no folder" in str(state_folder.problem(trial=False))
    assert live_processes() == []


# -- what lies in it ----------------------------------------------------------------------------


def test_other_people_s_files_stay(folder: Path, ledger: Ledger, dead: Process) -> None:
    """Those of a model, those that look like ours, and those that only a name makes ours."""
    folder.mkdir(mode=0o700)
    (folder / "config.json").write_text('{"architectures": ["Gemma4ForConditionalGeneration"]}')
    (folder / "123.json").write_text('{"pid": 123, "start": "1", "patches": []}')
    (folder / "123.counters").write_bytes(bytes(4096))
    (folder / "12345678.counters").write_text("mine")
    (folder / "list.json").write_text("[1, 2]")
    leave(folder, dead._replace(boot="0" * 32))
    leave(folder, dead._replace(namespace="1"))
    other = dead._replace(start=2)
    (folder / file_name(other, "json")).write_bytes(states_of(dead, ROW))
    (folder / file_name(other, "counters")).write_bytes(b"")
    (folder / file_name(dead, "counters")).mkdir()
    (folder / file_name(dead, "tmp")).symlink_to("config.json")
    os.mkfifo(folder / file_name(dead, "trial"))
    (folder / f"gemma4_turbo-{dead}.json.bak").write_bytes(states_of(dead, ROW))
    (folder / f"gemma4_turbo-{dead.boot}-{dead.namespace}-0{dead.pid}-1.json").write_text("")
    before = everything(folder)
    ledger.publish([ROW])
    assert state_folder.problem() is None
    assert [found.pid for found in live_processes()] == [os.getpid()]
    ledger.close()
    assert everything(folder) == before


def test_the_dead_are_swept_file_by_file(folder: Path, ledger: Ledger, dead: Process) -> None:
    """Whole pairs, and what a process left that was killed half-way."""
    folder.mkdir(mode=0o700)
    leave(folder, dead)
    (folder / file_name(dead, "tmp")).write_bytes(states_of(dead)[:-5])
    (folder / file_name(dead, "trial")).write_bytes(file_head(dead, "trial"))
    # Versions before this one left counters in files.
    old = dead._replace(start=2)
    (folder / file_name(old, "counters")).write_bytes(counters_of(old))
    ledger.publish([ROW])
    assert set(everything(folder)) == {file_name(processes.own(), "json")}


def test_a_zombie_is_gone(folder: Path, ledger: Ledger, memory: int) -> None:
    """Nobody has waited for it yet."""
    folder.mkdir(mode=0o700)
    with sleeping(memory) as (child, process):
        leave(folder, process)
        assert [found.pid for found in live_processes()] == [child.pid]
        child.kill()
        deadline = time.monotonic() + 10
        while processes._stat_fields(child.pid)[0] != b"Z" and time.monotonic() < deadline:  # type: ignore[index]
            time.sleep(0.01)
        assert live_processes() == []
        ledger.publish([ROW])
        assert not (folder / file_name(process, "json")).exists()


def test_a_process_that_proc_hides_is_not_judged(
    alive: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``hidepid``: neither gone nor there."""
    me = processes.own()
    assert processes.lives(alive, me) is True
    monkeypatch.setattr(processes, "_stat_fields", lambda pid: None)
    assert processes.lives(alive, me) is None


def test_equal_pids_in_two_containers(
    folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither counts, reports or removes the other's."""
    here = processes.namespace()
    monkeypatch.setattr(processes, "namespace", lambda: "4026539999")
    there = Ledger()
    there.counters(0).add_engaged(captured=False)
    there.publish([ROW])
    theirs = everything(folder)
    monkeypatch.setattr(processes, "namespace", lambda: here)
    assert live_processes() == []
    ledger.publish([ROW])
    (mine,) = live_processes()
    assert mine.patches[0]["engaged"] == 0
    ledger.close()
    assert everything(folder) == theirs
    monkeypatch.setattr(processes, "namespace", lambda: "4026539999")
    (report_there,) = live_processes()
    assert report_there.patches[0]["engaged"] == 1
    there.close()


def test_another_boot_is_not_judged(
    folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines that share a network folder."""
    here = processes.boot()
    monkeypatch.setattr(processes, "boot", lambda: "f" * 32)
    there = Ledger()
    there.publish([ROW])
    monkeypatch.setattr(processes, "boot", lambda: here)
    assert live_processes() == []
    ledger.publish([ROW])
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(processes, "boot", lambda: "f" * 32)
    there.close()


def test_without_a_proc_of_its_own(
    folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cannot name itself keeps its counters."""
    readlink = os.readlink
    monkeypatch.setattr(
        os, "readlink", lambda path: "1" if path == "/proc/self" else readlink(path)
    )
    ledger.publish([ROW])
    assert "/proc belongs to another PID namespace" in str(ledger.problem)
    assert "/proc belongs to another PID namespace" in str(state_folder.problem())
    assert "/proc belongs to another PID namespace" in str(state_folder.problem(trial=False))
    assert live_processes() == []


def a_link_to_a_victim(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def a_hard_link_to_a_victim(place: Path, victim: Path) -> None:
    place.hardlink_to(victim)


def a_fifo_there(place: Path, victim: Path) -> None:
    os.mkfifo(place)


def a_folder_there(place: Path, victim: Path) -> None:
    place.mkdir()


def a_socket_there(place: Path, victim: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(place))


def a_file_there(place: Path, victim: Path) -> None:
    place.write_bytes(b"x" * 5000)


@pytest.mark.parametrize("kind", ["tmp", "json"])
@pytest.mark.parametrize(
    "plant",
    [
        a_link_to_a_victim,
        a_hard_link_to_a_victim,
        a_fifo_there,
        a_folder_there,
        a_socket_there,
        a_file_there,
    ],
)
def test_planted_at_our_name(
    folder: Path,
    ledger: Ledger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Path, Path], None],
    kind: str,
) -> None:
    """It stays as it is, nothing hangs, and what could not be written is told."""
    folder.mkdir(mode=0o700)
    monkeypatch.chdir(folder)  # a socket's path must be short
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious" * 1000)
    name = file_name(processes.own(), kind)
    plant(folder / name, victim)
    before = everything(folder)[name]
    ledger.counters(0).add_engaged(captured=False)
    ledger.publish([ROW])
    assert ledger.counters(0).engaged == 1
    assert f"holds {name}, which is not ours" in str(ledger.problem)
    assert live_processes() == []
    ledger.close()
    assert everything(folder) == {name: before}
    assert victim.read_bytes() == b"precious" * 1000


def test_what_this_process_left_before_an_exec(folder: Path) -> None:
    """PID and start time stay; the program is another one."""
    code = f"""
import os, sys
from gemma4_turbo.engine.counters import Ledger, live_processes
ledger = Ledger()
ledger.counters(0).add_engaged(captured=False)
ledger.publish([{ROW!r}])
if len(sys.argv) == 1:
    os.execv(sys.executable, [sys.executable, __file__, "again"])
print(ledger.problem, [r.patches[0]['engaged'] for r in live_processes()])
"""
    script = folder.parent / "program.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "None [1]\n", done.stderr
    assert list(folder.iterdir()) == []


GOOD_REASON = "x" * counters._MAX_REASON


def changed(**fields: Any) -> bytes:
    """A row with other fields, as JSON."""
    return json.dumps([ROW | fields]).encode()


@pytest.mark.parametrize(
    "patches",
    [
        b"[" * 200_000,
        b'[{"name": "one", "state": "active", "reason": ' + b"[" * 100_000,
        b"Infinity",
        b"[NaN]",
        b"1e999",
        b"9" * 5000,
        b"{}",
        b"null",
        b"[1]",
        b"[[]]",
        b'["one"]',
        b'[{"state": "active"}]',
        b'[{"name": "one", "state": "active"}]',
        changed(name=1),
        changed(name=None),
        changed(name="x" * 65),
        changed(state="splendid"),
        changed(state=[]),
        changed(state=None),
        changed(reason=1.5),
        changed(reason=GOOD_REASON + "x"),
        changed(reason="\ud800"),
        b'[{"name": "\xff", "state": "active", "reason": ""}]',
        json.dumps([ROW] * 129).encode(),
        b"[]" + b" " * (2 << 20),
        b"",
        b"[],",
        b'[], "process": "somebody else"',
        b'[], "process": 1e300',
    ],
    ids=lambda value: value[:40].decode(errors="replace"),
)
def test_states_that_are_none_are_skipped(
    folder: Path, ledger: Ledger, alive: Process, patches: bytes
) -> None:
    """File by file: the next one is read."""
    folder.mkdir(mode=0o700)
    leave(folder, alive, 1)
    ledger.publish([ROW])
    assert len(live_processes()) == 2
    head = file_head(alive, "json") + b', "counters": %d, "patches": ' % SHARED[alive.pid]
    (folder / file_name(alive, "json")).write_bytes(head + json.dumps([ROW]).encode() + b"}")
    assert len(live_processes()) == 2
    (folder / file_name(alive, "json")).write_bytes(head + patches + b"}")
    (found,) = live_processes()
    assert found.pid == os.getpid()
    assert descendants() == []


def test_the_longest_reason_is_read(folder: Path, ledger: Ledger) -> None:
    """A writer cuts what a reader would not take, and what could not be printed."""
    rows = [dict(ROW, name=f"{i}", reason="\ud800" + "\U0001f600" * 5000) for i in range(128)]
    ledger.publish(rows)
    (found,) = live_processes()
    assert [patch["name"] for patch in found.patches] == [row["name"] for row in rows]
    assert {len(patch["reason"]) for patch in found.patches} == {counters._MAX_REASON}
    found.patches[0]["reason"].encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"",
        lambda content: b"\0" * len(content),
        lambda content: b"G" + content[1:],
        lambda content: content[:-8] + b"\xff" * 8,
        None,
    ],
    ids=["truncated", "longer", "empty", "zeros", "another head", "below zero", "missing"],
)
def test_counters_that_are_none_are_skipped(
    folder: Path, alive: Process, memory: int, change: Callable[[bytes], bytes] | None
) -> None:
    """Nothing is told of a process whose counters cannot be read."""
    folder.mkdir(mode=0o700)
    leave(folder, alive, 1)
    assert len(live_processes()) == 1
    if change is None:
        written = states_of(alive, ROW, counters=memory + 1)  # which the child has not
        (folder / file_name(alive, "json")).write_bytes(written)
    else:
        share(memory, change(counters_of(alive, 1)))
    assert live_processes() == []


@pytest.mark.parametrize("descriptor", [-1, 1 << 40, True, "../../../etc/passwd", None, 1.0])
def test_what_is_no_descriptor_is_not_followed(
    folder: Path, alive: Process, descriptor: Any
) -> None:
    folder.mkdir(mode=0o700)
    written = states_of(alive, ROW, counters=descriptor)
    (folder / file_name(alive, "json")).write_bytes(written)
    assert live_processes() == []


def test_a_descriptor_of_something_else_is_not_read(folder: Path) -> None:
    """A pipe that nobody writes to would block, a terminal or device may do things."""
    folder.mkdir(mode=0o700)
    reading, writing = os.pipe()
    try:
        with sleeping(reading) as (_, process):
            written = states_of(process, ROW, counters=reading)
            (folder / file_name(process, "json")).write_bytes(written)
            assert live_processes() == []
    finally:
        os.close(reading)
        os.close(writing)


def test_nobody_can_shorten_what_is_counted_in(ledger: Ledger) -> None:
    """A count behind the end would end the process: SIGBUS."""
    mine = ledger.counters(0)
    ledger.publish([ROW])
    assert ledger.problem is None
    assert ledger._memory is not None
    theirs = os.open(f"/proc/self/fd/{ledger._memory[0]}", os.O_RDWR)
    try:
        for change in (lambda: os.ftruncate(theirs, 0), lambda: os.ftruncate(theirs, 1 << 20)):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/self/fd/{theirs}", 0)
    finally:
        os.close(theirs)
    mine.add_engaged(captured=False)
    (found,) = live_processes()
    assert found.patches[0]["engaged"] == 1


def test_a_descriptor_that_somebody_closed(ledger: Ledger) -> None:
    """As who becomes a daemon does: counting goes on, the next word brings all counts back."""
    mine = ledger.counters(0)
    ledger.publish([ROW])
    mine.add_engaged(captured=False)
    assert ledger._memory is not None
    os.close(ledger._memory[0])
    with open(os.devnull) as another:  # which gets its number
        mine.add_engaged(captured=False)
        assert live_processes() == []
        assert ledger.look() is None
        ledger.close()
        assert os.fstat(another.fileno())
        ledger.publish([ROW])
        (found,) = live_processes()
        assert found.patches[0]["engaged"] == 2


def test_no_memory_to_share(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting goes on, and what is missing is told."""
    with monkeypatch.context() as patch:
        patch.delattr(os, "memfd_create")
        ledger.counters(0).add_engaged(captured=False)
        ledger.publish([ROW])
        assert "os.memfd_create" in str(ledger.problem)
        assert ledger.counters(0).engaged == 1
        assert live_processes() == []
    assert ledger.look() is None
    (found,) = live_processes()
    assert found.patches[0]["engaged"] == 1


def given_away(place: Path, victim: Path) -> None:
    place.write_bytes(victim.read_bytes())
    os.chown(place, NOBODY, NOBODY)


@pytest.mark.parametrize(
    "plant",
    [
        a_link_to_a_victim,
        a_fifo_there,
        a_folder_there,
        a_socket_there,
        pytest.param(given_away, marks=needs_root),
    ],
)
def test_what_is_no_file_of_ours_is_not_read(
    folder: Path,
    alive: Process,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Path, Path], None],
) -> None:
    """Through a link its content would be right."""
    folder.mkdir(mode=0o700)
    monkeypatch.chdir(folder)
    leave(folder, alive, 1)
    path = folder / file_name(alive, "json")
    aside = path.rename(folder / "aside")
    plant(path, aside)
    assert live_processes() == []


def test_how_many_files_are_looked_at(
    folder: Path, ledger: Ledger, alive: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with more is unfit: whom one does not look at one does not see."""
    folder.mkdir(mode=0o700)
    for number in range(20):
        (folder / f"{number}").write_text("")
    leave(folder, alive)
    # In whatever order they are read, something comes after the first of two.
    (folder / file_name(alive._replace(start=2), "json")).write_bytes(states_of(alive, ROW))
    assert len(live_processes()) == 1
    for limit, value in (("MAX_ENTRIES", 20), ("MAX_FILES", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(state_folder, limit, value)
            assert live_processes() == []
            for problem in (state_folder.problem(), state_folder.problem(trial=False)):
                assert "holds too many files" in str(problem)
            ledger.publish([ROW])
            assert "holds too many files" in str(ledger.problem)
    ledger.publish([ROW])
    assert ledger.problem is state_folder.problem() is None


# -- when writing fails -------------------------------------------------------------------------


def full(*args: Any, **kwargs: Any) -> Any:
    """As the kernel says it."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written stays behind; when there is room again, what was counted is there."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        ledger.counters(0).add_engaged(captured=False)
        ledger.publish([ROW])
        for problem in (
            ledger.problem,
            state_folder.problem(trial=False),
            state_folder.problem(),
            ledger.look(),
        ):
            assert "No space left on device" in str(problem)
            assert STATE_DIR in str(problem)
        assert ledger.counters(0).engaged == 1
        assert list(folder.iterdir()) == []
    ledger.counters(0).add_engaged(captured=False)
    assert ledger.look() is state_folder.problem(trial=False) is None
    (found,) = live_processes()
    assert found.patches[0]["engaged"] == 2


def test_full_only_later(folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last states stay readable, no scratch file stays."""
    ledger.publish([ROW])
    before = set(everything(folder))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        ledger.publish([dict(ROW, state="failed")])
        assert "No space left" in str(ledger.problem)
    assert set(everything(folder)) == before
    assert live_processes()[0].patches[0]["state"] == "active"
    ledger.publish([dict(ROW, state="failed")])
    assert ledger.problem is None
    assert live_processes()[0].patches[0]["state"] == "failed"


def test_a_write_in_pieces(folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel may do."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:100]))
    ledger.publish([ROW])
    assert [found.patches[0]["name"] for found in live_processes()] == ["one"]


def test_the_folder_removed_while_it_is_used(folder: Path, ledger: Ledger) -> None:
    """Counting goes on, the next word brings all counts back, and the gap is told."""
    mine = ledger.counters(0)
    mine.add_engaged(captured=False)
    ledger.publish([ROW])
    shutil.rmtree(folder)
    mine.add_engaged(captured=False)
    assert mine.engaged == 2
    assert live_processes() == []
    ledger.publish([ROW])
    mine.add_engaged(captured=False)
    (found,) = live_processes()
    assert found.patches[0]["engaged"] == 3
    assert "was emptied or moved while it was in use" in str(ledger.problem)
    ledger.close()
    assert list(folder.iterdir()) == []


def test_the_folder_removed_and_a_status(world: World, folder: Path) -> None:
    """A row does not claim to know the processes whose files went with it."""
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    world.imported()
    engine.apply()
    assert only_row(engine).reason == "installed"
    shutil.rmtree(folder)
    assert "only this process is counted" in only_row(engine).reason
    assert len(live_processes()) == 1


def test_no_descriptor_is_left(folder: Path, ledger: Ledger, alive: Process) -> None:
    """Whether it went well or not."""
    ledger.publish([ROW])
    leave(folder, alive)
    (folder / file_name(alive._replace(start=2), "json")).mkdir()

    def used() -> int:
        return len(os.listdir("/proc/self/fd"))

    def work() -> None:
        for mode in (0o700, 0o777):
            folder.chmod(mode)
            ledger.publish([ROW])
            live_processes()
            state_folder.problem()
            state_folder.problem(trial=False)
        folder.chmod(0o700)

    work()
    before = used()
    for _ in range(5):
        work()
    assert used() == before
