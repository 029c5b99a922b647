"""Installing, reporting and reverting the patches of the catalogue in this process.

A patch goes in when SGLang imports the last module that it touches. Nothing here raises into SGLang:
an exception in an import hook would make SGLang drop the model class and go on with another one.
What may stop a server, and when, is in `gemma4_turbo.engine.gates`.
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
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemma4_turbo.catalogue import Patch
from gemma4_turbo.engine import imports, state_folder, states
from gemma4_turbo.engine.imports import being_imported, installed_release
from gemma4_turbo.engine.port import Port, Ports
from gemma4_turbo.engine.run import PatchRun, code_of, ledger
from gemma4_turbo.engine.served_models import Models
from gemma4_turbo.engine.states import PatchStatus
from gemma4_turbo.engine.switches import SELECTION, Decision, Selection, Switches, read

if TYPE_CHECKING:
    from gemma4_turbo.engine.fingerprints import Definitions
    from gemma4_turbo.engine.swap import Swap

logger = logging.getLogger("gemma4_turbo")


class _FirstImport:
    """Calls back once, when SGLang's root package is first looked up. Finds nothing itself.

    So that `apply` need not import wrapt, which takes longer than all the rest of it. It stays where
    it is: taking it out of ``sys.meta_path`` during a look-up would make Python skip the next finder.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == imports.root and self._callback is not None:
            callback, self._callback = self._callback, None
            callback()


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _forked() -> None:
    """Another thread may have been at it in the parent; there is none here to let go of the lock."""
    for engine in list(_engines):
        engine._lock = threading.RLock()
        engine._untold = None


os.register_at_fork(after_in_child=_forked)


