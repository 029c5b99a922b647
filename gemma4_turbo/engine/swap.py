"""Replacing an attribute and putting the very same object back."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import wrapt

UNDER_SGLANG = sys.stdlib_module_names | {
    "cuda", "cutlass", "mpmath", "networkx", "numpy", "openai", "pynvml", "scipy", "sympy", "torch", "torchaudio",
    "torchvision", "transformers", "triton",
}  # fmt: skip
"""Packages that import nothing of SGLang, but make up two thirds of a server's names."""
_under: dict[str, int] = {}  # their modules that were met, thousands, and which objects they are
_STDLIB = os.path.join(os.path.dirname(os.__file__), "")
_INSTALLED = tuple(f"{os.sep}{place}{os.sep}" for place in ("site-packages", "dist-packages"))


class NotStockError(Exception):
    """The attribute is not what SGLang's source defines there."""


class Swap:
    """One attribute of a class or module, replaced until `restore`.

    For a module's attribute, every ``from module import name`` in ``sys.modules`` is rebound too; those of
    `UNDER_SGLANG` have none, where they lie as libraries do.
    Several patches may share one: it is put back when the last of them restores it.
    """

    def __init__(self, target: str) -> None:
        """Resolve ``module:qualname``, whose module must be imported; AttributeError otherwise."""
        module_name, _, qualname = target.partition(":")
        self.target = target
        self.module = sys.modules[module_name]
        self.owner, self.name, _ = wrapt.resolve_path(self.module, qualname)
        try:
            self.raw = vars(self.owner)[self.name]
        except KeyError:
            raise AttributeError(f"{target} is inherited, not defined there") from None
        self._installed: Any = None
        self._users = 0

    @property
    def function(self) -> Any:
        """Stock's function, without its staticmethod or classmethod."""
        return self.raw.__func__ if isinstance(self.raw, staticmethod | classmethod) else self.raw

    def require_stock(self, first_line: int, decorators: int = 0) -> None:
        """Raise `NotStockError` unless this is the function that the module's source defines.

        Args:
            first_line: line of the definition in that source, decorators included.
            decorators: how many there are; so many ``functools.wraps`` layers are looked through.
        """
        source = self.module.__file__ or ""
        wrong = not_stock(self.function, source, first_line, decorators)
        if wrong is not None:
            raise NotStockError(f"{self.target} {wrong}")

    def install(self, replacement: Any) -> None:
        """Set the replacement, under the raw attribute's staticmethod or classmethod; all of it, or nothing.

        A patch that shares the attribute must bring the very function that is there already.
        """
        if self._users:
            if replacement is not getattr(self._installed, "__func__", self._installed):
                raise NotStockError(f"{self.target} was replaced before us by another patch")
            self._users += 1
            return
        if isinstance(self.raw, staticmethod | classmethod):
            replacement = type(self.raw)(replacement)
        self._users = 1
        self._installed = replacement
        try:
            setattr(self.owner, self.name, replacement)
            if isinstance(self.owner, types.ModuleType):
                _rebind(self.raw, replacement)
        except BaseException:  # a holder that refuses, which holds stock's still
            self.restore()
            self._users, self._installed = 0, None
            raise

    @property
    def in_place(self) -> bool:
        """Whether the attribute still is our replacement."""
        return self._installed is not None and vars(self.owner).get(self.name) is self._installed

    def restore(self) -> bool:
        """Put stock's object back. False, and nothing done, if it is no longer ours.

        While another patch still stands on the replacement, it stays.
        """
        self._users = max(0, self._users - 1)
        if not self.in_place:
            return False
        if self._users:
            return True
        setattr(self.owner, self.name, self.raw)
        if isinstance(self.owner, types.ModuleType):
            _rebind(self._installed, self.raw)
        self._installed = None
        return True


def _rebind(old: Any, new: Any) -> None:
    for name, module in list(sys.modules.items()):
        if _under.get(name) == id(module):
            continue
        if not isinstance(module, types.ModuleType):
            continue
        names = object.__getattribute__(module, "__dict__")  # `vars` loads a module that is lazy
        if name.partition(".")[0] in UNDER_SGLANG and _is_installed(names.get("__file__")):
            _under[name] = id(module)
            continue
        for value in list(names.values()):
            if value is old:  # seldom: among names that are tens of thousands
                for held in [held for held, it in list(names.items()) if it is old]:
                    setattr(module, held, new)
                break


def _is_installed(file: object) -> bool:
    """Whether a module is where libraries are: a user's own, of the same name, is elsewhere."""
    return isinstance(file, str) and (
        file.startswith(_STDLIB) or any(place in file for place in _INSTALLED)
    )


def not_stock(function: Any, source: str, first_line: int, decorators: int) -> str | None:
    """Why a function is not the one that a source defines, or None.

    Args:
        function: with so many ``functools.wraps`` layers as there are decorators, or fewer.
        source: path of the file.
        first_line: line of the definition in it, decorators included.
        decorators: how many there are.
    """
    for _ in range(decorators):
        function = getattr(function, "__wrapped__", function)
    if type(function) is not types.FunctionType:
        return f"is a {type(function).__name__}, not stock's function"
    code = function.__code__
    same = os.path.realpath(code.co_filename) == os.path.realpath(source)
    if same and code.co_firstlineno == first_line:
        return None
    where = f"{code.co_filename}:{code.co_firstlineno}"
    return f"was replaced before us by the function at {where}"


def wrappers(node: Any) -> int:
    """How many decorators of a definition may wrap it in another function."""
    builtin = ("staticmethod", "classmethod", "property")
    return sum(getattr(decorator, "id", "") not in builtin for decorator in node.decorator_list)


def first_line(node: Any) -> int:
    """Of a definition, its decorators included: where Python says that its code begins."""
    lines: list[int] = [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
    return min(lines)
