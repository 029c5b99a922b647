"""The HTTP part of ``peers.py``: every engine's own server under ``sglang.bench_serving``.

The prompts are text and the tokenizer is generated: a word is a token. One client for all servers, of the
first SGLang among the engines; it speaks SGLang's own protocol to SGLang and OpenAI's to vLLM.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from bench.common.load import load_arguments, measured, with_stand_in
from bench.common.ports import own_port
from bench.common.servers import Server
from bench.peer.engine import Peer, PeerError, attention, end_group, environment, reason
from bench.peer.results import DURATION, EACH, EACH_99, FIRST, FIRST_99, OUTPUT, TOTAL
from bench.workers.load import LoadClient
from bench.workers.peers import DECIDING
from gemma4_turbo.cli.arguments import flag
from gemma4_turbo.engine.counters import descendants

MODULES = {"sglang": "sglang.launch_server", "vllm": "vllm.entrypoints.openai.api_server"}
# Of bench_serving's output: its name, ours, the unit.
SERVED = (
    ("median_ttft_ms", FIRST, "ms"),
    ("p99_ttft_ms", FIRST_99, "ms"),
    ("median_tpot_ms", EACH, "ms"),
    ("p99_tpot_ms", EACH_99, "ms"),
    ("output_throughput", OUTPUT, "tokens/s"),
    ("total_throughput", TOTAL, "tokens/s"),
    ("duration", DURATION, "s"),
)
FOLDER = (
    "import importlib.util\n"
    "print(*importlib.util.find_spec('sglang').submodule_search_locations, sep='\\n')"
)
VERSIONS = (
    "import importlib.metadata as m, json, sys\n"
    "found = {'python': '.'.join(map(str, sys.version_info[:3]))}\n"
    "for name in sys.argv[1:]:\n"
    "    try: found[name] = m.version(name)\n"
    "    except m.PackageNotFoundError: found[name] = None\n"
    "print(json.dumps(found))"
)


def rates(text: str) -> list[float]:
    """Requests a second; inf: all at once."""
    found = [float(part) for part in text.split(",") if part]
    if not all(rate > 0 for rate in found):
        raise ValueError(f"requests a second must be above 0, got {text}")
    return found


def name_of(rate: float) -> str:
    """Of a workload."""
    return "serving, unlimited" if rate == float("inf") else f"serving, {rate:g} a second"


def flags(arguments: dict[str, Any], source: str | None) -> list[str]:
    """An engine's arguments as its server takes them; what is false is left out.

    ``source``: of SGLang's `server_args`, whose release decides about names; None: as they are.
    """
    found = []
    for name, value in arguments.items():
        if value is False or value is None:
            continue
        found.append("--" + name.replace("_", "-") if source is None else flag(name, source))
        if value is not True:
            found.append(value if isinstance(value, str) else json.dumps(value))
    return found


class PeerServer(Server):
    """An engine's server, with nothing but what a comparison without weights needs."""

    def __init__(
        self, peer: Peer, arguments: dict[str, Any], log: Path, start_limit_s: float
    ) -> None:
        self.variant, self.log, self.port = peer.name, log, own_port()
        self.start_limit_s = start_limit_s
        log.unlink(missing_ok=True)
        module = MODULES["vllm" if peer.kind == "vllm" else "sglang"]
        source = None
        if peer.kind == "vllm":
            self.health = "/health"
        else:
            source = server_args(peer)
            arguments = {"nccl_port": own_port(), **arguments}
        command = [peer.python, "-m", module, "--host", "127.0.0.1", "--port", str(self.port)]
        self._start([*command, *flags(arguments, source)], environment(peer))
        self.peer = peer

    def about(self) -> dict[str, Any]:
        """What a row says of it, once it answers; PeerError if it does not."""
        try:
            ready_s = self.wait_ready()
        except SystemExit as end:
            if isinstance(end.code, int):
                raise  # this process was told to end
            raise PeerError(f"did not start: {reason(self.log)}") from None
        resolved = self.resolved()
        return {
            **versions(self.peer),
            "ready_s": ready_s,
            "resolved": resolved,
            "attention_backend": attention(resolved, self.log),
        }

    def resolved(self) -> dict[str, Any]:
        """What SGLang's server made of its arguments; vLLM's does not tell."""
        if self.peer.kind == "vllm":
            return {}
        address = f"http://127.0.0.1:{self.port}/server_info"
        try:
            with urllib.request.urlopen(address, timeout=60) as text:
                found = json.load(text)
        except (OSError, ValueError):
            return {}
        return {name: found[name] for name in DECIDING if found.get(name) is not None}

    def engaged(self) -> str:
        """The patches that ran in its processes."""
        if self.peer.kind != "ours":
            return ""
        rows = [row for process in descendants() for row in process.patches]
        return "+".join(sorted({row["name"] for row in rows if row["engaged"]}))

    def stop(self) -> None:
        super().stop()
        end_group(self.process)


def versions(peer: Peer) -> dict[str, Any]:
    """What is installed in an engine's environment; nothing is imported."""
    own = "vllm" if peer.kind == "vllm" else "sglang"
    names = [own, "torch", "triton", *(["gemma4_turbo"] if peer.kind == "ours" else [])]
    told = subprocess.run(
        [peer.python, "-c", VERSIONS, *names],
        env=environment(peer) | {"BENCH_PATCHED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {}
    return found | {"version": found.get(own)}


def server_args(peer: Peer) -> str | None:
    """SGLang's source of that name in an engine's environment, where nothing of it is imported; None: not found."""
    told = subprocess.run(
        [peer.python, "-c", FOLDER],
        env=environment(peer) | {"BENCH_PATCHED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = told.stdout.splitlines()
    try:
        return (Path(lines[-1]) / "srt" / "server_args.py").read_text(encoding="utf-8")
    except (IndexError, OSError):
        return None


class Load:
    """The client, started anew where it died."""

    def __init__(self, peers: list[Peer], scratch: Path) -> None:
        self.scratch = scratch
        own = [peer for peer in peers if peer.kind != "vllm"]
        self.python = own[0].python if own else sys.executable
        found = environment(own[0] if own else peers[0]) | {"GEMMA4_TURBO": "0"}
        del found["BENCH_PATCHED"]
        self.environment = with_stand_in(found, scratch)
        self.client: LoadClient | None = None

    def __call__(
        self, server: PeerServer, folder: Path, requests: dict[str, Any], limit_s: float
    ) -> list[tuple[str, float, str]]:
        """The figures of one run; PeerError where there are none."""
        if self.client is None or self.client.process.poll() is not None:
            self.client = LoadClient(self.environment, self.python)
        out = self.scratch / "load.jsonl"
        out.unlink(missing_ok=True)
        backend = "vllm" if server.peer.kind == "vllm" else "sglang"
        arguments = load_arguments(server.port, folder, requests | {"backend": backend}, out, True)
        limit = threading.Timer(limit_s, self.client.process.kill)
        limit.start()
        try:
            self.client.run(arguments)
            return measured(out.read_text().splitlines()[-1], requests["num-prompts"], SERVED)
        except (RuntimeError, OSError, IndexError, ValueError) as error:
            if server.process.poll() is not None:
                raise PeerError(f"the server died: {reason(server.log)}") from None
            last = [line for line in str(error).splitlines() if line.strip()]
            raise PeerError(
                f"no figures: {last[0]} {last[-1] if len(last) > 1 else ''}"[:300]
            ) from None
        finally:
            limit.cancel()

    def stop(self) -> None:
        """End the client."""
        if self.client is not None:
            self.client.stop()
