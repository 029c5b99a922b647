"""The gates: how a launch comes to SGLang's processes, and when a model stands.

* ``Engine._launch_subprocesses``, in the main process, before any process is spawned. What can be
  told from the sources and the environment is checked here: nothing has been loaded yet. A launch
  that comes by another way, or that loads us only as it goes, is caught further on:
  ``Engine._launch_scheduler_processes``, Ray's, ``serve_grpc`` and the encoder servers.
* ``ModelRunner.load_model``, in every scheduler process, when the model stands. What only shows
  at run time is checked here; the scheduler's error handling then ends the whole server.
"""

from __future__ import annotations

import logging
import sys

from gemma4_turbo.engine import gates, neighbours
from gemma4_turbo.engine.gates import Call, Check, add, guarded, install, register, remove
from gemma4_turbo.ports.any.launch import advice, late_arguments, model_gates, routes

__all__ = ["install", "register", "remove"]
logger = logging.getLogger("gemma4_turbo")

LAUNCH = "sglang.srt.entrypoints.engine:Engine._launch_subprocesses"
SCHEDULERS = "sglang.srt.entrypoints.engine:Engine._launch_scheduler_processes"
RAY = "sglang.srt.ray.engine:RayEngine._launch_scheduler_processes"
GRPC = "sglang.srt.entrypoints.grpc_server:serve_grpc"
ENCODERS = (  # a release has those of one folder, and is left alone about the others
    "sglang.srt.disaggregation.encode_server:launch_server",
    "sglang.srt.disaggregation.encode_grpc_server:serve_grpc_encoder",
    "sglang.srt.disaggregation.encoder.http_server:launch_server",
    "sglang.srt.disaggregation.encoder.grpc_server:serve_grpc_encoder",
)
REPLICAS = "sglang.srt.disaggregation.encoder.runtime:launch_dp_runtime"  # 0.5.12 has none
RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner.__init__"
LOADED = "sglang.srt.model_executor.model_runner:ModelRunner.load_model"
ENCODERS_LOADED = (
    "sglang.srt.disaggregation.encode_server:MMEncoder.__init__",
    "sglang.srt.disaggregation.encoder.server:MMEncoder.__init__",
)


# -- the launch -----------------------------------------------------------------------------------

_launched: list[object] = []  # the arguments of the launch that was looked at last


def _server_args(call: Call) -> object:
    found: object = call.kwargs.get("server_args")
    return call.args[0] if found is None and call.args else found


def _patches(call: Call) -> list[str]:
    return gates.launch_problems(call.engine) if call.engine.switches().strict else []


def _ways_into_spawned_processes(call: Call) -> list[str]:
    found = routes.bootstrap_routes()
    problems = list(getattr(found, "problems", ()))
    if not found:
        problems += gates.warned([routes.NO_WAY])
    starter = call.kwargs.get("run_scheduler_process_func", (*call.args, None, None, None)[2])
    arguments = call.instance, _server_args(call), starter
    return problems + gates.warned(routes.unreached_schedulers(found, *arguments))


def _ways_into_encoders(call: Call) -> list[str]:
    found = routes.bootstrap_routes()
    return gates.warned(routes.unreached_encoders(found, _server_args(call)))


def _ways_into_replicas(call: Call) -> list[str]:
    found = routes.bootstrap_routes()
    return gates.warned(routes.unreached_replicas(found, _server_args(call)))


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
    return gates.problems_of(BEFORE_LAUNCH, call)


_OURSELVES: list[Check] = [gates.hold, gates.mistakes, _patches, _arguments_made_before_us, _advice]
BEFORE_LAUNCH: list[Check] = [_remember, *_OURSELVES, _ways_into_spawned_processes]
BEFORE_ENCODERS: list[Check] = [*_OURSELVES, _ways_into_encoders]


# -- the model stands -----------------------------------------------------------------------------


def _half_imported_modules(call: Call) -> list[str]:
    call.engine.catch_up()
    return []


def _what_decided_elsewhere(call: Call) -> list[str]:
    call.engine.import_what_decides()
    return []


def _what_never_comes(call: Call) -> list[str]:
    call.engine.give_up_waiting()
    return []


BEFORE_LOADING: list[Check] = [gates.hold, _half_imported_modules, _what_decided_elsewhere]
AFTER_LOADING: list[Check] = [_what_never_comes, gates.mistakes, gates.states_when_the_model_stands]


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
for _encoder in ENCODERS:
    add(_encoder, _before_encoders)
add(REPLICAS, guarded(before=[_ways_into_replicas]))
add(LOADED, _after_load, instead=RUNNER)
add(RUNNER, guarded(before=[gates.hold]))
for _encoder in ENCODERS_LOADED:
    add(_encoder, _after_load)
add(late_arguments.MADE, guarded(after=[_made]))
model_gates.add_gates()
AFTER_LOADING[:0] = model_gates.WHEN_LOADED


def _hook_registry() -> set[str]:
    registry = getattr(sys.modules.get("sglang.srt.plugins.hook_registry"), "HookRegistry", None)
    return set(getattr(registry, "_patched", ()))


neighbours.REGISTRIES["SGLang's HookRegistry"] = _hook_registry
