"""A patched server under mixed load for minutes: no crash, no leak, and answers that stay the same.

    python bench/soak.py --model 26b-a4b --layers 6 --minutes 10

Starts ``sglang.launch_server`` on a generated multimodal folder with the patches that are on by default,
and keeps it busy over HTTP: short and long prompts, common beginnings, pictures, requests that are
aborted, all of them more than the KV pool holds. Half-way, some weights are read and written back through
SGLang's own update from a folder: they stay what they are, and everything that follows weights has to
look again. Once a minute the load pauses, the prefix cache is emptied, and a fixed set of prompts, the
probes, is asked one at a time.

PASS: the server lives, every request that was not aborted has its tokens, the probes have the tokens of
the first time, and memory of the GPU and of the processes at the end is what it was after the first
minute, but for ``--leak`` MiB. Exit 1 on FAIL. One row of a CSV per count and minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import psutil  # noqa: E402
import typer  # noqa: E402

from bench.common.comparing import NOTHING_RAN, any_ran, differences  # noqa: E402
from bench.common.engines import end_on_sigterm  # noqa: E402
from bench.common.logs import DIED, RETRACTED  # noqa: E402
from bench.common.options import patches_of  # noqa: E402
from bench.common.pictures import ImageServer, prompt, sampling  # noqa: E402
from bench.common.results import Results  # noqa: E402
from bench.common.servers import console, launch_arguments, servers  # noqa: E402
from bench.common.variants import PATCHED, STOCK  # noqa: E402
from gemma4_turbo.cli import report  # noqa: E402
from gemma4_turbo.engine import states  # noqa: E402
from gemma4_turbo.engine.counters import descendants  # noqa: E402
from gemma4_turbo.models import geometry_mm  # noqa: E402

KINDS = {"short": 4, "long": 2, "common beginning": 3, "pictures": 2, "aborted": 2}
"""How often which request is sent."""

PROBE_TOKENS = 24


# -- requests -----------------------------------------------------------------------------------


def text(words: int, seed: int) -> str:
    """Random words; a generated tokenizer makes a token of each character."""
    source = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join(
        "".join(source.choices(letters, k=source.randrange(2, 9))) for _ in range(words)
    )


def request(kind: str, source: random.Random) -> tuple[dict[str, Any], int]:
    """A body for ``/generate`` and how many tokens it asks for."""
    seed = source.randrange(2**31)
    new = source.choice((8, 32, 96, 256))
    if kind == "pictures":
        body = prompt(source.choice((1, 1, 3)), source.choice((224, 480)), seed)
    elif kind == "long":
        body = {"text": text(source.randrange(200, 500), seed)}
    elif kind == "common beginning":
        body = {"text": text(150, source.randrange(3)) + text(source.randrange(1, 60), seed)}
    else:
        body = {"text": text(source.randrange(1, 60), seed)}
    return body, new


def probes(pictures: bool) -> list[dict[str, Any]]:
    """The prompts that are asked again and again."""
    bodies: list[dict[str, Any]] = [{"text": text(words, words)} for words in (1, 7, 40, 160, 420)]
    if pictures:
        bodies += [prompt(1, 480, 1), prompt(3, 224, 2)]
    return bodies


# -- the server ---------------------------------------------------------------------------------


class SoakedServer(ImageServer):
    """With what a soak asks of it."""

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of an answer; None where it is text."""
        with self.post(path, body) as found:
            told = found.read()
        with contextlib.suppress(ValueError):
            return json.loads(told)
        return None

    def generate(self, body: dict[str, Any], new: int) -> int:
        """How many tokens came of a request."""
        found = self.answer("/generate", {**body, "sampling_params": sampling(new)})
        return len(found["output_ids"])

    def abort(self, body: dict[str, Any], source: random.Random) -> None:
        """Send a request and give it up, by its number or by hanging up."""
        number, by_number = uuid.uuid4().hex, source.random() < 0.5
        whole = {**body, "rid": number, "stream": True, "sampling_params": sampling(512)}
        with self.post("/generate", whole) as stream:
            for _ in range(source.randrange(1, 6)):
                if not stream.readline():
                    return
            if by_number:
                self.answer("/abort_request", {"rid": number})
                stream.read()

    def idle(self, seconds: float = 60.0) -> None:
        """Empty the prefix cache, which SGLang does as soon as nothing runs.

        Raises:
            RuntimeError: if something runs for longer.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.answer("/flush_cache", {})
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    def write_back(self, folder: Path) -> None:
        """Write some weights over themselves, from what `bench/site` has kept of them.

        Raises:
            RuntimeError: if SGLang does not take them.
        """
        given = {"model_path": str(folder), "load_format": "auto"}
        found = self.answer("/update_weights_from_disk", given)
        if not found or not found.get("success"):
            raise RuntimeError(f"/update_weights_from_disk: {found}")

    def memory(self) -> dict[str, float]:
        """MiB: of the GPU, by each process of the server; resident, by all of them.

        Where the driver names no process: all that is used on the GPU.
        """
        family = [psutil.Process(self.process.pid)]
        family += family[0].children(recursive=True)
        on_gpu, resident = gpu_memory_by_process(), 0
        found: defaultdict[str, float] = defaultdict(float)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                resident += process.memory_info().rss
                if process.pid in on_gpu:
                    found[f"GPU, {process.name()}"] += on_gpu[process.pid]
        return {**(found or {"GPU": gpu_memory()}), "resident": resident / 2**20}


def gpu_memory() -> float:
    """MiB in use on the first GPU that this process sees, by its driver."""
    return asked_driver("--query-gpu=memory.used")[0][0]


def gpu_memory_by_process() -> dict[int, float]:
    """MiB that each process has on that GPU; empty where the driver does not tell."""
    found = asked_driver("--query-compute-apps=pid,used_memory")
    return {int(pid): mib for pid, mib in found}


def asked_driver(question: str) -> list[list[float]]:
    """Lines of numbers; one with anything else, as ``[N/A]``, is left out."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", question, "--format=csv,noheader,nounits", "-i", visible]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = []
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            found.append([float(part) for part in line.split(",")])
    return found


