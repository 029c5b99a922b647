"""bench/common/ports.py between real processes, and that every start of an engine gets a port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import before_after
from bench.common import engines, ports, servers
from bench.peer import engine as peers_engine
from bench.peer import serving as peers_serving
from bench.proof import server as proof_server
from bench.proof.surroundings import Surroundings
from bench.speculation.engine import MtpEngine

REPOSITORY = Path(__file__).resolve().parents[4]
FIRST = 10_000 + os.getpid() % 500 * 8  # not those of another test run
EIGHT = range(FIRST, FIRST + 8)
FOUR_OF = f"""
import sys
from bench.common import ports
ports.PORTS = range({EIGHT.start}, {EIGHT.stop})
print(*(ports.own_port() for _ in range(4)), flush=True)
sys.stdin.read()
"""


class Process:
    """Another benchmark that asks for four ports out of eight, and lives until it is ended."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FOUR_OF],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def ports(self) -> list[int]:
        assert self.process.stdout is not None
        return [int(port) for port in self.process.stdout.readline().split()]

    def end(self) -> str:
        return self.process.communicate(timeout=20)[1]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ports for this process, too; what it claims ends with the test."""
    monkeypatch.setattr(ports, "PORTS", EIGHT)
    monkeypatch.setattr(ports, "_held", [])


def test_processes_at_once_share_no_port(few: None):
    """Two at once have all eight; a third gets none until one has ended."""
    one, two = Process(), Process()
    try:
        assert sorted(one.ports() + two.ports()) == list(EIGHT)
        with pytest.raises(SystemExit, match=f"no free port between {FIRST} and {FIRST + 7}"):
            ports.own_port()
        two.end()
        assert ports.own_port() in EIGHT
    finally:
        one.end()
        two.end()


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_not_handed_out(few: None, address: str):
    """Nor is its claim kept."""
    with socket.socket() as taken:
        taken.bind((address, EIGHT[3]))
        taken.listen()
        assert sorted(ports.own_port() for _ in range(7)) == [p for p in EIGHT if p != EIGHT[3]]
    assert ports.own_port() == EIGHT[3]


def test_below_the_ports_that_others_choose_from():
    """Of connections: the kernel's; of SGLang 0.5.23: 22000 to 29999."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert ports.PORTS[-1] < min(22_000, lowest)


def test_every_start_has_ports_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Engines by an argument, servers by a flag; vLLM's have no such argument."""
    commands: list[list[str]] = []

    def popen(command: list[str], **given: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(stdout=iter(()))

    monkeypatch.setattr("subprocess.Popen", popen)
    monkeypatch.setattr(peers_serving, "server_args", lambda peer: "nccl_port: int")
    log = tmp_path / "log"
    peer = peers_engine.Peer("p", "sglang", sys.executable, "", {}, {})
    engines.Engine("stock", [], {"tp_size": 2}, log)
    MtpEngine("stock", [], {}, log)
    peers_engine.Worker(peer, {"tp_size": 2}, log)
    found = [json.loads(command[-1]) for command in commands]
    numbers = [given.get("arguments", given)["nccl_port"] for given in found]
    assert found[0]["tp_size"] == found[2]["arguments"]["tp_size"] == 2
    commands.clear()
    servers.Server("stock", [], [], log)
    proof_server.TestedServer("stock", [], log, Surroundings(), [])
    peers_serving.PeerServer(peer, {}, log, 1.0)
    for command in commands:
        numbers += [int(command[command.index(f) + 1]) for f in ("--port", "--nccl-port")]
    assert len(set(numbers)) == 3 + 2 * 3
    assert set(numbers) <= set(ports.PORTS)
    commands.clear()
    peers_engine.Worker(peer._replace(kind="vllm"), {}, log)
    peers_serving.PeerServer(peer._replace(kind="vllm"), {}, log, 1.0)
    assert "nccl" not in str(commands)


def test_engines_of_other_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their class asks for no port itself."""
    given: list[int] = []

    class Engine:
        def __init__(self, variant: str, patches: list[str], arguments: dict[str, Any], log: Path):
            given.append(arguments["nccl_port"])

        def wait_ready(self) -> None: ...

        def stop(self) -> None: ...

    monkeypatch.setattr(before_after, "Engine", Engine)
    monkeypatch.setattr(before_after, "engine_class", lambda checkout: Engine)
    before_after.main(
        [tmp_path / "one"], layers=6, batches="", prefill="", rounds=1, out=tmp_path / "out.csv"
    )
    assert len(set(given)) == 3
