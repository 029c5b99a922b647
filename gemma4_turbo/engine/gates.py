"""Places in SGLang where something of ours is asked, and where strict mode stops a server.

SGLang swallows what a plugin or a model's import raises. It does not swallow what a gate raises. A gate
is a row of a table (`add`), and `guarded` makes it of checks; a release line's ways in add the rows.
Nothing of ours ends a server there but strict mode with `StrictModeError`: a check that raises is
logged, and stock's function is called once with its own arguments.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import wrapt

from gemma4_turbo.engine import state_folder, states
from gemma4_turbo.engine.imports import being_imported
from gemma4_turbo.engine.summary import summary_line
from gemma4_turbo.engine.swap import Swap
from gemma4_turbo.engine.switches import STRICT

if TYPE_CHECKING:
    from gemma4_turbo.engine.installer import Engine

logger = logging.getLogger("gemma4_turbo")


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
    instead: str | None


_GATES: dict[str, Gate] = {}
_half: set[str] = set()  # gates whose modules were being imported when we came
_unheld: dict[str, str] = {}  # gates that strict mode needs and that could not be put in, and why


def add(target: str, make: Make, instead: str | None = None) -> None:
    """One more gate. Call it before `register`, with ``make`` from `guarded`.

    Args:
        target: ``module:qualname``. A release that does not have it is left alone.
        make: the wrapper, from the engine.
        instead: another gate in the same module, where strict mode refuses if this one, without
            which it could not keep its word, cannot be put in. None: it can do without this one.
    """
    _GATES[target] = Gate(make, instead)


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
    problems = problems_of(checks, call)
    if problems and _strict(call.engine):
        raise StrictModeError(f"{STRICT}=1: " + "; ".join(dict.fromkeys(problems)))


def problems_of(checks: Sequence[Check], call: Call) -> list[str]:
    """What the checks have found; one that raises has found that."""
    problems: list[str] = []
    for check in checks:
        try:
            problems.extend(check(call))
        except Exception as error:
            what = getattr(check, "__name__", repr(check)).strip("_").replace("_", " ")
            problems.append(f"{what} could not be looked at: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                logger.exception("gemma4_turbo: %s", problems[-1])
    return problems


def warned(problems: list[str]) -> list[str]:
    """The problems, each logged."""
    for problem in problems:
        logger.warning("gemma4_turbo: %s", problem)
    return problems


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
        if being_imported(module):  # wrapt would call the hook now, with half a module
            _half.add(target)
        else:
            wrapt.register_post_import_hook(_hook(engine, target), module)


def _hook(engine: Engine, target: str) -> Callable[[Any], None]:
    return lambda module: _install_one(engine, target)


def install(engine: Engine) -> None:
    """Install the gates whose modules are there already."""
    for target in _GATES:
        module = target.partition(":")[0]
        if module in sys.modules and not being_imported(module):
            _install_one(engine, target)


def remove(engine: Engine) -> None:
    """Put all functions back."""
    for swap in engine.gates.values():
        swap.restore()
    engine.gates.clear()
    _unheld.clear()
    _half.clear()


def _install_one(engine: Engine, target: str) -> None:
    """Put one gate in. Raises nothing into SGLang's import but the last resort of strict mode."""
    if target in engine.gates:
        return
    gate = _GATES[target]
    try:
        if engine.switches().stock:
            return
        swap = Swap(target)
        swap.install(wrapt.FunctionWrapper(swap.function, gate.make(engine)))
        engine.gates[target] = swap
        _unheld.pop(target, None)
    except Exception as error:
        if gate.instead is None:
            logger.debug("gemma4_turbo: no gate at %s: %s", target, error)
            return
        logger.warning("gemma4_turbo: no summary will be logged: %s: %s", target, error)
        _unheld[target] = f"strict mode has no hold on {target}: {error}"
        _install_one(engine, gate.instead)
        if _strict(engine) and gate.instead not in engine.gates:
            # Nothing is left in this module where strict mode could refuse. SystemExit is the one
            # exception that neither the import system's callers nor SGLang's plugins swallow.
            raise SystemExit(f"gemma4_turbo: {_unheld[target]}") from None


# -- checks of any gate --------------------------------------------------------------------------


def hold(call: Call) -> list[str]:
    """Gates that strict mode needs and that are not in."""
    if _half:
        install(call.engine)
        _half.difference_update(call.engine.gates)
    needed = [target for target in _half if _GATES[target].instead is not None]
    return [*_unheld.values(), *(f"{target} is still being imported" for target in needed)]


def mistakes(call: Call) -> list[str]:
    """Exceptions of ours that were swallowed so far."""
    return list(getattr(call.engine, "mistakes", ()))


def launch_problems(engine: Engine) -> list[str]:
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


def states_when_the_model_stands(call: Call) -> list[str]:
    """Logs the summary; returns the states that strict mode refuses."""
    rows = call.engine.status()
    logger.info("%s", summary_line(rows))
    bad = [row for row in rows if row.state in states.REFUSED_WHEN_STRICT]
    refused = [f"{row.name} is {row.state}: {row.reason}" for row in bad]
    problems = [*call.engine.switches().problems, *filter(None, [state_folder.problem()])]
    return [*problems, *refused]
