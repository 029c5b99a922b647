"""What `sitecustomize` needs of wrapt, for the environments of other engines that have none."""

from __future__ import annotations

import importlib.util
import sys

TYPE_CHECKING = False  # typing would be imported for it in every process of an engine
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    Hook = Callable[[ModuleType], object]


class _Finder:
    """Runs functions once their module is there."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Hook]] = {}
        self.looking: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting or name in self.looking:
            return None
        self.looking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            loader: Any = spec.loader
            run, hooks = loader.exec_module, self.waiting

            def exec_module(module: ModuleType) -> None:
                run(module)
                for hook in hooks.pop(name, ()):
                    hook(module)

            loader.exec_module = exec_module
        return spec


_finder = _Finder()


def register_post_import_hook(hook: Hook, name: str) -> None:
    """Call ``hook(module)`` after the module of this name was imported, or now."""
    if name in sys.modules:
        hook(sys.modules[name])
        return
    _finder.waiting.setdefault(name, []).append(hook)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
