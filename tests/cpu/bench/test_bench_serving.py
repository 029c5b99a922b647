"""What bench/serving.py asks SGLang's load generator for, and what it takes from it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.engine.switches import Selection, read
from gemma4_turbo.models import geometry_mm
from tests.cpu.conftest import REPOSITORY, warm

typer = pytest.importorskip("typer")
servers = pytest.importorskip("bench.common.servers")
load = pytest.importorskip("bench.common.load")
load_client = pytest.importorskip("bench.workers.load")
serving = pytest.importorskip("bench.serving", reason="the bench's own packages are not installed")
FIGURES = {name: float(number) for number, (name, _, _) in enumerate(load.MEASURED)}


def test_the_figures_of_a_run():
    line = json.dumps({"completed": 5, **FIGURES, "std_itl_ms": 9.0})
    found = serving.measured(line, 5)
    assert [value for _, value, _ in found] == list(FIGURES.values())
    assert found[0] == ("time to first token, median", 0.0, "ms")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"completed": 4, **FIGURES}, "4 of 5 requests"),
        (FIGURES, "None of 5 requests"),
        ({"completed": 5, "duration": 1.0}, "does not tell median_ttft_ms"),
    ],
)
def test_a_run_that_cannot_count_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        serving.measured(json.dumps(line), 5)


def test_a_gpu_for_each_server():
    assert serving.placed("0,1") == {"stock": "0", "patched": "1"}
    assert serving.placed("") == {}
    for wrong in ("0", "0,0", "0,1,2", ","):
        with pytest.raises(typer.BadParameter, match="two different GPUs"):
            serving.placed(wrong)


def test_a_server_sees_its_gpu_alone(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        servers.subprocess, "Popen", lambda command, env, **rest: given.append(env) or None
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    for gpu in ("5", ""):
        servers.Server("stock", [], [], tmp_path / "log", (), gpu)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in given] == ["5", "4,5"]


REQUESTS = {
    "num-prompts": 3,
    "random-input-len": 4,
    "random-output-len": 2,
    "request-rate": 1000.0,
    "max-concurrency": 2,
}


class Answers(BaseHTTPRequestHandler):
    """As much of SGLang's server as the load asks for: two tokens for every request."""

    def log_message(self, *_):
        pass

    def send(self, kind: str, text: str):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.send("application/json", json.dumps({"data": [], "max_total_num_tokens": 700}))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        told = [{"text": "a" * n, "meta_info": {"completion_tokens": n}} for n in (1, 2)]
        self.send("text/event-stream", "".join(f"data: {json.dumps(x)}\n\n" for x in told))


class Fork:
    """As much of a `subprocess.Popen` as the client asks for: a fork that has the libraries under SGLang."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        pipes = [str(folder / name) for name in ("stdin", "stdout")]
        for pipe in pipes:
            os.mkfifo(pipe)
        self.child = warm(environment).start(
            **{"script": load_client.__file__, "arguments": [], "stdin": pipes[0]},
            **{"env": serving.environment(folder) | environment, "cwd": str(REPOSITORY)},
            **{"files": [pipes[1], str(folder / "stderr")], "timeout": 400},
        )
        self.pid, self.poll, self.wait = self.child.pid, self.child.poll, self.child.wait
        self.stdin, self.stdout = open(pipes[0], "w"), open(pipes[1])  # noqa: SIM115

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> None:
        self.child.wait()
        self.stdin.close()
        self.stdout.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory, environment):
    """One process: it imports SGLang's load generator once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("client")
        forks = SimpleNamespace(Popen=lambda *_, **__: Fork(folder, environment), PIPE=None)
        patch.setattr(load_client, "subprocess", forks)
        found = load_client.LoadClient({})
    yield found
    found.stop()


@pytest.fixture
def port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_runs_one_after_the_other_in_one_process(client, port, tmp_path: Path):
    """SGLang's own load generator; a run that fails is told, and does not end the process."""
    folder = geometry_mm.write_model(tmp_path / "model", "e2b", 5)
    process = client.process.pid
    for number in (1, 2):
        out = tmp_path / f"{number}.jsonl"
        client.run(serving.load_arguments(port, folder, REQUESTS, out))
        figures = {name: value for name, value, _ in serving.measured(out.read_text().strip(), 3)}
        assert figures["all requests"] > 0
        assert json.loads(out.read_text())["total_output_tokens"] == 6
        if number == 1:
            with pytest.raises(
                RuntimeError, match=r"(?s)exit 2.*unrecognized arguments: --nonsense"
            ):
                client.run(["--nonsense"])
    assert client.process.pid == process
    assert client.process.poll() is None


def test_a_server_that_is_not_there_is_told(client, tmp_path: Path):
    arguments = serving.load_arguments(1, tmp_path, REQUESTS, tmp_path / "out.jsonl")
    with pytest.raises(RuntimeError, match=r"(?s)failed: exit 1.*is not ready"):
        client.run([*arguments, "--ready-check-timeout-sec", "1"])


def test_a_process_that_ended_is_told(tmp_path: Path):
    client = load_client.LoadClient(serving.environment(tmp_path))
    client.process.kill()
    client.process.wait()
    with pytest.raises(RuntimeError, match="the load's process ended with status -9"):
        client.run([])
    client.stop()


@pytest.fixture
def environments(monkeypatch: pytest.MonkeyPatch):
    """Of the servers that were started; none is."""
    found = []
    monkeypatch.setattr(
        servers.subprocess, "Popen", lambda command, env, **_: found.append(env) or None
    )
    return found


def test_a_server_with_too_small_a_pool_is_refused(environments, port, tmp_path: Path):
    server = servers.Server("patched", [], [], tmp_path / "log")
    server.port = port
    serving.require_room(server, 700)
    with pytest.raises(SystemExit, match="the patched server has room for 700 tokens, not 701"):
        serving.require_room(server, 701)


def test_patches_besides_the_chosen(environments, tmp_path: Path):
    for variant in ("stock", "patched"):
        for patches in ([], ["router"]):
            servers.Server(variant, patches, [], tmp_path / "log", ["mm_prefill_graph", "yoco"])
    for environment in environments[:2]:
        assert environment["GEMMA4_TURBO"] == "0"
        assert not {name for name in environment if name.startswith("GEMMA4_TURBO_")}
    default, chosen = (
        {name for name, decision in read(environment, inherited(environment)).decisions.items()
         if decision.on}
        for environment in environments[2:]
    )  # fmt: skip
    assert chosen == {"router", "mm_prefill_graph", "yoco"}
    assert default == {p.name for p in CATALOGUE if p.default} | {"mm_prefill_graph"}


def inherited(environment: dict[str, str]) -> Selection | None:
    """What a patched process reads."""
    text = environment.get("GEMMA4_TURBO_SELECTION")
    return Selection.decode(text) if text else None


def test_a_patch_that_does_not_exist_is_named():
    with pytest.raises(typer.BadParameter, match="--patches: no patch is named 'other'"):
        serving.main(patches="router,other")
    with pytest.raises(typer.BadParameter, match="--also: no patch is named 'nonsense'"):
        serving.main(patches="router", also="nonsense")


def test_the_package_of_data_sets_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert serving.environment(tmp_path)["PYTHONPATH"] == "/elsewhere"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = serving.environment(tmp_path)["PYTHONPATH"]
    assert path == f"{tmp_path / 'stand_in'}:/elsewhere"
    assert "load_dataset" in (tmp_path / "stand_in" / "datasets.py").read_text()
