"""Other packages' wrappers on functions that a patch relies on or goes round.

SGLang's HookRegistry and other packages wrap functions at run time. A patch that does not call such a
function, or knows it by its source only, would bypass the wrapper. So each such function
is compared with what its module's source defines, when the patch is installed and again when the
model is loaded.
"""

from __future__ import annotations

import ast
import functools
import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine.fingerprints import Definitions
from gemma4_turbo.engine.swap import Swap, first_line, not_stock, wrappers

if TYPE_CHECKING:
    from gemma4_turbo.engine.port import Port

PACKAGE = os.path.dirname(os.path.dirname(__file__))
OURS = os.path.join(PACKAGE, "ports", "")  # whose functions replace others
REGISTRIES: dict[str, Callable[[], Iterable[str]]] = {}
"""By owner: the functions, ``module.qualname``, that somebody's registry says it has wrapped."""


def unfit(port: Port, definitions: Definitions, ours: Callable[[str], Swap | None]) -> str | None:
    """Which function beside the patch's targets somebody else has wrapped, or None.

    Args:
        port: whose functions these are. What is not imported yet is not looked at.
        definitions: of the imported modules' sources.
        ours: from ``module:qualname`` to the swap of a patch that is in place there, if any.
    """
    hooked = {name: owner for owner, names in REGISTRIES.items() for name in names()}
    absent = {f"{lack.target}.{name}" for lack in port.lacks for name in lack.names}
    for source in (*port.relies_on, *port.goes_round, *sorted(absent)):
        if ours(source) is not None:
            continue
        module_name, _, qualname = source.partition(":")
        module = sys.modules.get(module_name)
        if module is None:
            continue
        reason = hooked.get(f"{module_name}.{qualname}")
        if reason is None:
            reason = _wrapper(module, qualname, definitions, source in absent)
        if reason is not None:
            return f"{source}, which the patch relies on or goes round, was wrapped by {reason}"
    return None


def _wrapper(module: Any, qualname: str, definitions: Definitions, inherited: bool) -> str | None:
    """Who has replaced what the module's source defines as ``qualname``, or None.

    ``inherited``: it defines no such thing, whatever is there is somebody's.
    """
    *outer, name = qualname.split(".")
    owner: Any = module
    for part in outer:
        owner = vars(owner).get(part)
        if owner is None:  # the module is still being imported
            return None
        if not isinstance(owner, type) or owner.__module__ != module.__name__:
            return f"another {part}: {owner!r}"
        called = _called(owner)
        if called is not None:
            return called
    found = vars(owner).get(name)
    if found is None:  # inherited, as far as the class knows
        return None
    if inherited:
        return _where(_bare(found))
    if not isinstance(found, type):
        return _replaced(module, qualname, found, definitions)
    if found.__module__ != module.__name__:
        return f"another {name}: {found!r}"
    for method, value in list(vars(found).items()):
        if not method.startswith("__") or method in ("__init__", "__call__"):
            reason = _replaced(module, f"{qualname}.{method}", value, definitions)
            if reason is not None:
                return f"{reason}, as {qualname}.{method}"
    return _called(found)


def _called(kind: type) -> str | None:
    """Who has changed how modules of a class are called, or None: SGLang's define no such thing."""
    module = sys.modules.get("torch.nn")
    if module is None or not issubclass(kind, module.Module):
        return None
    for base in kind.__mro__[: kind.__mro__.index(module.Module)]:
        for name in ("__call__", "_call_impl", "_wrapped_call_impl"):
            if name in vars(base):
                return f"{base.__qualname__}.{name}, which is {_where(vars(base)[name])}"
    return None


def _replaced(module: Any, qualname: str, found: Any, definitions: Definitions) -> str | None:
    """Who has put ``found`` in the place of the source's function, or None where it is no function's."""
    function = _bare(found)
    if type(function) is types.FunctionType:
        code, source = function.__code__, module.__file__ or ""
        if code.co_filename.startswith("<"):  # what a dataclass adds
            return None
        own = code.co_qualname == qualname and _same(code.co_filename, source)
        if own or code.co_filename.startswith(OURS):
            return None
    node: Any = definitions.node(f"{module.__name__}:{qualname}")
    if node is None:
        if "." in qualname:  # a class's attribute that its source does not define
            return _where(function) if type(function) is types.FunctionType else None
        return _imported(module, qualname, found, definitions)
    if isinstance(node, ast.ClassDef):
        return f"{found!r}"
    if node.decorator_list and type(function).__module__.partition(".")[0] == "torch":
        return None  # an operator, made by a decorator
    wrong = not_stock(function, module.__file__ or "", first_line(node), wrappers(node))
    return None if wrong is None else _where(function)


def _imported(module: Any, name: str, found: Any, definitions: Definitions) -> str | None:
    """Who has replaced a name that the module imports, or None: the origin has the same object."""
    origins = definitions.origins(module.__name__, name)
    theirs = [
        vars(sys.modules[origin]).get(known)
        for origin, known in origins
        if origin in sys.modules and known in vars(sys.modules[origin])
    ]
    return None if not theirs or any(found is one for one in theirs) else _where(found)


def _same(path: str, other: str) -> bool:
    return path == other or os.path.realpath(path) == os.path.realpath(other)


def _bare(found: Any) -> Any:
    """The function behind a method, property or Triton kernel; anything else as it is."""
    if type(found) in (staticmethod, classmethod):
        found = found.__func__
    elif type(found) is property:
        found = found.fget
    elif type(found) is functools.cached_property:
        found = found.func
    if type(found).__module__.startswith("triton."):
        found = getattr(found, "fn", found)
    return found


def _where(function: Any) -> str:
    code = getattr(function, "__code__", None)
    if code is None:
        return f"a {type(function).__name__}"
    return f"the function at {os.path.basename(code.co_filename)}:{code.co_firstlineno}"
