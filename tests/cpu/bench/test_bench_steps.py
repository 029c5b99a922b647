"""bench/steps.py on stand-ins of its engine: what is captured, in which order, and what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import typer

from bench import steps
from bench.workers.steps import StepsWorker
from gemma4_turbo.catalogue import by_name
from gemma4_turbo.kernels import skinny_gemm

US = {"skinny_gemm": 0.25, "pdl": 0.125, "layer_norms": 0.5}
"""What each patch saves, ms of a step of 4 ms."""


class Engine:
    """Takes its time from what was captured last."""

    captured: ClassVar[list[tuple[list[str], dict[str, int]]]] = []
    profiles: ClassVar[list[str]] = []
    arguments: ClassVar[dict[str, Any]] = {}
    idle: ClassVar[set[str]] = set()
    failing: ClassVar[str] = ""
    stopped: ClassVar[int] = 0

    def __init__(self, variant: str, patches: list[str], arguments: dict[str, Any], log: Path):
        type(self).arguments = arguments
        self.captured.clear()
        self.profiles.clear()
        type(self).idle, type(self).failing, type(self).stopped = set(), "", 0

    def stop(self) -> None:
        type(self).stopped += 1

    def __call__(self, do: str, **asked: Any) -> dict[str, Any]:
        if do == "capture":
            self.captured.append((asked["patches"], asked["fetched"]))
            self.profiles.append(asked["profile"])
            if self.failing and self.failing in asked["patches"]:
                return {"error": "out of memory"}
            return {
                name: {
                    "state": "active",
                    "reason": "no such layer",
                    "ran": 0 if name in self.idle else 3,
                }
                for name in asked["patches"]
            }
        assert do == "step"
        patches, fetched = self.captured[-1]
        saved = sum(US.get(name, 0) for name in patches)
        saved += bool(self.profiles[-1])
        better = sum(0.0625 for blocks in fetched.values() if blocks == 8)
        step = (4 - saved - better) * asked["batch"]
        return {"ms": [step + 1, step, step + 2]}


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    monkeypatch.setattr(steps, "StepsEngine", Engine)
    return Engine


def medians(out: Path, batch: int = 1) -> dict[str, float]:
    frame = pd.read_csv(out)
    assert set(frame["quantity"]) == {steps.QUANTITY}
    found = frame[frame["x"] == batch].groupby("variant")["value"].median()
    return {str(name): float(value) for name, value in found.items()}


def test_each_patch_left_out(tmp_path: Path, engine: type[Engine], capsys: Any):
    """The ratio is to all of them; the control is all of them again."""
    out = tmp_path / "out.csv"
    steps.main("e4b", 0, "1,2", rounds=2, each=True, out=out)
    found = medians(out)
    assert found["all"] == found["control"] == 4 - 0.875
    assert found["all-skinny_gemm"] == 4 - 0.625
    assert found["all-pdl"] == 4 - 0.75
    assert medians(out, 2)["all-pdl"] == 2 * (4 - 0.75)
    names = [name for name in steps.PATCHES if by_name(name).default]
    assert set(found) == {"all", "control", *(f"all-{name}" for name in names)}
    first, second = engine.captured[: len(names) + 2], engine.captured[len(names) + 2 :]
    assert second[:-1] == first[:-1][::-1]  # the control stays last
    assert engine.arguments["cuda_graph_bs"] == [1, 2]
    assert engine.stopped == 1
    printed = capsys.readouterr().out
    assert "1 / all" in printed
    assert "did not run" not in printed


def test_variants_of_a_user(tmp_path: Path, engine: type[Engine]):
    out = tmp_path / "out.csv"
    given = ["stock", "all + mlp_few", "layer_norms,pdl"]
    steps.main("e4b", 0, "1", rounds=1, variant=given, out=out)
    assert medians(out) == {
        "stock": 4.0,
        "control": 4.0,  # of the first
        "all + mlp_few": 4 - 0.875,
        "layer_norms,pdl": 4 - 0.625,
    }
    stock, more, two, control = (patches for patches, _ in engine.captured)
    assert stock == control == []
    assert "mlp_few" in more
    assert "feed_forward_few" not in more
    assert two == ["layer_norms", "pdl"]


def test_what_a_patch_stands_on_comes_along():
    assert steps.parsed("router_few").patches == [*by_name("router_few").requires, "router_few"]
    without = steps.parsed("all-layer_norms").patches
    assert "layer_norms" not in without  # though others stand on it: they say that they are off


def test_blocks_fetched_ahead(tmp_path: Path, engine: type[Engine], capsys: Any):
    """Of one weight at a time, then the best of each, beside all of them again."""
    out = tmp_path / "out.csv"
    steps.main("e4b", 0, "1", rounds=1, fetch="0,8", out=out)
    found = medians(out)
    every = steps.weights("e4b")
    assert {"20480x2560", "2560x10240"} <= set(every)
    assert all(found[f"fetch 8 of {weight}"] == found["all"] - 0.0625 for weight in every)
    assert found[steps.BEST] == found["all"] - 0.0625 * len(every)
    assert engine.captured[-2][1] == dict.fromkeys(every, 8)
    assert engine.captured[-1][1] == {}
    assert steps.BEST in capsys.readouterr().out


def test_tiles_of_a_profile(tmp_path: Path, engine: type[Engine]):
    """Of its variant alone, and with the patches of any other."""
    profile = tmp_path / "+a-b.json"
    profile.touch()
    out = tmp_path / "out.csv"
    steps.main("e4b", 0, "1", rounds=1, variant=["all", f"all-pdl@{profile}"], out=out)
    assert medians(out)[f"all-pdl@{profile}"] == 4 - 0.75 - 1
    assert engine.profiles == ["", str(profile), ""]
    assert "pdl" not in engine.captured[1][0]


def test_no_weight_gains(tmp_path: Path, engine: type[Engine], capsys: Any):
    out = tmp_path / "out.csv"
    steps.main("e4b", 0, "1", rounds=1, fetch="0", out=out)
    assert steps.BEST not in medians(out)
    assert f"{steps.BEST}: none" in capsys.readouterr().out


def test_a_patch_that_never_ran_is_said(
    tmp_path: Path, engine: type[Engine], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    made = Engine.__init__

    def silent(self: Engine, *args: Any) -> None:
        made(self, *args)
        type(self).idle = {"ple_tail"}

    monkeypatch.setattr(Engine, "__init__", silent)
    given = ["all", "all-pdl", "pdl"]
    steps.main("26b-a4b", 6, "1", rounds=1, variant=given, out=tmp_path / "out.csv")
    told = [line for line in capsys.readouterr().out.splitlines() if "did not run" in line]
    assert told == ["ple_tail did not run: active: no such layer"]


def test_a_variant_that_is_not_captured(
    tmp_path: Path, engine: type[Engine], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Said, without a row; the others are measured."""
    made = Engine.__init__

    def short(self: Engine, *args: Any) -> None:
        made(self, *args)
        type(self).failing = "mlp_few"

    monkeypatch.setattr(Engine, "__init__", short)
    out = tmp_path / "out.csv"
    steps.main("e4b", 0, "1", rounds=1, variant=["all", "all+mlp_few"], out=out)
    assert set(medians(out)) == {"all", "control"}
    assert "all+mlp_few: not captured: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"variant": ["al"]}, "no patch is named 'al'"),
        ({"variant": ["all+yoco"]}, "yoco is no patch of a decode step"),
        ({"variant": [""]}, "--variant must be"),
        ({"variant": ["all+"]}, "--variant must be"),
        ({"variant": ["all@/nowhere"]}, "there is no GPU profile at '/nowhere'"),
        ({"batches": "1,x"}, "--batches must be"),
        ({"batches": "0"}, "--batches must be"),
        ({"fetch": "-1"}, "--fetch must be"),
        ({"model": "gpt2"}, "--model must be"),
        ({"layers": 4}, "--layers: layers must be"),
    ],
)
def test_bad_input(tmp_path: Path, given: dict[str, Any], told: str):
    with pytest.raises(typer.BadParameter, match=told.replace("'", ".")):
        steps.main(**{"layers": 0, "rounds": 1, "out": tmp_path / "out.csv", **given})


