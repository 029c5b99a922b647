"""The process that tests fork from: one for several that ask, gone with the last of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cpu.warm import SOCKET, Warm

# As the process does, without the libraries, whose import takes a minute.
COLD = """
import os, socket, sys
from pathlib import Path
from tests.cpu import warm
warm._serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
"""
WHERE = """
import os
from pathlib import Path
above = Path(f"/proc/{os.getppid()}/status").read_text()
print(next(line.split()[1] for line in above.splitlines() if line.startswith("PPid")))
"""

Start = Callable[[], Warm]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    monkeypatch.setattr(Warm, "command", ("-c", COLD))
    return lambda: Warm(dict(os.environ), tmp_path / "warm")


def answered(warm: Warm, code: str) -> subprocess.CompletedProcess[str]:
    done = warm.run(code=code, arguments=[], env=dict(os.environ), cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def process_of(warm: Warm) -> int:
    """Whose forks answer."""
    return int(answered(warm, WHERE).stdout)


def test_one_for_all_until_the_last_has_let_go(start: Start, tmp_path: Path) -> None:
    one, other = start(), start()
    process = process_of(one)
    assert process_of(other) == process
    # Neither waits for what the other runs.
    slow = one.start(
        **{"code": "import time; time.sleep(60)", "arguments": [], "timeout": 90},
        **{"env": dict(os.environ), "cwd": "/", "files": [os.devnull] * 2},
    )
    assert answered(other, "print(1)").stdout == "1\n"
    assert slow.poll() is None
    os.kill(slow.pid, 9)
    assert slow.wait() == -9
    one.close()
    assert process_of(other) == process
    other.close()
    assert one._process is not None
    assert one._process.wait(timeout=30) == 0
    assert other._process is None
    assert not (tmp_path / "warm").exists()
    again = start()
    assert process_of(again) != process
    again.close()


def test_what_a_killed_one_leaves_is_no_process(start: Start, tmp_path: Path) -> None:
    killed = start()
    assert killed._process is not None
    killed._process.kill()
    killed._process.wait()
    killed.close()
    assert (tmp_path / "warm" / SOCKET).exists()
    after = start()
    assert answered(after, "print(1)").stdout == "1\n"
    after.close()


def test_one_that_cannot_start_is_an_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Warm, "command", ("-c", "raise SystemExit(3)"))
    with pytest.raises(RuntimeError, match="ended with 3"):
        start()
