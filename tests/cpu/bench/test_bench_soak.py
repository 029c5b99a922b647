"""The soak against a stand-in for SGLang's server that speaks its HTTP: what passes, and what must not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from typer import Typer
from typer.testing import CliRunner

from tests.cpu.conftest import REPOSITORY

soak = pytest.importorskip("bench.soak", reason="the bench's own packages are not installed")


class StandIn(ThreadingHTTPServer):
    """Answers as the server does; ``fault`` names what goes wrong, from the weights' update on."""

    daemon_threads = True

    def __init__(self, fault: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.now = fault, ""
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.resident = 1000.0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        now = self.server.now
        if self.path == "/update_weights_from_disk":
            self.server.now = self.server.fault
            if self.server.fault == "leak":
                self.server.resident += 1000
            self.say(json.dumps({"success": self.server.fault != "not written"}).encode())
        elif self.path == "/generate" and body.get("stream"):
            self.say(b"data: {}\n\n" * 8 + b"data: [DONE]\n\n")
        elif self.path == "/generate":
            if now == "error":
                self.send_error(500, "no")
                return
            probe = "return_logprob" in body
            new = body["sampling_params"]["max_new_tokens"] - (now == "short" and not probe)
            first = 99 if probe and now == "changed" else 7
            token = [-0.5, first, None]
            meta = {
                "prompt_tokens": 3,
                "output_token_logprobs": [token] * new,
                "output_top_logprobs": [[token]] * new,
            }
            time.sleep(0.01)
            self.say(json.dumps({"output_ids": [first] * new, "meta_info": meta}).encode())
        else:
            self.say(b"done\n")

    def say(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):  # who hangs up is not waited for
            self.wfile.write(content)


# Of a server of 0.5.23: its arguments have the word as well.
ARGUMENTS = (
    "server_args={'retraction_policy': 'fcfs', 'disaggregation_decode_retraction_backup': None}\n"
)
FULL = f"{ARGUMENTS}KV cache pool is full. Retract requests. #retracted_reqs: 1, #new_tokens_gained: 9\n"
RAN = {"name": "router", "state": "active", "reason": "", "engaged": 3}


def run(
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *more: str,
    log: str = FULL,
    rows: Sequence[dict[str, Any]] = (RAN,),
    minutes: float = 0.02,  # the update is half-way: after the second pause
) -> tuple[Result, StandIn]:
    """The command."""
    stand_in = StandIn(fault)
    path = tmp_path / "soak-patched.log"

    @contextlib.contextmanager
    def servers(make: Any, variants: list[str]) -> Iterator[dict[str, Any]]:
        made = soak.SoakedServer.__new__(soak.SoakedServer)
        made.variant, made.log, made.port = variants[0], path, stand_in.server_port
        made.process = SimpleNamespace(poll=lambda: -9 if stand_in.now == "dead" else None)
        path.write_text(log)
        yield {variants[0]: made}

    monkeypatch.setattr(soak, "servers", servers)
    monkeypatch.setattr(soak, "end_on_sigterm", lambda: None)
    found = [SimpleNamespace(pid=7, patches=rows)]
    monkeypatch.setattr(soak, "descendants", lambda: found)
    monkeypatch.setattr(soak.report, "table", lambda rows, title: str(len(rows)))
    monkeypatch.setattr(soak.geometry_mm, "write_model", lambda folder, *_: folder)
    monkeypatch.setattr(
        soak.SoakedServer, "memory", lambda self: {"GPU": 10.0, "resident": stand_in.resident}
    )
    for name in ("BENCH_WEIGHT_RANGE", "BENCH_CHECKPOINT"):
        monkeypatch.setenv(name, "")
    app = Typer()
    app.command()(soak.main)
    arguments = ["--minutes", str(minutes), "--pause", "0.005", "--clients", "3"]
    result = CliRunner().invoke(
        app, [*arguments, "--out", str(tmp_path / "soak.csv"), *more], catch_exceptions=False
    )
    stand_in.shutdown()
    return result, stand_in


def test_every_kind_is_sent_and_the_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    result, stand_in = run("", tmp_path, monkeypatch, minutes=0.03)
    assert result.exit_code == 0, result.output
    table = (tmp_path / "soak.csv").read_text()
    for kind in soak.KINDS:
        assert f'"requests, {kind}"' in table
    paths = [path for path, _ in stand_in.seen]
    assert paths.count("/update_weights_from_disk") == 1
    assert paths.index("/flush_cache") < paths.index("/generate")
    sent = [body for path, body in stand_in.seen if path == "/generate"]
    assert any("image_data" in body and "return_logprob" not in body for body in sent)
    numbers = [body["rid"] for body in sent if body.get("stream")]
    aborted = {body["rid"] for path, body in stand_in.seen if path == "/abort_request"}
    assert aborted < set(numbers)  # the others hang up


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("changed", "tokens changed"),
        ("short", "had not all of their tokens"),
        ("error", "500"),
        ("dead", "the server ended with -9"),
        ("leak", "resident memory: 1000 MiB more"),
        ("not written", "weights: RuntimeError: /update_weights_from_disk"),
    ],
)
def test_what_goes_wrong_fails(
    fault: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result, _ = run(fault, tmp_path, monkeypatch, "--no-pictures")
    assert result.exit_code == 1
    assert told in result.output
    assert (tmp_path / "soak.csv").exists()


def test_the_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = f"{ARGUMENTS}Traceback (most recent call last):\n"
    result, _ = run("", tmp_path, monkeypatch, "--no-pictures", "--no-update", log=log)
    assert result.exit_code == 1
    assert "the log has: Traceback" in result.output
    assert "the KV pool was never full" in result.output


def test_a_patch_that_failed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lost = {"name": "yoco", "state": "failed", "reason": "RuntimeError: no", "engaged": 0}
    result, _ = run("", tmp_path, monkeypatch, "--no-pictures", "--no-update", rows=(RAN, lost))
    assert result.exit_code == 1
    assert "pid 7: yoco failed: RuntimeError: no" in result.output


def test_a_soak_of_stock_under_the_name_of_patched_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    idle = {**RAN, "engaged": 0}
    result, _ = run("", tmp_path, monkeypatch, "--no-pictures", "--no-update", rows=(idle,))
    assert result.exit_code == 1
    assert "no patch's code ran" in result.output


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("{0}, 1500\n1, 7\n", {"GPU, NAME": 1500.0}),
        ("{0}, [N/A]\n", {"GPU": 2000.0}),
        ("", {"GPU": 2000.0}),
    ],
)
def test_memory_of_the_gpu_is_the_servers_own_where_the_driver_tells(
    listed: str, expected: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    driver = tmp_path / "nvidia-smi"
    listed = listed.format(os.getpid())
    (tmp_path / "listed").write_text(listed)
    driver.write_text(
        f"#!/bin/sh\ncase $1 in *apps*) cat {tmp_path}/listed;; *) echo 2000;; esac\n"
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    server = soak.SoakedServer.__new__(soak.SoakedServer)
    server.process = SimpleNamespace(pid=os.getpid())
    found = server.memory()
    assert found.pop("resident") > 0
    own = soak.psutil.Process().name()
    assert found == {name.replace("NAME", own): mib for name, mib in expected.items()}


def test_requests_are_those_of_their_seed():
    for kind in soak.KINDS:
        one, other = (soak.request(kind, random.Random(3)) for _ in range(2))
        assert one == other
    beginnings = {
        soak.request("common beginning", random.Random(seed))[0]["text"][:200] for seed in range(20)
    }
    assert len(beginnings) == 3


def test_the_kept_weights_are_the_first_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors.torch import load_file

    monkeypatch.delenv("BENCH_PATCHED", raising=False)
    site = runpy.run_path(str(REPOSITORY / "bench" / "site" / "sitecustomize.py"))
    names = (
        "language_model.layers.0.input_layernorm.weight",
        "language_model.layers.0.layer_scalar",
    )
    other = (
        "language_model.layers.10.layer_scalar",
        "vision_tower.layers.0.input_layernorm.weight",
    )
    state = {name: torch.full((2,), float(len(name))) for name in (*names, *other)}
    site["_keep"](SimpleNamespace(state_dict=lambda: state), str(tmp_path / "kept"))
    found = load_file(os.path.join(tmp_path, "kept", "model.safetensors"))
    assert set(found) == {f"model.{name}" for name in names}
    assert all(torch.equal(found[f"model.{name}"], state[name]) for name in names)
