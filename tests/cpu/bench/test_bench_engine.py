"""bench/engine.py with a stand-in for the engines: what is compared, kept, and saved when cut off."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer

from bench import engine
from bench.common import comparing, engines
from bench.workers import engine as worker
from tests.cpu.conftest import REPOSITORY, warm
from tests.cpu.warm import Child

WORKER = """
import json, os, sys, time

patched = os.environ["BENCH_PATCHED"] == "1"
with open(os.environ["ASKED"], "a") as file:
    file.write(json.dumps([patched, json.loads(sys.argv[2]).get("quantization")]) + "\\n")
print(json.dumps({"ready_s": 1.0}), flush=True)
calls = 0
for line in sys.stdin:
    command = json.loads(line)
    answer = {}
    if command["do"] in ("decode", "prefill"):
        calls += 1
        if patched and calls > int(os.environ["CALLS"]):
            print("waiting", file=sys.stderr, flush=True)
            time.sleep(600)
        # The first pass is slow, as where something is compiled.
        answer = {"value": (2.0 if patched else 4.0) * (100 if calls == 1 else 1)}
    if command["do"] == "tokens":
        ids = [1, 2, 3 + patched]
        answer = {"rows": [{"ids": ids, "input": ["0x1"], "output": ["0x2"], "top": [["0x3", 7]]}]}
    if command["do"] == "distribution":
        exact = os.environ.get("BENCH_EXACT_ATTENTION") == "1"
        step = [-1.0 - exact, -2.0 - 0.25 * patched, -3.0 - 0.5 * command["alone"]]
        answer = {"rows": [{"ids": [1], "before": [], "after": [step]}]}
    if command["do"] == "status":
        rows = [{"name": "router", "state": "active", "reason": "", "engaged": int(os.environ["RAN"])}]
        answer = {"processes": [{"pid": 1, "command": "x", "patches": rows}]}
    print(json.dumps(answer), flush=True)
"""
RUN = """
import sys
from pathlib import Path

import typer

from bench import engine
from bench.common import engines

engines.BENCH = Path(sys.argv.pop(1))
typer.run(engine.main)
"""


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Starts the command with stand-ins for its engines; it prints to `printed`."""
    started: list[Child] = []

    def run(calls: int, ran: int = 1, *more: str) -> Child:
        (tmp_path / "workers").mkdir(exist_ok=True)
        (tmp_path / "workers" / "engine.py").write_text(WORKER)
        (tmp_path / "printed").touch()
        options = ["--together", "--rounds", "2", "--batches", "8", "--prefill", "", "--no-control"]
        options += ["--equality", "1", "--kl", "1", "--kl-exact", "--breakdown", "0"]
        options += ["--patches", "router", *more]
        child = warm(environment).start(
            code=RUN,
            arguments=[str(tmp_path), *options, "--out", str(tmp_path / "out.csv")],
            env={
                **os.environ,
                "CALLS": str(calls),
                "RAN": str(ran),
                "ASKED": str(tmp_path / "asked"),
            },
            cwd=str(REPOSITORY),
            files=[str(tmp_path / "printed")] * 2,
            timeout=120,
        )
        started.append(child)
        return child

    yield run
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def value(frame: pd.DataFrame, variant: str, quantity: str) -> float:
    (found,) = frame[(frame["variant"] == variant) & (frame["quantity"] == quantity)]["value"]
    return float(found)


def test_a_run(start: Callable[[int], Child], tmp_path: Path):
    assert start(99).wait() == 0, (tmp_path / "printed").read_text()
    frame = pd.read_csv(tmp_path / "out.csv")
    steps = frame[frame["quantity"] == "decode step"]
    assert set(steps["round"]) == {0, 1}
    assert steps.groupby("variant")["value"].agg(["min", "max"]).T.to_dict("list") == {
        "patched": [2.0, 2.0],
        "stock": [4.0, 4.0],
    }
    assert value(frame, "stock vs patched", "token_diffs") == 1
    assert value(frame, "stock vs patched", "tokens") == 3
    # p (r - 1 - log r) of the one token that changed, a third of the sample, of 262144 tokens.
    for other, p, change in (("patched", -2.0, -0.25), ("stock, one at a time", -3.0, -0.5)):
        expected = math.exp(p) * (math.expm1(change) - change) / 3 * 262144
        assert value(frame, f"stock vs {other}", "KL divergence") == pytest.approx(expected)
    moved = math.exp(-2.0) * (math.expm1(1.0) - 1.0) / 3 * 262144
    exact = "stock, attention in fp32"
    assert value(frame, f"{exact} vs stock", "KL divergence") == pytest.approx(moved)
    assert value(frame, f"{exact} vs patched", "KL divergence") > moved


