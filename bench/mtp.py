"""Speculative decoding with an MTP assistant in SGLang's own engine: stock against patched.

    python bench/mtp.py --model e4b --together
    python bench/mtp.py --model e4b --together --agreeing 0.7

Target and assistant are generated. Three engines: no speculation, stock's, and patched; together or
one after another, one busy at a time, rounds alternating. What is measured, as rows of a CSV:
milliseconds per verify step, its split into draft, verification and seed step from a profiler's
trace, tokens a second, accept length, and greedy tokens against those without speculation, one
prompt at a time and in batches, with the margin between the two best tokens where they first
differ. ``--stress 500`` ends with that many requests, aborts and simultaneous finishes among them;
stock's scheduler dies of it. With ``--agreeing`` every token and accept length is known beforehand,
and compared; otherwise weights are random and the assistant right by chance only. Needs a GPU and
transformers 5.8.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

from bench.common.turns import turn  # noqa: E402
from bench.engine import (  # noqa: E402
    ARGUMENTS,
    PATCHED,
    STOCK,
    Engine,
    Results,
    console,
    end_on_sigterm,
    in_turn,
)
from bench.models import assistant  # noqa: E402
from gemma4_turbo.cli import report  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

PLAIN = "no speculation"
PATCHES = "mtp_sync,mtp_chain,mtp_seed_graph,mtp_metadata,mtp_merge_batch,frozen_kv_views,kv_scales"
DRAFT_STEPS = 3
AGREEMENT_SEED = 11
Rows = list[dict[str, Any]]


class MtpEngine(Engine):
    """With the commands of `workers.mtp`; leaves nothing of its process group behind."""

    script = "workers/mtp.py"

    def stop(self) -> None:
        assert self.process.stdin is not None
        if self.process.stdin.closed:
            return  # stopped before; its number can be another's by now
        super().stop()
        with contextlib.suppress(ProcessLookupError):  # what a scheduler that died left
            os.killpg(self.process.pid, signal.SIGKILL)


def outlived(engine: Engine, do: Callable[[], None]) -> str | None:
    """What an engine died of in ``do``; None if it did not."""
    try:
        do()
    except (SystemExit, OSError) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            raise  # this process was told to end
        return cause_of_death(engine.log)
    return None


@contextlib.contextmanager
def started(make: Callable[[str], Engine], names: list[str]) -> Iterator[dict[str, Engine]]:
    """Engines at once, without those that do not start; stopped at the end.

    Other processes' timings wait until all have started; see `bench.common.turns`.
    """
    made: dict[str, Engine] = {}
    try:
        with turn(timed=False):
            made |= {name: make(name) for name in names}
            live = dict(made)
            for name, engine in made.items():
                cause = outlived(engine, engine.wait_ready)
                if cause is not None:
                    console.print(f"{name}: did not start: {cause} ({engine.log})")
                    live.pop(name).stop()
        yield live
    finally:
        for engine in made.values():
            engine.stop()


def prompts_of(count: int, longest: int, seed: int, vocab: int, words: bool) -> list[list[int]]:
    """Random tokens, prompts of 4 to ``longest``; ``words`` are the even ones."""
    source = random.Random(seed)
    lengths = [source.randrange(4, longest + 1) for _ in range(count)]
    bound = vocab // 2 if words else vocab
    ids = [[source.randrange(5, bound) for _ in range(length)] for length in lengths]
    return [[2 * token for token in one] for one in ids] if words else ids


# -- comparing ------------------------------------------------------------------------------------


def compare(truth: Rows, other: Rows) -> dict[str, Any]:
    """Tokens that differ, and what the truth's margin was where a sequence first does."""
    found: dict[str, Any] = {"sequences": len(truth), "tokens": 0, "token_diffs": 0, "first": []}
    for number, (one, two) in enumerate(zip(truth, other, strict=True)):
        wrong = [i for i, (x, y) in enumerate(zip(one["ids"], two["ids"], strict=True)) if x != y]
        found["tokens"] += len(one["ids"])
        found["token_diffs"] += len(wrong)
        if wrong:
            at, margins = wrong[0], one.get("margins")
            found["first"].append(
                {
                    "sequence": number,
                    "position": at,
                    "margin": margins[at] if margins else None,
                    "second best": margins and one["seconds"][at] == two["ids"][at],
                }
            )
    return found


