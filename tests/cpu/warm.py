"""A Python that has imported the libraries under SGLang, and forks for each script that it is given.

Four fifths of what SGLang takes to be imported are theirs. Nothing of SGLang and nothing of ours is
in a fork before its script imports it. Kernels run in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

LIBRARIES = (
    *("torch", "torchvision", "transformers.modeling_utils", "transformers.processing_utils"),
    *("torch._dynamo", "torch._inductor.compile_fx", "torchao", "flashinfer", "scipy.optimize"),
    *("openai", "fastapi", "compressed_tensors", "xgrammar"),
)
OURS = ("sglang", "sgl_kernel", "gemma4_turbo")


class Warm:
    """The process, from outside."""

    def __init__(self, environment: dict[str, str]) -> None:
        repository = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cpu.warm"],
            env={**environment, "PYTHONPATH": repository, "TRITON_INTERPRET": "1"},
            cwd=repository,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, **request: Any) -> subprocess.CompletedProcess[str]:
        """``code`` or ``module``, ``arguments``, ``env``, ``cwd`` and ``timeout`` in seconds."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            process.stdin.write(json.dumps({**request, "files": [*map(str, files)]}) + "\n")
            process.stdin.flush()
            code = json.loads(process.stdout.readline())
            told = [file.read_text(errors="replace") for file in files]
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(str(request), request["timeout"], *told)
        return subprocess.CompletedProcess([], code, *told)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _run(request: dict[str, Any]) -> int:
    """In a fork: what ``python -c code`` or ``python -m module`` does."""
    signal.alarm(int(request["timeout"]))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(request["files"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    here = os.getcwd()
    paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [here, *filter(None, paths), *(path for path in sys.path if path != here)]
    sys.argv = ["-c", *request["arguments"]]
    try:
        if "module" in request:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        else:
            exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Import, then a request a line and its exit code a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from tests import interpreter

    interpreter.quicken()
    assert not set(OURS) & set(sys.modules)
    repository = os.getcwd()
    sys.path[:] = [path for path in sys.path if path != repository]
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 1
            try:
                code = _run(json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
