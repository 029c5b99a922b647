"""From `apply` to `revert`, on a stand-in for SGLang."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gemma4_turbo
from gemma4_turbo.engine import fingerprints, installer, states
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.engine.switches import SELECTION
from tests.cpu.conftest import REPOSITORY
from tests.cpu.synthetic import Build, World, alias, only_row, record, returning


def one_patch(world: World, build: Build | None = None, **fields: Any) -> installer.Engine:
    """An engine with the patch ``one``, which replaces the leaf's ``answer``."""
    patch = record("one", world.target("answer"), **fields)
    return world.engine((patch, build or returning("ours")))


def counted(builds: list[str]) -> Build:
    """A build that notes each of its calls."""

    def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
        builds.append(run.patch.name)
        return returning("ours")(run, stock)

    return build


# -- apply ---------------------------------------------------------------------------------------


def test_before_the_import(world: World) -> None:
    """Waiting until the target is imported, then active."""
    engine = one_patch(world)
    (row,) = engine.apply()
    assert (row.state, row.engaged) == (states.WAITING, 0)
    assert row.reason == "SGLang has not imported the target yet"
    assert row.targets == (world.target("answer"),)
    leaf = world.imported()
    assert leaf.answer(1) == "ours"
    assert only_row(engine)[:3] == ("one", states.ACTIVE, "installed")


def test_after_the_import(world: World) -> None:
    """Patched at once."""
    engine = one_patch(world)
    leaf = world.imported()
    assert leaf.answer(1) == 2
    (row,) = engine.apply()
    assert row.state == states.ACTIVE
    assert leaf.answer(1) == "ours"


@pytest.mark.parametrize("import_first", [True, False])
def test_twice_is_once(world: World, import_first: bool) -> None:
    """The second call builds nothing and wraps nothing."""
    builds: list[str] = []
    engine = one_patch(world, counted(builds))
    if import_first:
        world.imported()
    engine.apply()
    engine.apply()
    replacement = world.imported().answer
    finders = list(sys.meta_path)
    engine.apply()
    engine.bootstrap()
    assert builds == ["one"]
    assert world.imported().answer is replacement
    assert sys.meta_path == finders


def test_the_parent_package_alone_installs_nothing(world: World) -> None:
    """Importing the root does not pull in the leaf."""
    engine = one_patch(world)
    engine.apply()
    importlib.import_module(world.package)
    assert world.leaf not in sys.modules
    assert only_row(engine).state == states.WAITING


def test_a_patch_waits_for_the_last_of_its_modules(world: World) -> None:
    """It also relies on another module's source, which must be known."""
    world.write("basis", "def used() -> int:\n    return 1\n")
    engine = one_patch(world, relies_on=(world.target("used", "basis"),))
    engine.apply()
    leaf = world.imported()
    assert only_row(engine).state == states.WAITING
    assert leaf.answer(1) == 2
    world.imported("basis")
    assert only_row(engine).state == states.ACTIVE
    assert leaf.answer(1) == "ours"


def test_called_while_the_target_is_being_imported(world: World) -> None:
    """The half of a module that is there is not patched; the whole one is."""
    path = world.root / world.package / "leaf.py"
    engine = one_patch(world)
    importlib.import_module(world.package)
    called = "import gemma4_turbo.engine.installer as p; p.BEING_IMPORTED.apply()\n"
    world.write("leaf", called + path.read_text())
    installer.BEING_IMPORTED = engine  # type: ignore[attr-defined]
    try:
        leaf = world.imported()
    finally:
        del installer.BEING_IMPORTED  # type: ignore[attr-defined]
    assert only_row(engine)[1:3] == (states.ACTIVE, "installed")
    assert leaf.answer(1) == "ours"


@pytest.mark.parametrize("argument", ["only", "skip"])
def test_a_name_that_is_no_patch(world: World, argument: str) -> None:
    """ValueError that names the argument, the name and the choices; nothing is registered."""
    engine = one_patch(world)
    calls: dict[str, Any] = {argument: ["nope"]}
    with pytest.raises(ValueError, match=f"{argument} names no patch: 'nope'; choose from one"):
        engine.apply(**calls)
    assert world.imported().answer(1) == 2
    assert SELECTION not in os.environ