def told(found: dict[str, Any]) -> str:
    """One line."""
    line = (
        f"{found['token_diffs']} of {found['tokens']} tokens, "
        f"{len(found['first'])} of {found['sequences']} sequences"
    )
    if not found["first"]:
        return line
    positions = sorted(first["position"] for first in found["first"])
    line += f"; first at {', '.join(map(str, positions[:12]))}"
    margins = [first["margin"] for first in found["first"] if first["margin"] is not None]
    if margins:
        second = sum(bool(first["second best"]) for first in found["first"])
        line += f"; margins there up to {max(margins):.4f} nats; the second best in {second}"
    return line


def accept_length(rows: Rows) -> float | None:
    """Tokens per verify step; the first token of a prompt needs none. None without speculation."""
    verified = sum(row["verified"] for row in rows)
    return sum(len(row["ids"]) - 1 for row in rows) / verified if verified else None


def expected(agreement: Any, ids: list[list[int]], new: int) -> Rows:
    """What an agreeing target says, and the verify steps it takes to."""
    return [
        {
            "ids": agreement.tokens(one[-1], new),
            "verified": agreement.verifications(one[-1], new, DRAFT_STEPS),
        }
        for one in ids
    ]


def cause_of_death(log: Path) -> str:
    """What the log says of the exception: that of the scheduler, else the last one."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    hit = [i for i, line in enumerate(lines) if "hit an exception" in line]
    named = [
        line.strip()[:300]
        for line in lines[hit[-1] if hit else 0 :]
        if re.match(r"^(\[.*\] )?\w+(\.\w+)*(Error|Exception)\b", line)
    ]
    if not named:
        return "no exception in the log"
    return named[0] if hit else named[-1]


# -- the run --------------------------------------------------------------------------------------


class Session:
    """Everything that was found so far."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.answers: dict[tuple[str, str], Rows] = {}  # by variant and how they were asked for
        self.splits: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
        self.reports: dict[str, Any] = {}
        self.stress: dict[str, str] = {}

    def timed(
        self, engine: Engine, batch: int, ids: list[list[int]], new: int, round_: int
    ) -> None:
        """Milliseconds a verify step (a token without speculation) and tokens a second."""
        answer = engine("step", ids=ids[:batch], new=new)
        if answer["steps"] <= 0 or answer["seconds"] <= 0:
            console.print(f"{engine.variant}: no time for {answer}")
            return
        ms = answer["seconds"] / answer["steps"] * 1e3
        rate = answer["tokens"] / answer["seconds"]
        self.results.add(engine.variant, "step", batch, round_, ms, "ms")
        self.results.add(engine.variant, "tokens a second", batch, round_, rate, "1/s")

    def stressed(self, engine: Engine, count: int, limit_s: float, words: bool) -> None:
        """Many requests; an engine that dies of them is a result too."""
        begun, answer = time.perf_counter(), {}

        def do() -> None:
            answer.update(engine("stress", count=count, limit_s=limit_s, seed=5, words=words))

        cause = outlived(engine, do)
        if cause is not None:
            seconds = time.perf_counter() - begun
            self.stress[engine.variant] = f"died after {seconds:.0f} s: {cause}"
            self.results.add(engine.variant, "stress: died", count, 0, 1, "count")
            return
        ended = answer["ended"]
        self.stress[engine.variant] = f"{ended}, {answer['seconds']:.0f} s"
        self.results.add(engine.variant, "stress: died", count, 0, 0, "count")
        for how, number in ended.items():
            self.results.add(engine.variant, f"stress: {how}"[:60], count, 0, number, "count")

    # -- telling

    def comparisons(self, agreement: Any, ids: list[list[int]], new: int) -> None:
        """Each variant against no speculation, stock against patched, batches against alone."""
        pairs = []
        for how in dict.fromkeys(how for _, how in self.answers):
            for variant in (STOCK, PATCHED):
                pairs.append(((PLAIN, how), (variant, how)))
            pairs.append(((STOCK, how), (PATCHED, how)))
        for variant in (PLAIN, STOCK, PATCHED):
            asked = [how for name, how in self.answers if name == variant]
            pairs += [((variant, asked[0]), (variant, how)) for how in asked[1:]]
        for one, other in pairs:
            if one in self.answers and other in self.answers:
                self._comparison(" ".join(one), " ".join(other), one, other)
        if agreement is not None and self.answers:
            truth = expected(agreement, ids, new)
            wanted = accept_length(truth)
            console.print(f"expected: accept length {wanted:.4f}")
            for key, rows in self.answers.items():
                found = compare(truth, rows)
                steps = sum(
                    x["verified"] != y["verified"] for x, y in zip(truth, rows, strict=True)
                )
                name = " ".join(key)
                console.print(
                    f"expected against {name}: {told(found)}; accept length {accept_length(rows)}"
                )
                self.results.add(
                    f"expected vs {name}",
                    "token_diffs",
                    len(rows),
                    0,
                    found["token_diffs"],
                    "count",
                )
                if key[0] != PLAIN:
                    self.results.add(
                        f"expected vs {name}", "verify steps differ", len(rows), 0, steps, "count"
                    )
            self.results.add("expected", "accept length", len(truth), 0, wanted or 0, "tokens")
        for (variant, how), rows in self.answers.items():
            length = accept_length(rows)
            if length is not None:
                self.results.add(variant, f"accept length, {how}", len(rows), 0, length, "tokens")

    def _comparison(self, name: str, other_name: str, one: Any, other: Any) -> None:
        found = compare(self.answers[one], self.answers[other])
        console.print(f"{name} against {other_name}: {told(found)}")
        for quantity in ("token_diffs", "tokens"):
            self.results.add(
                f"{name} vs {other_name}", quantity, found["sequences"], 0, found[quantity], "count"
            )
        margins = [first["margin"] for first in found["first"] if first["margin"] is not None]
        if margins:
            self.results.add(
                f"{name} vs {other_name}", "largest margin", len(margins), 0, max(margins), "nats"
            )

    def tables(self) -> None:
        """Splits by part, reports of the patches, stress, medians."""
        for (variant, batch), found in self.splits.items():
            steps = max((part["steps"] for part in found.values()), default=0)
            if not steps:
                console.print(f"{variant}, batch {batch}: no trace")
                continue
            table = Table(title=f"{variant}, batch {batch}: a verify step", title_justify="left")
            for heading in ("part", "GPU us", "kernels", "launches", "host us, profiled"):
                table.add_column(heading)
            for name, part in found.items():
                each = [part[key] / steps for key in ("gpu_us", "kernels", "launches", "host_us")]
                table.add_row(name, *(f"{value:.1f}" for value in each))
                label = name.removeprefix("mtp ")
                self.results.add(variant, f"{label}: GPU", batch, 0, each[0] / 1e3, "ms")
                self.results.add(variant, f"{label}: launches", batch, 0, each[2], "launches")
            console.print(table)
        self._host()
        for process in self.reports.get("processes", []):
            console.print(
                report.table(process["patches"], f"pid {process['pid']}: {process['command'][:80]}")
            )
        for variant, line in self.stress.items():
            console.print(f"stress, {variant}: {line}")
        summary = self.results.summary()
        if not summary.empty:
            columns = [*summary.columns[:3], PLAIN, STOCK, PATCHED, "ratio"]
            kept = summary[[c for c in columns if c in summary]].dropna(thresh=4)
            console.print(kept.to_string(index=False, float_format=lambda v: f"{v:.3f}"))

    def _host(self) -> None:
        """What of a step, measured without a profiler, no kernel accounts for."""
        frame = self.results.frame()
        if frame.empty or not self.splits:
            return
        timed = frame[frame["quantity"] == "step"].groupby(["variant", "x"])["value"].median()
        for (variant, batch), found in self.splits.items():
            steps = max((part["steps"] for part in found.values()), default=0)
            if steps and (variant, batch) in timed.index:
                busy = sum(part["gpu_us"] for part in found.values()) / steps / 1e3
                idle = float(timed[(variant, batch)]) - busy
                self.results.add(variant, "step without a kernel", batch, 0, idle, "ms")


