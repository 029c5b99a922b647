"""The scenarios' servers: started, asked, examined, ended; and what is kept of it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.common.servers import console, launch_arguments
from bench.common.variants import STOCK
from bench.proof.comparing import Comparison, compare, farthest
from bench.proof.doctor import merged, not_aside
from bench.proof.hook import hook_arguments, hook_calls
from bench.proof.rows import Row, tell
from bench.proof.scenarios import MARLIN, Scenario, write_models
from bench.proof.server import CROWDS, StartError, TestedServer, last_error
from bench.proof.surroundings import (
    EXACT,
    HOSTILE,
    REPOSITORY,
    SQUATTED,
    SURROUNDINGS,
    Surroundings,
    entry_point,
)
from bench.proof.watching import changes, snapshot

MEAN_DISTANCE = 0.02  # nats between logprobs on average that need no floor
STARTED = time.monotonic()


class Slots:
    """So many servers at once."""

    def __init__(self, free: int) -> None:
        self.all = self.free = free
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until so many are free; one that wants more than there are waits for all."""
        count = min(count, self.all)
        with self._changed:
            self._changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            yield
        finally:
            with self._changed:
                self.free += count
                self._changed.notify_all()


class Bench:
    """The scenarios' common state."""

    def __init__(self, out: Path, scratch: Path, at_once: int, limits: dict[str, float]) -> None:
        self.out, self.scratch, self.limits = out, scratch, limits
        self.slots = Slots(at_once)
        self.rows: list[Row] = []
        self.doctor: dict[str, Any] = {}
        self.answers: dict[str, Any] = {}
        self.servers: list[TestedServer] = []
        self.more: list[str] = []
        self.ended = False
        self.prebuilt: subprocess.Popen[bytes] | None = None
        self._models: dict[str, Path] = {}
        self._writing, self._telling = threading.Lock(), threading.Lock()
        inherited = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        self.path = [str(entry_point(scratch)), str(REPOSITORY), *inherited]

    def model(self, name: str) -> Path:
        """The model's folder."""
        with self._writing:
            if name not in self._models:
                started = time.monotonic()
                self._models[name] = write_models(name, self.scratch / f"model-{name}")
                self.say(f"model {name}: written in {time.monotonic() - started:.0f} s")
            return self._models[name]

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        console.print(f"{time.monotonic() - STARTED:4.0f} s  {text}", highlight=False, markup=False)

    def start(
        self, name: str, variant: str, arguments: list[str], found: Surroundings, path: list[str]
    ) -> TestedServer:
        """A server that is ended with the others whatever happens."""
        log = self.scratch / "logs" / f"{name}-{variant.replace(' ', '_')}.log"
        log.parent.mkdir(exist_ok=True)
        if self.ended:
            raise StartError("the time is up")
        server = TestedServer(variant, arguments, log, found, path)
        self.servers.append(server)
        return server

    def stop(self) -> None:
        """No process stays."""
        self.ended = True
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(TestedServer.stop, list(self.servers)))
        if self.prebuilt is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.prebuilt.pid, 9)

    def prebuild(self) -> None:
        """Start compiling Marlin."""
        with (self.scratch / "marlin.log").open("wb") as output:
            self.prebuilt = subprocess.Popen(
                [sys.executable, "-c", MARLIN],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def arguments(self, scenario: Scenario) -> tuple[list[str], list[str]]:
        """For launch_server, and folders for PYTHONPATH."""
        folder = self.model(scenario.model)
        more = "--load-format auto --skip-tokenizer-init --chunked-prefill-size 512"
        arguments = launch_arguments(folder, 8, 16_384, self.limits["memory"], more)
        path = self.path
        if scenario.name == "hooks":
            hooks, where = hook_arguments(self.scratch)
            arguments, path = arguments + hooks, [str(where), *path]
        return [*arguments, *scenario.arguments, *self.more], path

    def run(self, scenario: Scenario) -> None:
        """One scenario, whatever happens in it."""
        rows = [Row(scenario.name, run) for run in scenario.runs]
        self.rows += rows
        try:
            arguments, path = self.arguments(scenario)
            if scenario.model == "marlin" and self.prebuilt is not None:
                self.prebuilt.wait()
            with self.slots.taken(1 + len(rows)):
                if self.ended:
                    raise StartError("the time is up")
                self._run(scenario, rows, arguments, path)
        except BaseException as error:
            traceback.print_exc()
            for row in rows:
                row.problems.append(f"{type(error).__name__}: {error}")
        with self._telling:
            for row in rows:
                tell(row)

    def _run(
        self, scenario: Scenario, rows: list[Row], arguments: list[str], path: list[str]
    ) -> None:
        scratch = Path(tempfile.mkdtemp(prefix=f"{scenario.name}-", dir=self.scratch))
        calls = {variant: scratch / f"calls-{variant}" for variant in (STOCK, *scenario.runs)}

        def hooked(variant: str, found: Surroundings) -> Surroundings:
            found.environment["BENCH_HOOK_CALLS"] = str(calls[variant])
            return found

        stock = self.start(scenario.name, STOCK, arguments, hooked(STOCK, Surroundings()), path)
        pairs: list[tuple[Row, TestedServer, Surroundings, dict[str, list[Any]]]] = []
        for row in rows:
            where = scratch / row.run.replace(" ", "-")
            where.mkdir()
            try:
                found = hooked(row.run, SURROUNDINGS[row.run](where, path))
                row.notes += found.notes
                before = snapshot(found.watched)
                server = self.start(scenario.name, row.run, arguments, found, path)
                pairs.append((row, server, found, before))
            except Exception as error:
                row.problems.append(f"not started: {type(error).__name__}: {error}")
        reference: dict[str, list[dict[str, Any]]] | None = None
        again: Comparison | None = None
        try:
            first = self.asked(scenario, stock)
        except (StartError, OSError, RuntimeError, ValueError) as error:
            for row in rows:
                row.not_shown = True
                row.notes.append(f"stock: {error}")
        else:
            reference = first
            again = compare(first["alone"], self.asked(scenario, stock)["alone"], 0)[0]

        def one(pair: tuple[Row, TestedServer, Surroundings, dict[str, list[Any]]]) -> None:
            row, server, found, before = pair
            row.itself = again
            try:
                self.examine(scenario, row, server, reference)
                if reference is None:
                    row.notes.append("patched starts and answers")
            except (StartError, OSError, RuntimeError, ValueError) as error:
                # Where stock does not start either, the patched server need not.
                (row.notes if reference is None else row.problems).append(f"{row.run}: {error}")
            after = snapshot(found.watched)
            row.problems += changes(before, after)[:8]
            if before:
                new = [path for path in after if path not in before and "__pycache__" not in path]
                row.notes.append(
                    f"{len(before)} foreign files looked at before and after, {len(new)} new beside them"
                )

        with ThreadPoolExecutor(len(rows)) as pool:
            list(pool.map(one, pairs))
        for row in rows:
            if scenario.name == "hooks" and reference is not None:
                counts = [hook_calls(calls[variant]) for variant in (STOCK, row.run)]
                row.notes.append(
                    f"the hook was called {counts[0]} times in stock, {counts[1]} here"
                )
                if not all(counts):
                    row.problems.append("the hook was not called")
        stock.stop()
        for _, server, _, _ in pairs:
            server.stop()

    def asked(self, scenario: Scenario, server: TestedServer) -> dict[str, list[dict[str, Any]]]:
        """The server's answers, as soon as it stands."""
        from bench.models import checkpoints

        first = f"{scenario.name}, {server.variant}"
        if first not in self.answers:
            ready = server.wait_healthy(self.limits["start"])
            self.say(f"{first}: ready after {ready:.0f} s")
        found = server.answers(checkpoints.VOCABULARY)
        self.answers.setdefault(first, found)
        return found

    def examine(
        self,
        scenario: Scenario,
        row: Row,
        server: TestedServer,
        reference: dict[str, list[dict[str, Any]]] | None,
    ) -> None:
        """Ask the patched server, compare, ask doctor, see that it still lives."""
        found = self.asked(scenario, server)
        if reference is not None:
            row.alone, told = compare(reference["alone"], found["alone"], self.limits["tie"])
            row.together, more = compare(
                reference["together"], found["together"], self.limits["tie"]
            )
            row.notes += [*told, *(f"together, {line}" for line in more)][:10]
            floor = farthest(reference["alone"], reference["crowd"], self.limits["tie"])
            row.notes.append(
                f"stock's own floor, the farthest of batches of {CROWDS}: {floor},"
                f" {floor.distance:.3f} at most, {floor.mean:.4f} on average"
            )
            bad = row.alone.wrong + row.together.wrong
            if bad and (row.run in scenario.bitwise or not floor.wrong):
                row.problems.append(f"{bad} answer(s) differ from stock")
            for apart in (row.alone, row.together):
                if not apart.distance <= max(self.limits["distance"], 2 * floor.distance):
                    row.problems.append(f"logprobs {apart.distance:.3f} apart")
                if not apart.mean <= max(MEAN_DISTANCE, 2 * floor.mean):
                    row.problems.append(f"logprobs {apart.mean:.4f} apart on average")
            if row.run in scenario.bitwise and not row.alone.bits:
                row.problems.append("not equal bit for bit")
        try:
            doctor = server.doctor()
            self.doctor[f"{scenario.name}, {row.run}"] = doctor
            row.patches = merged(doctor["servers"])
            if doctor["problems"]:
                row.notes.append(f"doctor: {'; '.join(doctor['problems'])[:300]}")
        except (RuntimeError, KeyError, OSError) as error:
            row.problems.append(f"doctor: {error}")
        lines = server.log.read_text(errors="replace").splitlines()
        said = [
            hit[0] for line in lines if (hit := re.search("gemma4_turbo .*installed: .*", line))
        ]
        if not row.patches:
            row.notes.append("doctor sees no process of this server")
            row.notes.append(said[-1][:400] if said else "the log says nothing of patches")
        if not said and not row.patches:
            row.problems.append("the package was not there")
        engaged = sum(patch["engaged"] for patch in row.patches)
        if scenario.engages and row.patches and not engaged:
            row.problems.append("no patch has run: nothing was tested")
        if scenario.architecture:
            row.problems += not_aside(row.patches, scenario.architecture)[:10]
            if not row.patches:
                row.problems.append("doctor does not say why patches stand aside")
        if not server.healthy():
            row.problems.append(f"the server is not alive: {last_error(server.log)}")

    def cross_checks(self) -> None:
        """Between scenarios: the hook changes answers; hostile surroundings change no bit."""
        unhooked, hooked = (self.answers.get(f"{name}, {STOCK}") for name in ("moe", "hooks"))
        if unhooked and hooked and unhooked["alone"] == hooked["alone"]:
            for row in self.rows:
                if row.scenario == "hooks":
                    row.problems.append("the hook changes nothing: nothing was tested")
        for row in self.rows:
            friendly = self.answers.get(f"{row.scenario}, {EXACT}")
            found = self.answers.get(f"{row.scenario}, {row.run}")
            if row.run in (HOSTILE, SQUATTED) and friendly and found:
                same = compare(friendly["alone"], found["alone"], 0)[0].bits
                row.notes.append(
                    f"{'equal' if same else 'NOT equal'} bit for bit to {EXACT} in friendly surroundings"
                )

    def save(self) -> None:
        """At most four files, whatever there is."""
        self.out.mkdir(parents=True, exist_ok=True)
        rows = [
            {"verdict": row.verdict}
            | {
                key: value._asdict() if isinstance(value, Comparison) else value
                for key, value in vars(row).items()
            }
            for row in self.rows
        ]
        (self.out / "rows.json").write_text(json.dumps(rows, indent=1))
        (self.out / "doctor.json").write_text(json.dumps(self.doctor, indent=1))
        with gzip.open(self.out / "answers.json.gz", "wt") as file:
            json.dump(self.answers, file)
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            for log in [*sorted(self.scratch.glob("logs/*.log")), self.scratch / "marlin.log"]:
                if log.exists():
                    archive.add(log, log.name)
