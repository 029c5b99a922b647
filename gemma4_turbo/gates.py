"""Places in SGLang where the patches are summed up, and where strict mode stops a server.

SGLang swallows what a plugin or a model's import raises. It does not swallow what these raise:

* ``Engine._launch_subprocesses``, in the main process, before any process is spawned. What can be
  told from the sources and the environment is checked here: nothing has been loaded yet.
* ``ModelRunner.load_model``, in every scheduler process, when the model stands. What only shows
  at run time is checked here; the scheduler's error handling then ends the whole server.

A gate is a row of a table (`add`), and `guarded` makes it of checks. Nothing of ours ends a server
there but strict mode with `StrictModeError`: a check that raises is logged, and stock's function is
called once with its own arguments.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import wrapt

from gemma4_turbo import advice, state_folder, states
from gemma4_turbo.routes import PLUGIN_GROUP, bootstrap_routes
from gemma4_turbo.swap import Swap
from gemma4_turbo.switches import STRICT

if TYPE_CHECKING:
    from gemma4_turbo.patching import Engine

__all__ = ["PLUGIN_GROUP", "StrictModeError", "add", "bootstrap_routes", "guarded"]
logger = logging.getLogger("gemma4_turbo")

LAUNCH = "sglang.srt.entrypoints.engine:Engine._launch_subprocesses"
LOADED = "sglang.srt.model_executor.model_runner:ModelRunner.load_model"


class StrictModeError(RuntimeError):
    """``GEMMA4_TURBO_STRICT=1`` and a patch that is switched on cannot do its work."""


class Call(NamedTuple):
    """One call of the function that a gate stands in."""

    engine: Engine
    instance: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None  # of stock's function, for the checks after it


Wrapper = Callable[[Any, Any, Any, Any], Any]  # as wrapt calls it
Make = Callable[["Engine"], Wrapper]
Check = Callable[[Call], Iterable[str]]  # logs what it has to say; returns why strict mode refuses


class Gate(NamedTuple):
    """One row of the table."""

    make: Make
    needed: bool  # strict mode does not hold without it


_GATES: dict[str, Gate] = {}


def add(target: str, make: Make, needed: bool = False) -> None:
    """One more gate. Call it before `register`, with ``make`` from `guarded`.

    Args:
        target: ``module:qualname``. A release that has no such module is left alone.
        make: the wrapper, from the engine.
        needed: strict mode cannot keep its word without this gate.
    """
    _GATES[target] = Gate(make, needed)


def guarded(before: Sequence[Check] = (), after: Sequence[Check] = ()) -> Make:
    """A gate with these checks; both lists may grow later.

    Each check runs by itself: what it raises is logged, the others have their say, and stock's
    function runs. In strict mode a check that raised counts as a reason to refuse.
    """

    def make(engine: Engine) -> Wrapper:
        def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            _run(before, Call(engine, instance, args, kwargs))
            result = wrapped(*args, **kwargs)
            _run(after, Call(engine, instance, args, kwargs, result))
            return result

        return wrapper

    return make


def _run(checks: Sequence[Check], call: Call) -> None:
    """All checks; raises `StrictModeError` in strict mode if one of them has found something."""
    problems: list[str] = []
    for check in checks:
        try:
            problems.extend(check(call))
        except Exception as error:
            what = check.__name__.strip("_").replace("_", " ")
            problems.append(f"{what} could not be looked at: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                logger.exception("gemma4_turbo: %s", problems[-1])
    if problems and _strict(call.engine):
        raise StrictModeError(f"{STRICT}=1: " + "; ".join(problems))


def _strict(engine: Engine) -> bool:
    try:
        return engine.switches().strict
    except Exception:  # a strict mode that cannot be read is meant
        return os.environ.get(STRICT, "").strip() not in ("", "0")


# -- the table ------------------------------------------------------------------------------------


def register(engine: Engine) -> None:
    """Install the gates as soon as SGLang imports what they stand in."""
    for target in _GATES:
        module = target.partition(":")[0]
        wrapt.register_post_import_hook(_hook(engine, target), module)


def _hook(engine: Engine, target: str) -> Callable[[Any], None]:
    return lambda module: _install_one(engine, target)


def install(engine: Engine) -> None:
    """Install the gates whose modules are there already."""
    for target in _GATES:
        if target.partition(":")[0] in sys.modules:
            _install_one(engine, target)


def remove(engine: Engine) -> None:
    """Put all functions back."""
    for swap in engine.gates.values():
        swap.restore()
    engine.gates.clear()


def _install_one(engine: Engine, target: str) -> None:
    switches = engine.switches()
    if target in engine.gates or switches.stock:
        return
    gate = _GATES[target]
    try:
        swap = Swap(target)
        swap.install(wrapt.FunctionWrapper(swap.function, gate.make(engine)))
        engine.gates[target] = swap
    except Exception as error:
        if switches.strict and gate.needed:
            # Without its gate strict mode could not keep its word. SystemExit is the one
            # exception that neither the import system's callers nor SGLang's plugins swallow.
            raise SystemExit(
                f"gemma4_turbo: strict mode has no hold on {target}: {error}"
            ) from None
        logger.warning("gemma4_turbo: no summary will be logged: %s: %s", target, error)


# -- the launch -----------------------------------------------------------------------------------


def _patches(call: Call) -> list[str]:
    return launch_refusals(call.engine) if _strict(call.engine) else []


def _ways_into_spawned_processes(call: Call) -> list[str]:
    if bootstrap_routes():
        return []
    problem = (
        "spawned processes would stay stock: gemma4_turbo's entry point is not installed "
        "or not allowed by SGLANG_PLUGINS, and no sitecustomize on PYTHONPATH calls it"
    )
    logger.warning("gemma4_turbo: %s", problem)
    return [problem]


def _advice(call: Call) -> list[str]:
    for argument in (*call.args, *call.kwargs.values()):
        for sentence in advice.on_launch(argument):  # what is no ServerArgs has nothing to say
            logger.warning("gemma4_turbo: %s", sentence)
    return []


def launch_refusals(engine: Engine) -> list[str]:
    """Why strict mode would refuse, as far as sources, environment and states so far tell."""
    switches = engine.switches()
    refusals = [*switches.problems, *filter(None, [state_folder.problem()])]
    for name, run in engine.runs.items():
        if not engine.decision(run.patch)[0]:
            continue
        state, reason = engine.outlook(run.patch)
        if state in states.REFUSED_WHEN_STRICT:
            refusals.append(f"{name} is {state}: {reason}")
    return refusals


BEFORE_LAUNCH: list[Check] = [_patches, _ways_into_spawned_processes, _advice]


# -- the model stands -----------------------------------------------------------------------------


def _half_imported_modules(call: Call) -> list[str]:
    call.engine.catch_up()
    return []


def _states(call: Call) -> list[str]:
    from gemma4_turbo.report import summary_line

    rows = call.engine.status()
    logger.info("%s", summary_line(rows))
    bad = [row for row in rows if row.state in states.REFUSED_WHEN_STRICT]
    told = [f"{row.name} is {row.state}: {row.reason}" for row in bad]
    problems = [*call.engine.switches().problems, *filter(None, [state_folder.problem()])]
    return [*problems, *told]


BEFORE_LOADING: list[Check] = [_half_imported_modules]
AFTER_LOADING: list[Check] = [_states]

_before_launch = guarded(before=BEFORE_LAUNCH)
_after_load = guarded(before=BEFORE_LOADING, after=AFTER_LOADING)
add(LAUNCH, _before_launch, needed=True)
add(LOADED, _after_load, needed=True)
