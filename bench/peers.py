"""Stock SGLang, this package and vLLM beside each other, on the same generated models.

    python bench/peers.py --engine 'stock=sglang:' --engine 'ours=ours:' --engine 'vllm=vllm:/venvs/vllm/bin/python'

Every engine runs in its own interpreter, one after the other, a second round in reverse order; first with
its own defaults, then all with the same chunk of prompts. Workloads: A, B, C (many prompts at once), the
lengths of a chat service, long prompts of E2B and E4B, prompts with images, and multi-token prediction.
``--serving`` adds every engine's own server under ``sglang.bench_serving``. Every measurement is written to
the CSV at once; an engine that does not start or does not answer is a row that says why.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402

from bench.common.engines import end_on_sigterm  # noqa: E402
from bench.peer import results as peers_results  # noqa: E402
from bench.peer import serving as peers_serving  # noqa: E402
from bench.peer.engine import FORM, Peer, PeerError, Worker, parse  # noqa: E402
from bench.peer.results import FAILED, READY, Rows, duration, figures  # noqa: E402
from bench.peer.workloads import (  # noqa: E402
    CHUNK,
    DEFAULTS,
    MOST_ROUNDS,
    MOST_WARM_UPS,
    MTP,
    PICTURES,
    TEXT,
    WORKLOADS,
    Workload,
    arguments,
    chunked,
    requests,
    warm_ups,
    write,
    write_draft,
    write_words,
)
from gemma4_turbo.models import geometry  # noqa: E402

WARM = 0.9  # of the fastest run before, and the other way round
SETTINGS = {"defaults": DEFAULTS, "chunk": CHUNK}
console = Console(width=200)


class Limits:
    """Seconds for a start and for a measurement."""

    def __init__(self, start_s: float, run_s: float) -> None:
        self.start_s, self.run_s = start_s, run_s


class Group:
    """Workloads that one start of an engine serves."""

    def __init__(self, scratch: Path, model: str, kind: str, layers: int | None) -> None:
        self.scratch, self.model, self.kind, self.layers = scratch, model, kind, layers
        self.workloads: list[Workload] = []

    def arguments(self, peer: Peer, setting: str, chunk: int) -> dict[str, Any]:
        """Of the engine."""
        folder = write(self.scratch, self.model, self.kind, self.layers, peer.kind)
        draft = write_draft(self.scratch, self.model) if self.kind == MTP else None
        found = arguments(peer.kind, folder, self.kind, draft)
        if setting == CHUNK:
            found |= chunked(peer.kind, chunk)
        return found | peer.arguments

    def otherwise(self, peer: Peer) -> list[dict[str, Any]]:
        """What a second start changes: stock 0.5.12.post1 to 0.5.23 cannot record these graphs."""
        shares = geometry.GEOMETRIES[self.model].kv_shared_layers > 0 and self.layers is None
        return [{"disable_piecewise_cuda_graph": True}] if shares and peer.kind != "vllm" else []

    def place(self, setting: str, round_: int) -> dict[str, Any]:
        """Columns that all rows of a start have."""
        layers = self.layers or geometry.GEOMETRIES[self.model].layers
        return {"setting": setting, "round": round_, "model": self.model, "layers": layers}


def grouped(names: list[str], model: str, layers: int | None, scratch: Path) -> list[Group]:
    """The workloads, by model and kind; fewer layers only of ``model``."""
    found: dict[tuple[str, str], Group] = {}
    for name in names:
        workload = WORKLOADS[name]
        own = workload.model or model
        key = own, workload.kind
        if key not in found:
            found[key] = Group(scratch, own, workload.kind, None if workload.model else layers)
        found[key].workloads.append(workload)
    return list(found.values())


class Run:
    """One engine after the other."""

    def __init__(self, rows: Rows, logs: Path, limits: Limits) -> None:
        self.rows, self.logs, self.limits = rows, logs, limits
        self.unable: set[tuple[str, str, str, str]] = (
            set()
        )  # it would not start in a second round either

    def log(self, peer: Peer) -> Path:
        """Of an engine's newest start."""
        safe = "".join(c if c.isalnum() or c in "-." else "_" for c in peer.name)
        return self.logs.with_name(f"{self.logs.stem}-{safe}.log")

    def failed(
        self, peer: Peer, about: dict[str, Any], place: dict[str, Any], names: list[str], why: str
    ) -> None:
        """A row for each workload that is not measured."""
        console.print(f"{peer.name}: {why}", style="red", markup=False)
        for name in names:
            self.rows.add(peer, about, place | {"workload": name}, [(FAILED, None, "")], why)

    def start(
        self, group: Group, peer: Peer, given: dict[str, Any], place: dict[str, Any]
    ) -> tuple[Worker, dict[str, Any], dict[str, Any]]:
        """An engine that stands, what it says of itself, and its flags; PeerError where none does."""
        tries = [given, *(given | change for change in group.otherwise(peer))]
        for number, flags in enumerate(tries):
            worker = Worker(peer, flags, self.log(peer))
            place["flags"] = told(flags, group.scratch)
            try:
                about = worker.ready(self.limits.start_s)
            except PeerError as error:
                worker.stop(0)
                if number + 1 == len(tries):
                    raise
                self.failed(peer, {}, place, ["start"], str(error))
            except BaseException:
                worker.stop(0)
                raise
            else:
                found = [(READY, about["ready_s"], "s")]
                self.rows.add(peer, about, place | {"workload": "start"}, found)
                console.print(f"{peer.name}: ready after {about['ready_s']:.0f} s", markup=False)
                return worker, about, place
        raise AssertionError

    def engine(self, group: Group, peer: Peer, setting: str, chunk: int, round_: int) -> None:
        """All workloads of a group on one engine; started anew where it died."""
        key = (group.model, group.kind, setting, peer.name)
        left = [w for w in group.workloads if not self.rows.has(peer, setting, w.name, round_)]
        given, place = group.arguments(peer, setting, chunk), group.place(setting, round_)
        worker: Worker | None = None
        about: dict[str, Any] = {}
        try:
            while left and key not in self.unable:
                if worker is None:
                    try:
                        worker, about, place = self.start(group, peer, given, place)
                    except PeerError as error:
                        self.unable.add(key)
                        self.failed(peer, {}, place, [w.name for w in left], str(error))
                        return
                workload = left.pop(0)
                try:
                    self.measure(worker, about, workload, place)
                except PeerError as error:
                    worker.stop(0)
                    worker = None
                    self.failed(peer, about, place, [workload.name], str(error))
        except BaseException:  # told to end
            if worker is not None:
                worker.stop(0)
            raise
        if worker is not None:
            worker.stop()

    def measure(
        self, worker: Worker, about: dict[str, Any], workload: Workload, place: dict[str, Any]
    ) -> None:
        """Warm up with other prompts, then measure; PeerError where there are no figures.

        An engine compiles kernels for sizes of batches when they come, and they depend on when requests
        come: it is warm when a run takes about as long as the fastest before. One that takes longer compiled.
        """
        limit, asked = self.limits.run_s, requests(workload, place["round"])
        try:
            fastest = math.inf
            for given in warm_ups(workload, place["round"]):
                lasted = duration(worker({"do": "run", "requests": given}, limit))
                if WARM * fastest < lasted < fastest / WARM:
                    break
                fastest = min(fastest, lasted)
            else:
                told = f"{worker.peer.name}, {workload.name}: not warm after {MOST_WARM_UPS} runs"
                console.print(told, style="yellow", markup=False)
            answer = worker({"do": "run", "requests": asked}, limit)
            found: list[Any] = figures(answer, asked)
        except (ValueError, TypeError, KeyError) as error:
            raise PeerError(f"no figures: {error}") from None
        patches = worker({"do": "report"}, limit)
        broken = patches.get("failed", [])
        where = place | {
            "workload": workload.name,
            "requests": len(asked),
            "patches": "+".join(n for n in patches.get("engaged", []) if n not in broken),
        }
        self.rows.add(worker.peer, about, where, found)
        if broken:
            console.print(f"{worker.peer.name}: failed patches: {', '.join(broken)}", style="red")
        text = ", ".join(f"{name} {value:.1f} {unit}" for name, value, unit in found)
        console.print(f"{worker.peer.name}, {workload.name}: {text}", markup=False)

    def served(
        self,
        peer: Peer,
        load: peers_serving.Load,
        group: Group,
        setting: str,
        chunk: int,
        round_: int,
        at: list[float],
        options: dict[str, Any],
    ) -> None:
        """The engine's server at every rate; the seed of the prompts differs, or they would be cached."""
        names = {peers_serving.name_of(rate): rate for rate in at}
        left = [n for n in names if not self.rows.has(peer, setting, n, round_)]
        if not left or (group.model, "serving", setting, peer.name) in self.unable:
            return
        given = group.arguments(peer, setting, chunk)
        folder = write_words(Path(given["model" if peer.kind == "vllm" else "model_path"]))
        del given["skip_tokenizer_init"]
        place = group.place(setting, round_) | {"flags": told(given, group.scratch)}
        server = peers_serving.PeerServer(peer, given, self.log(peer), self.limits.start_s)
        about: dict[str, Any] = {}
        try:
            about = server.about()
            self.rows.add(
                peer, about, place | {"workload": "start"}, [(READY, about["ready_s"], "s")]
            )
            rate = {"request-rate": "inf", "seed": 1}
            load(server, folder, options | rate, self.limits.run_s)  # warms up
            while left:
                name = left[0]
                seed = 100 * (round_ + 1) + list(names).index(name)
                rate = {"request-rate": names[name], "seed": seed}
                found = load(server, folder, options | rate, self.limits.run_s)
                where = {"workload": name, "requests": options["num-prompts"]}
                where["patches"] = server.engaged()
                self.rows.add(peer, about, place | where, list(found))
                console.print(f"{peer.name}, {name}: {found[0][1]:.0f} {found[0][2]}", markup=False)
                left.pop(0)
        except PeerError as error:
            self.unable.add((group.model, "serving", setting, peer.name))
            self.failed(peer, about, place, left, str(error))
        finally:
            server.stop()


