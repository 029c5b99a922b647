"""A Python that has imported the libraries under SGLang, and forks for each script that it is given.

Four fifths of what SGLang takes to be imported are theirs. Nothing of SGLang and nothing of ours is
in a fork before its script imports it, nor in the processes that the script spawns, which are forks
too. Kernels run in Triton's interpreter. The workers of pytest-xdist share it: it takes 20 s of a core.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    *("torch", "torchvision", "transformers.modeling_utils", "transformers.processing_utils"),
    *("torch._dynamo", "torch._inductor.compile_fx", "torchao", "flashinfer", "scipy.optimize"),
    *("openai", "fastapi", "compressed_tensors", "xgrammar", "triton_kernels"),
    *("aiohttp", "uvicorn", "uvloop", "zmq", "IPython", "mistral_common", "watchfiles"),
    *("openai.types.realtime", "triton_kernels.tensor", "gguf", "wrapt"),
    *("flashinfer.comm", "fsspec.asyn", "msgspec", "jsonschema", "partial_json_parser"),
    *("torchcodec", "torchvision.transforms.v2", "zmq.asyncio", "zmq.auth.thread", "aiohttp.web"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.processing_auto"),
    *("transformers.models.gemma4.configuration_gemma4", "fastapi.middleware.cors", "lxml.etree"),
    *("pandas", "typer", "rich.console"),  # and under the benchmarks
)
OURS = ("sglang", "sgl_kernel", "gemma4_turbo")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>
SOCKET = "warm"
_LARGEST = 1 << 17  # bytes of a request to spawn: an environment, mostly


class Child:
    """One of its forks: as much of `subprocess.Popen` as tests ask for."""

    def __init__(self, warm: Warm, request: dict[str, Any]) -> None:
        self._warm, self._request = warm, request
        self.returncode: int | None = None
        self.pid = warm.ask(start=request)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._warm.ask(poll=self.pid)
        return self.returncode

    def wait(self) -> int:
        """Its exit code; TimeoutExpired after the seconds that it was given."""
        if self.returncode is None:
            self.returncode = self._warm.ask(wait=self.pid)
        assert self.returncode is not None
        if self.returncode == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(str(self._request), self._request["timeout"])
        return self.returncode


class Warm:
    """The process, from outside: one for all that name the same folder, from the first to the last."""

    command = ("-m", "tests.cpu.warm")

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        """``folder``: for the socket that it listens at; made here, and gone with the process."""
        self._process: subprocess.Popen[bytes] | None = None
        while self._process is None or not self._process.wait():
            try:
                connection = _connected(folder) or self._made(environment, folder)
                self._lines = connection.makefile("rw")
                connection.close()  # as soon as the lines are
                if self._lines.readline():  # its greeting, once it has imported
                    return
            except (FileNotFoundError, ConnectionError):  # it was about to end
                continue
        raise RuntimeError(f"{self.command[-1]} ended with {self._process.returncode}")

    def _made(self, environment: dict[str, str], folder: Path) -> socket.socket:
        repository = str(Path(__file__).resolve().parents[2])
        with _locked(folder):
            there = _connected(folder)
            if there is not None:  # another was quicker
                return there
            path = folder / SOCKET
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen()
                self._process = subprocess.Popen(
                    [sys.executable, *self.command, str(listener.fileno()), str(folder)],
                    env={**environment, "PYTHONPATH": repository, "TRITON_INTERPRET": "1"},
                    cwd=repository,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[listener.fileno()],
                )
            made = _connected(folder)
            assert made is not None
            return made

    def ask(self, **question: Any) -> Any:
        """A line there, a line back."""
        self._lines.write(json.dumps(question) + "\n")
        self._lines.flush()
        return json.loads(self._lines.readline())

    def start(self, **request: Any) -> Child:
        """``code``, ``module`` or ``script``, ``arguments``, ``env``, ``cwd``, ``timeout`` in seconds.

        ``files``: for stdout and stderr; ``stdin`` is empty without one. ``spawns``: whether it starts processes with
        multiprocessing. ``libraries``: shared ones that LD_LIBRARY_PATH is too late for.
        It leads a process group.
        """
        return Child(self, request)

    def run(self, **request: Any) -> subprocess.CompletedProcess[str]:
        """As `start`, to its end; what it printed is kept."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            child = self.start(**request, files=[*map(str, files)])
            try:
                code = child.wait()
            except subprocess.TimeoutExpired as late:
                late.output, late.stderr = (file.read_text(errors="replace") for file in files)
                raise
            told = [file.read_text(errors="replace") for file in files]
        return subprocess.CompletedProcess([], code, *told)

    def close(self) -> None:
        """Let go of the process, which ends when everybody has."""
        self._lines.close()


