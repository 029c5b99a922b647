"""``sglang.bench_serving``, run after run in one process: its imports take as long as a run.

Reads one run's arguments a line, a JSON list, from stdin; answers each with one JSON object: ``failed``,
empty or why, and the end of what bench_serving said. Every run executes the module anew, as
``python -m sglang.bench_serving`` does; what it imports stays.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import subprocess
import sys
import traceback
from typing import Any

MODULE = "sglang.bench_serving"


class LoadClient:
    """The other end: a process of this file, for as many runs as asked, in an environment with SGLang."""

    def __init__(self, environment: dict[str, str], python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [python, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: list[str]) -> None:
        """One run of bench_serving.

        Raises:
            RuntimeError: if it failed, with what it said last.
        """
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(arguments) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the load's process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if answer["failed"]:
            raise RuntimeError(f"bench_serving failed: {answer['failed']}\n{answer['said']}")

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def one_run(arguments: list[str]) -> dict[str, Any]:
    """``failed`` and ``said`` of one run; an exit with status 0 is none."""
    said, failed = io.StringIO(), ""
    sys.argv = [MODULE, *arguments]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            failed = f"exit {end.code}" if end.code else ""
        except Exception as error:  # told to the other end
            traceback.print_exc()
            failed = repr(error)
    return {"failed": failed, "said": said.getvalue()[-3000:]}


def main() -> None:
    """Until stdin ends."""
    answers = sys.stdout
    for line in sys.stdin:
        answers.write(json.dumps(one_run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
