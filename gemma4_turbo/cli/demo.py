"""``demo``: the main job on what this machine has."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from json import dumps, loads
from pathlib import Path
from typing import Any, NamedTuple

from gemma4_turbo.cli import report, verify
from gemma4_turbo.cli.arguments import flag
from gemma4_turbo.cli.modules import CannotRunError, require_sglang, require_targets
from gemma4_turbo.cli.report import Console
from gemma4_turbo.cli.sitecustomize import folder as example_folder
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.engine.counters import descendants
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.models import geometry

START_LIMIT_S = 420
SMALL = {
    "moe": "two layers as of 26B-A4B, 128 experts, top-8",
    "ple": "two layers as of E4B, per-layer embeddings",
}
"""Models of the run without a GPU: kinds of `small_model.build`, and what they are called."""
IDLE = "they need a GPU, a server or another model"
BOUND = 2e-2
REQUESTS, CONCURRENCY, PROMPT, NEW_TOKENS = 32, 8, 256, 64


def run(layers: int, port: int) -> int:
    """The command."""
    console = Console()
    require_sglang()
    with report.Progress() as progress:
        progress.stage("importing PyTorch")
        device = verify.prepare_device()
    return on_gpu(console, layers, port) if device == "cuda" else on_cpu(console)


# -- without a GPU ------------------------------------------------------------------------------


class Compared(NamedTuple):
    """A model's step, stock against patched."""

    model: str
    engaged: dict[str, int]  # calls that ran a patch's code, by patch
    distance: float  # of the outputs, relative


def on_cpu(console: Console) -> int:
    """Small models of stock's classes on the CPU, the kernels in Triton's interpreter."""
    console.print(
        "No GPU: SGLang's own Gemma 4 classes on the CPU, kernels in Triton's interpreter"
    )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    with report.Progress() as progress:
        progress.stage("importing SGLang, which takes a minute")
        ENGINE.bootstrap()
        require_targets(progress)
        patched = [_step(kind, f"{told}, patched", progress) for kind, told in SMALL.items()]
        rows = ENGINE.status()  # while it is on, with what it has done
        checks = verify.check_all("cpu", progress.stage)
        ENGINE.revert()
        stock = [_step(kind, f"{told}, stock", progress) for kind, told in SMALL.items()]
        ENGINE.apply()
    compared = [
        Compared(told, engaged, float((ours - theirs).norm() / theirs.norm()))
        for told, (ours, engaged), (theirs, _) in zip(SMALL.values(), patched, stock, strict=True)
    ]
    report.show(console, report.table(rows, "Patches in these models", idle=IDLE))
    listing, status = outcome(compared, checks)
    listing.lines.insert(-1, (report.closing(rows), 0, ""))
    report.show(console, listing)
    return status


def _step(kind: str, told: str, progress: report.Progress) -> tuple[Any, dict[str, int]]:
    """``[1, hidden]`` of a model's step in fp32, and the calls that ran each patch's code."""
    import torch

    from gemma4_turbo.cli import small_model

    progress.stage(f"running {told}")
    before = _engaged()
    # SGLang's compiled rotation runs as it is written: compiling it takes most of a minute.
    with torch._dynamo.config.patch(disable=True):
        model = small_model.build(kind)
        for layer in model.layers if kind == "moe" else ():
            # Folded with 1 / sqrt(hidden) it is 1: stock's norm leaves it out on a CPU.
            layer.router.scale.data.fill_(small_model.HIDDEN**0.5)
        result = small_model.run(model).float()
    engaged = {name: count - before[name] for name, count in _engaged().items()}
    return result, {name: count for name, count in engaged.items() if count}


def _engaged() -> dict[str, int]:
    return {name: run.engaged_count() for name, run in ENGINE.runs.items()}


