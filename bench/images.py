"""Prompts with pictures through SGLang's real server: stock against patched, random weights.

    python bench/images.py --model 26b-a4b --layers 6 --patches vision_batch,vision_rope --together

Starts ``sglang.launch_server`` on a generated multimodal folder (language model at a Gemma 4
geometry, vision encoder at full size) and sends PNG images over HTTP. Per variant: time to first
token of one prompt alone and of all prompts at once, prompts per second, and greedy tokens with
their logprobs from prompts sent one at a time, compared between the variants, with stock again, and
with stock given other images, which shows what the comparison can see.
The patched server gets the package through ``sitecustomize_example``. One row of a CSV per
measurement, as in ``engine.py``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402
from rich.progress import Progress  # noqa: E402

from bench.common.comparing import differences, distance, require_any_ran  # noqa: E402
from bench.common.engines import end_on_sigterm, in_turn  # noqa: E402
from bench.common.options import patches_of  # noqa: E402
from bench.common.pictures import ImageServer, letters, prompt  # noqa: E402
from bench.common.results import Results  # noqa: E402
from bench.common.servers import console, launch_arguments, servers  # noqa: E402
from bench.common.turns import turn  # noqa: E402
from bench.common.variants import PATCHED, STOCK  # noqa: E402
from gemma4_turbo.cli import report  # noqa: E402
from gemma4_turbo.engine.counters import descendants  # noqa: E402
from gemma4_turbo.models import geometry, geometry_mm  # noqa: E402

AGAIN, OTHER_IMAGES = "stock again", "stock, other images"
CALLS = ("engaged", "captured", "declined")


def with_needed(patches: list[str], model: str, layers: int) -> list[str]:
    """The patches, and ``optional_kv`` for prefill graphs of KV-shared layers (E2B, E4B, not cut)."""
    shared = 0 if layers else geometry.GEOMETRIES[model].kv_shared_layers
    more = "mm_prefill_graph" in patches and "optional_kv" not in patches and shared
    return [*patches, "optional_kv"] if more else patches


def farthest(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """The largest distance of two logprobs, up to the first token that differs."""
    return max((distance(one, other)[1] for one, other in zip(a, b, strict=True)), default=0.0)


def main(
    model: Annotated[str, typer.Option(help=" | ".join(geometry_mm.MODELS))] = "26b-a4b",
    layers: Annotated[int, typer.Option(help="Of the language model; 0: all")] = 6,
    patches: Annotated[
        str, typer.Option(help="Comma list; empty: all that are on by default")
    ] = "",
    prompts: Annotated[int, typer.Option(min=1)] = 16,
    images: Annotated[int, typer.Option(min=0, help="Of a prompt; 0: text alone")] = 6,
    between: Annotated[
        int, typer.Option(min=0, help="Words behind each image; 0: images follow each other")
    ] = 0,
    side: Annotated[int, typer.Option(help="Pixels of an image's side")] = 480,
    soft_tokens: Annotated[
        int, typer.Option(help="Most tokens of an image: 70, 140, 280, 560, 1120")
    ] = 280,
    compared: Annotated[
        int, typer.Option(min=1, help="Prompts whose tokens are compared, one at a time")
    ] = 8,
    texts: Annotated[
        int, typer.Option(min=0, help="Prompts of text alone that are compared as well")
    ] = 0,
    longest: Annotated[int, typer.Option(min=5, help="Tokens of the longest of these")] = 3000,
    new_tokens: Annotated[int, typer.Option(min=2)] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    together: Annotated[bool, typer.Option(help="Both servers alive at once")] = False,
    max_total_tokens: Annotated[int, typer.Option(help="Size of the KV pool")] = 65536,
    mem_fraction: Annotated[float, typer.Option(help="SGLang's mem_fraction_static")] = 0.8,
    chunk: Annotated[int, typer.Option(help="SGLang's chunked_prefill_size")] = 8192,
    weight_range: Annotated[
        float, typer.Option(help="Random weights are uniform in +-this")
    ] = 3e-2,
    server_arguments: Annotated[
        str, typer.Option(help="More for launch_server, for both, in one string")
    ] = "",
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-images.csv"),
) -> None:
    """Stock against patched, prompts with images, the real server."""
    end_on_sigterm()
    chosen = with_needed(patches_of(patches), model, layers)
    results = Results(model, layers or None, chosen)
    os.environ["BENCH_WEIGHT_RANGE"] = str(weight_range)
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    folder = geometry_mm.write_model(scratch / "model", model, layers or None, soft_tokens)
    arguments = launch_arguments(
        folder,
        max(8, prompts),
        max_total_tokens,
        mem_fraction,
        f"--chunked-prefill-size {chunk} {server_arguments}",
    )

    def make(variant: str) -> ImageServer:
        return ImageServer(variant, chosen, arguments, out.with_name(f"{out.stem}-{variant}.log"))

    def bodies(round_: int) -> list[dict[str, Any]]:
        """New images every round: SGLang keeps the embeddings of those it has seen."""
        seeds = range((round_ + 3) * 10_000, (round_ + 3) * 10_000 + prompts)
        return [prompt(images, side, seed, between) for seed in seeds]

    same = bodies(-2)[:compared] + letters(texts, 4, longest, 12)
    answers: dict[str, list[dict[str, Any]]] = {}

    def measure(server: ImageServer, round_: int, keep: bool = True) -> None:
        """One prompt alone, then all at once."""
        sent = bodies(round_)
        body = prompt(images, side, (round_ + 3) * 10_000 + 9_999, between)
        alone = server.first_token(body, 2)
        started = time.perf_counter()
        with ThreadPoolExecutor(prompts) as pool:
            firsts = list(pool.map(lambda body: server.first_token(body, new_tokens), sent))
        elapsed = time.perf_counter() - started
        if keep:
            for quantity, count, value, unit in (
                ("first token, alone", 1, alone * 1e3, "ms"),
                ("first token, median", prompts, median(firsts) * 1e3, "ms"),
                ("first token, last", prompts, max(firsts) * 1e3, "ms"),
                ("all prompts", prompts, elapsed * 1e3, "ms"),
                ("throughput", prompts, prompts / elapsed, "prompts/s"),
            ):
                results.add(server.variant, quantity, count, round_, value, unit)

    def once(server: ImageServer) -> None:
        """Compiles what is compiled on first use, then the tokens, one prompt at a time."""
        measure(server, -1, keep=False)
        answers[server.variant] = [server.tokens(body, new_tokens) for body in same]
        if server.variant == STOCK:
            answers[AGAIN] = [server.tokens(body, new_tokens) for body in same]
            if images:  # what the comparison can see of the images at all
                answers[OTHER_IMAGES] = [
                    server.tokens({**body, "image_data": other["image_data"]}, new_tokens)
                    for body, other in zip(same, bodies(-3), strict=False)
                ]
        console.print(f"{server.variant}: chat with an image: {server.chat(side)}")

    rows: dict[str, dict[str, Any]] = {}

    def reports() -> None:
        """What the patches did, over all processes of the patched server."""
        for process in descendants():
            for row in process.patches:
                if row["state"] in ("active", "failed"):
                    sums = rows.setdefault(row["name"], {**row, **dict.fromkeys(CALLS, 0)})
                    sums |= {calls: sums[calls] + row[calls] for calls in CALLS}
                    if row["state"] == "failed":  # in one process is enough
                        sums |= {"state": "failed", "reason": row["reason"]}
        for name, row in rows.items():
            for calls in CALLS:
                results.add(PATCHED, f"{name} {calls}", prompts, 0, row[calls], "calls")
        if rows:
            console.print(report.table(list(rows.values()), "Patches, all processes of the server"))
        silent = [name for name, row in rows.items() if not row["engaged"]]
        if silent:
            console.print(f"installed but never engaged: {', '.join(silent)}", style="red")

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("starting servers", total=2 * (rounds + 1))
        for group in [[STOCK, PATCHED]] if together else [[STOCK], [PATCHED]]:
            with servers(make, group) as live:
                for server in live.values():
                    progress.update(task, description=f"warm-up: {server.variant}")
                    with turn():
                        once(server)
                    progress.advance(task)
                for round_ in range(rounds):
                    for server in in_turn(live, round_):
                        progress.update(task, description=f"round {round_}: {server.variant}")
                        with turn():
                            measure(server, round_)
                        progress.advance(task)
                reports()

    show(results, answers)
    results.save(out)
    require_any_ran("images.py", [{"patches": list(rows.values())}])


def show(results: Results, answers: dict[str, list[dict[str, Any]]]) -> None:
    """The comparison for the terminal and as rows, then the medians."""
    stock = answers[STOCK]
    lengths = sorted({answer["prompt"] for answer in stock})
    console.print(
        f"{len(stock)} prompts of {lengths[0]} to {lengths[-1]} tokens, "
        f"{len({tuple(answer['ids']) for answer in stock})} different outputs, "
        f"{len({tuple(answer['output']) for answer in stock})} by their logprobs"
    )
    for other in (name for name in (AGAIN, OTHER_IMAGES, PATCHED) if name in answers):
        found: dict[str, float] = dict(differences(stock, answers[other]))
        found["largest_distance"] = farthest(stock, answers[other])
        console.print(f"{STOCK} against {other}: {found}")
        for name in ("token_diffs", "logprob_diffs", "tokens", "logprobs", "largest_distance"):
            results.add(f"{STOCK} vs {other}", name, len(stock), 0, found[name], "count")
    summary = results.summary()
    timed = summary[summary["unit"].isin(["ms", "prompts/s"])]
    columns = [c for c in ("quantity", "x", "unit", STOCK, PATCHED, "ratio") if c in timed]
    console.print(timed[columns].to_string(index=False, float_format=lambda v: f"{v:.3f}"))


if __name__ == "__main__":
    typer.run(main)
