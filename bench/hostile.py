"""Proof on a GPU that the package never changes answers, loses files or ends servers.

    python bench/hostile.py                          # all scenarios, under nine minutes on one GPU
    python bench/hostile.py --scenarios llama,hooks --at-once 4

Starts SGLang's real server on small checkpoints with random weights, stock (``GEMMA4_TURBO=0``) and
patched (nothing set, found through the entry point), several at once, sends all of them the same
greedy requests and compares tokens and logprobs:

* ``moe``: a Gemma 4 with real head sizes and 128 experts. Patched as it comes, with
  ``GEMMA4_TURBO_PROFILE=exact`` (must be equal bit for bit), and so in hostile surroundings: with a state
  folder that is open to everybody and full of pipes, sockets, links and foreign JSON, or whose default
  place another user has taken, with folders on PYTHONPATH that cannot be searched, are none, or are
  zips, and with a ``sitecustomize`` that raises. Nothing of that may be touched.
* ``hooks``: the same model with ``--forward-hooks``, which must be called and must change answers.
* ``fp8``, ``awq``, ``marlin``: quantised by SGLang at start; an AWQ checkpoint in fp16; one in bf16
  that SGLang runs by Marlin.
* ``llama``: no Gemma 4. Equal bit for bit, and every patch says why it stands aside.

With `tolerance` patches tokens may differ where stock's own two best are within ``--tie`` nats, or where
stock itself differs with its prompts in one batch (the floor, in the notes): counted, never hidden. While a patched server runs,
``gemma4_turbo doctor --json`` is asked in its environment. All that was seen goes to ``$OUT``:
``rows.json``, ``doctor.json``, ``answers.json.gz``, ``logs.tar.gz``. Exit 1 on FAIL.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402

from bench.common.engines import end_on_sigterm  # noqa: E402
from bench.common.servers import console  # noqa: E402
from bench.proof.rows import Row, summary  # noqa: E402
from bench.proof.run import STARTED, Bench  # noqa: E402
from bench.proof.scenarios import SCENARIOS  # noqa: E402


def main(
    scenarios: Annotated[
        str, typer.Option(help=f"Comma list of {', '.join(s.name for s in SCENARIOS)}; empty: all")
    ] = "",
    at_once: Annotated[int, typer.Option(min=2, help="Servers at the same time")] = 9,
    limit: Annotated[float, typer.Option(help="Seconds until what still runs is ended")] = 520,
    start_limit: Annotated[float, typer.Option(help="Seconds for a server to start")] = 150,
    tie: Annotated[
        float, typer.Option(help="Nats between stock's best tokens that count as equally good")
    ] = 0.1,
    most_distance: Annotated[float, typer.Option(help="Of logprobs, in nats")] = 0.5,
    mem_fraction: Annotated[
        float, typer.Option(help="SGLang's mem_fraction_static; pools are small all the same")
    ] = 0.7,
    server_arguments: Annotated[
        str, typer.Option(help="More for launch_server, for all, in one string")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for what was seen; default: $OUT, else a new one")
    ] = None,
) -> None:
    """All scenarios, stock against patched."""
    end_on_sigterm()
    names = [name for name in scenarios.split(",") if name]
    unknown = set(names) - {scenario.name for scenario in SCENARIOS}
    if unknown:
        raise typer.BadParameter(f"--scenarios: no scenario is called {', '.join(sorted(unknown))}")
    chosen = [s for s in SCENARIOS if not names or s.name in names]
    out = out or Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gemma4_turbo-hostile-"))
    # Short: SGLang makes sockets below, whose paths are limited.
    scratch = Path(tempfile.mkdtemp(prefix="g4h-", dir="/tmp"))
    limits = {"start": start_limit, "tie": tie, "distance": most_distance, "memory": mem_fraction}
    bench = Bench(out, scratch, at_once, limits)
    bench.more = server_arguments.split()
    pool = ThreadPoolExecutor(len(chosen))
    try:
        if any(scenario.model == "marlin" for scenario in chosen):
            bench.prebuild()
        futures = []
        for scenario in chosen:
            futures.append(pool.submit(bench.run, scenario))
            time.sleep(0.2)  # the models are written in this order
        left = max(1.0, limit - (time.monotonic() - STARTED))
        if wait(futures, timeout=left).not_done:
            bench.say("the time is up: what still runs is ended")
            bench.stop()
            wait(futures, timeout=15)
    finally:
        bench.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        bench.cross_checks()
        bench.save()
        started = {row.scenario for row in bench.rows}
        bench.rows += [
            Row(s.name, run, problems=["not begun"])
            for s in chosen
            if s.name not in started
            for run in s.runs
        ]
        for row in bench.rows:
            for line in row.problems:
                bench.say(f"{row.scenario}, {row.run}: {line}")
        console.print(summary(bench.rows))
        failed = [row for row in bench.rows if row.verdict == "FAIL"]
        unseen = [row for row in bench.rows if row.verdict == "NOT SHOWN"]
        aside = f", {len(unseen)} not shown: stock does not start" if unseen else ""
        shown = len(bench.rows) > len(unseen)
        verdict = "PASS" if shown and not failed else "FAIL"
        print(f"{verdict}: {len(failed)} of {len(bench.rows)} failed{aside}", flush=True)
        shutil.rmtree(scratch, ignore_errors=True)
    # Threads that wait for what no longer comes do not hold the process.
    sys.stdout.flush()
    os._exit(0 if verdict == "PASS" else 1)


if __name__ == "__main__":
    typer.run(main)
