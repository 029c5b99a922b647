"""Mistakes of whoever adds a patch: named in its state, and no other patch is the worse for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma4_turbo import instance
from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.engine import fingerprints, gates, installer, states
from gemma4_turbo.engine.run import PatchRun
from tests.cpu.synthetic import RELEASE, Record, World, record, returning

known_releases = fingerprints.known_releases
RECORD = "gemma4-turbo record WHEEL"


def with_good(world: World, bad: Record, build: Any = None) -> installer.Engine:
    """An engine with the patch in question between two that are in order."""
    return world.engine(
        (record("first", world.target("Model.scale")), returning("first")),
        (bad, build or returning("bad")),
        (record("last", world.target("Model.forward")), returning("last")),
    )


def settled(engine: installer.Engine, world: World) -> dict[str, str]:
    """Applied before the import, then imported: the reason of the bad one; the good ones work."""
    engine.apply()
    leaf = world.imported()
    rows = {row.name: row for row in engine.status()}
    assert rows["first"].state == rows["last"].state == states.ACTIVE
    assert leaf.answer(1) == 2
    (bad,) = [row for row in rows.values() if row.name not in ("first", "last")]
    assert bad.state == states.FAILED, bad
    engine.revert()
    assert (leaf.Model.scale(1), leaf.Model().forward(1)) == (10, 2)
    return {"reason": bad.reason}


@pytest.mark.parametrize("name", ["anser", "Model.answer", "Modell.forward", ""])
def test_a_misspelt_target(world: World, name: str) -> None:
    """Which neither the source nor the table has: equal, for want of both."""
    target = world.target(name)
    engine = with_good(world, record("bad", target))
    assert engine.outlook(engine.runs["bad"].patch)[0] == states.FAILED
    reason = settled(engine, world)["reason"]
    assert reason.startswith(
        f"fingerprints/{RELEASE}.json has no fingerprint of {target}: {RECORD}"
    )
    assert "misspelt" in reason


@pytest.mark.parametrize("field", ["targets", "relies_on"])
def test_a_misspelt_module(world: World, field: str) -> None:
    """It is never imported: the patch would wait for it and nobody would know."""
    wrong = world.target("answer", "laef")
    fields: dict[str, Any] = {"targets": (world.target("answer"),), field: (wrong,)}
    engine = with_good(world, record("bad", **fields))
    assert f"no fingerprint of {wrong}" in settled(engine, world)["reason"]


def test_a_misspelt_target_of_a_patch_that_looks_by_itself(world: World) -> None:
    """Told unless a release is known that has it."""
    bad = record("bad", world.target("anser"), written_for=(), finds_defect=True)
    assert "misspelt" in settled(with_good(world, bad), world)["reason"]
    world.table["2.0"] = {world.target("anser"): "0" * 16}
    definitions = fingerprints.Definitions(fingerprints.folder_source(world.root))
    assert fingerprints.judge(bad.ports, RELEASE, definitions).state == states.UNSUPPORTED


def test_a_fingerprint_that_was_not_recorded(world: World) -> None:
    """Of a source that another release has; the source at hand is nobody's."""
    target, basis = world.target("answer"), world.target("Model.name")
    bad = record("bad", target, relies_on=(basis,))
    engine = with_good(world, bad)
    world.table["2.0"] = {basis: world.table[RELEASE].pop(basis)}
    told = f"fingerprints/{RELEASE}.json has no fingerprint of {basis}: {RECORD}"
    assert settled(engine, world)["reason"] == told


@pytest.mark.parametrize("empty", [True, False])
def test_a_release_that_was_not_recorded(world: World, empty: bool) -> None:
    """Not there at all, or without any of the sources."""
    target = world.target("answer")
    bad = record("bad", target, written_for=("9.9",))
    engine = with_good(world, bad)
    world.table[RELEASE][target] = "0" * 16
    if empty:
        world.table["9.9"] = {}
    told = f"fingerprints/9.9.json has no fingerprint of {target}"
    told = told if empty else "there is no fingerprints/9.9.json"
    assert settled(engine, world)["reason"] == f"{told}: {RECORD}"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"written_for": ()}, "written_for names no release"),
        ({"requires": ("first", "frist")}, "requires names no patch: frist"),
        ({"lazy": ("sglang.elsewhere",)}, "lazy names a module that holds none of"),
        ({"targets": ()}, "the patch names no target"),
        ({"tells_only": True, "superseded_when": None}, "tells_only without superseded_when"),
        ({"module": ""}, "the port names no module with its code"),
        ({"needless": "why", "module": "code"}, "there is no code to find in code"),
        ({"tells_only": True, "module": "code"}, "there is no code to find in code"),
    ],
)
def test_a_field_of_the_record(world: World, fields: dict[str, Any], told: str) -> None:
    """Told wherever it is looked at: here and by the gate before the launch."""
    values: dict[str, Any] = {"targets": (world.target("answer"),), **fields}
    engine = with_good(world, record("bad", **values))
    (unfit,) = gates.launch_problems(engine)
    assert unfit.startswith(f"bad is failed: {told}")
    assert settled(engine, world)["reason"].startswith(told)


def test_the_records_are_in_order() -> None:
    """Those of the package."""
    assert [fingerprints.mistake(instance.PORTS[patch.name]) for patch in CATALOGUE] == [
        None
    ] * len(CATALOGUE)


