"""Places in SGLang where the patches are summed up, and where strict mode stops a server.

SGLang swallows what a plugin or a model's import raises. It does not swallow what these raise:

* ``Engine._launch_subprocesses``, in the main process, before any process is spawned. What can be
  told from the sources and the environment is checked here: nothing has been loaded yet. A launch
  that comes by another way, or that loads us only as it goes, is caught further on:
  ``Engine._launch_scheduler_processes``, Ray's, ``serve_grpc`` and the encoder servers.
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

from gemma4_turbo import advice, late_arguments, routes, state_folder, states
from gemma4_turbo.routes import PLUGIN_GROUP, bootstrap_routes
from gemma4_turbo.swap import Swap
from gemma4_turbo.switches import STRICT

if TYPE_CHECKING:
    from gemma4_turbo.patching import Engine

__all__ = ["PLUGIN_GROUP", "StrictModeError", "add", "bootstrap_routes", "guarded"]
logger = logging.getLogger("gemma4_turbo")

LAUNCH = "sglang.srt.entrypoints.engine:Engine._launch_subprocesses"
SCHEDULERS = "sglang.srt.entrypoints.engine:Engine._launch_scheduler_processes"
RAY = "sglang.srt.ray.engine:RayEngine._launch_scheduler_processes"
GRPC = "sglang.srt.entrypoints.grpc_server:serve_grpc"
ENCODER = "sglang.srt.disaggregation.encode_server:launch_server"
ENCODER_GRPC = "sglang.srt.disaggregation.encode_grpc_server:serve_grpc_encoder"
RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner.__init__"
LOADED = "sglang.srt.model_executor.model_runner:ModelRunner.load_model"
ENCODER_LOADED = "sglang.srt.disaggregation.encode_server:MMEncoder.__init__"


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
    problems = _problems(checks, call)
    if problems and _strict(call.engine):
        raise StrictModeError(f"{STRICT}=1: " + "; ".join(dict.fromkeys(problems)))


def _problems(checks: Sequence[Check], call: Call) -> list[str]:
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


def _warned(problems: list[str]) -> list[str]:
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
    from gemma4_turbo.patching import being_imported

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
    from gemma4_turbo.patching import being_imported

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


def _hold(call: Call) -> list[str]:
    if _half:
        install(call.engine)
        _half.difference_update(call.engine.gates)
    needed = [target for target in _half if _GATES[target].instead is not None]
    return [*_unheld.values(), *(f"{target} is still being imported" for target in needed)]


def _mistakes(call: Call) -> list[str]:
    return list(getattr(call.engine, "mistakes", ()))


# -- the launch -----------------------------------------------------------------------------------

_launched: list[Any] = []  # the arguments of the launch that was looked at last


def _server_args(call: Call) -> Any:
    found = call.kwargs.get("server_args")
    return call.args[0] if found is None and call.args else found


def _patches(call: Call) -> list[str]:
    return launch_refusals(call.engine) if call.engine.switches().strict else []


def _ways_into_spawned_processes(call: Call) -> list[str]:
    found = bootstrap_routes()
    problems = list(getattr(found, "problems", ()))
    if not found:
        problems += _warned([routes.NO_WAY])
    starter = call.kwargs.get("run_scheduler_process_func", (*call.args, None, None, None)[2])
    arguments = call.instance, _server_args(call), starter
    return problems + _warned(routes.unreached_schedulers(found, *arguments))


def _ways_into_encoders(call: Call) -> list[str]:
    found = bootstrap_routes()
    return _warned(routes.unreached_encoders(found, _server_args(call)))


def _arguments_made_before_us(call: Call) -> list[str]:
    late = late_arguments.without_a_say(call.engine, _server_args(call))
    if not late:
        return []
    problem = "{} had no say: the ServerArgs were made before gemma4_turbo.apply()"
    logger.warning("gemma4_turbo: %s", problem.format(", ".join(late)))
    return [problem.format(name) for name, would_have_acted in late.items() if would_have_acted]


def _advice(call: Call) -> list[str]:
    for argument in (*call.args, *call.kwargs.values()):
        for sentence in advice.on_launch(argument):  # what is no ServerArgs has nothing to say
            logger.warning("gemma4_turbo: %s", sentence)
    return []


def _remember(call: Call) -> list[str]:
    _launched[:] = [_server_args(call)]
    return []


def _late_launch(call: Call) -> list[str]:
    """The checks of a launch that did not pass ``_launch_subprocesses``, or before we were there."""
    if _launched and _launched[0] is _server_args(call):
        return []
    return _problems(BEFORE_LAUNCH, call)


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


_OURSELVES: list[Check] = [_hold, _mistakes, _patches, _arguments_made_before_us, _advice]
BEFORE_LAUNCH: list[Check] = [_remember, *_OURSELVES, _ways_into_spawned_processes]
BEFORE_ENCODERS: list[Check] = [*_OURSELVES, _ways_into_encoders]


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


BEFORE_LOADING: list[Check] = [_hold, _half_imported_modules]
AFTER_LOADING: list[Check] = [_mistakes, _states]


def _made(call: Call) -> list[str]:
    late_arguments.mark(call.engine, call.instance)
    return []


_before_launch = guarded(before=BEFORE_LAUNCH)
_before_schedulers = guarded(before=[_late_launch])
_before_encoders = guarded(before=BEFORE_ENCODERS)
_after_load = guarded(before=BEFORE_LOADING, after=AFTER_LOADING)

add(LAUNCH, _before_launch, instead=SCHEDULERS)
add(SCHEDULERS, _before_schedulers)
add(RAY, _before_schedulers)
add(GRPC, _before_launch)
add(ENCODER, _before_encoders)
add(ENCODER_GRPC, _before_encoders)
add(LOADED, _after_load, instead=RUNNER)
add(RUNNER, guarded(before=[_hold]))
add(ENCODER_LOADED, _after_load)
add(late_arguments.MADE, guarded(after=[_made]))
