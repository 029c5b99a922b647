"""Replacing an attribute and putting the very same object back."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import wrapt


class NotStockError(Exception):
    """The attribute is not what SGLang's source defines there."""


class Swap:
    """One attribute of a class or module, replaced until `restore`.

    For a module's attribute, every ``from module import name`` in ``sys.modules`` is rebound too.
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
        function = self.function
        for _ in range(decorators):
            function = getattr(function, "__wrapped__", function)
        if type(function) is not types.FunctionType:
            raise NotStockError(
                f"{self.target} is a {type(function).__name__}, not stock's function"
            )
        code = function.__code__
        source = os.path.realpath(self.module.__file__ or "")
        if os.path.realpath(code.co_filename) != source or code.co_firstlineno != first_line:
            where = f"{code.co_filename}:{code.co_firstlineno}"
            raise NotStockError(f"{self.target} was replaced before us by the function at {where}")

    def install(self, replacement: Any) -> None:
        """Set the replacement, under the raw attribute's staticmethod or classmethod.

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
        setattr(self.owner, self.name, replacement)
        if isinstance(self.owner, types.ModuleType):
            _rebind(self.raw, replacement)

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
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