@pytest.mark.parametrize("argument", ["only", "skip"])
def test_a_single_string(argument: str) -> None:
    """``only="router"`` would otherwise mean the patches r, o, u, t, e."""
    calls: dict[str, Any] = {argument: "router"}
    with pytest.raises(ValueError, match=f"{argument} must be a collection of patch names"):
        gemma4_turbo.apply(**calls)


def two_patches(world: World) -> installer.Engine:
    """``one`` replaces `answer`, ``two`` replaces `Model.forward`."""
    return world.engine(
        (record("one", world.target("answer")), returning("one")),
        (record("two", world.target("Model.forward")), returning("two")),
    )


def states_of(engine: installer.Engine) -> dict[str, str]:
    """State by patch."""
    return {row.name: row.state for row in engine.status()}


def test_only_and_skip(world: World) -> None:
    """A later call with names changes the selection, one without does not."""
    engine = two_patches(world)
    leaf = world.imported()
    engine.apply(only=["one"])
    assert states_of(engine) == {"one": states.ACTIVE, "two": states.OFF}
    assert (leaf.answer(1), leaf.Model().forward(1)) == ("one", 2)
    engine.apply()
    assert states_of(engine) == {"one": states.ACTIVE, "two": states.OFF}
    engine.apply(skip=(name for name in ["one"]))
    assert states_of(engine) == {"one": states.OFF, "two": states.ACTIVE}
    assert (leaf.answer(1), leaf.Model().forward(1)) == (2, "two")
    engine.apply(only=[])
    assert states_of(engine) == {"one": states.OFF, "two": states.OFF}
    assert (leaf.answer(1), leaf.Model().forward(1)) == (2, 2)


# -- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("import_first", [True, False])
@pytest.mark.parametrize("variable", ["GEMMA4_TURBO", "GEMMA4_TURBO_ONE", "OLD_ONE"])
def test_off_names_the_variable(
    world: World, monkeypatch: pytest.MonkeyPatch, variable: str, import_first: bool
) -> None:
    """Stock's very object stays, before and after the import."""
    value = "1" if variable == "OLD_ONE" else "0"
    monkeypatch.setenv(variable, value)
    engine = one_patch(world, aliases=(alias("OLD_ONE"),))
    if import_first:
        stock = world.imported().answer
    (row,) = engine.apply()
    assert row[1:3] == (states.OFF, f"{variable}={value}")
    if import_first:
        assert world.imported().answer is stock
    assert world.imported().answer(1) == 2
    assert only_row(engine)[1:3] == (states.OFF, f"{variable}={value}")