def told(flags: dict[str, Any], scratch: Path) -> str:
    """Flags for the CSV, without the name of a temporary folder."""
    return json.dumps(flags).replace(f"{scratch}/", "")


def chosen(text: str, known: dict[str, Any], option: str) -> list[str]:
    """Names of a comma list; typer.BadParameter for one that is not known."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"{option} must be of {', '.join(known)}; got {', '.join(unknown)}"
        )
    return names


def main(
    engine: Annotated[list[str], typer.Option(help=f"Once for each: {FORM}; no PYTHON: this one")],
    model: Annotated[str, typer.Option(help="Of the workloads A, B, C, chat, images")] = "26b-a4b",
    layers: Annotated[int, typer.Option(help="Fewer layers of it; 0: all")] = 0,
    workloads: Annotated[str, typer.Option(help="Comma list; empty: none")] = ",".join(WORKLOADS),
    settings: Annotated[str, typer.Option(help="Comma list")] = ",".join(SETTINGS),
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of the same chunk")] = 8192,
    rounds: Annotated[int, typer.Option(min=1, max=MOST_ROUNDS)] = 2,
    serving: Annotated[bool, typer.Option(help="Also every engine's server, over HTTP")] = False,
    rates: Annotated[str, typer.Option(help="Requests a second")] = "2,8,16,inf",
    prompts: Annotated[int, typer.Option(min=1, help="Requests at each rate")] = 80,
    start_limit: Annotated[float, typer.Option(help="Seconds for a start")] = 600,
    limit: Annotated[float, typer.Option(help="Seconds for a measurement")] = 300,
    weight_range: Annotated[float, typer.Option(help="Weights are uniform in +-this")] = 3e-2,
    resume: Annotated[bool, typer.Option(help="Go on with the newest run in the CSV")] = False,
    retry_failed: Annotated[
        bool, typer.Option(help="With --resume: try again what failed, as where a time was up")
    ] = False,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-peers.csv"),
) -> None:
    """Against the field."""
    peers = [parse(text) for text in engine]
    if len({peer.name for peer in peers}) < len(peers):
        raise typer.BadParameter("--engine: two engines have one name")
    names = chosen(workloads, WORKLOADS, "--workloads")
    at_settings = [SETTINGS[name] for name in chosen(settings, SETTINGS, "--settings")]
    if model not in geometry.GEOMETRIES:
        raise typer.BadParameter(
            f"--model must be of {', '.join(geometry.GEOMETRIES)}, got {model!r}"
        )
    try:
        geometry.config(model, layers or None)
    except ValueError as error:
        raise typer.BadParameter(f"--layers: {error}") from None
    try:
        at = peers_serving.rates(rates) if serving else []
        rows = Rows(out, resume, retry_failed)
    except ValueError as error:
        raise typer.BadParameter(f"--rates, --out: {error}") from None
    end_on_sigterm()
    os.environ["BENCH_WEIGHT_RANGE"] = str(weight_range)
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    groups = grouped(names, model, layers or None, scratch)
    run = Run(rows, out, Limits(start_limit, limit))
    load = peers_serving.Load(peers, scratch)
    served = Group(scratch / "served", model, TEXT, layers or None)
    options = {"num-prompts": prompts, "random-input-len": 1024, "random-output-len": 256}

    def turns(progress: Progress, task: Any, what: str, do: Any) -> None:
        for setting in at_settings:
            for round_ in range(rounds):
                for peer in peers if round_ % 2 == 0 else peers[::-1]:
                    text = f"{what}, {setting}, round {round_}: {peer.name}"
                    progress.update(task, description=text)
                    do(peer, setting, round_)
                    progress.advance(task)

    try:
        with Progress(console=console, transient=True) as progress:
            times = (len(groups) + bool(at)) * len(at_settings) * rounds * len(peers)
            task = progress.add_task("starting", total=times)
            for group in groups:
                what = f"{group.model} {'' if group.kind == PICTURES else group.kind}".strip()
                turns(progress, task, what, lambda p, s, r, g=group: run.engine(g, p, s, chunk, r))
            if at:
                turns(
                    progress,
                    task,
                    "serving",
                    lambda p, s, r: run.served(p, load, served, s, chunk, r, at, options),
                )
    finally:  # where it is cut off, what there is still counts
        load.stop()
        found = peers_results.summary(rows.frame())
        if not found.empty:
            console.print(peers_results.table(found))
            peers_results.plot(found, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