def test_a_port_without_build(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function that each must have."""
    engine = with_good(world, record("bad", world.target("answer")))
    monkeypatch.setattr(sys.modules["code_of_bad"], "build", None)
    assert "code_of_bad has no build()" in settled(engine, world)["reason"]


@pytest.mark.parametrize("name", ["undo", "verify"])
def test_a_port_without_the_rest(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It is put back, and compares nothing."""
    engine = with_good(world, record("bad", world.target("answer")))
    monkeypatch.setattr(sys.modules["code_of_bad"], name, None)
    engine.apply()
    leaf = world.imported()
    assert leaf.answer(1) == "bad"
    assert engine.runs["bad"].verify("cpu") == []
    engine.revert()
    assert leaf.answer(1) == 2
    assert {row.state for row in engine.status()} <= {states.OFF, states.WAITING}


def test_a_patch_without_a_port(world: World) -> None:
    """A record that no release line knows."""
    bad = record("bad", world.target("answer"))
    engine = with_good(world, bad._replace(ports=()))
    assert "the patch has no port" in settled(engine, world)["reason"]


def test_a_port_inside_a_module(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a table of ports: named by its attribute."""
    bad = record("bad", world.target("answer"), module="code_of_bad:there")
    engine = with_good(world, record("bad", world.target("answer"), module="code_of_bad"))
    code: Any = sys.modules["code_of_bad"]
    code.there = SimpleNamespace(build=code.build)
    engine.runs["bad"].ports = bad.ports
    engine.apply()
    assert world.imported().answer(1) == "bad"
    engine.revert()
    engine.runs["bad"].ports = (bad.ports[0]._replace(module="code_of_bad:nowhere"),)
    assert "nowhere" in settled(engine, world)["reason"]


def test_no_module_of_the_patch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record whose file is called otherwise."""
    engine = with_good(world, record("bad", world.target("answer")))
    monkeypatch.delitem(sys.modules, "code_of_bad")
    assert "No module named 'code_of_bad'" in settled(engine, world)["reason"]


@pytest.mark.parametrize(
    "returned", [None, {}, [], {"other:f": print}, "half", {"answer": None, "Model.name": print}]
)
def test_a_target_without_a_replacement(world: World, returned: Any) -> None:
    """Nothing is half installed, and what build did is undone."""
    targets = world.target("Model.name"), world.target("answer")
    values = {"half": {targets[0]: print}}.get(returned) if returned == "half" else returned
    if isinstance(values, dict) and "answer" in values:
        values = {world.target(name): value for name, value in values.items()}
    engine = with_good(world, record("bad", *targets), lambda run, stock: values)
    reason = settled(engine, world)["reason"]
    assert "build() of code_of_bad has no replacement for" in reason
    code: Any = sys.modules["code_of_bad"]
    assert code.undone == 1


# -- what goes wrong when stock is put back ------------------------------------------------------


def fails(*args: Any) -> None:
    """In place of an `undo` or a `restore`."""
    raise RuntimeError("cannot")


def break_undo(engine: installer.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch's own."""
    monkeypatch.setattr(sys.modules["code_of_bad"], "undo", fails)


def break_restore(engine: installer.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one of its two targets."""
    monkeypatch.setattr(engine.runs["bad"].swaps[1], "restore", fails)


@pytest.mark.parametrize("broken", [break_undo, break_restore])
@pytest.mark.parametrize("how", ["revert", "skip"])
def test_the_rest_is_reverted(
    world: World, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., None], how: str
) -> None:
    """The patch that cannot be says so; it may be tried again after another revert()."""
    engine = with_good(world, record("bad", world.target("answer"), world.target("Model.name")))
    leaf = world.imported()
    stock = vars(leaf.Model).copy(), leaf.answer
    engine.apply()
    broken(engine, monkeypatch)
    if how == "revert":
        engine.revert()
    else:
        engine.apply(only=[])
    rows = {row.name: row for row in engine.status()}
    assert (rows["first"].state, rows["last"].state) == (states.OFF, states.OFF)
    assert rows["bad"].state == states.FAILED
    assert rows["bad"].reason.startswith("not reverted: ")
    assert "RuntimeError: cannot" in rows["bad"].reason
    for name in ("scale", "forward"):
        assert vars(leaf.Model)[name] is stock[0][name]
    assert leaf.answer is stock[1]
    monkeypatch.undo()
    engine.revert()
    assert {row.state for row in engine.status()} <= {states.OFF, states.WAITING}


def test_an_installation_that_cannot_be_undone(world: World) -> None:
    """Both exceptions are told, and the others go in."""

    def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
        sys.modules["code_of_bad"].undo = fails  # type: ignore[attr-defined]
        raise states.NotNeededError("nothing to mend")

    engine = with_good(world, record("bad", world.target("answer")), build)
    reason = settled(engine, world)["reason"]
    assert reason == "nothing to mend; undo(): RuntimeError: cannot"


# -- tables and sources that cannot be read ------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[1]", '"x"', "[" * 100_000, b"\xff\xfe\xff", None]
)
def test_a_table_of_fingerprints_that_cannot_be_used(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: Any
) -> None:
    """Every patch says so; nothing is raised into apply, status or the gate."""
    table = tmp_path / "fingerprints"
    if content is not None:
        table.mkdir()
        table = table / "1.0.json"
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    engine = with_good(world, record("bad", world.target("answer")))
    known_releases.cache_clear()
    monkeypatch.setattr(fingerprints, "known_releases", known_releases)
    monkeypatch.setattr(fingerprints, "TABLES", tmp_path / "fingerprints")
    assert len(gates.launch_problems(engine)) == 3
    engine.apply()
    assert world.imported().answer(1) == 2
    for row in engine.status():
        assert row.state == states.FAILED
        assert row.reason.startswith("fingerprints cannot be used: ")
    known_releases.cache_clear()
