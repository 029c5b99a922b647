"""Two places in SGLang where the patches are summed up, and where strict mode stops a server.

SGLang swallows what a plugin or a model's import raises. It does not swallow what these raise:

* ``Engine._launch_subprocesses``, in the main process, before any process is spawned. What can be
  told from the sources and the environment is checked here: nothing has been loaded yet.
* ``ModelRunner.load_model``, in every scheduler process, when the model stands. What only shows
  at run time is checked here; the scheduler's error handling then ends the whole server.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

from gemma4_turbo import advice, state_folder, states
from gemma4_turbo.swap import Swap

if TYPE_CHECKING:
    from gemma4_turbo.patching import Engine

logger = logging.getLogger("gemma4_turbo")

LAUNCH = "sglang.srt.entrypoints.engine:Engine._launch_subprocesses"
LOADED = "sglang.srt.model_executor.model_runner:ModelRunner.load_model"
PLUGIN_GROUP = "sglang.srt.plugins"


class StrictModeError(RuntimeError):
    """``GEMMA4_TURBO_STRICT=1`` and a patch that is switched on cannot do its work."""


def register(engine: Engine) -> None:
    """Install the gates as soon as SGLang imports what they stand in."""
    for target in (LAUNCH, LOADED):
        module = target.partition(":")[0]
        wrapt.register_post_import_hook(_hook(engine, target), module)


def _hook(engine: Engine, target: str) -> Callable[[Any], None]:
    return lambda module: _install_one(engine, target)


def install(engine: Engine) -> None:
    """Install both gates where their modules are there already."""
    for target in (LAUNCH, LOADED):
        if target.partition(":")[0] in sys.modules:
            _install_one(engine, target)


def remove(engine: Engine) -> None:
    """Put both functions back."""
    for swap in engine.gates.values():
        swap.restore()
    engine.gates.clear()


def _install_one(engine: Engine, target: str) -> None:
    switches = engine.switches()
    if target in engine.gates or switches.stock:
        return
    try:
        swap = Swap(target)
        swap.install(wrapt.FunctionWrapper(swap.function, _WRAPPERS[target](engine)))
        engine.gates[target] = swap
    except Exception as error:
        if switches.strict:
            # Without its gate strict mode could not keep its word. SystemExit is the one
            # exception that neither the import system's callers nor SGLang's plugins swallow.
            raise SystemExit(
                f"gemma4_turbo: strict mode has no hold on {target}: {error}"
            ) from None
        logger.warning("gemma4_turbo: no summary will be logged: %s: %s", target, error)


def _before_launch(engine: Engine) -> Any:
    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        strict = engine.switches().strict
        refusals = launch_refusals(engine) if strict else []
        if not bootstrap_routes():
            refusals.append(
                "spawned processes would stay stock: gemma4_turbo's entry point is not installed "
                "or not allowed by SGLANG_PLUGINS, and no sitecustomize on PYTHONPATH calls it"
            )
            logger.warning("gemma4_turbo: %s", refusals[-1])
        for argument in (*args, *kwargs.values()):
            for sentence in advice.on_launch(argument):  # what is no ServerArgs has nothing to say
                logger.warning("gemma4_turbo: %s", sentence)
        if strict and refusals:
            raise StrictModeError("GEMMA4_TURBO_STRICT=1: " + "; ".join(refusals))
        return wrapped(*args, **kwargs)

    return wrapper


def _after_load(engine: Engine) -> Any:
    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        engine.catch_up()
        result = wrapped(*args, **kwargs)
        from gemma4_turbo.report import summary_line

        rows = engine.status()
        logger.info("%s", summary_line(rows))
        bad = [row for row in rows if row.state in states.REFUSED_WHEN_STRICT]
        switches = engine.switches()
        if switches.strict:
            problems = [*switches.problems, *filter(None, [state_folder.problem()])]
            told = [f"{row.name} is {row.state}: {row.reason}" for row in bad]
            if problems or told:
                raise StrictModeError("GEMMA4_TURBO_STRICT=1: " + "; ".join([*problems, *told]))
        return result

    return wrapper


_WRAPPERS = {LAUNCH: _before_launch, LOADED: _after_load}


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


def bootstrap_routes() -> list[str]:
    """By which ways a process that SGLang spawns gets the patches: entry point, sitecustomize."""
    from importlib.metadata import entry_points

    routes = []
    allowed = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    if any(
        entry.value.startswith("gemma4_turbo.") and (not allowed or entry.name in allowed)
        for entry in entry_points(group=PLUGIN_GROUP)
    ):
        routes.append("entry point")
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        candidate = Path(folder or ".", "sitecustomize.py")
        if candidate.is_file():
            if "gemma4_turbo" in candidate.read_text(errors="replace"):
                routes.append("sitecustomize")
            break  # Python runs the first one only
    return routes