def main(
    model: Annotated[str, typer.Option(help=" | ".join(geometry.GEOMETRIES))] = "e4b",
    layers: Annotated[int, typer.Option(help="Fewer layers of the target; 0: all")] = 0,
    patches: Annotated[str, typer.Option(help="Comma list")] = PATCHES,
    variants: Annotated[
        str, typer.Option(help="Comma list of plain, stock, patched")
    ] = "plain,stock,patched",
    agreeing: Annotated[
        float, typer.Option(help="Part of the words for which target and assistant agree; -1: off")
    ] = -1.0,
    batches: Annotated[str, typer.Option(help="Batch sizes timed; empty: none")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Tokens of a timing, beyond the first 8")] = 128,
    equality: Annotated[int, typer.Option(help="Prompts of the comparison; 0: none")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens per prompt of it")] = 64,
    split: Annotated[int, typer.Option(help="Steps under the profiler; 0: none")] = 12,
    stress: Annotated[int, typer.Option(help="Requests of the stress test; 0: none")] = 0,
    stress_limit: Annotated[float, typer.Option(help="Seconds for it")] = 150.0,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt")] = 700,
    unit_norms: Annotated[
        bool, typer.Option(help="Norms around one: what attention reads decides about tokens")
    ] = True,
    centroids: Annotated[bool, typer.Option(help="The assistant's head over centroids")] = False,
    kv: Annotated[str, typer.Option(help="SGLang's kv_cache_dtype")] = "auto",
    together: Annotated[bool, typer.Option(help="All engines alive at once")] = False,
    graphs: Annotated[bool, typer.Option(help="CUDA graphs")] = True,
    max_total_tokens: Annotated[int, typer.Option(help="Size of the KV pool")] = 16384,
    mem_fraction: Annotated[float, typer.Option(help="SGLang's mem_fraction_static")] = 0.85,
    weight_range: Annotated[
        float, typer.Option(help="Random weights are uniform in +-this")
    ] = 3e-2,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-mtp.csv"),
) -> None:
    """Speculative decoding, stock against patched."""
    known = {"plain": PLAIN, "stock": STOCK, "patched": PATCHED}
    asked = [name for name in variants.split(",") if name]
    if not asked or not set(asked) <= set(known):
        raise typer.BadParameter(f"variants must be some of {', '.join(known)}, got {variants!r}")
    if centroids and agreeing >= 0:
        raise typer.BadParameter("--agreeing is for an assistant without --centroids")
    chosen = [name for name in patches.split(",") if name]
    sizes = [int(size) for size in batches.split(",") if size]
    largest = max([*sizes, 8])
    words = agreeing >= 0
    results = Results(model, layers or None, chosen)
    results.base["weights"] = f"agreeing {agreeing}" if words else "random"
    results.base["kv"] = kv
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    target, draft = assistant.write_pair(scratch, model, layers or None, centroids, words)
    agreement = None
    os.environ |= {"BENCH_WEIGHT_RANGE": str(weight_range), "BENCH_RANGES": "1"}
    os.environ["BENCH_UNIT_NORMS"] = "1" if unit_norms and not words else "0"
    os.environ["BENCH_AGREEING"] = ""
    if words:
        from bench.inside.agreeing import Agreement

        agreement = Agreement(geometry.VOCABULARY, agreeing, AGREEMENT_SEED)
        width = assistant.config(model)["text_config"]["hidden_size"] // 2
        os.environ["BENCH_AGREEING"] = f"{agreeing}:{AGREEMENT_SEED}:{width}"
    arguments: dict[str, Any] = {
        "model_path": str(target),
        **ARGUMENTS,
        "disable_radix_cache": True,
        "context_length": 8192,
        "max_running_requests": largest,
        "max_total_tokens": max_total_tokens,
        "mem_fraction_static": mem_fraction,
        "kv_cache_dtype": kv,
        "cuda_graph_max_bs": largest,
        "disable_cuda_graph": not graphs,
        "disable_piecewise_cuda_graph": True,
    }
    speculation = assistant.speculation(draft, DRAFT_STEPS)

    def make(variant: str) -> Engine:
        log = out.with_name(f"{out.stem}-{variant.replace(' ', '_')}.log")
        log.unlink(missing_ok=True)
        return MtpEngine(
            variant, chosen, arguments if variant == PLAIN else arguments | speculation, log
        )

    session = Session(results)
    compared = prompts_of(equality, longest, 99, geometry.VOCABULARY, words)

    def once(engine: Engine) -> None:
        if equality:
            more = {"ids": compared, "new": new_tokens, "margins": engine.variant == PLAIN}
            for batch in (1, 8):
                how = "alone" if batch == 1 else f"in batches of {batch}"
                rows = engine("greedy", batch=batch, **more)["rows"]
                session.answers[engine.variant, how] = rows
        if split and engine.variant != PLAIN:
            for size in sizes:
                ids = prompts_of(size, longest, 7, geometry.VOCABULARY, words)
                session.splits[engine.variant, size] = engine("split", ids=ids, steps=split)[
                    "parts"
                ]

    def measure(engine: Engine, round_: int) -> None:
        for size in sizes:
            ids = prompts_of(size, longest, 50 + round_, geometry.VOCABULARY, words)
            session.timed(engine, size, ids, steps, round_)

    def last(engine: Engine) -> None:
        if engine.variant == PATCHED:
            session.reports = engine("status")
        if stress and engine.variant != PLAIN:
            session.stressed(engine, stress, stress_limit, words)
            if engine.variant == PATCHED and "died" not in session.stress[PATCHED]:
                session.reports = engine("status")

    def run() -> None:
        names = [known[name] for name in known if name in asked]
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("starting engines", total=len(names) * (rounds + 3))

            def each(live: dict[str, Any], name: str, number: int, do: Any) -> None:
                for engine in in_turn(live, number):
                    progress.update(task, description=f"{name}: {engine.variant}")
                    cause = outlived(engine, partial(do, engine))
                    if cause is not None:  # the others go on
                        console.print(f"{engine.variant}: died in {name}: {cause} ({engine.log})")
                        del live[engine.variant]
                    progress.advance(task)

            groups = [names] if together else [[name] for name in names]
            for group in groups:
                with started(make, group) as live:
                    each(live, "warm-up", 0, lambda engine: measure(engine, -1))
                    for number in range(rounds):
                        each(live, f"round {number}", number, lambda e, r=number: measure(e, r))
                    each(live, "tokens", 0, once)
                    # Patched first: stock's engine does not outlive its stress test.
                    each(live, "stress", 1, last)

    end_on_sigterm()
    try:
        run()
    finally:  # where a limit on its time cuts a run off, what there is still counts
        results.rows = [row for row in results.rows if row["round"] >= 0]
        session.comparisons(agreement, compared, new_tokens)
        session.tables()
        results.save(out)


if __name__ == "__main__":
    typer.run(main)
