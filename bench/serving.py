"""``sglang.bench_serving`` against SGLang's real server: stock and patched, random weights.

    python bench/serving.py --gpus 0,1

Both servers hold a generated multimodal model folder, as Gemma 4's published checkpoints are. The
requests are SGLang's own ``random-ids`` workload: 80 prompts of 1024 tokens, 256 new tokens each, 8 a
second, at most 64 at once. Rounds alternate between the variants; one row of a CSV per measurement.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402
from rich.progress import Progress  # noqa: E402

from bench.common.engines import end_on_sigterm, in_turn  # noqa: E402
from bench.common.load import environment, load_arguments, measured  # noqa: E402
from bench.common.options import patches_of  # noqa: E402
from bench.common.results import Results  # noqa: E402
from bench.common.servers import Server, console, launch_arguments, servers  # noqa: E402
from bench.common.turns import turn  # noqa: E402
from bench.common.variants import PATCHED, STOCK  # noqa: E402
from bench.workers.load import LoadClient  # noqa: E402
from gemma4_turbo.cli import report  # noqa: E402
from gemma4_turbo.engine.counters import descendants  # noqa: E402
from gemma4_turbo.models import geometry, geometry_mm  # noqa: E402


def placed(gpus: str) -> dict[str, str]:
    """The GPU of each server, from two names with a comma between them; nothing from nothing."""
    names = [name for name in gpus.split(",") if name]
    if gpus and len(set(names)) != 2:
        raise typer.BadParameter(f"--gpus must be two different GPUs, as 0,1; got {gpus!r}")
    return dict(zip((STOCK, PATCHED), names, strict=False))


def require_room(server: Server, tokens: int) -> None:
    """Exit where memory was left for fewer tokens: requests would wait that do not in the other server."""
    found = server.pool()
    if found < tokens:
        sys.exit(
            f"serving.py: the {server.variant} server has room for {found} tokens, not {tokens}: "
            "lower --max-total-tokens, or leave out --together"
        )


def main(
    model: Annotated[str, typer.Option(help=" | ".join(geometry.GEOMETRIES))] = "26b-a4b",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all")] = 0,
    patches: Annotated[
        str, typer.Option(help="Comma list; empty: all that are on by default")
    ] = "",
    also: Annotated[str, typer.Option(help="Comma list of patches besides these")] = "",
    prompts: Annotated[int, typer.Option(min=1)] = 80,
    input_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    output_tokens: Annotated[int, typer.Option(min=1)] = 256,
    rate: Annotated[float, typer.Option(help="Requests a second")] = 8.0,
    concurrency: Annotated[int, typer.Option(help="At most so many at once")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    together: Annotated[bool, typer.Option(help="Both servers alive at once, on one GPU")] = False,
    gpus: Annotated[
        str, typer.Option(help="Two GPUs, as 0,1: both servers alive at once, one on each")
    ] = "",
    max_total_tokens: Annotated[int, typer.Option(help="Size of the KV pool")] = 131072,
    mem_fraction: Annotated[float, typer.Option(help="SGLang's mem_fraction_static")] = 0.85,
    server_arguments: Annotated[
        str, typer.Option(help="More for launch_server, for both, in one string")
    ] = "",
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-serving.csv"),
) -> None:
    """Stock against patched under load."""
    end_on_sigterm()
    chosen, besides = patches_of(patches), patches_of(also, "--also")
    places = placed(gpus)
    results = Results(model, layers or None, [*(chosen or ["all"]), *besides])
    os.environ.setdefault("BENCH_WEIGHT_RANGE", "0.03")
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    folder = geometry_mm.write_model(scratch / "model", model, layers or None)
    arguments = launch_arguments(
        folder, concurrency, max_total_tokens, mem_fraction, server_arguments
    )
    requests = {
        "num-prompts": prompts,
        "random-input-len": input_tokens,
        "random-output-len": output_tokens,
        "request-rate": rate,
        "max-concurrency": concurrency,
    }

    # One process for each server: both warm up at the same time.
    clients = {variant: LoadClient(environment(scratch)) for variant in (STOCK, PATCHED)}

    def make(variant: str) -> Server:
        log = out.with_name(f"{out.stem}-{variant}.log")
        return Server(variant, chosen, arguments, log, besides, places.get(variant, ""))

    def measure(server: Server, round_: int) -> None:
        """One run; round -1 only compiles what is compiled on first use."""
        told = scratch / f"{server.variant}-{round_}.jsonl"
        try:
            clients[server.variant].run(load_arguments(server.port, folder, requests, told))
        except RuntimeError as error:
            sys.exit(f"serving.py: {server.variant}: {error}")
        found = measured(told.read_text().splitlines()[-1], prompts)
        if round_ < 0:
            return
        for name, value, unit in found:
            results.add(server.variant, name, prompts, round_, value, unit)
        text = ", ".join(f"{name} {value:.1f} {unit}" for name, value, unit in found)
        console.print(f"{server.variant}, round {round_}: {text}")  # a run may not get to its end

    def run() -> None:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("starting servers", total=2 * (rounds + 1))
            at_once = together or bool(places)
            for group in [[STOCK, PATCHED]] if at_once else [[STOCK], [PATCHED]]:
                with servers(make, group) as live:
                    for server in live.values():
                        require_room(server, max_total_tokens)
                    progress.update(task, description="warm-up")
                    with turn(), ThreadPoolExecutor() as pool:
                        # The same load, so that no shape is new to the measured rounds.
                        list(pool.map(lambda server: measure(server, -1), live.values()))
                    progress.advance(task, len(live))
                    for round_ in range(rounds):
                        for server in in_turn(live, round_):
                            progress.update(task, description=f"round {round_}: {server.variant}")
                            with turn():
                                measure(server, round_)
                            progress.advance(task)
                    for process in descendants():
                        rows = [row for row in process.patches if row["state"] == "active"]
                        if any(row["engaged"] for row in rows):
                            console.print(report.table(rows, f"pid {process.pid}"))

    try:
        run()
    finally:  # where a limit on its time cuts a run off, what there is still counts
        for client in clients.values():
            client.stop()
        summary = results.summary()
        if not summary.empty:
            columns = [
                c for c in ("quantity", "x", "unit", STOCK, PATCHED, "ratio") if c in summary
            ]
            told = summary[columns].to_string(index=False, float_format=lambda v: f"{v:.3f}")
            console.print(told)
        results.save(out)


if __name__ == "__main__":
    typer.run(main)
