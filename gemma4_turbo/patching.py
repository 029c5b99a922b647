"""Installing, reporting and reverting the patches of the catalogue in this process.

A patch goes in when SGLang imports the last module that it touches. Nothing here raises into SGLang:
an exception in an import hook would make SGLang drop the model class and go on with another one.
What may stop a server, and when, is in `gemma4_turbo.gates`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from gemma4_turbo import state_folder, states
from gemma4_turbo.catalogue import CATALOGUE, Patch
from gemma4_turbo.models import Models
from gemma4_turbo.states import PatchStatus
from gemma4_turbo.switches import SELECTION, Selection, Switches, read

if TYPE_CHECKING:
    from gemma4_turbo.checks import Check
    from gemma4_turbo.counters import Counters, Ledger
    from gemma4_turbo.fingerprints import Definitions
    from gemma4_turbo.swap import Swap

logger = logging.getLogger("gemma4_turbo")
ROOT = "sglang"


class PatchModule(Protocol):
    """What ``patches/<name>.py`` offers."""

    def build(self, run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
        """From ``{target: stock's function}`` to ``{target: replacement}``."""

    def undo(self, run: PatchRun) -> None:
        """Put back what the replacements changed on live objects."""

    def verify(self, run: PatchRun, device: str) -> list[Check]:
        """Compare with stock on ``cuda`` or, through Triton's interpreter, on ``cpu``."""


class PatchRun:
    """One patch of the catalogue as it runs in this process."""

    def __init__(self, patch: Patch, index: int, publish: Callable[[], None]) -> None:
        self.patch = patch
        self.state = states.WAITING
        self.reason = "SGLang has not imported the target yet"
        self.swaps: list[Any] = []
        self.code: PatchModule | None = None
        self._index = index
        self._publish = publish
        self._counters: Counters | None = None
        self._decline_reason = ""

    def set(self, state: str, reason: str, log: bool = True) -> None:
        """Change the state, log it once, and tell the other processes."""
        if (state, reason) == (self.state, self.reason):
            return
        self.state, self.reason = state, reason
        if log:
            level = logging.WARNING if state in states.REFUSED_WHEN_STRICT else logging.INFO
            logger.log(level, "gemma4_turbo: %s is %s: %s", self.patch.name, state, reason)
        self._publish()

    @property
    def counters(self) -> Counters:
        """The patch's counters, mapped on first use."""
        if self._counters is None:
            self._counters = ledger().counters(self._index)
        return self._counters

    def engaged(self, captured: bool) -> None:
        """Count one call that ran the patch's code; ``captured``: into a CUDA graph."""
        self.counters.add_engaged(captured)

    def engaged_count(self) -> int:
        """Calls counted in this process so far."""
        return 0 if self._counters is None else self._counters.engaged

    def declined(self, reason: str) -> None:
        """Count one call that took stock's path, and keep why the first one did."""
        self.counters.add_declined()
        if not self._decline_reason:
            self._decline_reason = reason
            logger.info("gemma4_turbo: %s took stock's path: %s", self.patch.name, reason)
            self._publish()

    def full_reason(self) -> str:
        """The reason, with a note on declined calls."""
        if not self._decline_reason:
            return self.reason
        return f"{self.reason}; some calls take stock's path: {self._decline_reason}"

    def definitions(self) -> Definitions:
        """What the imported modules' sources define, for a patch that looks for a defect."""
        from gemma4_turbo import fingerprints

        return fingerprints.Definitions(_imported_source)

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
        self.reason = "SGLang has not imported the target yet"


@functools.cache
def ledger() -> Ledger:
    """This process's counters and states for other processes."""
    from gemma4_turbo.counters import Ledger

    return Ledger()


class _FirstImport:
    """Calls back once, when SGLang's root package is first looked up. Finds nothing itself.

    So that `apply` need not import wrapt, which takes longer than all the rest of it. It stays where
    it is: taking it out of ``sys.meta_path`` during a look-up would make Python skip the next finder.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == ROOT and self._callback is not None:
            callback, self._callback = self._callback, None
            callback()


class Engine:
    """All patches of a catalogue in this process."""

    def __init__(self, catalogue: Iterable[Patch] = CATALOGUE) -> None:
        self.catalogue = tuple(catalogue)
        self.runs = {
            patch.name: PatchRun(patch, index, self._publish)
            for index, patch in enumerate(self.catalogue)
        }
        self._lock = threading.RLock()
        self._selection: Selection | None = None
        self._armed = False
        self._finder: Any = None
        self.gates: dict[str, Swap] = {}  # of gemma4_turbo.gates
        self.models = Models()
        self.mistakes: list[str] = []  # exceptions of ours that were swallowed; for strict mode
        self._ready: set[str] = set()  # modules that have been run to their end
        self._half: set[str] = set()  # modules that were being run when we came

    # -- the public calls -------------------------------------------------------------------

    def apply(
        self, only: Iterable[str] | None = None, skip: Iterable[str] | None = None
    ) -> list[PatchStatus]:
        """See `gemma4_turbo.apply`."""
        chosen = None if only is None else self._names("only", only)
        left_out = () if skip is None else self._names("skip", skip)
        with self._lock:
            kept = self._selection
            if kept is None or kept.reverted or chosen is not None or left_out:
                self._select(Selection(chosen, left_out))
        return self.status(below=self._armed)

    def bootstrap(self) -> None:
        """See `gemma4_turbo.bootstrap`."""
        try:
            with self._lock:
                if self._selection is None:
                    inherited = os.environ.get(SELECTION, "")
                    self._select(Selection.decode(inherited) if inherited else Selection())
        except Exception as error:
            self._swallow("bootstrap failed; this process stays stock", error)
            self._guarded(self._register_gates)()

    def revert(self) -> None:
        """See `gemma4_turbo.revert`."""
        with self._lock:
            self._selection = Selection(reverted=True)
            os.environ[SELECTION] = self._selection.encode()
            for run in self.runs.values():
                self._uninstall(run)
            self._gates("remove")
            self.mistakes.clear()

    def status(self, below: bool = True) -> list[PatchStatus]:
        """See `gemma4_turbo.status`; ``below=False`` leaves the descendants out."""
        with self._lock:
            self.catch_up()
            reports, unseen = [], None
            if below:
                from gemma4_turbo.counters import descendants

                unseen = ledger().look() or state_folder.problem(trial=False)
                reports = descendants()
            told: dict[str, list[dict[str, Any]]] = {name: [] for name in self.runs}
            for report in reports:
                for patch in report.patches:
                    told.get(patch["name"], []).append(patch)
            rows = [self._row(run, told[name]) for name, run in self.runs.items()]
            if unseen is None:
                return rows
            note = f"{states.ALONE}: {unseen}"
            return [row._replace(reason=f"{row.reason}; {note}") for row in rows]

    def switches(self) -> Switches:
        """The switches as they stand now."""
        return read(selection=self._selection, catalogue=self.catalogue)

    # -- installing and reverting, side by side ------------------------------------------------

    def _install(self, run: PatchRun) -> None:
        """Put one patch in if its modules are there and everything about it fits."""
        patch = run.patch
        if run.state not in (states.WAITING, states.OFF):
            return
        on, reason = self.decision(patch)
        if not on:
            run.set(states.OFF, reason)
            return
        foreign = self.models.unfit(patch)
        if foreign is not None:
            run.set(states.UNSUPPORTED, foreign)
            return
        mistake = self._mistake(patch)
        if mistake is not None:
            run.set(states.FAILED, mistake)
            return
        if not all(module in self._ready for module in patch.modules):
            return
        from gemma4_turbo import fingerprints, neighbours
        from gemma4_turbo.swap import NotStockError, Swap, first_line, wrappers

        done: list[Swap] = []
        try:
            verdict = fingerprints.judge(patch, installed_release(), _imported_source)
            if verdict.state != states.ACTIVE:
                run.set(verdict.state, verdict.reason)
                return
            definitions = fingerprints.Definitions(_imported_source)
            swaps = [self._shared(target) or Swap(target) for target in patch.targets]
            for swap in swaps:
                if not swap.in_place:
                    node: Any = definitions.node(swap.target)
                    swap.require_stock(first_line(node), wrappers(node))
            bypassed = neighbours.unfit(patch, definitions, self._ours)
            if bypassed is not None:
                run.set(states.CONFLICT, bypassed)
                return
            run.code = _patch_module(patch)
            stock = {swap.target: swap.function for swap in swaps}
            replacements = run.code.build(run, stock)
            _require_all(patch, replacements)
            for swap in swaps:
                swap.install(replacements[swap.target])
                done.append(swap)
            run.swaps = done
            run.set(states.ACTIVE, "installed")
        except NotStockError as error:
            self._abandon(run, done, states.CONFLICT, str(error))
        except states.NotNeededError as reason:
            self._abandon(run, done, states.UPSTREAMED, str(reason))
        except Exception as error:
            self._abandon(run, done, states.FAILED, f"{type(error).__name__}: {error}")
            logger.debug("gemma4_turbo: %s", patch.name, exc_info=True)

    def model_made(self, model: Any) -> None:
        """SGLang has built ``model``, nothing of which has run: patches come and go with it."""
        aside: dict[str, list[str]] = {}
        with self._lock:
            self.models.made(model)
            for run in self.runs.values():
                foreign = self.models.unfit(run.patch)
                if foreign is not None:
                    if run.state != states.OFF:
                        self._uninstall(run)
                        if run.state != states.WAITING:
                            continue  # ours is there still: that is what the row says
                        run._decline_reason = ""
                        run.set(states.UNSUPPORTED, foreign, log=False)
                        aside.setdefault(foreign, []).append(run.patch.name)
                elif run.state == states.UNSUPPORTED and self.models.is_reason(run.reason):
                    run.forget()
                    self._install(run)
        for foreign, names in aside.items():  # one line, not forty
            logger.info("gemma4_turbo: unsupported: %s: %s", foreign, ", ".join(names))

    def look_at_neighbours(self) -> None:
        """Take out what would now bypass another package's wrapper."""
        from gemma4_turbo import fingerprints, neighbours

        definitions = fingerprints.Definitions(_imported_source)
        with self._lock:
            for run in self.runs.values():
                if run.state != states.ACTIVE:
                    continue
                bypassed = neighbours.unfit(run.patch, definitions, self._ours)
                if bypassed is not None:
                    self._uninstall(run)
                    run.set(states.CONFLICT, bypassed)

    def _ours(self, target: str) -> Swap | None:
        """What stands in stock's place at ``target`` by our doing, a patch or a gate."""
        gate = self.gates.get(target)
        return gate if gate is not None and gate.in_place else self._shared(target)

    def _shared(self, target: str) -> Swap | None:
        """The replacement of ``target`` that another patch has put in, if any."""
        for run in self.runs.values():
            for swap in run.swaps:
                if swap.target == target and swap.in_place:
                    found: Swap = swap
                    return found
        return None

    @staticmethod
    def _put_back(run: PatchRun, swaps: list[Any]) -> tuple[list[str], list[str]]:
        """Everything that can be, and the live objects: ``(replaced after us, what went wrong)``."""
        foreign, problems = [], []
        for swap in reversed(swaps):
            try:
                if not swap.restore():
                    foreign.append(swap.target)
            except Exception as error:
                problems.append(f"{swap.target} not put back: {type(error).__name__}: {error}")
        if run.code is not None:
            try:
                run.code.undo(run)
            except Exception as error:
                problems.append(f"undo(): {type(error).__name__}: {error}")
                logger.debug("gemma4_turbo: %s", run.patch.name, exc_info=True)
        return foreign, problems

    def _abandon(self, run: PatchRun, done: list[Swap], state: str, reason: str) -> None:
        """Undo an installation that failed half-way, and say why it did."""
        _, problems = self._put_back(run, done)
        run.code = None
        run.set(states.FAILED if problems else state, "; ".join([reason, *problems]))

    def _uninstall(self, run: PatchRun) -> None:
        """Put back what is still ours."""
        foreign, problems = self._put_back(run, run.swaps) if run.swaps else ([], [])
        if problems:
            run.swaps = []
            run.set(states.FAILED, f"not reverted: {'; '.join(problems)}")
            return
        if foreign:
            run.swaps = []
            run.set(states.CONFLICT, f"not reverted, replaced after us: {', '.join(foreign)}")
        else:
            was = run.state
            run.forget()
            if was != states.WAITING:
                self._publish()

    def decision(self, patch: Patch) -> tuple[bool, str]:
        """Whether the switches want a patch and everything that it stands on, and why."""
        decisions = self.switches().decisions
        for needed in patch.requires:
            if needed not in decisions:
                continue  # a mistake, which is told where the patch would be installed
            if not decisions[needed].on and decisions[patch.name].on:
                return False, f"stands on {needed}, which is off: {decisions[needed].reason}"
        return decisions[patch.name].on, decisions[patch.name].reason

    def outlook(self, patch: Patch) -> tuple[str, str]:
        """State and reason of a patch that is on; while it waits, those that its sources foretell."""
        run = self.runs[patch.name]
        if run.state != states.WAITING:
            return run.state, run.reason
        from gemma4_turbo import fingerprints

        try:
            mistake = self._mistake(patch)
            if mistake is not None:
                return states.FAILED, mistake
            return fingerprints.judge(patch, installed_release(), fingerprints.installed_source)
        except Exception as error:
            return states.FAILED, f"{type(error).__name__}: {error}"

    def _mistake(self, patch: Patch) -> str | None:
        """What is wrong with a patch's record, before any source is looked at."""
        unknown = [name for name in patch.requires if name not in self.runs]
        if unknown:
            return f"requires names no patch: {', '.join(unknown)}"
        from gemma4_turbo import fingerprints

        return fingerprints.mistake(patch)

    # -- plumbing -----------------------------------------------------------------------------

    def _names(self, argument: str, names: Iterable[str]) -> tuple[str, ...]:
        if isinstance(names, str):
            raise ValueError(f"{argument} must be a collection of patch names, got {names!r}")
        names = tuple(names)
        for name in names:
            if name not in self.runs:
                raise ValueError(
                    f"{argument} names no patch: {name!r}; choose from {', '.join(self.runs)}"
                )
        return names

    def _select(self, selection: Selection) -> None:
        self._selection = selection
        os.environ[SELECTION] = selection.encode()
        state_folder.settle()
        self._set_log_level()
        if self._armed:
            for run in self.runs.values():
                if not self.decision(run.patch)[0] and run.swaps:
                    self._uninstall(run)
            for run in self.runs.values():
                self._install(run)
            self._gates("install")
        elif ROOT in sys.modules:
            self._arm()
        elif self._finder not in sys.meta_path:
            self._finder = _FirstImport(self._guarded(self._arm))
            sys.meta_path.insert(0, self._finder)

    def _arm(self) -> None:
        """Register the post-import hooks. wrapt runs a hook at once if its module is there."""
        try:
            import wrapt
        except ImportError as error:
            for run in self.runs.values():
                run.set(states.FAILED, f"wrapt is not installed: {error}")
            return
        self._armed = True
        self._register_gates()  # first: strict mode must hold whatever goes wrong below
        for problem in self.switches().problems:
            logger.error("gemma4_turbo: %s", problem)
        for run in self.runs.values():
            for name in run.patch.modules:
                if being_imported(name):  # wrapt would call the hook now, with half a module
                    self._half.add(name)
                else:
                    wrapt.register_post_import_hook(self._hook(run), name)
        for run in self.runs.values():
            if self._mistake(run.patch) is not None:  # its module would be waited for in vain
                self._install(run)

    def _hook(self, run: PatchRun) -> Callable[[types.ModuleType], None]:
        @self._guarded
        def patch_on_import(module: types.ModuleType) -> None:
            with self._lock:
                self._ready.add(module.__name__)
                self.catch_up()
                self._install(run)

        return patch_on_import

    def catch_up(self) -> None:
        """Install what had to wait for modules that were being imported when we came."""
        done = {name for name in self._half if not being_imported(name)}
        if done:
            self._half -= done
            self._ready |= done & set(sys.modules)
            for run in self.runs.values():
                self._install(run)

    def _guarded(self, function: Callable[..., None]) -> Callable[..., None]:
        """For Python's import system, which must never see an exception of ours."""

        @functools.wraps(function)
        def call(*args: Any) -> None:
            try:
                function(*args)
            except Exception as error:
                self._swallow(function.__name__, error)

        return call

    def _swallow(self, what: str, error: Exception) -> None:
        """Log it, keep it for strict mode, and let SGLang go on."""
        with contextlib.suppress(Exception):
            self.mistakes.append(f"{what}: {type(error).__name__}: {error}")
            logger.exception("gemma4_turbo: %s", what)

    def _register_gates(self) -> None:
        from gemma4_turbo import gates, occasions  # noqa: F401 - occasions adds its own

        gates.register(self)

    def _gates(self, what: str) -> None:
        if self._armed:
            from gemma4_turbo import gates

            getattr(gates, what)(self)

    def _set_log_level(self) -> None:
        level = self.switches().log_level
        if level is not None:
            logger.setLevel(level.upper())

    def _row(self, run: PatchRun, below: list[dict[str, Any]]) -> PatchStatus:
        state, reason = run.state, run.full_reason()
        if state == states.ACTIVE and not all(swap.in_place for swap in run.swaps):
            state = states.CONFLICT
            reason = "replaced after us: " + ", ".join(
                swap.target for swap in run.swaps if not swap.in_place
            )
        if state == states.WAITING:
            on, why = self.decision(run.patch)
            if not on:
                state, reason = states.OFF, why
            elif self._selection is None:
                reason = "apply() has not been called in this process"
        engaged = run.engaged_count() + sum(other["engaged"] for other in below)
        if state == states.UNSUPPORTED and run.swaps and engaged:
            state, reason = states.ACTIVE, f"installed; but {reason}"
        # The processes that run the model outweigh this one, and the worst of them the others.
        known = set(states.SEVERITY) - {states.WAITING}
        told = [other for other in below if other["state"] in known]
        if told:
            worst = max(told, key=lambda other: states.SEVERITY.index(other["state"]))
            state, reason = worst["state"], worst["reason"]
        return PatchStatus(run.patch.name, state, reason, run.patch.targets, engaged)

    def _publish(self) -> None:
        ledger().publish(
            [
                {"name": run.patch.name, "state": run.state, "reason": run.full_reason()}
                for run in self.runs.values()
            ]
        )


def installed_release() -> str | None:
    """Version of the installed SGLang, without importing it."""
    from importlib import metadata

    try:
        return metadata.version(ROOT)
    except metadata.PackageNotFoundError:
        return None


def being_imported(name: str) -> bool:
    """Whether a module's code is running just now."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _patch_module(patch: Patch) -> PatchModule:
    module: Any = importlib.import_module(f"gemma4_turbo.patches.{patch.name}")
    for name in ("build", "undo", "verify"):
        if not callable(getattr(module, name, None)):
            raise AttributeError(f"patches/{patch.name}.py has no {name}()")
    return module  # type: ignore[no-any-return]


def _require_all(patch: Patch, replacements: Any) -> None:
    """Before any of them is installed: a replacement for each target."""
    for target in patch.targets:
        if not isinstance(replacements, Mapping) or replacements.get(target) is None:
            raise KeyError(f"build() of patches/{patch.name}.py has no replacement for {target}")


def _imported_source(module: str) -> str | None:
    """Source of an imported module, from the very file that it was loaded from.

    Of one that is not imported yet: from the file that it would be loaded from.
    """
    from gemma4_turbo import fingerprints

    loaded = sys.modules.get(module)
    if loaded is None:
        return fingerprints.installed_source(module)
    path = getattr(loaded, "__file__", None)
    return fingerprints.file_source(path) if path else None


ENGINE = Engine()