class Engine:
    """All patches of a catalogue in this process."""

    def __init__(
        self,
        catalogue: Iterable[Patch],
        ports: Ports,
        own_models: str = "",
        own_kinds: Container[str] | None = None,
        launch_gates: str = "",
        measured: Callable[[], Mapping[str, Decision]] = dict,
    ) -> None:
        """No process is touched before `apply`.

        Args:
            catalogue: the patches.
            ports: for each of them, by name, its ports.
            own_models: how the modules begin that belong to the models that the patches are for.
            own_kinds: what follows in those that define such a model; None: anything.
            launch_gates: our module of gates, with ``register``, ``install`` and ``remove``, each given the
                engine; imported with the first module of SGLang's. None if empty.
            measured: by patch, what was measured on this machine; asked for where a patch is decided.
        """
        self.catalogue = tuple(catalogue)
        self.runs = {
            patch.name: PatchRun(patch, tuple(ports.get(patch.name, ())), index, self)
            for index, patch in enumerate(self.catalogue)
        }
        # Of two patches that replace one function, each its own way, only the first goes in: the one
        # that mends a defect.
        self._in_turn = sorted(
            self.runs.values(), key=lambda run: not any(port.finds_defect for port in run.ports)
        )
        self._lock = threading.RLock()
        self._selection: Selection | None = None
        self._armed = False
        self._finder: Any = None
        self.gates: dict[str, Swap] = {}  # of gemma4_turbo.engine.gates
        self.models = Models(own_models, own_kinds)
        self._launch_gates = launch_gates
        self._measured = measured
        self.mistakes: list[str] = []  # exceptions of ours that were swallowed; for strict mode
        self._ready: set[str] = set()  # modules that have been run to their end
        self._half: set[str] = set()  # modules that were being run when we came
        self._untold: bool | None = None  # within `_told_once`: whether there is something to tell
        _engines.add(self)

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
        with self._lock, self._told_once():
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
                from gemma4_turbo.engine.counters import descendants

                unseen = ledger().look() or state_folder.problem(trial=False)
                reports = descendants()
            below_by_name: dict[str, list[dict[str, Any]]] = {name: [] for name in self.runs}
            for report in reports:
                for patch in report.patches:
                    below_by_name.get(patch["name"], []).append(patch)
            rows = [self._row(run, below_by_name[name]) for name, run in self.runs.items()]
            if unseen is None:
                return rows
            note = f"{states.ALONE}: {unseen}"
            return [row._replace(reason=f"{row.reason}; {note}") for row in rows]

    def switches(self) -> Switches:
        """The switches as they stand now."""
        return read(selection=self._selection, catalogue=self.catalogue, measured=self._measured())

    # -- installing and reverting, side by side ------------------------------------------------

    def _install(self, run: PatchRun, switches: Switches | None = None) -> None:
        """Put one patch in if its modules are there and everything about it fits."""
        patch = run.patch
        if run.state not in (states.WAITING, states.OFF):
            return
        on, reason = self.decision(patch, switches)
        if not on:
            run.set(states.OFF, reason)
            return
        foreign = self.models.unfit(run.targets)
        if foreign is not None:
            run.set(states.UNSUPPORTED, foreign)
            return
        mistake = self._mistake(run)
        if mistake is not None:
            run.set(states.FAILED, mistake)
            return
        ready = [port for port in run.ports if self._ready.issuperset(port.modules)]
        if not ready:
            return
        from gemma4_turbo.engine import fingerprints, neighbours
        from gemma4_turbo.engine.swap import NotStockError, Swap, first_line, wrappers

        done: list[Swap] = []
        try:
            definitions = fingerprints.Definitions(fingerprints.imported_source)
            verdict = fingerprints.judge(ready, installed_release(), definitions)
            if verdict.state != states.ACTIVE:
                rest = [port for port in run.ports if port not in ready]
                if not fingerprints.any_there(rest, fingerprints.imported_source):
                    run.set(verdict.state, verdict.reason)  # else another may yet fit
                return
            port = run.port = verdict.port
            assert port is not None
            swaps = [self._shared(target) or Swap(target) for target in port.targets]
            for swap in swaps:
                if not swap.in_place:
                    node: Any = definitions.node(swap.target)
                    swap.require_stock(first_line(node), wrappers(node))
            bypassed = neighbours.unfit(port, definitions, self._ours)
            if bypassed is not None:
                run.set(states.CONFLICT, bypassed)
                return
            run.code = code_of(port)
            stock = {swap.target: swap.function for swap in swaps}
            replacements = run.code.build(run, stock)
            _require_all(port, replacements)
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
            for run in self._in_turn:
                foreign = self.models.unfit(run.targets)
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
        from gemma4_turbo.engine import fingerprints, neighbours

        definitions = fingerprints.Definitions(fingerprints.imported_source)
        with self._lock:
            for run in self.runs.values():
                if run.state != states.ACTIVE or run.port is None:
                    continue
                bypassed = neighbours.unfit(run.port, definitions, self._ours)
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
                    shared: Swap = swap
                    return shared
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
        undo = getattr(run.code, "undo", None)
        if undo is not None:
            try:
                undo(run)
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
                self.publish()

    def decision(self, patch: Patch, switches: Switches | None = None) -> tuple[bool, str]:
        """Whether the switches want a patch and everything that it stands on, and why.

        ``switches``, as they stand now, spare who asks for many patches to read them again.
        """
        decisions = (switches or self.switches()).decisions
        for needed in patch.requires:
            if needed not in decisions:
                continue  # a mistake, which is told where the patch would be installed
            if not decisions[needed].on and decisions[patch.name].on:
                return False, f"stands on {needed}, which is off: {decisions[needed].reason}"
        return decisions[patch.name].on, decisions[patch.name].reason

    def outlook(self, patch: Patch, definitions: Definitions | None = None) -> tuple[str, str]:
        """State and reason of a patch that is on; while it waits, those that its sources foretell.

        ``definitions`` of `installed_source` spare who asks for many patches to read them again.
        """
        run = self.runs[patch.name]
        if run.state != states.WAITING:
            return run.state, run.reason
        from gemma4_turbo.engine import fingerprints

        try:
            mistake = self._mistake(run)
            if mistake is not None:
                return states.FAILED, mistake
            if definitions is None:
                definitions = fingerprints.Definitions(fingerprints.installed_source)
            verdict = fingerprints.judge(run.ports, installed_release(), definitions)
            return verdict.state, verdict.reason
        except Exception as error:
            return states.FAILED, f"{type(error).__name__}: {error}"

    def is_strict(self) -> bool:
        """Whether a patch that cannot do its work is to end the server."""
        return self.switches().strict

    def _mistake(self, run: PatchRun) -> str | None:
        """What is wrong with a patch's records, before any source is looked at."""
        unknown = [name for name in run.patch.requires if name not in self.runs]
        if unknown:
            return f"requires names no patch: {', '.join(unknown)}"
        from gemma4_turbo.engine import fingerprints

        return fingerprints.mistake(run.ports)

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
            switches = self.switches()
            with self._told_once():
                for run in self.runs.values():
                    if not self.decision(run.patch, switches)[0] and run.swaps:
                        self._uninstall(run)
                for run in self._in_turn:
                    self._install(run, switches)
            self._gates("install")
        elif imports.root in sys.modules:
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
        for run in self._in_turn:
            for name in run.modules:
                if being_imported(name):  # wrapt would call the hook now, with half a module
                    self._half.add(name)
                else:
                    wrapt.register_post_import_hook(self._hook(run), name)
        for run in self.runs.values():
            if self._mistake(run) is not None:  # its module would be waited for in vain
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
            for run in self._in_turn:
                self._install(run)

    def import_what_decides(self) -> None:
        """Where a model is to be loaded: import what only the process of the arguments has imported."""
        from gemma4_turbo.engine import fingerprints

        for run in self.runs.values():
            names = [name for port in run.ports for name in port.decides]
            if not names or run.state != states.WAITING or not self.decision(run.patch)[0]:
                continue
            for name in names:
                if fingerprints.installed_source(name) is not None:
                    importlib.import_module(name)  # the hook for it puts the patch in

    def give_up_waiting(self) -> None:
        """Judge what waits for a module that this SGLang does not have at all: it will never come."""
        from gemma4_turbo.engine import fingerprints

        source_of = functools.cache(fingerprints.installed_source)  # patches share modules
        definitions = fingerprints.Definitions(source_of)
        for run in self.runs.values():
            if run.state != states.WAITING or not run.ports or not self.decision(run.patch)[0]:
                continue
            if not fingerprints.any_there(run.ports, source_of):
                state, reason = self.outlook(run.patch, definitions)
                if state != states.ACTIVE:
                    run.set(state, reason, log=False)  # the summary that follows says it

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
        if self._launch_gates:
            importlib.import_module(self._launch_gates).register(self)

    def _gates(self, what: str) -> None:
        if self._armed and self._launch_gates:
            getattr(importlib.import_module(self._launch_gates), what)(self)

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
        others = [other for other in below if other["state"] in known]
        if others:
            worst = max(others, key=lambda other: states.SEVERITY.index(other["state"]))
            state, reason = worst["state"], worst["reason"]
        return PatchStatus(run.patch.name, state, reason, run.targets, engaged)

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        """The other processes are told at the end, not of each patch in turn: that is a file each time."""
        if self._untold is not None:  # somebody is at it further out
            yield
            return
        self._untold = False
        try:
            yield
        finally:
            untold, self._untold = self._untold, None
            if untold:
                self.publish()

    def publish(self) -> None:
        """Tell the other processes the states."""
        if self._untold is not None:
            self._untold = True
            return
        ledger().publish(
            [
                {"name": run.patch.name, "state": run.state, "reason": run.full_reason()}
                for run in self.runs.values()
            ]
        )


def _require_all(port: Port, replacements: Any) -> None:
    """Before any of them is installed: a replacement for each target."""
    for target in port.targets:
        if not isinstance(replacements, Mapping) or replacements.get(target) is None:
            raise KeyError(f"build() of {port.module} has no replacement for {target}")
