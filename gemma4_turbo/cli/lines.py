"""What the installed SGLang has of what benchmarks and GPU tests call, of whichever release line it is.

The line is found as the engine finds a port, by the sources that are there, never by a number. Nothing of
SGLang is imported before something is asked for that needs it.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.imports import installed_release
from gemma4_turbo.instance import LINES, PORTS

if TYPE_CHECKING:
    from types import ModuleType

    from gemma4_turbo.ports.any.sglang_types import Rules
    from gemma4_turbo.ports.any.stock import Calls

MODEL = "sglang.srt.models.gemma4_causal"
ALIGN = "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"


@cache
def _definitions() -> fingerprints.Definitions:
    return fingerprints.Definitions(fingerprints.installed_source)


# -- the line and its patches ---------------------------------------------------------------------


@cache
def verdict(patch: str) -> fingerprints.Verdict:
    """What the engine would say of a patch here."""
    return fingerprints.judge(PORTS[patch], installed_release(), _definitions())


def patch_unfit(patch: str) -> str | None:
    """Why this SGLang takes no port of the patch, or None."""
    found = verdict(patch)
    return None if found.state == states.ACTIVE else f"{patch}: {found.reason}"


def patch(name: str) -> ModuleType:
    """The module with the patch's port that fits; LookupError where none does."""
    port = verdict(name).port
    if port is None or patch_unfit(name) is not None:
        raise LookupError(patch_unfit(name))
    return import_module(port.module.partition(":")[0])


@cache
def package() -> str:
    """Of the release line: the newest that has a port which fits; LookupError where none has."""
    for line in LINES:
        own = line.HERE.rpartition(".")[2] != "any"
        if own and any(verdict(name).port is port for name, port in line.PORTS.items()):
            return str(line.HERE)
    raise LookupError("no release line has a port that fits the installed SGLang")


def part(name: str) -> ModuleType:
    """A module of the line's: ``stock``, ``decode_step.attention``."""
    return import_module(f"{package()}.{name}")


def stock() -> Calls:
    """The line's calls of stock's, which fusions follow from now on; LookupError as `package`."""
    calls: Calls = part("stock").STOCK
    return calls


def rules() -> Rules:
    """What the line makes of its modules. Imports SGLang's."""
    part("classes").load()
    from gemma4_turbo.ports.any import sglang_types

    return sglang_types.rules()


def uses(target: str, name: str) -> bool:
    """Whether the source of a function ``module:qualname`` mentions a name."""
    return _definitions().uses(target, name)


# -- what stock computes otherwise in a line ------------------------------------------------------


def router_scale_is_folded() -> bool:
    """Whether the router's scale is in its norm's weight already, when a layer runs."""
    return uses(f"{MODEL}:Gemma4Router.forward", "_scale_fused")


def skipped_slot() -> int | None:
    """The slot of the KV pool that stock's store leaves as it is, or None."""
    slot: int | None = getattr(part("decode_step.attention"), "PADDING", None)
    return slot


def align_multiple() -> int:
    """What stock's function rounds the length of its sorted slots up to."""
    return int(getattr(patch("moe_align"), "MULTIPLE", 1))


def slots_of_stocks() -> int:
    """Up to so many slots stock itself aligns in one launch, if it has enough experts; 0: never."""
    return _number("sglang.kernels.ops.moe.moe_align_small_numel", "SMALL_NUMEL_LIMIT", 0)


def experts_of_stocks() -> int:
    """From so many experts on."""
    return _number(ALIGN, "_CUDA_SMALL_BATCH_MAX_BUCKETS", 0)


def _number(module: str, name: str, otherwise: int) -> int:
    """A number that a module calls by a name, read from its source."""
    source = fingerprints.installed_source(module)
    for node in ast.parse(source or "").body:
        named = isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        )
        if named and isinstance(node.value, ast.Constant):  # type: ignore[attr-defined]
            return int(node.value.value)  # type: ignore[attr-defined, arg-type]
    return otherwise
