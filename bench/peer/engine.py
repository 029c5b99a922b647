"""Engines of ``peers.py``: how one is named on the command line, and its worker's process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import typer

from bench.common.ports import own_port
from bench.common.turns import turn
from gemma4_turbo.cli.arguments import RENAMED

BENCH = Path(__file__).resolve().parents[1]
KINDS = ("sglang", "ours", "vllm")
FORM = "NAME=KIND:PYTHON[:PATH...][;argument=value...], KIND one of " + ", ".join(KINDS)
ERROR = re.compile(r"\b(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b: ?.*")
CONSEQUENCES = ("See root cause above", "See stack trace for root cause")  # vLLM's last error
BACKEND = re.compile(r"Using (?:AttentionBackendEnum\.)?(\w+) (?:attention )?backend")


class PeerError(Exception):
    """An engine did not start, died, or did not answer; the text says which and why."""


class Peer(NamedTuple):
    """An engine to measure.

    Attributes:
        path: its PYTHONPATH; empty: that of this process.
        arguments: of the engine, beyond what every engine of its kind gets.
        environment: variables of its processes.
    """

    name: str
    kind: str
    python: str
    path: str
    arguments: dict[str, Any]
    environment: dict[str, str]


def parse(text: str) -> Peer:
    """An ``--engine``.

    Raises:
        typer.BadParameter: naming the argument.
    """
    head, *options = text.split(";")
    found = re.fullmatch(r"([^=]+)=(\w+):([^:]*)(?::(.*))?", head.strip())
    if not found or found[2] not in KINDS:
        raise typer.BadParameter(f"--engine must be {FORM}; got {text!r}")
    arguments: dict[str, Any] = {}
    environment: dict[str, str] = {}
    for option in filter(None, (part.strip() for part in options)):
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--engine: {option!r} is not argument=value, in {text!r}")
        if name.isupper():
            environment[name] = value
        else:
            arguments[name] = valued(value)
    python = found[3] or sys.executable
    if not os.access(python, os.X_OK):
        raise typer.BadParameter(f"--engine: there is no interpreter {python}, in {text!r}")
    return Peer(found[1].strip(), found[2], python, found[4] or "", arguments, environment)


def valued(text: str) -> Any:
    """JSON where it is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def environment(peer: Peer) -> dict[str, str]:
    """Of the engine's processes; the patches are in those of ``ours`` alone."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("GEMMA4_TURBO")}
    inherited = peer.path or os.environ.get("PYTHONPATH", "")
    others = [part for part in inherited.split(os.pathsep) if part]
    repository = BENCH.parent
    others = [part for part in others if Path(part).resolve() != repository]
    path = [str(BENCH / "site"), *([str(repository)] if peer.kind == "ours" else []), *others]
    kept |= {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",  # bench/kernels.py is not the package kernels
        "BENCH_PATCHED": str(int(peer.kind == "ours")),
        "HF_HUB_OFFLINE": "1",
    }
    if peer.kind != "ours":
        kept["GEMMA4_TURBO"] = "0"
    return kept | peer.environment


def reason(log: Path) -> str:
    """The error that a log ends with, else its last line."""
    if not log.exists():
        return "no log"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [found[0] for line in lines if (found := ERROR.search(line))]
    causes = [text for text in errors if not any(end in text for end in CONSEQUENCES)]
    last = [*lines[-1:], *errors[-1:], *causes[-1:]]
    return last[-1][:300] if last else "an empty log"


def attention(resolved: dict[str, Any], log: Path) -> str:
    """The attention backend as the engine resolved it, else as its log tells."""
    names = ("prefill_attention_backend", "decode_attention_backend")
    parts = [str(resolved[name]) for name in names if resolved.get(name)]
    if resolved.get("attention_backend"):
        return "+".join(dict.fromkeys(parts or [str(resolved["attention_backend"])]))
    told = BACKEND.findall(log.read_text(errors="replace")) if log.exists() else []
    return "+".join(dict.fromkeys(told)) or "not told"


class Worker:
    """The process of `workers.peers`, in a group of its own."""

    script = BENCH / "workers" / "peers.py"
    patience_s = 20.0  # until a process that was told to end is killed

    def __init__(self, peer: Peer, arguments: dict[str, Any], log: Path) -> None:
        self.peer, self.log = peer, log
        log.unlink(missing_ok=True)
        if peer.kind != "vllm":
            arguments = {"nccl_port": own_port(), **arguments}
        given = {"kind": peer.kind, "arguments": arguments, "renamed": RENAMED}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [peer.python, str(self.script), str(log), json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=environment(peer),
                start_new_session=True,
            )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def answer(self, limit_s: float, what: str) -> dict[str, Any]:
        """The next one; PeerError where none comes, or it tells of an error."""
        try:
            line = self.lines.get(timeout=limit_s)
        except queue.Empty:
            raise PeerError(f"{what}: no answer in {limit_s:.0f} s") from None
        if not line:
            raise PeerError(f"{what}: {reason(self.log)}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            told = str(found["error"])
            consequence = any(end in told for end in CONSEQUENCES)
            raise PeerError(f"{what}: {reason(self.log) if consequence else told}")
        return found

    def ready(self, limit_s: float) -> dict[str, Any]:
        """What the engine is, once it stands."""
        found = self.answer(limit_s, "did not start")
        return found | {"attention_backend": attention(found["resolved"], self.log)}

    def __call__(self, command: dict[str, Any], limit_s: float) -> dict[str, Any]:
        assert self.process.stdin
        with turn():
            try:
                self.process.stdin.write(json.dumps(command) + "\n")
                self.process.stdin.flush()
            except OSError:
                raise PeerError(f"died: {reason(self.log)}") from None
            return self.answer(limit_s, "died or did not answer")

    def stop(self, patience_s: float | None = None) -> None:
        """End the process and all of its group."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(self.patience_s if patience_s is None else patience_s)
        end_group(self.process)


def end_group(process: subprocess.Popen[Any], wait_s: float = 10) -> None:
    """Kill what is left of a process group, and wait until its memory is free again."""
    deadline = time.monotonic() + wait_s
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while True:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    process.wait()
