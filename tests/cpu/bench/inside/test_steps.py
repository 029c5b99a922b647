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
from gemma4_turbo.engine import gpu_profile
from gemma4_turbo.fusions.site import SITE
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import measured, skinny_gemm
from tests.cpu.synthetic import clean_environment


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """SGLang's class with the method, and a graph class that counts."""
    clean_environment(monkeypatch)
    monkeypatch.setenv("GEMMA4_TURBO_STATE_DIR", str(tmp_path / "state"))
    # What is reverted stays off; other tests ask what an engine would do that nobody has told anything.
    for run in ENGINE.runs.values():
        for name in ("state", "reason"):
            monkeypatch.setattr(run, name, getattr(run, name))
    monkeypatch.setattr(ENGINE, "_selection", ENGINE._selection)

    class Graph:
        ran = 0

        def replay(self) -> None:
            self.ran += 1

    class Scheduler:
        pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(steps, "_last", None)
    monkeypatch.setenv("GEMMA4_TURBO_GPU_PROFILE", "0")  # as it was, in the end
    module = SimpleNamespace(Scheduler=Scheduler)
    steps.install(module)
    made: Any = Scheduler()
    made.captured = []

    def recapture() -> None:
        states = {row.name: row.state for row in ENGINE.status(below=False)}
        made.captured.append({name for name, state in states.items() if state != "off"})

    runner = SimpleNamespace(init_device_graphs=recapture, model=torch.nn.Linear(2, 2))
    made.tp_worker = SimpleNamespace(model_runner=runner)
    made.graph = Graph()
    yield made
    ENGINE.revert()
    steps._fetch({})
    clean_environment(monkeypatch)  # of the selection, which spawned processes would inherit
    monkeypatch.undo()
    for module in (gpu_profile, measured):
        module.forget()


def ask(scheduler: Any, folder: Path, **asked: Any) -> Any:
    out = folder / "answer.json"
    scheduler.bench_steps(asked=json.dumps(asked), out=str(out))
    return json.loads(out.read_text())


def test_a_capture_has_these_patches_alone(scheduler: Any, tmp_path: Path):
    """Whatever the one before it had; none at all is stock."""
    for patches in (["layer_norms", "pdl"], [], ["pdl"]):
        found = ask(scheduler, tmp_path, do="capture", patches=patches, fetched={}, profile="")
        assert {name for name, row in found.items() if row["state"] != "off"} == set(patches)
        assert scheduler.captured[-1] == set(patches)
        assert all(row["ran"] == 0 and row["reason"] for row in found.values())


def test_the_newer_name_of_the_capture(scheduler: Any, tmp_path: Path):
    runner = scheduler.tp_worker.model_runner
    runner.recapture_decode_cuda_graph, runner.init_device_graphs = runner.init_device_graphs, None
    ask(scheduler, tmp_path, do="capture", patches=["pdl"], fetched={}, profile="")
    assert scheduler.captured == [{"pdl"}]


def test_calls_are_counted(scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of this capture, not of those before."""
    runner = scheduler.tp_worker.model_runner

    def engaged() -> None:
        ENGINE.runs["pdl"].engaged(True)

    monkeypatch.setattr(runner, "init_device_graphs", engaged)
    for _ in range(2):
        found = ask(scheduler, tmp_path, do="capture", patches=["pdl"], fetched={}, profile="")
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
    ask(scheduler, tmp_path, do="capture", patches=[], fetched={}, profile="")
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
        ask(scheduler, tmp_path, do="capture", patches=[], fetched=fetched, profile="")
        for weight in (one, other):
            assert skinny_gemm.launch_skinny_gemm(None, weight, 1, 2) == 2  # type: ignore[call-arg, comparison-overlap, arg-type]
    assert seen == [16, usual, 0, 2, usual, usual]
    assert usual == skinny_gemm.PREFETCH_BLOCKS
    assert skinny_gemm.launch_skinny_gemm is launch


def test_tiles_are_the_profiles(scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the capture that names it: sites that have chosen others are gone, and the next one has none."""
    monkeypatch.setattr(gpu_profile, "stale", lambda key: None)
    monkeypatch.setattr(measured, "source", lambda gpu: gpu_profile.tiles("NVIDIA L4"))
    key = gpu_profile.Key("NVIDIA L4", "1", "2", "3", "4", "5")
    row = gpu_profile.Shape("skinny_gemm", (64, 128, 0, 16), (16, 64, 1, 2, 4), "", {})
    where = tmp_path / "profile.json"
    gpu_profile.save(str(where), gpu_profile.Profile(key, {}, (row,)))
    model, device = scheduler.tp_worker.model_runner.model, torch.device("cpu")
    for profile in (str(where), ""):
        model.__dict__[SITE] = object()
        ask(scheduler, tmp_path, do="capture", patches=[], fetched={}, profile=profile)
        assert SITE not in model.__dict__
        found = skinny_gemm.measured_row((64, 128), skinny_gemm.Epilogue.NONE, 1, device)
        assert (found is not None) == bool(profile)
    monkeypatch.setattr(gpu_profile, "stale", lambda key: "of another GPU")
    with pytest.raises(RuntimeError, match="is not used: of another GPU"):
        ask(scheduler, tmp_path, do="capture", patches=[], fetched={}, profile=str(where))
