"""bench/before_after.py on stand-ins: each checkout's own engine runs, and is told apart by its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer

from bench import before_after

CHECKOUT = """
class Engine:
    def __init__(self, variant, patches, arguments, log):
        assert variant == "patched" and log.name.endswith("{name}.log")

    def wait_ready(self):
        pass

    def stop(self):
        pass

    def __call__(self, do, **arguments):
        return {{"value": {value}}}
"""


class Engine:
    """This version's, and stock's."""

    def __init__(self, variant: str, patches: list[str], arguments: dict[str, Any], log: Path):
        self.value = 6.0 if variant == "stock" else 3.0

    def wait_ready(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def __call__(self, do: str, **arguments: Any) -> dict[str, float]:
        return {"value": self.value}


def checkout(folder: Path, value: float) -> Path:
    (folder / "bench").mkdir(parents=True)
    (folder / "bench" / "engine.py").write_text(CHECKOUT.format(name=folder.name, value=value))
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


@pytest.mark.parametrize("names", [("a/x", "b/x"), ("a/stock",)])
def test_names_of_their_own(names: tuple[str, ...], tmp_path: Path):
    with pytest.raises(typer.BadParameter, match="names of their own"):
        before_after.main([tmp_path / name for name in names])
