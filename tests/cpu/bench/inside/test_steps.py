"""bench.inside.steps: what the scheduler does when it is asked, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.inside import steps
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import skinny_gemm


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's class with the method, and a graph class that counts."""

    class Graph:
        ran = 0

        def replay(self) -> None:
            self.ran += 1

    class Scheduler:
        pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(steps, "_last", None)
    module = SimpleNamespace(Scheduler=Scheduler)
    steps.install(module)
    made: Any = Scheduler()
    made.captured = []

    def recapture() -> None:
        states = {row.name: row.state for row in ENGINE.status(below=False)}
        made.captured.append({name for name, state in states.items() if state != "off"})

    made.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(init_device_graphs=recapture))
    made.graph = Graph()
    yield made
    ENGINE.revert()
    steps._fetch({})


def ask(scheduler: Any, folder: Path, **asked: Any) -> Any:
    out = folder / "answer.json"
    scheduler.bench_steps(asked=json.dumps(asked), out=str(out))
    return json.loads(out.read_text())


def test_a_capture_has_these_patches_alone(scheduler: Any, tmp_path: Path):
    """Whatever the one before it had; none at all is stock."""
    for patches in (["layer_norms", "pdl"], [], ["pdl"]):
        found = ask(scheduler, tmp_path, do="capture", patches=patches, fetched={})
        assert {name for name, row in found.items() if row["state"] != "off"} == set(patches)
        assert scheduler.captured[-1] == set(patches)
        assert all(row["ran"] == 0 and row["reason"] for row in found.values())


def test_the_newer_name_of_the_capture(scheduler: Any, tmp_path: Path):
    runner = scheduler.tp_worker.model_runner
    runner.recapture_decode_cuda_graph, runner.init_device_graphs = runner.init_device_graphs, None
    ask(scheduler, tmp_path, do="capture", patches=["pdl"], fetched={})
    assert scheduler.captured == [{"pdl"}]


def test_calls_are_counted(scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of this capture, not of those before."""
    runner = scheduler.tp_worker.model_runner

    def engaged() -> None:
        ENGINE.runs["pdl"].engaged(True)

    monkeypatch.setattr(runner, "init_device_graphs", engaged)
    for _ in range(2):
        found = ask(scheduler, tmp_path, do="capture", patches=["pdl"], fetched={})
        assert found["pdl"]["ran"] == 1


def test_the_last_graph_is_replayed(
    scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first of its readings is left out: it warms up."""

    class Event:
        clock = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = scheduler.graph.ran

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at) * 3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="no CUDA graph was replayed"):
        ask(scheduler, tmp_path, do="replay", count=4, times=2)
    scheduler.graph.replay()
    assert ask(scheduler, tmp_path, do="replay", count=4, times=2) == {"ms": [3.0, 3.0]}
    assert scheduler.graph.ran == 1 + 4 * 3
    ask(scheduler, tmp_path, do="capture", patches=[], fetched={})
    with pytest.raises(RuntimeError, match="no CUDA graph was replayed"):
        ask(scheduler, tmp_path, do="replay", count=4, times=2)


def test_blocks_to_fetch_are_a_weights(
    scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """For its launches alone, and gone with the next capture."""
    usual, seen = skinny_gemm.PREFETCH_BLOCKS, []

    def launch(x: Any, weight: Any, *more: Any) -> int:
        seen.append(skinny_gemm.PREFETCH_BLOCKS)
        return len(more)

    monkeypatch.setattr(skinny_gemm, "launch_skinny_gemm", launch)
    one, other = torch.empty(64, 128), torch.empty(128, 64)
    for fetched in ({"64x128": 16}, {"64x128": 0, "128x64": 2}, {}):
        ask(scheduler, tmp_path, do="capture", patches=[], fetched=fetched)
        for weight in (one, other):
            assert skinny_gemm.launch_skinny_gemm(None, weight, 1, 2) == 2  # type: ignore[call-arg, comparison-overlap, arg-type]
    assert seen == [16, usual, 0, 2, usual, usual]
    assert usual == skinny_gemm.PREFETCH_BLOCKS
    assert skinny_gemm.launch_skinny_gemm is launch
