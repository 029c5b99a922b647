"""Counters and states of the patches, seen from other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemma4_turbo.engine import processes, states
from gemma4_turbo.engine.counters import Ledger, descendants, live_processes
from gemma4_turbo.engine.run import ledger
from gemma4_turbo.engine.state_folder import file_name
from gemma4_turbo.engine.switches import STATE_DIR
from tests.cpu.conftest import REPOSITORY
from tests.cpu.synthetic import World, only_row, record, returning

# Counts as a scheduler does, then stays: until it is killed, or told on its stdin to count on.
CHILD = """
import sys
from gemma4_turbo.engine.counters import Ledger
ledger = Ledger()
one, two = ledger.counters(0), ledger.counters(1)
one.add_engaged(captured=False)
one.add_engaged(captured=True)
two.add_declined()
row = {"state": "active", "reason": "installed"}
ledger.publish([dict(row, name="one"), dict(row, name="two")])
print("ready", flush=True)
for line in sys.stdin:
    one.add_engaged(captured=False)
    print("counted", flush=True)
"""
# The same in a child of that child, whose output is the parent's.
GRANDCHILD = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {CHILD!r}]))"

Start = Callable[[str], "subprocess.Popen[str]"]


def in_another_process(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in an interpreter of its own, with this environment and this package."""
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of this test, not there yet."""
    monkeypatch.setenv(STATE_DIR, str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts a process and waits until it has counted."""
    processes: list[subprocess.Popen[str]] = []

    def started(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield started
    for process in processes:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, also for its children, and wait."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def test_visible_from_another_process_while_it_runs(start: Start) -> None:
    """Engaged, captured and declined, as they are now."""
    process = start(CHILD)
    (report,) = live_processes()
    assert report.pid == process.pid
    assert sys.executable in report.command
    row = {"state": "active", "reason": "installed"}
    assert report.patches == [
        {**row, "name": "one", "engaged": 2, "captured": 1, "declined": 0},
        {**row, "name": "two", "engaged": 0, "captured": 0, "declined": 1},
    ]
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "counted\n"
    assert live_processes()[0].patches[0]["engaged"] == 3


def test_gone_and_swept_after_sigkill(start: Start, folder: Path) -> None:
    """SGLang ends its processes with SIGKILL: nothing can tidy up at exit."""
    process = start(CHILD)
    kill(process)
    assert live_processes() == []
    (left,) = folder.iterdir()
    survivor = Ledger()
    survivor.publish([])
    assert not left.exists()
    assert [path.name for path in folder.iterdir()] == [file_name(processes.own(), "json")]
    survivor.close()
    assert list(folder.iterdir()) == []


def test_the_living_are_not_swept(start: Start, folder: Path) -> None:
    """A process that starts removes nobody else's files."""
    process = start(CHILD)
    (states_file,) = folder.glob("*.json")
    start(CHILD)
    assert f"-{process.pid}-" in states_file.name
    assert states_file.exists()
    assert len(live_processes()) == 2


def test_counters_without_states_leave_nothing(folder: Path) -> None:
    """Of a process that was killed between opening its counters and publishing its states."""
    code = "import os; from gemma4_turbo.engine.counters import Ledger; Ledger().open(); os.kill(os.getpid(), 9)"
    assert in_another_process(code).returncode == -signal.SIGKILL
    assert list(folder.iterdir()) == []


def test_without_a_folder_counts_in_memory(folder: Path) -> None:
    """A file is where the folder should be: counting goes on, and the problem is told."""
    folder.write_text("not a folder")
    ledger = Ledger()
    mine = ledger.counters(0)
    mine.add_engaged(captured=False)
    ledger.publish([{"name": "one", "state": "active", "reason": ""}])
    assert mine.engaged == 1
    assert ledger.problem is not None
    assert ledger.problem == f"{STATE_DIR}: {str(folder)!r} is not a directory"
    assert live_processes() == []
    assert descendants() == []
    ledger.close()
    assert folder.read_text() == "not a folder"


def test_with_a_folder_there_is_no_problem(folder: Path) -> None:
    """And nobody else can read it."""
    ledger = Ledger()
    ledger.publish([])
    assert ledger.problem is None
    assert folder.stat().st_mode & 0o777 == 0o700
    ledger.close()


def test_a_later_process_with_the_same_pid_is_another(start: Start, folder: Path) -> None:
    """The start time tells them apart."""
    process = start(CHILD)
    (path,) = folder.glob("*.json")
    first = processes.parsed(path.stem.removeprefix("gemma4_turbo-"))
    assert first is not None
    assert first.pid == process.pid
    earlier = first._replace(start=first.start - 1)
    content = (folder / file_name(first, "json")).read_bytes()
    content = content.replace(str(first).encode(), str(earlier).encode())
    (folder / file_name(earlier, "json")).write_bytes(content)
    assert len(live_processes()) == 1
    mine = Ledger()
    mine.publish([])
    assert not (folder / file_name(earlier, "json")).exists()
    assert path.exists()
    mine.close()


def test_a_name_with_parentheses_is_read_right() -> None:
    """``/proc/<pid>/stat`` holds the command's name between parentheses, whatever it is."""
    code = (
        "import os; open('/proc/self/comm', 'wb').write(b'a) R 1 (\\xff');"
        "from gemma4_turbo.engine import processes;"
        "print(processes.parent(os.getpid()) == os.getppid())"
    )
    done = in_another_process(code)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("code", [CHILD, GRANDCHILD], ids=["child", "grandchild"])
def test_descendants(start: Start, code: str) -> None:
    """Children and their children, but not this process itself."""
    process = start(code)
    mine = Ledger()
    mine.publish([])
    assert len(live_processes()) == 2
    (report,) = descendants()
    assert (report.pid == process.pid) is (code == CHILD)
    assert report.patches[0]["engaged"] == 2
    mine.close()


def test_strangers_are_no_descendants(start: Start) -> None:
    """A sibling sees the other process, but not as its own."""
    start(CHILD)
    code = (
        "from gemma4_turbo.engine.counters import descendants, live_processes;"
        "print(len(live_processes()), len(descendants()))"
    )
    done = in_another_process(code)
    assert done.stdout == "1 0\n", done.stderr


def test_status_counts_this_process_and_the_ones_below(
    world: World, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `status` says in a launcher whose children run the model."""
    patch = record("one", world.target("answer"))
    engine = world.engine((patch, returning("ours")))
    engine.apply()
    start(CHILD)
    row = only_row(engine)
    assert (row.state, row.reason, row.engaged) == (states.ACTIVE, "installed", 2)
    world.imported()
    engine.runs["one"].engaged(captured=False)
    assert only_row(engine).engaged == 3
    assert ledger().counters(0).engaged == 1


def test_the_worst_of_the_processes_below_is_told(world: World, start: Start) -> None:
    """One scheduler of eight in trouble must not be hidden by seven that are fine."""
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    engine.apply()
    start(CHILD)
    start(CHILD.replace('"active"', '"failed"').replace('"installed"', '"out of luck"'))
    row = only_row(engine)
    assert (row.state, row.reason, row.engaged) == (states.FAILED, "out of luck", 4)


def test_declined_calls_are_told_with_the_first_reason(world: World) -> None:
    """In the status and in the file for other processes."""
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    world.imported()
    engine.apply()
    run = engine.runs["one"]
    run.declined("rank 3")
    run.declined("rank 4")
    assert only_row(engine).reason == "installed; some calls take stock's path: rank 3"
    (report,) = live_processes()
    assert report.patches[0]["declined"] == 2
    assert report.patches[0]["reason"].endswith("rank 3")


def test_a_forked_child_counts_for_itself(folder: Path) -> None:
    """Its ledger has a file of its own, and the parent's counters stay what they were."""
    mine = Ledger()
    first = mine.counters(0)
    first.add_engaged(captured=False)
    mine.publish([{"name": "one", "state": "active", "reason": ""}])
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            mine.counters(0).add_engaged(captured=True)
            mine.publish([{"name": "one", "state": "active", "reason": ""}])
            engaged = {r.pid: r.patches[0]["engaged"] for r in live_processes()}
            status = 0 if engaged == {os.getpid(): 1, os.getppid(): 1} else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert first.engaged == 1
    mine.close()


def test_a_forked_child_does_not_count_for_its_parent(folder: Path) -> None:
    """Also through what was handed out before the fork, as patches keep it; and it is seen."""
    mine = Ledger()
    first = mine.counters(0)
    first.add_engaged(captured=False)
    mine.publish([{"name": "one", "state": "active", "reason": ""}])
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            started_at = first.engaged
            before = len(live_processes())
            first.add_engaged(captured=True)
            first.add_engaged(captured=True)
            engaged = {r.pid: r.patches[0]["engaged"] for r in live_processes()}
            right = {os.getpid(): 2, os.getppid(): 1}
            status = 0 if (started_at, before, engaged) == (0, 1, right) else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert first.engaged == 1
    (report,) = live_processes()
    assert report.patches[0]["engaged"] == 1
    mine.close()


def test_status_of_a_forked_child_is_its_own(world: World) -> None:
    """The run's counters, cached before the fork."""
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    world.imported()
    engine.apply()
    engine.runs["one"].engaged(captured=False)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            engine.runs["one"].engaged(captured=False)
            status = 0 if only_row(engine).engaged == 1 else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert engine.runs["one"].engaged_count() == 1
