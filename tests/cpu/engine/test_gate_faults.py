"""Whatever of ours raises at a gate: stock's function runs, unless strict mode is on."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from gemma4_turbo.engine import fingerprints, gates, installer
from gemma4_turbo.engine.installer import Engine
from gemma4_turbo.ports.any.launch import advice, late_arguments, launch_gates, routes
from tests.cpu.synthetic import World, record, returning

ERRORS = (
    RuntimeError("injected"),
    RecursionError("injected"),
    OSError("injected"),
    MemoryError("injected"),
)
AT_LAUNCH = {
    "switches": (Engine, "switches"),
    "decision": (Engine, "decision"),
    "outlook": (Engine, "outlook"),
    "sources": (fingerprints, "judge"),
    "routes": (routes, "bootstrap_routes"),
    "entry points": (routes, "entry_points"),
    "sitecustomize": (routes, "_sitecustomizes"),
    "schedulers": (routes, "unreached_schedulers"),
    "arguments made before us": (late_arguments, "without_a_say"),
    "advice": (advice, "on_launch"),
}
AT_LOADING = {
    "catch_up": (Engine, "catch_up"),
    "status": (Engine, "status"),
    "row": (Engine, "_row"),
    "summary": (gates, "summary_line"),
    "switches": (Engine, "switches"),
}


@pytest.fixture
def engine(world: World, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """One patch that is on; every way into spawned processes is open."""
    monkeypatch.setenv("PYTHONPATH", "nowhere")
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    made = world.engine((record("one", world.target("answer")), returning("ours")))
    made.apply()
    return made


class Stock:
    """A function of SGLang that notes its calls."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[Any] = []
        self._error = error

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append((args, kwargs))
        if self._error is not None:
            raise self._error
        return "stock's"


def raises_once(
    monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str], error: Exception
) -> list[str]:
    """The place raises at its first call and works from then on; the list tells that it did."""
    owner, name = place
    real, raised = getattr(owner, name), []

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if not raised:
            raised.append(name)
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, faulty)
    return raised


def faults(places: list[Any]) -> pytest.MarkDecorator:
    """A gate catches whatever is raised alike: every place with one error, every error at two."""
    first, *others = ERRORS
    pairs = [(place, first) for place in places]
    pairs += [(place, error) for place in (places[0], places[-1]) for error in others]
    return pytest.mark.parametrize(
        ("gate", "place", "error"),
        [
            pytest.param(*place.values, error, id=f"{place.id}-{type(error).__name__}")
            for place, error in pairs
        ],
    )


IN_STRICT_MODE_ONLY = ("decision", "outlook", "sources")
PLACES = [
    pytest.param(gate, place, id=f"{where}-{name}")
    for where, gate, table in (
        ("launch", launch_gates._before_launch, AT_LAUNCH),
        ("loading", launch_gates._after_load, AT_LOADING),
    )
    for name, place in table.items()
]
ALWAYS = [place for place in PLACES if not str(place.id).endswith(IN_STRICT_MODE_ONLY)]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Records that speak of the injected error, once each."""
    return [
        record.getMessage()
        for record in caplog.records
        if "injected" in record.getMessage() and record.levelno >= logging.WARNING
    ]


@faults(ALWAYS)
def test_goes_on(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gate: gates.Make,
    place: tuple[Any, str],
    error: Exception,
) -> None:
    """Stock's function once, with its arguments; the error in the log once."""
    stock, wrapper = Stock(), gate(engine)
    raised = raises_once(monkeypatch, place, error)
    assert wrapper(stock, None, (1,), {"server_args": 2}) == "stock's"
    assert raised
    assert stock.calls == [((1,), {"server_args": 2})]
    assert len(told(caplog)) == 1