def _connected(folder: Path) -> socket.socket | None:
    """To the process that listens there, None if none does."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(folder / SOCKET))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else starts or ends a process there."""
    folder.mkdir(mode=0o700, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


# -- inside ---------------------------------------------------------------------------------------


def _run(request: dict[str, Any]) -> int:
    """In a fork: what ``python -c code``, ``python -m module`` or ``python script`` does."""
    environ, arguments = request["env"], list(request["arguments"])
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(request["cwd"])
    sys.stdin = os.fdopen(0)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for library in request.get("libraries", ()):
        ctypes.CDLL(library)
    first = str(Path(request["script"]).parent) if "script" in request else os.getcwd()
    paths = [first, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
    sys.argv = [request.get("script", "-c"), *arguments]
    sys.modules.pop("sitecustomize", None)  # Debian's Python has one, which ran in the warm process
    try:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")  # as a Python that starts does
        if "module" in request:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        elif "script" in request:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end_with(request: dict[str, Any]) -> NoReturn:
    """Run it and leave, with nothing of what the forked process would do at its end."""
    code = 1
    try:
        code = _run(request)
        # What an interpreter does at its end and `os._exit` does not.
        if request.get("spawns"):
            from multiprocessing import util

            util._exit_function()  # type: ignore[attr-defined]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _start(request: dict[str, Any]) -> NoReturn:
    """In a fork."""
    signal.alarm(int(request["timeout"]))
    os.setsid()
    os.dup2(os.open(request.get("stdin", os.devnull), os.O_RDONLY), 0)
    for number, path in enumerate(request["files"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    if request.get("spawns"):
        _spawn_forks(request)
    _end_with(request)


def _spawn_forks(request: dict[str, Any]) -> None:
    """From now on a process that multiprocessing spawns is a fork of this one as it is now."""
    from multiprocessing import util

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if not os.fork():
        ours.close()
        _fork_when_asked(theirs, parent, request)
    theirs.close()
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # its grandchildren become our children
    stock = util.spawnv_passfds  # type: ignore[attr-defined]

    def spawn(path: bytes, arguments: list[str], passed: Any) -> int:
        if arguments[-1] != "--multiprocessing-fork":
            return int(stock(path, arguments, passed))  # its tracker of resources
        descriptors = sorted(map(int, passed))
        asked = {
            **{"code": arguments[-2], "arguments": arguments[-1:], "descriptors": descriptors},
            **{"env": dict(os.environ), "cwd": os.getcwd()},
        }
        socket.send_fds(ours, [json.dumps(asked).encode()], descriptors)
        return int(ours.recv(100))

    util.spawnv_passfds = spawn  # type: ignore[attr-defined]


def _fork_when_asked(asked: socket.socket, parent: int, common: dict[str, Any]) -> NoReturn:
    """Until the parent is gone: a fork for each request, as a child of the parent."""
    while True:
        message, descriptors, *_ = socket.recv_fds(asked, _LARGEST, 32)
        if not message:
            os._exit(0)
        request = json.loads(message)
        request |= {"spawns": True, "libraries": common.get("libraries", ())}
        between = os.fork()
        if not between:
            child = os.fork()
            if child:
                asked.send(str(child).encode())
                os._exit(0)
            while os.getppid() != parent:
                time.sleep(0.001)
            asked.close()
            # Under the numbers that they have in the parent, by way of numbers that nobody has.
            high = [fcntl.fcntl(number, fcntl.F_DUPFD, 500) for number in descriptors]
            for number in descriptors:
                os.close(number)
            for number, place in zip(high, request["descriptors"], strict=True):
                os.dup2(number, place)
                os.close(number)
            _spawn_forks(request)
            _end_with(request)
        os.waitpid(between, 0)
        for number in descriptors:
            os.close(number)


def _serve(listener: socket.socket, folder: Path) -> None:
    """A fork for each that connects, until they are gone and nobody new has come."""
    forks: set[int] = set()
    listener.settimeout(60)  # for the first, who may have ended meanwhile
    while True:
        with contextlib.suppress(TimeoutError):
            _answer(forks, listener)
        listener.settimeout(1)
        forks -= {fork for fork in forks if os.waitpid(fork, os.WNOHANG)[0]}
        if forks:
            continue
        with _locked(folder):
            if select.select([listener], [], [], 0)[0]:
                continue
            (folder / SOCKET).unlink()
            folder.rmdir()
            return


def _answer(forks: set[int], listener: socket.socket) -> None:
    """The next that connects: a request a line and its answer a line, in a fork."""
    connection, _ = listener.accept()
    fork = os.fork()
    if fork:
        forks.add(fork)
        connection.close()
        return
    try:
        listener.close()
        connection.setblocking(True)
        _obey(connection)
    finally:
        os._exit(0)


def _obey(connection: socket.socket) -> None:
    """Until the other end lets go of it."""
    with connection.makefile("rw") as lines:
        print("ready", file=lines, flush=True)
        for line in iter(lines.readline, ""):
            ((verb, of),) = json.loads(line).items()
            answer: int | None
            if verb == "start":
                answer = os.fork()
                if not answer:
                    os.close(connection.fileno())
                    _start(of)
            else:
                ended, status = os.waitpid(of, os.WNOHANG if verb == "poll" else 0)
                answer = os.waitstatus_to_exitcode(status) if ended else None
            print(json.dumps(answer), file=lines, flush=True)


def main() -> None:
    """Import, then listen."""
    os.dup2(2, 1)  # what libraries print
    gc.set_threshold(100_000, 50, 100)  # as in tests/conftest.py, for all that is imported in forks
    from tests import distributions, interpreter, op_sources

    distributions.quicken()
    for name in LIBRARIES:
        with contextlib.suppress(Exception):  # one that lacks a library of the system's
            importlib.import_module(name)
    interpreter.quicken()
    op_sources.quicken()
    assert not set(OURS) & set(sys.modules)
    repository = os.getcwd()
    sys.path[:] = [path for path in sys.path if path != repository]
    gc.collect()
    gc.freeze()  # a fork that collected garbage would copy the pages of all that was imported
    listener, folder = sys.argv[1:]
    _serve(socket.socket(fileno=int(listener)), Path(folder))


if __name__ == "__main__":
    main()