# -- the soak -----------------------------------------------------------------------------------


@dataclass
class Soak:
    """What happened so far."""

    sent: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    short: int = 0  # answers with fewer tokens than asked for
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """An exception is kept as a failure of this."""
        try:
            yield
        except Exception as error:
            with self._lock:
                self.failures.append(f"{what}: {type(error).__name__}: {error}")

    def keep_busy(self, server: Any, until: float, worker: int, pictures: bool) -> None:
        """One client, a request after another, until then."""
        source = random.Random(worker * 1000 + int(until * 10) % 1000)
        kinds = {kind: often for kind, often in KINDS.items() if pictures or kind != "pictures"}
        while time.monotonic() < until and not self.failures:
            (kind,) = source.choices(list(kinds), list(kinds.values()))
            body, new = request(kind, source)
            found = None
            with self.noting(kind):
                if kind == "aborted":
                    server.abort(body, source)
                    found = new
                else:
                    found = server.generate(body, new)
            if found is None:
                return
            with self._lock:
                self.sent[kind] += 1
                if kind != "aborted":
                    self.tokens += found
                    self.short += found != new


def problems(
    soak: Soak,
    asked: list[list[dict[str, Any]]],
    memory: list[dict[str, float]],
    leak: float,
    log: str,
    failed: Sequence[str] = (),
) -> list[str]:
    """Why a soak failed, a line each; none: PASS.

    Args:
        asked: the probes' answers, of each time.
        memory: in MiB, the first after the first minute, the last at the end.
        leak: how many MiB more at the end are none.
        log: the server's.
        failed: patches whose code had an error, and ran stock's from then on.
    """
    told = [*soak.failures, *failed]
    if soak.short:
        told.append(f"{soak.short} answers had not all of their tokens")
    for number, answers in enumerate(asked[1:], 1):
        found = differences(asked[0], answers)
        if found["token_diffs"]:
            told.append(f"probes, time {number}: {found['token_diffs']} tokens changed")
    for kind in memory[0] if len(memory) > 1 else ():
        grown = memory[-1][kind] - memory[0][kind]
        if grown > leak:
            told.append(f"{kind} memory: {grown:.0f} MiB more than after the first minute")
    if died := DIED.search(log):
        told.append(f"the log has: {died[0]}")
    if not RETRACTED.search(log):
        told.append("the KV pool was never full: --max-total-tokens is too much for these clients")
    return told


