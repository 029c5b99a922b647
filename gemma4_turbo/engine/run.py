"""One patch as it runs in this process: its state, its counters, and the other patches beside it."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

from gemma4_turbo.catalogue import Patch
from gemma4_turbo.engine import states
from gemma4_turbo.engine.port import Port

if TYPE_CHECKING:
    from gemma4_turbo.engine.checks import Check
    from gemma4_turbo.engine.counters import Counters, Ledger
    from gemma4_turbo.engine.fingerprints import Definitions

logger = logging.getLogger("gemma4_turbo")
WAITING = "SGLang has not imported the target yet"
DECLINED = "some calls take stock's path"


class PatchModule(Protocol):
    """What the code that a `Port` names offers: a module, or an object in one.

    Beside it there may be ``undo(run)``, which puts back what the replacements changed on live
    objects, and ``verify(run, device)``, which compares with stock on ``cuda`` or, through Triton's
    interpreter, on ``cpu``, and returns a list of `Check`.
    """

    def build(self, run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
        """From ``{target: stock's function}`` to ``{target: replacement}``."""


class Host(Protocol):
    """What a patch may ask the engine that installs it."""

    def decision(self, patch: Patch) -> tuple[bool, str]:
        """Whether the switches want a patch, and why."""

    def outlook(self, patch: Patch) -> tuple[str, str]:
        """State and reason, foretold from the sources while the patch waits."""

    def is_strict(self) -> bool:
        """Whether a patch that cannot do its work is to end the server."""

    def publish(self) -> None:
        """Tell the other processes the states."""


class PatchRun:
    """One patch of the catalogue as it runs in this process."""

    def __init__(self, patch: Patch, ports: tuple[Port, ...], index: int, host: Host) -> None:
        self.patch = patch
        self.ports = ports
        self.port: Port | None = None  # that fits the SGLang at hand, once it was looked at
        self.state = states.WAITING
        self.reason = WAITING
        self.swaps: list[Any] = []
        self.code: PatchModule | None = None
        self._index = index
        self._host = host
        self._counters: Counters | None = None
        self._decline_reason = ""
        self._is_provisional = False  # that reason

    def set(self, state: str, reason: str, log: bool = True) -> None:
        """Change the state, log it once, and tell the other processes."""
        if (state, reason) == (self.state, self.reason):
            return
        self.state, self.reason = state, reason
        if log:
            level = logging.WARNING if state in states.REFUSED_WHEN_STRICT else logging.INFO
            logger.log(level, "gemma4_turbo: %s is %s: %s", self.patch.name, state, reason)
        self._host.publish()

    @property
    def counters(self) -> Counters:
        """The patch's counters, mapped on first use."""
        if self._counters is None:
            self._counters = ledger().counters(self._index)
        return self._counters

    def engaged(self, captured: bool) -> None:
        """Count one call that ran the patch's code; ``captured``: into a CUDA graph."""
        (self._counters or self.counters).add_engaged(captured)

    def engaged_count(self) -> int:
        """Calls counted in this process so far."""
        return 0 if self._counters is None else self._counters.engaged

    def declined(self, reason: str, provisional: bool = False) -> None:
        """Count one call that took stock's path, and keep why the first one did.

        ``provisional``: a call that says nothing of others, as one into compiled code, or an eager one of
        what is done in CUDA graphs alone: the others' first reason is kept then.
        """
        self.counters.add_declined()
        if not self._decline_reason or (self._is_provisional and not provisional):
            self._decline_reason, self._is_provisional = reason, provisional
            logger.info("gemma4_turbo: %s took stock's path: %s", self.patch.name, reason)
            self._host.publish()

    def full_reason(self) -> str:
        """The reason, with a note on declined calls."""
        if not self._decline_reason:
            return self.reason
        return f"{self.reason}; {DECLINED}: {self._decline_reason}"

    def definitions(self) -> Definitions:
        """What the imported modules' sources define, for a patch that looks for a defect."""
        from gemma4_turbo.engine import fingerprints

        return fingerprints.Definitions(fingerprints.imported_source)

    @property
    def targets(self) -> tuple[str, ...]:
        """What the port replaces; of the newest line's port as long as none is chosen."""
        port = self.port or next(iter(self.ports), None)
        return () if port is None else port.targets

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that some port waits for."""
        return tuple(sorted({module for port in self.ports for module in port.modules}))

    def will_run(self) -> bool:
        """Whether it is switched on and fits this SGLang, imported or not."""
        wanted, _ = self._host.decision(self.patch)
        return wanted and self._host.outlook(self.patch)[0] == states.ACTIVE

    def is_strict(self) -> bool:
        """Whether a patch that cannot do its work is to end the server."""
        return self._host.is_strict()

    def verify(self, device: str) -> list[Check]:
        """Comparisons with stock, none where the code has none."""
        compare = getattr(self.code, "verify", None)
        return [] if compare is None else list(compare(self, device))

    def stand_aside(self, state: str, reason: str) -> None:
        """Put stock back at run time, so that what is not needed costs nothing from here on."""
        for swap in reversed(self.swaps):
            swap.restore()
        self.swaps = []
        self.set(state, reason)

    def forget(self) -> None:
        """Back to waiting, as before `install`."""
        self.swaps = []
        self.state = states.WAITING
        self.reason = WAITING


@functools.cache
def ledger() -> Ledger:
    """This process's counters and states for other processes."""
    from gemma4_turbo.engine.counters import Ledger

    return Ledger()


RUNS: dict[str, PatchRun] = {}
"""The runs of this process's engine, by name, for operators that outlive an installation."""


def peer(name: str) -> PatchRun:
    """Another patch's run; KeyError if there is none."""
    return RUNS[name]


def code_of(port: Port) -> PatchModule:
    """Import a port's code. AttributeError, naming what is missing, if it has no ``build``."""
    name, _, attribute = port.module.partition(":")
    code: Any = importlib.import_module(name)
    if attribute:
        code = getattr(code, attribute)
    if not callable(getattr(code, "build", None)):
        raise AttributeError(f"{port.module} has no build()")
    return code  # type: ignore[no-any-return]