def test_both_engines_get_the_quantization(start: Callable[..., Child], tmp_path: Path):
    """And every row names it; without the option SGLang is not asked for any, and the rows say none."""
    for quantization in ("fp8", ""):
        more = ["--quantization", quantization] if quantization else []
        assert start(99, 1, *more, "--kl", "0").wait() == 0, (tmp_path / "printed").read_text()
        asked = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
        assert sorted(asked) == [[False, quantization or None], [True, quantization or None]]
        frame = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
        assert set(frame["quantization"]) == {quantization or "none"}
        for name in ("asked", "out.csv"):
            (tmp_path / name).unlink()


def test_stock_against_stock_fails(start: Callable[..., Child], tmp_path: Path):
    """No patch's code ran: nothing is proven, whatever was equal."""
    assert start(99, 0).wait() == 1
    assert "engine.py: no patch's code ran" in (tmp_path / "printed").read_text()
    assert (tmp_path / "out.csv").exists()


def test_what_is_known_is_saved_when_a_limit_cuts_it_off(
    start: Callable[[int], Child], tmp_path: Path
):
    process = start(1)
    printed = tmp_path / "printed"
    # Of the stand-in: the patched engine's first round will not end.
    while "waiting" not in printed.read_text():
        assert process.poll() is None, printed.read_text()
        time.sleep(0.1)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 143, printed.read_text()
    frame = pd.read_csv(tmp_path / "out.csv")
    assert value(frame, "stock vs patched", "token_diffs") == 1
    steps = frame[frame["quantity"] == "decode step"]
    assert steps[["variant", "round", "value"]].to_numpy().tolist() == [["stock", 0, 4.0]]
    assert "KL divergence" in set(frame["quantity"])


def test_a_decoded_token_counts_while_what_is_before_it_is_the_same():
    """Steps after the first token that differs have other tokens before them."""
    one = {"ids": [1, 2, 3, 4], "before": [[-1.0]], "after": [[-1.0], [-1.0], [-1.0], [-1.0]]}
    other = {"ids": [1, 2, 9, 4], "before": [[-1.0]], "after": [[-1.0], [-1.5], [-1.0], [-9.0]]}
    found = engine.divergence([one], [other])
    moved = math.exp(-1.0) * (math.expm1(-0.5) + 0.5) * comparing.VOCABULARY
    assert found == {"KL divergence": 0, "KL divergence, decode": pytest.approx(moved / 2)}
    three = engine.divergence([one, one, one], [other, one, one])
    assert three["KL divergence, decode"] < found["KL divergence, decode"]
    deviation = moved / 2 / 3  # of the mean of one moved / 2 and two zeros
    assert three["KL divergence, decode, standard error"] == pytest.approx(deviation)
    only_prefill = {"ids": [1], "before": [], "after": [[-1.0]]}
    assert engine.divergence([only_prefill], [only_prefill]) == {"KL divergence": 0}


def test_prompts_length_and_tokens():
    assert engine.parse_prefill("8x4096") == (8, 4096, 1)
    assert engine.parse_prefill("30x7000+10") == (30, 7000, 10)
    for text in ("8", "8x", "x8", "8x4096+", "8x4096 "):
        with pytest.raises(typer.BadParameter, match="--prefill must be"):
            engine.parse_prefill(text)


def test_an_engine_that_does_not_start(tmp_path, monkeypatch):
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "engine.py").write_text(
        "import sys; open(sys.argv[1], 'w').write('[1] TypeError: no KV\\nbye\\n')"
    )
    monkeypatch.setattr(engines, "BENCH", tmp_path)
    failing = engine.Engine(engine.PIECEWISE, [], {}, tmp_path / "log")
    assert engine.fate(failing) == "does not start: [1] TypeError: no KV"


