"""A row of a line's ``wiring.py``: the code of a patch that is fusions in shared forwards, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_turbo.fusions.fusion import Step, forget
from gemma4_turbo.kernels import pdl as launches

if TYPE_CHECKING:
    from gemma4_turbo.engine.checks import Check
    from gemma4_turbo.engine.run import PatchRun

Replacements = dict[str, Any]
Fusions = tuple[Step, ...]
Enable = Callable[[Fusions, "PatchRun", dict[str, Any]], Replacements]


def nothing() -> None:
    pass


class Wired(NamedTuple):
    """The fusions of one patch, and the forwards that they are part of."""

    fusions: Fusions
    forwards: tuple[Enable, ...]
    before: Callable[[], object] = nothing  # when it goes in
    after: Callable[[], object] = nothing  # when it has come out

    def build(self, run: PatchRun, stock: dict[str, Any]) -> Replacements:
        """The shared forwards, with these fusions on."""
        self.before()
        replaced: Replacements = {}
        for enable in self.forwards:
            replaced |= enable(self.fusions, run, stock)
        return replaced

    def undo(self, run: PatchRun) -> None:
        """Switch them off; their verdicts are asked again. CUDA graphs keep what they captured."""
        for fusion in self.fusions:
            fusion.run = None
        forget(run.patch.name)
        self.after()

    def verify(self, run: PatchRun, device: str) -> list[Check]:
        """Kernel against stock."""
        return [check for fusion in self.fusions for check in fusion.checks(device)]


def launch_early() -> None:
    """For `pdl`, as it goes in."""
    launches.wanted = True


def launch_as_usual() -> None:
    """As it has come out."""
    launches.wanted = False
