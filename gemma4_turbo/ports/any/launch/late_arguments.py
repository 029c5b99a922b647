"""``ServerArgs`` that were made before the patches of ``ServerArgs`` were in.

Those patches decide while an instance is made. A program that builds one and calls ``apply()`` or
SGLang's ``load_plugins`` afterwards leaves them without a say, and nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, cast

from gemma4_turbo.engine import states

if TYPE_CHECKING:
    from gemma4_turbo.engine.installer import Engine
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.protocols import ServerArgs

_MODULE = "sglang.srt.server_args"
_CLASS = f"{_MODULE}:ServerArgs."
MADE = f"{_CLASS}__post_init__"
_MARK = "_gemma4_turbo_had_a_say"  # in the instance, so that it is pickled with it


def _installed(engine: Engine) -> list[PatchRun]:
    return [
        run
        for run in engine.runs.values()
        if run.state == states.ACTIVE and any(t.startswith(_CLASS) for t in run.targets)
    ]


def mark(engine: Engine, server_args: object) -> None:
    """Note in a new instance which patches had a say in it."""
    vars(server_args)[_MARK] = tuple(run.patch.name for run in _installed(engine))


def without_a_say(engine: Engine, server_args: object) -> dict[str, bool]:
    """Patches that are on and came too late for this instance, and whether they would have acted."""
    if not any(base.__module__ == _MODULE for base in type(server_args).__mro__):
        return {}  # a stand-in
    had = getattr(server_args, _MARK, ())
    return {
        run.patch.name: _would_have_acted(run, server_args)
        for run in _installed(engine)
        if run.patch.name not in had
    }


def _would_have_acted(run: PatchRun, server_args: object) -> bool:
    try:
        return _ACTS[run.patch.name](cast("ModuleType", run.code), cast("ServerArgs", server_args))
    except Exception:  # where they cannot tell, the patches themselves leave stock's value
        return False


def _swa_ratio(code: ModuleType, server_args: ServerArgs) -> bool:
    default = float(getattr(type(server_args), code.FIELD))
    return getattr(server_args, code.FIELD) == default and code.unfit(server_args) is None


def _mm_prefill_graph(code: ModuleType, server_args: ServerArgs) -> bool:
    return not server_args.enforce_piecewise_cuda_graph and code.unfit(server_args) is None


def _mtp_moe_runner(code: ModuleType, server_args: ServerArgs) -> bool:
    backend = server_args.moe_runner_backend
    return backend.startswith("flashinfer") and code.concerns(server_args)


_ACTS: dict[str, Callable[[ModuleType, ServerArgs], bool]] = {
    "swa_ratio": _swa_ratio,
    "mm_prefill_graph": _mm_prefill_graph,
    "mtp_moe_runner": _mtp_moe_runner,
}