def test_processes_take_turns(tmp_path, monkeypatch):
    """A second process waits until the first has left."""
    told = tmp_path / "told"
    body = (
        "import sys, time; from bench.common.turns import turn\n"
        f"with turn():\n    f = open({str(told)!r}, 'a'); f.write('in '); f.flush()\n"
        "    time.sleep(0.5); f.write('out '); f.flush()\n"
    )
    lock = {**os.environ, "BENCH_LOCK": str(tmp_path / "lock")}
    command = [sys.executable, "-c", body]
    running = [subprocess.Popen(command, env=lock, cwd=REPOSITORY) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert told.read_text() == "in out " * 3


def test_arguments_have_the_names_of_the_release():
    from bench.workers.engine import named_here

    given = {"cuda_graph_max_bs": 8, "disable_cuda_graph": False}
    assert named_here(given, ["cuda_graph_max_bs", "disable_cuda_graph"]) == given
    later = ["cuda_graph_max_bs_decode", "disable_cuda_graph"]
    assert named_here(given, later) == {"cuda_graph_max_bs_decode": 8, "disable_cuda_graph": False}
    with pytest.raises(ValueError, match="no argument disable_piecewise_cuda_graph"):
        named_here({"disable_piecewise_cuda_graph": True}, later)


def test_kernels_of_a_profile_by_class():
    """Sums over GPUs by NCCL and by SGLang's own kernels; a norm inside one is counted once, as a sum."""
    kernels = {
        "void sglang::cross_device_reduce_1stage<__nv_bfloat16, 2>(RankData*)": [4, 20.0],
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": [1, 30.0],
        "allreduce_fusion_kernel_oneshot_rmsnorm": [1, 5.0],
        "_layer_norms_kernel": [2, 4.0],
        "_layer_tail_kernel": [2, 6.0],
        "kernel_cutlass_RMSNormKernel_object": [1, 1.0],
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": [9, 900.0],
        "void moe_sum_reduce_kernel": [3, 3.0],
    }
    assert engine.by_class(kernels) == {"sums over GPUs": (6, 55.0), "norms": (5, 11.0)}


def on_gpu(call: int, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
    return {"cat": cat, "name": "k", "ts": ts, "dur": dur, "args": {"correlation": call}}


STEPS = [
    *(on_gpu(1, 100, 5), on_gpu(1, 104, 6), on_gpu(1, 111, 1, "gpu_memcpy")),  # two overlap
    on_gpu(2, 130, 400),  # sampling, whatever it takes
    *(on_gpu(3, 900, 5), on_gpu(3, 905, 5), on_gpu(3, 920, 2)),
    *(on_gpu(4, 2000, 300), on_gpu(4, 2300, 300)),  # another graph, of fewer
    {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 9e9, "args": {}},
    {"name": "process_name", "args": {"name": "python"}},
]


def test_replays_of_a_graph():
    """From the first kernel's start to the last end, however long the host takes between two of them."""
    assert worker.replays(STEPS) == [12, 22]
    assert worker.replays([on_gpu(1, 0, 5), on_gpu(2, 9, 5)]) == []  # eager: each has its own call
    assert worker.replays([]) == []


def test_time_of_a_graph_on_the_gpu():
    """Of the decode stage of the first GPU alone, once its trace is whole."""

    class Engine:
        def __init__(self, events: list[dict[str, Any]]) -> None:
            self.events = events

        def start_profile(self, **given: Any) -> None:
            assert (given["num_steps"], given["activities"]) == (32, ["GPU"])
            self.folder = Path(given["output_dir"])

        def generate(self, input_ids: list[list[int]], sampling_params: dict[str, Any]) -> None:
            assert [len(ids) for ids in input_ids] == [7, 7]
            assert sampling_params["max_new_tokens"] > 32
            for name, events in (
                ("x-TP-0-EXTEND", STEPS[4:]),
                ("x-TP-1-DECODE", STEPS[:3]),
                ("x-TP-0-DECODE", self.events),
            ):
                path = self.folder / f"{name}.trace.json.gz"
                path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))

    made = object.__new__(worker.Worker)
    for events, expected in ((STEPS, 17e-3), (STEPS[3:4], None)):
        made.engine = Engine(events)
        assert made.busy(batch=2, length=7, seed=0) == {"value": expected}


def test_a_trace_that_is_being_written(tmp_path: Path):
    path = tmp_path / "trace.json.gz"
    whole = gzip.compress(b'{"traceEvents": []}')
    path.write_bytes(whole[:-9])
    assert worker.events_of(str(path)) is None
    path.write_bytes(whole)
    assert worker.events_of(str(path)) == []


def test_lengths_of_the_compared_prompts():
    """Recorded comparisons are of the default's; a longer limit has the shortest and the longest."""
    recorded = [len(ids) for ids in worker.mixed_prompts(64, 99)]
    assert (min(recorded), max(recorded), sum(recorded)) == (11, 697, 22394)
    long = [len(ids) for ids in worker.mixed_prompts(64, 99, 3000)]
    assert (min(long), max(long)) == (4, 3000)
    assert sum(length > 1024 for length in long) > 30  # beyond the window


def test_patches_besides_those_that_are_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, str] = {}
    monkeypatch.setattr(
        engines.subprocess, "Popen", lambda command, env, **kwargs: asked.update(env)
    )
    engine.Engine(engine.PATCHED, [], {}, tmp_path / "log", ["feed_forward_few"])
    assert asked["GEMMA4_TURBO_SELECTION"] == "only=*;skip="
    assert asked["GEMMA4_TURBO_FEED_FORWARD_FEW"] == "1"
    engine.Engine(engine.PATCHED, ["router"], {}, tmp_path / "log", ["swa_ratio"])
    assert asked["GEMMA4_TURBO_SELECTION"] == "only=router,swa_ratio;skip="


def test_an_engine_with_the_bitwise_patches_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the patches of the measurement are."""
    asked: dict[str, str] = {}

    def popen(command: list[str], env: dict[str, str], **kwargs: object) -> None:
        asked.update(env)

    monkeypatch.setattr(engines.subprocess, "Popen", popen)
    engine.Engine(engine.BITS, [], {}, tmp_path / "log")
    only = asked["GEMMA4_TURBO_SELECTION"].removeprefix("only=").partition(";")[0].split(",")
    assert only == engine.patches_of("exact")
    assert "layer_norms" in only
    assert "skinny_gemm" not in only
    assert asked["BENCH_PATCHED"] == "1"
