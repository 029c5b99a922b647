"""SGLang's real server, stock or patched, for the benchmarks that talk to it over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from bench.common.ports import own_port
from bench.common.variants import PATCHED
from gemma4_turbo.catalogue import by_name
from gemma4_turbo.cli.arguments import flag

BENCH = Path(__file__).resolve().parents[1]
START_LIMIT_S = 480
console = Console(width=150)
ServerT = TypeVar("ServerT", bound="Server")


class Server:
    """One ``sglang.launch_server`` in a process group of its own.

    Args:
        patches: of a patched server; none: all that are on by default.
        also: patches besides these.
        gpu: the one that it sees; empty: those that this process sees.
    """

    health = "/health_generate"
    start_limit_s: float = START_LIMIT_S

    def __init__(
        self,
        variant: str,
        patches: list[str],
        arguments: list[str],
        log: Path,
        also: Sequence[str] = (),
        gpu: str = "",
    ) -> None:
        self.variant, self.log, self.port = variant, log, own_port()
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("GEMMA4_TURBO")
        }
        # sitecustomize_example runs the sitecustomize that it shadows: that of bench/site.
        path = [str(BENCH / "site"), str(BENCH.parent), os.environ.get("PYTHONPATH", "")]
        environment |= {"BENCH_PATCHED": "0", "HF_HUB_OFFLINE": "1"}
        if variant == PATCHED:
            path.insert(0, str(BENCH.parent / "sitecustomize_example"))
            environment["GEMMA4_TURBO_STRICT"] = "1"
            if patches:
                environment["GEMMA4_TURBO_SELECTION"] = f"only={','.join(patches)};skip="
            environment |= {by_name(name).env: "1" for name in also}
        else:
            environment["GEMMA4_TURBO"] = "0"
        environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "sglang.launch_server", "--port", str(self.port)]
        command += ["--nccl-port", str(own_port())]
        self._start([*command, *arguments], environment)

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started = time.perf_counter()

    def wait_ready(self) -> float:
        """Seconds until the server, warmed up by SGLang itself, answered."""
        while time.perf_counter() - self.started < self.start_limit_s:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, OSError):
                address = f"http://127.0.0.1:{self.port}{self.health}"
                with urllib.request.urlopen(address, timeout=10) as answer:
                    if answer.status == 200:
                        return time.perf_counter() - self.started
            time.sleep(0.5)
        tail = [text for text in self.log.read_text(errors="replace").splitlines() if text]
        self.stop()
        sys.exit(f"the {self.variant} server did not start ({self.log}):\n" + "\n".join(tail[-20:]))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The open answer to a request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            return urllib.request.urlopen(request, timeout=300)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code}, {error.read()[:500]!r}") from None

    def pool(self) -> int:
        """Tokens that the KV pool has room for, in full attention layers."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}/server_info", timeout=60
        ) as text:
            return int(json.load(text)["max_total_num_tokens"])

    def stop(self) -> None:
        """End the whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # also what the main process left behind
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def launch_arguments(
    folder: Path, largest_batch: int, max_total_tokens: int, mem_fraction: float, more: str
) -> list[str]:
    """For ``sglang.launch_server`` on a generated model folder; ``more`` is split as a shell does."""
    return [
        *("--model-path", str(folder), "--load-format", "dummy"),
        *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
        *("--grammar-backend", "none", "--disable-radix-cache"),
        *(flag("cuda_graph_max_bs"), str(largest_batch)),
        *("--max-total-tokens", str(max_total_tokens)),
        *("--mem-fraction-static", str(mem_fraction)),
        *shlex.split(more),
    ]


@contextlib.contextmanager
def servers(make: Callable[[str], ServerT], variants: list[str]) -> Iterator[dict[str, ServerT]]:
    """Several servers at once, stopped at the end."""
    live: dict[str, ServerT] = {}
    try:
        for variant in variants:
            live[variant] = make(variant)
        for variant, server in live.items():
            console.print(f"{variant}: ready after {server.wait_ready():.0f} s")
        yield live
    finally:
        for server in live.values():
            server.stop()
