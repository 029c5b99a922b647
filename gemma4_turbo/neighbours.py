"""Other packages' wrappers on functions that a patch relies on or goes round.

SGLang's HookRegistry and other packages wrap functions at run time. A patch that does not call such a
function, or knows it by its source only, would bypass the wrapper. So it is looked whether the function
still is the one that its module's source defines: when the patch is installed, and again when the
model stands.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemma4_turbo.fingerprints import Definitions
from gemma4_turbo.swap import Swap, first_line, not_stock, wrappers

if TYPE_CHECKING:
    from gemma4_turbo.catalogue import Patch

OURS = os.path.dirname(__file__)  # whose patches/ and forwards/ replace functions
REGISTRY = "sglang.srt.plugins.hook_registry"


def unfit(patch: Patch, definitions: Definitions, ours: Callable[[str], Swap | None]) -> str | None:
    """Which function beside the patch's targets somebody else has wrapped, or None.

    Args:
        patch: whose functions these are. What is not imported yet is not looked at.
        definitions: of the imported modules' sources.
        ours: from ``module:qualname`` to the swap of a patch that is in place there, if any.
    """
    hooked = _hooked_by_registry()
    for source in (*patch.relies_on, *patch.goes_round):
        if ours(source) is not None:
            continue
        module_name, _, qualname = source.partition(":")
        module = sys.modules.get(module_name)
        if module is None:
            continue
        reason = None
        if f"{module_name}.{qualname}" in hooked:
            reason = "SGLang's HookRegistry"
        else:
            reason = _wrapper(module, qualname, definitions)
        if reason is not None:
            return f"{source}, which the patch relies on or goes round, was wrapped by {reason}"
    return None


def _hooked_by_registry() -> set[str]:
    registry = getattr(sys.modules.get(REGISTRY), "HookRegistry", None)
    return set(getattr(registry, "_patched", ()))


def _wrapper(module: Any, qualname: str, definitions: Definitions) -> str | None:
    """Who has replaced what the module's source defines as ``qualname``, or None."""
    *outer, name = qualname.split(".")
    owner: Any = module
    for part in outer:
        owner = vars(owner).get(part)
        if owner is None:  # the module is still being imported
            return None
        if not isinstance(owner, type) or owner.__module__ != module.__name__:
            return f"another {part}: {owner!r}"
    found = vars(owner).get(name)
    if isinstance(found, type):
        if found.__module__ != module.__name__:
            return f"another {name}: {found!r}"
        for method, value in list(vars(found).items()):
            if not _generated(method, value):
                reason = _replaced(module, f"{qualname}.{method}", value, definitions)
                if reason is not None:
                    return f"{reason}, as {qualname}.{method}"
        return None
    if found is None or (not outer and not isinstance(found, types.FunctionType)):
        return None  # inherited; or imported, whose source is another module's
    return _replaced(module, qualname, found, definitions)


def _generated(name: str, value: Any) -> bool:
    """Whether a class's attribute is no function that its source defines, as what a dataclass adds."""
    if name.startswith("__") and name not in ("__init__", "__call__"):
        return True
    function = _plain(value)
    return function is None or function.__code__.co_filename.startswith("<")


def _replaced(module: Any, qualname: str, found: Any, definitions: Definitions) -> str | None:
    function = _plain(found)
    if function is None:
        return None
    code, source = getattr(function, "__code__", None), module.__file__ or ""
    if code is not None and (
        (code.co_qualname == qualname and _same(code.co_filename, source))
        or os.path.dirname(os.path.dirname(code.co_filename)) == OURS
    ):
        return None
    node: Any = definitions.node(f"{module.__name__}:{qualname}")
    if node is None:
        imported = "." not in qualname
        return None if imported else _where(function)
    wrong = not_stock(function, source, first_line(node), wrappers(node))
    return None if wrong is None else _where(function)


def _same(path: str, other: str) -> bool:
    return path == other or os.path.realpath(path) == os.path.realpath(other)


def _plain(found: Any) -> Any:
    """The function behind a method, property or Triton kernel; None if it is none that can be told."""
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, functools.cached_property):
        found = found.func
    if not isinstance(found, types.FunctionType) and isinstance(
        getattr(found, "fn", None), types.FunctionType
    ):
        found = found.fn  # triton.jit
    wrapped = found
    while wrapped is not None and not isinstance(wrapped, types.FunctionType):
        wrapped = getattr(wrapped, "__wrapped__", None)
    return None if wrapped is None else found


def _where(function: Any) -> str:
    code = getattr(function, "__code__", None)
    if code is None:
        return f"a {type(function).__name__}"
    return f"the function at {os.path.basename(code.co_filename)}:{code.co_firstlineno}"