def main(
    model: Annotated[str, typer.Option(help=" | ".join(geometry_mm.MODELS))] = "26b-a4b",
    layers: Annotated[int, typer.Option(help="Of the language model; 0: all")] = 6,
    patches: Annotated[
        str, typer.Option(help="Comma list; empty: all that are on by default")
    ] = "",
    stock: Annotated[bool, typer.Option(help="The same load on stock, as a control")] = False,
    minutes: Annotated[float, typer.Option(min=0.01)] = 10.0,
    pause: Annotated[
        float, typer.Option(min=0.001, help="Minutes between two times of the probes")
    ] = 1.0,
    clients: Annotated[int, typer.Option(min=1)] = 48,
    pictures: Annotated[bool, typer.Option(help="Requests with pictures")] = True,
    update: Annotated[bool, typer.Option(help="Write weights half-way")] = True,
    max_total_tokens: Annotated[
        int, typer.Option(help="Size of the KV pool: less than the clients' requests together")
    ] = 24576,
    mem_fraction: Annotated[float, typer.Option(help="SGLang's mem_fraction_static")] = 0.7,
    leak: Annotated[float, typer.Option(help="MiB that may be more at the end")] = 256.0,
    weight_range: Annotated[
        float, typer.Option(help="Random weights are uniform in +-this")
    ] = 3e-2,
    server_arguments: Annotated[
        str, typer.Option(help="More for launch_server, in one string")
    ] = "",
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-soak.csv"),
) -> None:
    """A patched server under mixed load."""
    end_on_sigterm()
    chosen = patches_of(patches)
    variant = STOCK if stock else PATCHED
    results = Results(model, layers or None, chosen)
    os.environ["BENCH_WEIGHT_RANGE"] = str(weight_range)
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    kept = scratch / "kept"
    os.environ["BENCH_CHECKPOINT"] = str(kept)
    folder = geometry_mm.write_model(scratch / "model", model, layers or None)
    arguments = launch_arguments(folder, clients, max_total_tokens, mem_fraction, server_arguments)
    arguments.remove("--disable-radix-cache")  # common beginnings are to be found
    log = out.with_name(f"{out.stem}-{variant}.log")

    def make(name: str) -> SoakedServer:
        return SoakedServer(name, chosen, arguments, log)

    soak, bodies = Soak(), probes(pictures)
    asked: list[list[dict[str, Any]]] = []
    memory: list[dict[str, float]] = []
    failed: list[str] = []
    started = time.monotonic()
    with servers(make, [variant]) as live:
        server: Any = live[variant]

        def ask() -> None:
            with soak.noting("probes"):
                server.idle()
                asked.append([server.tokens(body, PROBE_TOKENS) for body in bodies])

        ask()
        end, written = time.monotonic() + minutes * 60, not update
        while time.monotonic() < end and not soak.failures and server.process.poll() is None:
            until = min(end, time.monotonic() + pause * 60)
            with ThreadPoolExecutor(clients) as pool:
                for worker in range(clients):
                    pool.submit(soak.keep_busy, server, until, worker, pictures)
            if soak.failures or server.process.poll() is not None:
                break
            if not written and time.monotonic() > end - minutes * 30:
                with soak.noting("weights"):
                    server.write_back(kept)
                    console.print("weights written over themselves")
                written = True
            ask()
            if soak.failures:
                break
            memory.append(server.memory())
            done = f"{(time.monotonic() - started) / 60:.1f} min"
            console.print(f"{done}: {dict(soak.sent)}, {memory[-1]}", highlight=False)
            save(results, variant, len(memory), soak, asked, memory)
        if server.process.poll() is not None:
            soak.failures.append(f"the server ended with {server.process.poll()}")
        if variant == PATCHED:
            processes = descendants()
            for process in processes:
                lost = [row for row in process.patches if row["state"] == states.FAILED]
                failed += [
                    f"pid {process.pid}: {row['name']} failed: {row['reason']}" for row in lost
                ]
                rows = [row for row in process.patches if row["engaged"] or row in lost]
                if rows:
                    console.print(report.table(rows, f"pid {process.pid}"))
            if not any_ran({"patches": process.patches} for process in processes):
                failed.append(NOTHING_RAN)
    told = log.read_text(errors="replace")
    full = len(RETRACTED.findall(told))
    results.add(variant, "times requests were retracted", clients, 0, full, "times")
    results.save(out)
    found = problems(soak, asked, memory, leak, told, failed)
    for line in found:
        console.print(line, style="red", highlight=False, markup=False)
    total = sum(soak.sent.values())
    verdict = "FAIL" if found else "PASS"
    console.print(
        f"{verdict}: {total} requests, {soak.tokens} tokens, probes asked {len(asked)} times, "
        f"requests retracted {full} times"
    )
    if found:
        raise typer.Exit(1)


def save(
    results: Results,
    variant: str,
    number: int,
    soak: Soak,
    asked: list[list[dict[str, Any]]],
    memory: list[dict[str, float]],
) -> None:
    """Rows of one pause; the file is written at the end."""
    changed = differences(asked[0], asked[-1])
    for name, value, unit in (
        *((f"requests, {kind}", count, "requests") for kind, count in soak.sent.items()),
        ("tokens", soak.tokens, "tokens"),
        ("probe tokens that differ", changed["token_diffs"], "count"),
        ("probe logprobs that differ", changed["logprob_diffs"], "count"),
        *((f"memory, {kind}", mib, "MiB") for kind, mib in memory[-1].items()),
    ):
        results.add(variant, name, number, 0, value, unit)


if __name__ == "__main__":
    typer.run(main)