def test_the_environment_is_read_at_the_import(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may set ``os.environ`` after `apply`."""
    engine = one_patch(world)
    engine.apply()
    monkeypatch.setenv("GEMMA4_TURBO_ONE", "0")
    assert world.imported().answer(1) == 2
    assert only_row(engine).state == states.OFF


def test_conflict_before_us(world: World) -> None:
    """Who came first keeps the place, and is named."""
    engine = one_patch(world)
    leaf = world.imported()
    leaf.answer = theirs = lambda x: "theirs"
    (row,) = engine.apply()
    assert row.state == states.CONFLICT
    assert f"replaced before us by the function at {__file__}" in row.reason
    assert leaf.answer is theirs


@pytest.mark.parametrize("qualname", ["answer", "Model.forward", "Model.scale", "Model.name"])
def test_conflict_with_a_polite_wrapper(world: World, qualname: str) -> None:
    """``functools.wraps`` makes it look like stock's own function, decorated or not."""
    engine = world.engine((record("one", world.target(qualname)), returning("ours")))
    leaf = world.imported()
    owner = leaf.Model if "." in qualname else leaf
    name = qualname.rpartition(".")[2]
    raw = vars(owner)[name]
    decorator = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    stock = raw.__func__ if decorator else raw

    @functools.wraps(stock)
    def wrapper(*args: Any) -> Any:
        return stock(*args)

    setattr(owner, name, decorator(wrapper) if decorator else wrapper)
    theirs = vars(owner)[name]
    (row,) = engine.apply()
    assert row.state == states.CONFLICT
    assert vars(owner)[name] is theirs


def test_conflict_after_us(world: World) -> None:
    """Somebody replaced us later: the state says so as soon as it is asked for."""
    engine = one_patch(world)
    leaf = world.imported()
    engine.apply()
    leaf.answer = lambda x: "theirs"
    assert only_row(engine)[1:3] == (
        states.CONFLICT,
        f"replaced after us: {world.target('answer')}",
    )


@pytest.mark.parametrize(
    ("old", "new", "state"),
    [
        ("return x * 2", "return x * 3", states.DRIFTED),
        ("return x * 2", "return x * 2  # twice", states.ACTIVE),
        ("return x + 1", "return x + 2", states.ACTIVE),  # not what the patch looks at
    ],
)
def test_drifted_on_a_one_line_edit(world: World, old: str, new: str, state: str) -> None:
    """An edit of the target's code, of its comments, of another function."""
    engine = one_patch(world)
    world.edit(old, new)
    engine.apply()
    leaf = world.imported()
    row = only_row(engine)
    assert row.state == state
    if state == states.DRIFTED:
        assert world.target("answer") in row.reason
        assert leaf.answer(1) == 3


def test_drifted_because_of_what_it_relies_on(world: World) -> None:
    """The reason names the source that changed, not the target."""
    world.write("basis", "def used() -> int:\n    return 1\n")
    engine = one_patch(world, relies_on=(world.target("used", "basis"),))
    world.write("basis", "def used() -> int:\n    return 2\n")
    engine.apply()
    world.imported()
    world.imported("basis")
    row = only_row(engine)
    assert row.state == states.DRIFTED
    assert world.target("used", "basis") in row.reason
    assert world.target("answer") not in row.reason


def test_upstreamed(world: World) -> None:
    """The new source mentions what makes the patch needless."""
    engine = one_patch(world)
    world.edit("return x * 2", "return stock_has_it_now(x)")
    engine.apply()
    world.imported()
    assert only_row(engine).state == states.UPSTREAMED


def test_unsupported(world: World) -> None:
    """The target is gone."""
    engine = one_patch(world)
    world.edit("def answer", "def renamed")
    engine.apply()
    world.imported()
    row = only_row(engine)
    assert row.state == states.UNSUPPORTED
    assert world.target("answer") in row.reason


def _raises(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError("no kernel today")


def _forgets_the_second(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    return {next(iter(stock)): lambda *args: "ours"}


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (_raises, "RuntimeError: no kernel today"),
        (_forgets_the_second, "KeyError"),
    ],
)
def test_failed_leaves_nothing_half_installed(world: World, build: Build, told: str) -> None:
    """With two targets, whether build raises or the second one cannot be installed."""
    patch = record("pair", world.target("answer"), world.target("Model.scale"))
    engine = world.engine((patch, build))
    leaf = world.imported()
    stock = leaf.answer, vars(leaf.Model)["scale"]
    (row,) = engine.apply()
    assert row.state == states.FAILED
    assert told in row.reason
    assert leaf.answer is stock[0]
    assert vars(leaf.Model)["scale"] is stock[1]


def test_both_targets_are_installed_and_reverted(world: World) -> None:
    """The counterpart of the test above."""
    patch = record("pair", world.target("answer"), world.target("Model.scale"))
    engine = world.engine((patch, returning("ours")))
    leaf = world.imported()
    stock = leaf.answer, vars(leaf.Model)["scale"]
    engine.apply()
    assert (leaf.answer(1), leaf.Model.scale(1)) == ("ours", "ours")
    engine.revert()
    assert leaf.answer is stock[0]
    assert vars(leaf.Model)["scale"] is stock[1]


def test_one_patch_s_failure_leaves_the_others_alone(world: World) -> None:
    """Patch by patch."""
    engine = world.engine(
        (record("bad", world.target("answer")), _raises),
        (record("good", world.target("Model.forward")), returning("good")),
    )
    engine.apply()
    leaf = world.imported()
    assert states_of(engine) == {"bad": states.FAILED, "good": states.ACTIVE}
    assert (leaf.answer(1), leaf.Model().forward(1)) == (2, "good")


def test_a_hook_never_raises_into_the_import(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong: the model class stays importable, and the log tells."""
    engine = one_patch(world)

    def broken(run: PatchRun) -> None:
        raise RuntimeError("our own mistake")

    monkeypatch.setattr(engine, "_install", broken)
    engine.apply()
    with caplog.at_level(logging.ERROR, "gemma4_turbo"):
        assert world.imported().answer(1) == 2
    assert "our own mistake" in caplog.text


def test_a_source_that_does_not_parse_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when SGLang uses a syntax that the reader does not know: failed, not an exception."""
    engine = one_patch(world)
    monkeypatch.setattr(fingerprints, "imported_source", lambda module: "def broken(:\n")
    engine.apply()
    assert world.imported().answer(1) == 2
    row = only_row(engine)
    assert row.state == states.FAILED
    assert "SyntaxError" in row.reason


def test_states_are_logged_once_and_bad_ones_as_warnings(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """What a user greps for."""
    engine = world.engine(
        (record("bad", world.target("answer")), _raises),
        (record("good", world.target("Model.forward")), returning("good")),
    )
    with caplog.at_level(logging.INFO, "gemma4_turbo"):
        engine.apply()
        world.imported()
        engine.apply()
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "gemma4_turbo: bad is failed: RuntimeError: no kernel today"),
        ("INFO", "gemma4_turbo: good is active: installed"),
    ]


# -- revert --------------------------------------------------------------------------------------


@pytest.mark.parametrize("qualname", ["answer", "Model.forward", "Model.scale", "Model.name"])
def test_revert_restores_the_very_same_object(world: World, qualname: str) -> None:
    """The raw ``__dict__`` value of function, method, staticmethod and classmethod."""
    engine = world.engine((record("one", world.target(qualname)), returning("ours")))
    leaf = world.imported()
    owner = vars(leaf.Model if "." in qualname else leaf)
    name = qualname.rpartition(".")[2]
    stock = owner[name]
    engine.apply()
    assert owner[name] is not stock
    engine.revert()
    assert owner[name] is stock
    assert only_row(engine)[1:3] == (states.OFF, "revert() was called")


def test_revert_leaves_alone_what_another_replaced(world: World) -> None:
    """Their wrapper stays; the state says what could not be reverted."""
    engine = two_patches(world)
    leaf = world.imported()
    stock = leaf.Model.forward
    engine.apply()
    leaf.answer = theirs = lambda x: "theirs"
    engine.revert()
    assert leaf.answer is theirs
    assert leaf.Model.forward is stock
    one, two = engine.status()
    assert one.state == states.CONFLICT
    assert one.reason == f"not reverted, replaced after us: {world.target('answer')}"
    assert two.state == states.OFF


def test_revert_lets_the_patch_put_live_objects_back(world: World) -> None:
    """Once, and only if it was installed."""
    engine = one_patch(world)
    code: Any = sys.modules["code_of_one"]
    engine.apply()
    engine.revert()
    assert code.undone == 0
    world.imported()
    engine.apply()
    engine.revert()
    engine.revert()
    assert code.undone == 1


def test_aliases_follow(world: World) -> None:
    """Also those of a module that imported the name while the patch was in."""
    world.write("early", f"from {world.leaf} import answer")
    world.write("late", f"from {world.leaf} import answer")
    engine = one_patch(world)
    early = world.imported("early")
    leaf = world.imported()
    stock = leaf.answer
    engine.apply()
    late = world.imported("late")
    assert early.answer is late.answer is leaf.answer
    assert late.answer(1) == "ours"
    engine.revert()
    assert early.answer is late.answer is leaf.answer is stock


def test_revert_before_the_import(world: World) -> None:
    """What is imported later stays stock."""
    engine = one_patch(world)
    engine.apply()
    engine.revert()
    assert world.imported().answer(1) == 2
    assert only_row(engine)[1:3] == (states.OFF, "revert() was called")


@pytest.mark.parametrize("import_when", ["before apply", "after apply", "after revert", "last"])
def test_revert_then_apply_again(world: World, import_when: str) -> None:
    """Patched again, whenever the target was imported."""
    engine = one_patch(world)

    def step(name: str) -> None:
        if import_when == name:
            world.imported()

    step("before apply")
    engine.apply()
    step("after apply")
    engine.revert()
    step("after revert")
    engine.apply()
    step("last")
    assert world.imported().answer(1) == "ours"
    assert only_row(engine).state == states.ACTIVE
    engine.revert()
    assert world.imported().answer(1) == 2


def test_bootstrap_does_not_undo_a_revert(world: World) -> None:
    """SGLang calls its plugins after the program may have called `revert`."""
    engine = one_patch(world)
    engine.apply()
    engine.revert()
    engine.bootstrap()
    assert world.imported().answer(1) == 2


def test_status_before_apply(world: World) -> None:
    """Nothing was asked for, nothing is registered."""
    engine = one_patch(world)
    assert only_row(engine)[1:3] == (
        states.WAITING,
        "apply() has not been called in this process",
    )
    assert world.imported().answer(1) == 2


# -- patches that share a target, or stand on each other -----------------------------------------


def shared(value: str) -> Build:
    """A build that brings one and the same function whoever calls it."""

    def replacement(*args: Any) -> Any:
        return value

    def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(stock, replacement)

    return build


@pytest.mark.parametrize("qualname", ["answer", "Model.scale"])
@pytest.mark.parametrize("first", ["one", "two"])
def test_a_shared_replacement_stays_until_the_last_one_goes(
    world: World, qualname: str, first: str
) -> None:
    """Whichever goes first, for a function and for a static method."""
    build = shared("both")
    engine = world.engine(
        *((record(name, world.target(qualname)), build) for name in ("one", "two"))
    )
    leaf = world.imported()
    owner = leaf.Model if "." in qualname else leaf
    name = qualname.rpartition(".")[2]
    stock = vars(owner)[name]
    engine.apply()
    ours = vars(owner)[name]
    assert ours is not stock
    assert states_of(engine) == {"one": states.ACTIVE, "two": states.ACTIVE}
    engine.apply(skip=[first])
    assert vars(owner)[name] is ours
    assert sorted(states_of(engine).values()) == [states.ACTIVE, states.OFF]
    engine.apply(only=[])
    assert vars(owner)[name] is stock
    engine.apply(only=["one", "two"])
    assert states_of(engine) == {"one": states.ACTIVE, "two": states.ACTIVE}
    engine.revert()
    assert vars(owner)[name] is stock


def test_sharing_gives_both_stock_s_function(world: World) -> None:
    """The second patch's build sees stock, not the first one's replacement."""
    seen: list[Any] = []
    build = shared("both")

    def noting(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
        seen.extend(stock.values())
        return build(run, stock)

    engine = world.engine(
        *((record(name, world.target("answer")), noting) for name in ("one", "two"))
    )
    stock = world.imported().answer
    engine.apply()
    assert seen == [stock, stock]


def test_different_replacements_of_one_target_conflict(world: World) -> None:
    """The first keeps the place; the second leaves none of its other targets replaced."""
    engine = world.engine(
        (record("one", world.target("answer")), returning("one")),
        (record("two", world.target("Model.forward"), world.target("answer")), returning("two")),
    )
    leaf = world.imported()
    stock = leaf.answer, leaf.Model.forward
    one, two = engine.apply()
    assert one.state == states.ACTIVE
    assert (two.state, two.reason) == (
        states.CONFLICT,
        f"{world.target('answer')} was replaced before us by another patch",
    )
    assert leaf.answer(1) == "one"
    assert leaf.Model.forward is stock[1]
    engine.revert()
    assert leaf.answer is stock[0]


@pytest.mark.parametrize("imported_before", [False, True])
def test_what_mends_a_defect_goes_in_first(world: World, imported_before: bool) -> None:
    """Wherever it stands in the catalogue, and whenever the module is imported."""
    target = world.target("answer")
    engine = world.engine(
        (record("faster", target), returning("faster")),
        (record("mended", target, finds_defect=True), returning("mended")),
    )
    if imported_before:
        world.imported()
    engine.apply()
    assert world.imported().answer(1) == "mended"
    expected = {"faster": states.CONFLICT, "mended": states.ACTIVE}
    assert states_of(engine) == expected
    engine.revert()
    engine.apply()
    assert states_of(engine) == expected


def test_a_patch_is_off_with_what_it_requires(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At apply, by variable and by argument, and when the selection changes."""
    engine = world.engine(
        (record("base", world.target("answer")), returning("base")),
        (record("top", world.target("Model.forward"), requires=("base",)), returning("top")),
    )
    monkeypatch.setenv("GEMMA4_TURBO_BASE", "0")
    _, top = engine.apply()
    reason = "stands on base, which is off: GEMMA4_TURBO_BASE=0"
    assert top[1:3] == (states.OFF, reason)
    leaf = world.imported()
    stock = leaf.Model.forward
    assert engine.status()[1][1:3] == (states.OFF, reason)
    monkeypatch.delenv("GEMMA4_TURBO_BASE")
    engine.apply(only=["base", "top"])
    assert states_of(engine) == {"base": states.ACTIVE, "top": states.ACTIVE}
    _, top = engine.apply(skip=["base"])
    assert top.state == states.OFF
    assert top.reason.startswith("stands on base, which is off: ")
    assert leaf.Model.forward is stock
    _, top = engine.apply(only=["base"])
    assert top.state == states.OFF
    assert "stands on" not in top.reason


@pytest.mark.parametrize("build", [_raises, _forgets_the_second])
def test_a_failed_installation_is_undone(world: World, build: Build) -> None:
    """What build did to live objects is put back, once; a patch that shares is not touched."""
    same = shared("both")

    def half(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
        return same(run, {next(iter(stock)): None}) if build is not _raises else build(run, stock)

    engine = world.engine(
        (record("good", world.target("answer")), same),
        (record("pair", world.target("answer"), world.target("Model.scale")), half),
    )
    leaf = world.imported()
    stock = leaf.answer
    good, pair = engine.apply()
    assert (good.state, pair.state) == (states.ACTIVE, states.FAILED)
    code: Any = sys.modules["code_of_pair"]
    assert code.undone == 1
    assert leaf.answer(1) == "both"
    engine.revert()
    assert code.undone == 1
    assert leaf.answer is stock


# -- the way to the import ----------------------------------------------------------------------


class _OnlyWay:
    """A finder in front of all others without which the package is not found."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.machinery.PathFinder.find_spec(name, [str(self.root)])


def test_no_other_finder_is_skipped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import hook in front, as some editable installs and tracers have, still sees the root.

    Python iterates over ``sys.meta_path`` itself: taking an entry out of it during the look-up
    makes it skip the next one.
    """
    import wrapt

    wrapt.register_post_import_hook(lambda module: None, "standin_never")  # its finder is there
    engine = one_patch(world)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(world.root)])
    finder: Any = _OnlyWay(world.package, world.root)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    engine.apply()
    assert world.imported().answer(1) == "ours"


def test_looking_for_the_root_is_enough(world: World) -> None:
    """``importlib.util.find_spec`` imports nothing and breaks nothing."""
    engine = one_patch(world)
    engine.apply()
    assert importlib.util.find_spec(world.package) is not None
    assert world.package not in sys.modules
    assert world.imported().answer(1) == "ours"


def test_threads_that_import_and_apply(world: World) -> None:
    """Built once, whoever comes first."""
    builds: list[str] = []
    engine = one_patch(world, counted(builds))
    calls: list[Callable[[], Any]] = [engine.apply, world.imported, engine.status] * 4
    engine.apply()
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert builds == ["one"]
    assert world.imported().answer(1) == "ours"


# -- spawned processes --------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
import pytest
from tests.cpu.synthetic import World, record, returning
with pytest.MonkeyPatch.context() as monkeypatch:
    world = World(Path(sys.argv[1]), sys.argv[2], monkeypatch)
    engine = world.engine(
        (record("one", world.target("answer")), returning("one")),
        (record("two", world.target("Model.forward")), returning("two")),
    )
    engine.bootstrap()
    leaf = world.imported()
    print(leaf.answer(1), leaf.Model().forward(1))
    print(*[row.state for row in engine.status()])
"""


def spawned(world: World) -> list[str]:
    """What a child of this process makes of the environment that it inherits."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(world.root), world.package],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_selection_travels_to_spawned_processes(world: World) -> None:
    """only=, skip= and revert() hold in the children too, and apply() lifts the revert."""
    engine = two_patches(world)
    engine.apply(only=["one"])
    assert spawned(world) == ["one 2", "active off"]
    engine.apply(skip=["one"])
    assert spawned(world) == ["2 two", "off active"]
    engine.revert()
    assert spawned(world) == ["2 2", "off off"]
    engine.apply()
    assert spawned(world) == ["one two", "active active"]


def test_what_waits_for_a_module_without_its_target_is_told_when_the_model_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of that name this SGLang has another module, which nobody may ever import."""
    other = world.target("absent", "later")
    world.table["0.9"] = {other: "0" * 16}
    world.write("later", "def answer():\n    return 1\n")
    engine = world.engine((record("one", other), returning("ours")))
    monkeypatch.setattr(fingerprints, "installed_source", fingerprints.folder_source(world.root))
    engine.apply()
    world.imported()
    assert engine.status()[0].state == states.WAITING
    engine.give_up_waiting()
    (row,) = engine.status()
    assert row.state == states.UNSUPPORTED
    assert row.reason.endswith(f"has no {other}")


def test_a_line_that_has_no_use_for_a_patch_says_so(world: World) -> None:
    """Not that it lacks what another line's code is for; and where its own targets are gone, nothing."""
    why = "nothing is asked twice"
    world.table["0.9"] = {world.target("absent"): "0" * 16}
    engine = world.engine(
        (record("one", world.target("answer"), needless=why), returning("ours")),
        (record("two", world.target("absent"), needless=why), returning("ours")),
    )
    engine.apply()
    world.imported()
    one, two = engine.status()
    assert (one.state, two.state) == (states.UNSUPPORTED, states.UNSUPPORTED)
    assert one.reason.endswith(f": {why}")
    assert why not in two.reason


def test_what_waits_for_a_module_that_is_nowhere_is_told_when_the_model_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for ever; what waits for a module that is still to come goes on."""
    gone = world.target("thing", "gone")
    world.table["0.9"] = {gone: "0" * 16}
    world.write("later", "def answer():\n    return 1\n")
    engine = world.engine(
        (record("one", world.target("answer"), relies_on=(gone,)), returning("ours")),
        (record("two", world.target("answer", "later")), returning("ours")),
    )
    monkeypatch.setattr(fingerprints, "installed_source", fingerprints.folder_source(world.root))
    engine.apply()
    world.imported()
    assert [row.state for row in engine.status()] == [states.WAITING] * 2
    engine.give_up_waiting()
    one, two = engine.status()
    assert (one.state, two.state) == (states.UNSUPPORTED, states.WAITING)
    assert one.reason.endswith(f"has no {gone}")
    world.imported("later")
    assert engine.status()[1].state == states.ACTIVE


# -- forks ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_while_another_thread_is_at_it(world: World) -> None:
    """Nobody in the child could let go of the lock: its imports and `status` are not to wait for that."""
    engine = one_patch(world)
    engine.apply()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with engine._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)  # a child that hangs is ended by it
        answer = world.imported().answer(1)
        os._exit(0 if answer == "ours" and only_row(engine).state == states.ACTIVE else 1)
    _, status = os.waitpid(pid, 0)
    done.set()
    thread.join()
    assert status == 0