def test_the_workers_commands(monkeypatch: pytest.MonkeyPatch):
    """Numbers and texts alone travel to the scheduler; its answer comes in a file, its error as one."""
    asked: list[dict[str, Any]] = []

    class Inner:
        def collective_rpc(self, method: str, asked_: str = "", **given: Any) -> None:
            assert method == "bench_steps"
            assert all(isinstance(value, str) for value in given.values())
            asked.append(json.loads(given["asked"]))
            assert asked[-1]["do"] != "capture", "no memory"
            Path(given["out"]).write_text('{"ms": [1.5]}')

    worker: Any = object.__new__(StepsWorker)
    worker.engine = Inner()
    generated: list[Any] = []
    monkeypatch.setattr(
        StepsWorker, "generate", lambda self, ids, new: generated.append((ids, new))
    )
    assert worker.step(batch=2, length=3, seed=1, count=5, times=4) == {"ms": [1.5]}
    ((ids, new),) = generated
    assert [len(one) for one in ids] == [3, 3]
    assert new > 1  # a step beside the prefill
    assert "no memory" in worker.capture(["pdl"], {}, "")["error"]
    assert asked == [
        {"do": "replay", "count": 5, "times": 4},
        {"do": "capture", "patches": ["pdl"], "fetched": {}, "profile": ""},
    ]


def test_the_kernel_has_the_name_that_is_replaced():
    assert isinstance(skinny_gemm.PREFETCH_BLOCKS, int)
    assert skinny_gemm.launch_skinny_gemm.__module__ == skinny_gemm.__name__