@faults(PLACES)
def test_strict_refuses_what_it_cannot_look_at(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    gate: gates.Make,
    place: tuple[Any, str],
    error: Exception,
) -> None:
    """And with nothing but `StrictModeError`, which names it."""
    monkeypatch.setenv("GEMMA4_TURBO_STRICT", "1")
    assert gate(engine)(Stock(), None, (1,), {}) == "stock's"  # without a fault
    stock = Stock()
    raised = raises_once(monkeypatch, place, error)
    with pytest.raises(gates.StrictModeError) as refused:
        gate(engine)(stock, None, (1,), {})
    assert raised
    # Told by the gate, or by the state of the patch whose source could not be judged.
    assert f"{type(error).__name__}: injected" in str(refused.value)
    assert len(stock.calls) == (gate is launch_gates._after_load and place[1] != "catch_up")


@pytest.mark.parametrize("strict", ["0", "1"])
@pytest.mark.parametrize("error", [ValueError("stock's own"), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("gate", [launch_gates._before_launch, launch_gates._after_load])
def test_what_stock_raises_passes_through(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gate: gates.Make,
    error: BaseException,
    strict: str,
) -> None:
    """The very same object, and no second call."""
    monkeypatch.setenv("GEMMA4_TURBO_STRICT", strict)
    stock = Stock(error)
    with pytest.raises(type(error)) as found:
        gate(engine)(stock, None, (1,), {"x": 2})
    assert found.value is error
    assert stock.calls == [((1,), {"x": 2})]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_one_check_that_raises_leaves_the_others_their_say(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first of them is broken, for good."""

    def broken(*args: Any) -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr(Engine, "switches", broken)
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert launch_gates._before_launch(engine)(Stock(), None, (), {}) == "stock's"
    assert any("would stay stock" in line for line in caplog.messages)
    monkeypatch.setenv("GEMMA4_TURBO_STRICT", "1")  # read from the environment then
    with pytest.raises(gates.StrictModeError, match=r"injected.*would stay stock"):
        launch_gates._before_launch(engine)(Stock(), None, (), {})


def test_checks_can_be_added(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the lists, also after the gate was made; and gates to the table."""
    seen: list[gates.Call] = []

    def check(call: gates.Call) -> list[str]:
        seen.append(call)
        return ["something else is wrong"]

    wrapper = launch_gates._before_launch(engine)
    launch_gates.BEFORE_LAUNCH.append(check)
    try:
        assert wrapper(Stock(), None, (7,), {}) == "stock's"
        monkeypatch.setenv("GEMMA4_TURBO_STRICT", "1")
        with pytest.raises(gates.StrictModeError, match="something else is wrong"):
            wrapper(Stock(), None, (7,), {})
    finally:
        launch_gates.BEFORE_LAUNCH.remove(check)
    assert [call.args for call in seen] == [(7,), (7,)]
    made = gates.guarded(after=[check])(engine)
    monkeypatch.delenv("GEMMA4_TURBO_STRICT")
    assert made(Stock(), None, (8,), {}) == "stock's"
    assert (seen[-1].args, seen[-1].result) == ((8,), "stock's")


@pytest.mark.parametrize("what", ["_select", "_install", "catch_up"])
def test_what_was_swallowed_before_is_told_at_the_launch(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    """In `bootstrap` and in the hooks of SGLang's imports: nothing raises there."""
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    raised = raises_once(monkeypatch, (Engine, what), RecursionError("injected"))
    if what == "_select":
        engine.bootstrap()
    else:
        world.imported("__init__")
        engine.bootstrap()
        if what == "catch_up":
            raised.clear()
        world.imported()
    assert raised
    assert engine.mistakes
    assert "RecursionError: injected" in engine.mistakes[0]
    assert launch_gates._before_launch(engine)(Stock(), None, (), {}) == "stock's"
    monkeypatch.setenv("GEMMA4_TURBO_STRICT", "1")
    with pytest.raises(gates.StrictModeError, match="RecursionError: injected"):
        launch_gates._before_launch(engine)(Stock(), None, (), {})
    engine.revert()
    assert not engine.mistakes


def test_gates_are_there_even_if_bootstrap_fails(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else strict mode would let a stock server pass."""
    registered: list[Engine] = []
    monkeypatch.setattr(launch_gates, "register", registered.append)
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    monkeypatch.setattr(engine, "_launch_gates", launch_gates.__name__)
    raises_once(monkeypatch, (installer.Engine, "_select"), RuntimeError("injected"))
    engine.bootstrap()
    assert registered == [engine]
