"""Whether somebody looks at, or changes, what a module is given or returns.

A fusion goes round modules: it does not call them, or calls them on other tensors. It declines where
one of them has a hook: ``register_forward_hook`` and ``register_forward_pre_hook``, SGLang's
``--forward-hooks`` and debug dumps (which are such hooks), hooks for all modules, a ``forward`` that was
set on the module itself, or what ``module.compile()`` has put in its place. Asked at every call, as
hooks come and go: no result is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

FOR_ALL: tuple[Any, Any] = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)

HOOKED = "{} has forward hooks"
COMPILED = "_compiled_call_impl"  # on a module: what ``module.compile()`` has it run


def hooked(*modules: Any) -> bool:
    """Whether a hook runs when one of the modules is called; what is no module has none."""
    if FOR_ALL[0] or FOR_ALL[1]:
        return True
    for module in modules:
        state = module.__dict__
        if (
            state.get("_forward_hooks")
            or state.get("_forward_pre_hooks")
            or "forward" in state
            or state.get(COMPILED) is not None
        ):
            return True
    return False


class Watched:
    """Hooks of modules and all that is inside them, whatever is put in there later."""

    def __init__(self, modules: Iterable[Any]) -> None:
        self._roots = tuple(modules)
        self._changed = False
        self._look()

    def _look(self) -> None:
        every = dict.fromkeys(inner for root in self._roots for inner in root.modules())
        self._states = [module.__dict__ for module in every]
        self._inside = [
            (module._modules, name, child)
            for module in every
            for name, child in module._modules.items()
        ]

    def changed(self) -> bool:
        """Whether a module inside was ever replaced since this was made."""
        for store, name, child in self._inside:
            if store.get(name) is not child:
                self._changed = True
                self._look()
                break
        return self._changed

    def hooked(self) -> bool:
        """Whether a hook runs when one of them is called."""
        if FOR_ALL[0] or FOR_ALL[1]:
            return True
        self.changed()
        for state in self._states:
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or "forward" in state
                or state.get(COMPILED) is not None
            ):
                return True
        return False
