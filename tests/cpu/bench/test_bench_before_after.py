"""bench/before_after.py on stand-ins: each checkout's own engine runs, and is told apart by its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import typer

from bench import before_after
from tests.cpu.conftest import REPOSITORY

OURS = str(REPOSITORY / "bench" / "workers" / "engine.py")
CHECKOUT = """
class Engine:
    def __init__(self, variant, patches, arguments, log):
        assert variant == "patched" and log.name.endswith("{name}.log")

    def wait_ready(self):
        pass

    def stop(self):
        pass

    script = "workers/engine.py"

    def __call__(self, do, **arguments):
        if do == "busy":
            assert self.script == {script!r}
        return {{"value": {value} / (4 if do == "busy" else 1)}}
"""


class Engine:
    """This version's, and stock's."""

    script = "workers/engine.py"
    asked: ClassVar[list[str]] = []

    def __init__(self, variant: str, patches: list[str], arguments: dict[str, Any], log: Path):
        self.value = 6.0 if variant == "stock" else 3.0

    def wait_ready(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def __call__(self, do: str, **arguments: Any) -> dict[str, float]:
        self.asked.append(do)
        return {"value": self.value / (4 if do == "busy" else 1)}


def checkout(folder: Path, value: float) -> Path:
    (folder / "bench").mkdir(parents=True)
    (folder / "bench" / "engine.py").write_text(
        CHECKOUT.format(name=folder.name, value=value, script=OURS)
    )
    return folder


def test_several_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(before_after, "Engine", Engine)
    old = [checkout(tmp_path / "one", 4.0), checkout(tmp_path / "two", 2.0)]
    out = tmp_path / "out.csv"
    before_after.main(old, layers=6, batches="1", prefill="", rounds=2, out=out)
    frame = pd.read_csv(out)
    assert frame.groupby("variant")["value"].agg(set).to_dict() == {
        "one": {4.0},
        "two": {2.0},
        "after": {3.0},
        "stock": {6.0},
    }
    header, row = capsys.readouterr().out.splitlines()[-2:]
    assert "after / one  after / two  after / stock" in header
    assert row.split()[-3:] == ["0.750", "1.500", "0.500"]


def test_time_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """A quantity of its own, behind all rounds without a profiler; not asked for without the option."""
    monkeypatch.setattr(before_after, "Engine", Engine)
    asked = Engine.asked
    asked.clear()
    old = [checkout(tmp_path / "one", 4.0)]
    given = {"layers": 6, "batches": "1,8", "prefill": "", "rounds": 2}
    before_after.main(old, **given, out=tmp_path / "without.csv")
    assert set(asked) == {"decode"}
    asked.clear()
    out = tmp_path / "out.csv"
    before_after.main(old, **given, busy=True, out=out)
    assert asked == ["decode"] * len(sizes := (1, 8)) * 2 * 3 + ["busy"] * len(sizes) * 2 * 2
    frame = pd.read_csv(out)
    found = frame[frame["quantity"] == "decode step on the GPU"]
    assert found.groupby("variant")["value"].agg(set).to_dict() == {
        "one": {1.0},
        "after": {0.75},
        "stock": {1.5},
    }
    assert sorted(set(zip(found["x"], found["round"], strict=True))) == [
        (1, 0),
        (1, 1),
        (8, 0),
        (8, 1),
    ]
    assert "decode step on the GPU" in capsys.readouterr().out


def test_without_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """Told, and no row."""

    class Eager(Engine):
        def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
            return {"value": None} if do == "busy" else super().__call__(do, **arguments)

    monkeypatch.setattr(before_after, "Engine", Eager)
    out = tmp_path / "out.csv"
    old = [checkout(tmp_path / "one", 4.0)]
    before_after.main(old, layers=6, batches="1", prefill="", rounds=1, busy=True, out=out)
    frame = pd.read_csv(out)
    assert set(frame[frame["quantity"] == "decode step on the GPU"]["variant"]) == {"one"}
    assert "after: no CUDA graph in the trace of a decode step, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("a/x", "b/x"), ("a/stock",)])
def test_names_of_their_own(names: tuple[str, ...], tmp_path: Path):
    with pytest.raises(typer.BadParameter, match="names of their own"):
        before_after.main([tmp_path / name for name in names])
