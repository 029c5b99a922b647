"""Targets of a patch that SGLang imports long after those that the patch goes in with.

What reads the server's arguments is imported before they are read; what they decide about, for most of
SGLang's ways to start, much later. A patch of both cannot wait for the second: it goes in with the
first, and each late target is replaced at the first of the occasions that finds its module whole. Of
the occasions, those that are half imported as the patch comes are missed: never all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.engine.swap import Swap

Function = Callable[..., Any]


class LateTargets:
    """The late targets of one patch."""

    def __init__(
        self,
        made: dict[str, Callable[[PatchRun, Function], Function]],
        occasions: tuple[str, ...],
    ) -> None:
        """``made``: what makes each target's replacement; ``occasions``: modules that are imported."""
        self._made = made
        self._occasions = occasions
        self._run: PatchRun | None = None
        self._swaps: dict[str, Swap] = {}  # those that are in

    def put_in(self, run: PatchRun) -> None:
        """Now or later. `NotStockError` if somebody else's function is there already."""
        import wrapt

        self._replace(run)
        # At once for those that are there, also by half: nothing to do then.
        for name in self._occasions:
            wrapt.register_post_import_hook(self._on_import, name)
        self._run = run

    def take_out(self) -> None:
        """Stock's functions again."""
        self._run = None
        for swap in self._swaps.values():
            swap.restore()
        self._swaps.clear()

    def in_place(self, target: str) -> bool:
        """Whether the target is ours now."""
        swap = self._swaps.get(target)
        return swap is not None and swap.in_place

    def _replace(self, run: PatchRun, just_imported: str = "") -> None:
        """Put in what is missing and can be.

        Python calls a module half imported until the hooks for it have run as well.
        """
        from gemma4_turbo.engine import fingerprints
        from gemma4_turbo.engine.imports import being_imported
        from gemma4_turbo.engine.swap import Swap

        for target, make in self._made.items():
            module = target.partition(":")[0]
            half = module != just_imported and being_imported(module)
            if module not in sys.modules or half or target in self._swaps:
                continue
            swap = Swap(target)
            node: Any = fingerprints.Definitions(fingerprints.installed_source).node(target)
            swap.require_stock(node.lineno)
            swap.install(make(run, swap.function))
            self._swaps[target] = swap

    def _on_import(self, module: ModuleType) -> None:
        """Called by wrapt for each of the occasions, and again for every `put_in`."""
        if self._run is None:
            return
        try:
            self._replace(self._run, module.__name__)
        except Exception as error:  # never into SGLang's import
            self._run.set(states.CONFLICT, str(error))
