"""A server in its surroundings, and the requests that all servers get."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from bench.common.pictures import ImageServer, as_row, sampling
from bench.common.ports import own_port
from bench.common.variants import STOCK
from bench.proof.surroundings import Surroundings
from bench.workers.engine import prompts

DOCTOR_LIMIT_S = 120

NEW_TOKENS = 32
LENGTHS = (5, 17, 40, 130, 300, 700)  # of the prompts sent one at a time; longer than a chunk: 700
BATCH = 6  # prompts sent together
# Batch sizes that show what stock's own batches change. 2, 4 and 8 are graphs of three sizes, the others
# run eagerly: batches that are padded to one size give the same bits and are one draw.
CROWDS = (2, 4, 8, 12, 24)
HEALTH = 20


class StartError(Exception):
    """A server that did not start, with the line of its log that says why."""


class TestedServer(ImageServer):
    """A server in its surroundings; requests as in ``images.py``."""

    def __init__(
        self,
        variant: str,
        arguments: list[str],
        log: Path,
        surroundings: Surroundings,
        path: list[str],
    ) -> None:
        self.variant, self.log, self.port = variant, log, own_port()
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("GEMMA4_TURBO")
        }
        # Not in a server's own temporary folder: compiled once for all.
        shared = Path(tempfile.gettempdir(), f"torchinductor-bench-{os.getuid()}")
        self.environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(shared))
        self.environment |= {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([*surroundings.path, *path]),
            **surroundings.environment,
        }
        if variant == STOCK:
            self.environment["GEMMA4_TURBO"] = "0"
        self.python = [*surroundings.prefix, sys.executable]
        start = [*self.python, "-m", "sglang.launch_server"]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*start, "--port", str(self.port), "--nccl-port", str(own_port()), *arguments],
                env=self.environment,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started = time.perf_counter()

    def healthy(self) -> bool:
        """Whether it answers, by a generated token."""
        if self.process.poll() is not None:
            return False
        with contextlib.suppress(urllib.error.URLError, OSError):
            address = f"http://127.0.0.1:{self.port}/health_generate"
            with urllib.request.urlopen(address, timeout=HEALTH) as answer:
                return bool(answer.status == 200)
        return False

    def wait_healthy(self, limit: float) -> float:
        """Seconds until it answered.

        Raises:
            StartError: if it ended, or has not answered in time.
        """
        while time.perf_counter() - self.started < limit:
            if self.process.poll() is not None:
                raise StartError(f"ended with {self.process.returncode}: {last_error(self.log)}")
            if self.healthy():
                return time.perf_counter() - self.started
            time.sleep(0.5)
        raise StartError(f"no answer in {limit:.0f} s: {last_error(self.log)}")

    def answers(self, vocabulary: int) -> dict[str, list[dict[str, Any]]]:
        """Greedy tokens: prompts one at a time, others together, and the first ones together too."""
        alone = [
            self.tokens({"input_ids": short(length, vocabulary, length)}, NEW_TOKENS)
            for length in LENGTHS
        ]
        together = [short(30 + 25 * i, vocabulary, 1000 + i) for i in range(BATCH)]
        return {
            "alone": alone,
            "together": self.at_once(together),
            "crowd": self.crowds(vocabulary),
        }

    def crowds(self, vocabulary: int) -> list[dict[str, Any]]:
        """The same prompts in batches of another composition: the floor of `tolerance` patches.

        An expert that the router picks by a hair moves a logprob by a nat, so one composition says
        little of the farthest: there are as many as `CROWDS`, one after another in the answer.
        """
        found = []
        for size in CROWDS:
            for start in range(0, len(LENGTHS), size):
                lengths = LENGTHS[start : start + size]
                fillers = size - len(lengths)
                prompts = [short(20 + 30 * i, vocabulary, 2000 + i) for i in range(fillers)]
                prompts += [short(length, vocabulary, length) for length in lengths]
                found += self.at_once(prompts)[fillers:]
        return found

    def at_once(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """Greedy tokens of prompts in one request."""
        body = {
            "input_ids": prompts,
            "sampling_params": sampling(NEW_TOKENS),
            "return_logprob": True,
            "top_logprobs_num": 5,
        }
        with self.post("/generate", body) as answer:
            return [as_row(found) for found in json.loads(answer.read())]

    def doctor(self) -> dict[str, Any]:
        """What ``gemma4_turbo doctor --import --json`` says in the server's environment.

        Raises:
            RuntimeError: if it says nothing in time, or no JSON.
        """
        command = [*self.python, "-m", "gemma4_turbo", "doctor", "--import", "--json"]
        try:
            done = subprocess.run(
                command,
                env=self.environment,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=DOCTOR_LIMIT_S,
            )
            found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"doctor has not ended in {DOCTOR_LIMIT_S} s") from None
        except ValueError:
            tail = (done.stderr.strip().splitlines() or ["nothing printed"])[-1]
            raise RuntimeError(f"doctor ended with {done.returncode}: {tail}") from None
        return found | {"exit_code": done.returncode}


def short(length: int, vocabulary: int, seed: int) -> list[int]:
    """A prompt of token ids that the small vocabulary has."""
    return [10 + token % (vocabulary - 10) for token in prompts(1, length, seed)[0]]


def last_error(log: Path) -> str:
    """The last exception in a log, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[.*\] )?[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["nothing printed"])[-1][:300]
