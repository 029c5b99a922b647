"""The processes that compile for ``tune``: without a GPU, what is timed later, each kernel once, and gone at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo.cli.tuning import compiling, linear, processes
from gemma4_turbo.cli.tuning.compiling import Compiler, Job, Kind
from gemma4_turbo.kernels.skinny_gemm import Config, Epilogue
from tests.cpu.conftest import REPOSITORY

HOPPER = (9, 0), 132, 227 * 1024


def in_a_process(*arguments: str, **environment: str) -> str:
    """The output of a Python that does not interpret Triton's kernels."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**kept, "PYTHONPATH": str(REPOSITORY), "GEMMA4_TURBO": "0", **environment},
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_kernel_that_is_timed_was_compiled_before():
    """26B-A4B has experts and wide groups; E4B shares KV and has layers of its own.

    Whether launches are early or not: another kernel each.
    """
    said = in_a_process("tests/cpu/cli/tune_keys_scenario.py", "26b-a4b", "e4b")
    assert "missing" not in said, said
    numbers = [int(word) for word in said.split() if word.isdigit()]
    assert len(numbers) == 4
    for jobs, kernels in (numbers[:2], numbers[2:]):
        assert 90 < jobs < kernels < 300  # shapes that share kernels share jobs


def test_a_kernel_is_compiled_without_a_gpu(tmp_path, monkeypatch):
    """Into Triton's cache, with the compiler that comes with it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in the process that is started
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = Compiler()
    compiler.start(Kind.OURS, 1)
    one = linear.Linear("", 512, 512, Epilogue.NONE, 16)
    arguments = linear.Linear.compile, one, Config(64, 128, 1, 2), HOPPER, True
    work = Job(Kind.OURS, processes.ours, arguments)
    compiler.order("a", [work])
    until_ready(compiler, "a")
    assert compiler.ask(work).result() is None
    compiler.close()
    assert [path.name for path in tmp_path.rglob("*.cubin")] == ["_skinny_gemm_kernel.cubin"]


# -- the processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with as much of torch and Triton as a process asks for that computes nothing.

    Theirs take seconds to import.
    """
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("""
from contextlib import nullcontext as no_grad
class cuda: is_initialized = staticmethod(lambda: False)
class Tensor: ...
""")
    (folder / "triton" / "runtime").mkdir(parents=True)
    (folder / "triton" / "runtime" / "jit.py").write_text("class JITFunction: run = None")
    return str(folder)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, no_torch: str) -> Any:
    """With a process whose beginning imports nothing; it looks for modules where this one does."""
    monkeypatch.setattr(processes, "begin", len)
    monkeypatch.setattr(sys, "path", [no_torch, *sys.path])
    made = Compiler()
    made.start(Kind.OURS, 1)
    yield made
    made.close()


def job(seconds: float, name: str = "") -> Job:
    return Job(Kind.OURS, time.sleep, (seconds, name) if name else (seconds,))


def until_ready(compiler: Compiler, key: str) -> None:
    end = time.monotonic() + 60
    while not compiler.ready(key):
        assert time.monotonic() < end
        compiler.pause()


def test_equal_jobs_are_done_once_and_what_fails_is_done(compiler):
    assert compiler.order("a", [job(0), job(0, "too many arguments")]) == 2
    assert compiler.order("b", [job(0)]) == 0
    until_ready(compiler, "a")
    assert compiler.ready("b")
    failed = compiler.ask(job(0, "too many arguments")).result()
    assert isinstance(failed, processes.Failed)
    assert failed.startswith("TypeError")
    assert compiler.ready("never ordered")


def test_what_is_not_needed_is_not_waited_for(compiler):
    compiler.order("a", [job(0)])
    until_ready(compiler, "a")
    long = [job(3600), job(3601), job(3602), job(3603), job(3604)]
    compiler.order("b", long)
    compiler.order("c", long[4:])
    assert not compiler.ready("b")
    compiler.keep("b", [])
    assert compiler.ready("b")
    assert not compiler.ready("c")  # which shares a job with it
    assert compiler.ask(long[4]) is not None


def test_the_end_waits_for_nothing_and_leaves_nobody(compiler):
    compiler.order("a", [job(3600)])
    deadline = time.monotonic() + 60
    while not compiler.ask(job(3600)).running() and time.monotonic() < deadline:
        time.sleep(0.05)
    begun = time.monotonic()
    compiler.close()
    assert time.monotonic() - begun < 10
    assert active_children() == []
    assert compiler.order("b", [job(0)]) == 1
    assert compiler.ready("b")
    compiler.close()


def test_processes_of_others_are_left_alone():
    from multiprocessing import get_context

    other = get_context("spawn").Process(target=time.sleep, args=(3600,))
    other.start()
    try:
        made = Compiler()
        made.close()
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


def test_without_processes_everything_is_ready():
    made = Compiler()
    assert made.order("a", [job(3600)]) == 1
    assert made.ready("a")
    made.pause()
    made.close()


def test_no_semaphore_is_left_when_it_is_terminated(tmp_path, no_torch):
    """And the processes do not outlive it, nor does it wait for them."""
    script = tmp_path / "ended.py"
    script.write_text("""
import os, signal, time
from gemma4_turbo.cli import tune
from gemma4_turbo.cli.tuning.compiling import Compiler, Job, Kind

if __name__ == "__main__":
    compiler = Compiler()
    try:
        with tune.signals(600):
            compiler.start(Kind.OURS, 1)
            job = Job(Kind.OURS, time.sleep, (3600,))
            while not compiler.ask(job).running():
                time.sleep(0.05)
            print("ready", flush=True)
            time.sleep(600)
    except tune.TerminatedError:
        print("terminated")
    finally:
        compiler.close()
""")
    process = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": f"{no_torch}:{REPOSITORY}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    said, errors = process.communicate(timeout=60)
    assert (said, process.returncode) == ("terminated\n", 0)
    assert "leaked" not in errors


def test_a_process_ends_with_the_one_that_started_it(tmp_path, no_torch):
    """However that ends."""
    script = tmp_path / "killed.py"
    script.write_text("""
import os, signal, time
from gemma4_turbo.cli.tuning.compiling import Compiler, Job, Kind

if __name__ == "__main__":
    compiler = Compiler()
    compiler.start(Kind.OURS, 1)
    print(compiler.ask(Job(Kind.OURS, os.getpid, ())).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": f"{no_torch}:{REPOSITORY}"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    child = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 20
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists()


@pytest.mark.parametrize(("cores", "ours", "stock", "calls"), [(1, 0, 0, 0), (2, 1, 0, 0), (4, 3, 0, 0), (16, 9, 3, 3), (64, 14, 4, 3)])  # fmt: skip
def test_processes_by_cores(cores, ours, stock, calls, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(compiling, "_free_host", lambda: 1 << 40)
    assert compiling.first_workers() == ours
    assert compiling.later_workers(1 << 40) == {Kind.STOCK: stock, Kind.CALLS: calls}
    assert not any(compiling.later_workers(0).values())
    monkeypatch.setattr(compiling, "_free_host", lambda: 0)
    assert compiling.first_workers() == 0
    assert not any(compiling.later_workers(1 << 40).values())


def test_shapes_that_share_kernels_share_jobs():
    tile = Config(64, 128, 5, 3)
    one = linear.Linear("O", 2816, 4096, Epilogue.NONE, 16)
    other = linear.Linear("QKV", 8192, 2816, Epilogue.NONE, 16)
    assert one.alike(tile) == other.alike(tile._replace(split=2))
    assert one.alike(tile) != one.alike(tile._replace(split=1))