def outcome(compared: Sequence[Compared], checks: Sequence[Check]) -> tuple[report.Listing, int]:
    """What was found, the verdict last, and the exit status.

    A model in which nothing of ours ran is no comparison: it fails.
    """
    lines = report.Listing().add("Stock against patched", 2, "bold")
    lines.lines += verify.check_table(checks).lines
    apart, idle = [], []
    for one in compared:
        if not one.engaged:
            idle.append(one.model)
            lines.add(f"A step of {one.model}: NO PATCH RAN", 2, "red")
            continue
        if not one.distance < BOUND:  # NaN is not
            apart.append(one.model)
        ran = ", ".join(f"{name} {count}" for name, count in one.engaged.items())
        lines.add(
            f"A step of {one.model}: relative distance of the outputs {one.distance:.1e} (allowed: {BOUND:.0e}, "
            f"bf16 rounded in another order); calls that ran a patch's code: {ran}",
            2,
            "red" if one.model in apart else "",
        )
    if apart or not all(check.passed for check in checks):
        return lines.add("demo: stock and patched are DIFFERENT", 0, "red"), 1
    if idle or not compared:
        told = f"demo: no patch ran in {' and '.join(idle) or 'any model'}"
        return lines.add(told, 0, "red"), 1
    names = {name for one in compared for name in one.engaged}
    noun = "patch" if len(names) == 1 else "patches"
    last = f"{verify.verdict(checks, 'demo')}; {len(names)} {noun} ran in {len(compared)} models"
    return lines.add(last, 0, "green"), 0


# -- with a GPU ---------------------------------------------------------------------------------


def on_gpu(console: Console, layers: int, port: int) -> int:
    """The real server through sitecustomize_example, requests over HTTP, then the report."""
    example_folder()
    port = port or _free_port()
    if not _is_free(port):
        raise CannotRunError(f"port {port} is busy: choose another one with --port")
    with tempfile.TemporaryDirectory(prefix="gemma4_turbo-demo-") as scratch:
        try:
            model = geometry.write_model(Path(scratch, "model"), "26b-a4b", layers)
        except ValueError as error:
            raise CannotRunError(str(error)) from None
        log = Path(scratch, "server.log")
        with _server(model, port, log) as server:
            with report.Progress() as progress:
                progress.stage(f"starting a server (sglang serve), 26B-A4B, {layers} layers")
                _wait_until_healthy(server, port, log)
                progress.stage(f"sending {REQUESTS} requests")
                tokens, seconds = _send_requests(port)
            rows = ENGINE.status()
            for process in descendants():
                title = f"pid {process.pid}: {process.command}"
                report.show(console, report.process_table(process.patches, title))
    report.show(console, report.table(rows, "Patches, all processes of the server"))
    rate = f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s"
    last = report.Listing().add(
        f"{REQUESTS} requests answered, {CONCURRENCY} at a time: {rate} "
        f"({report.device()}, random weights, {layers} layers)",
        2,
    )
    silent = [row.name for row in rows if row.state == "active" and row.engaged == 0]
    if silent:
        last.add(f"installed but never engaged: {', '.join(silent)}", 2, "red")
    report.show(console, last.add(f"demo: {report.closing(rows)}", 0, "red" if silent else "green"))
    return 1 if silent else 0


@contextmanager
def _server(model: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    package = str(Path(__file__).resolve().parents[2])
    path = [str(example_folder()), package, os.environ.get("PYTHONPATH", "")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(part for part in path if part))
    command = [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(model), "--port", str(port)),
        *("--load-format", "dummy", "--skip-tokenizer-init"),
        *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
        *("--grammar-backend", "none", flag("cuda_graph_max_bs"), "16"),
    ]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield server
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health_generate", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    kept = Path(tempfile.gettempdir(), "gemma4_turbo-demo-server.log")
    kept.write_bytes(log.read_bytes())
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise CannotRunError(
        f"the server did not start ({kept}): {lines[-1] if lines else 'no output'}"
    )


def _send_requests(port: int) -> tuple[int, float]:
    def one(number: int) -> int:
        body: dict[str, Any] = {
            "input_ids": [(number * 7919 + i * 104729) % 200_000 + 10 for i in range(PROMPT)],
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/generate",
            data=dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return len(loads(answer.read())["output_ids"])

    one(0)  # the first request pays for what is compiled on first use
    started = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        tokens = sum(pool.map(one, range(1, REQUESTS + 1)))
    return tokens, time.perf_counter() - started


def _free_port() -> int:
    # SGLang derives other ports from this one: a high one would lead it beyond 65535.
    for port in random.sample(range(20_000, 30_000), 100):
        if _is_free(port):
            return port
    raise CannotRunError("no free port between 20000 and 30000: choose one with --port")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
