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

    python bench/mtp.py --model e4b --together --kv-cache-dtype fp8_e4m3 --kv-scales 0.5:0.25

An 8-bit KV cache with scales in the target's layers that own one, for `kv_scales`: stock's assistant and the
target's KV-shared layers read it as if the scales were 1. The three engines share all such arguments.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402
from rich.progress import Progress  # noqa: E402

from bench.common.comparing import require_any_ran  # noqa: E402
from bench.common.engines import (  # noqa: E402
    Engine,
    console,
    end_on_sigterm,
    in_turn,
    outlived,
    started,
)
from bench.common.options import patches_of  # noqa: E402
from bench.common.results import Results  # noqa: E402
from bench.common.variants import ARGUMENTS, PATCHED, STOCK  # noqa: E402
from bench.models import assistant  # noqa: E402
from bench.speculation.comparing import DRAFT_STEPS, PLAIN  # noqa: E402
from bench.speculation.engine import MtpEngine  # noqa: E402
from bench.speculation.session import Session  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

PATCHES = "mtp_sync,mtp_chain,mtp_seed_graph,mtp_metadata,mtp_merge_batch,frozen_kv_views,kv_scales"
AGREEMENT_SEED = 11


def prompts_of(count: int, longest: int, seed: int, vocab: int, words: bool) -> list[list[int]]:
    """Random tokens, prompts of 4 to ``longest``; ``words`` are the even ones."""
    source = random.Random(seed)
    lengths = [source.randrange(4, longest + 1) for _ in range(count)]
    bound = vocab // 2 if words else vocab
    ids = [[source.randrange(5, bound) for _ in range(length)] for length in lengths]
    return [[2 * token for token in one] for one in ids] if words else ids


def _of_an_8_bit_cache(scales: str, dtype: str) -> None:
    """typer.BadParameter, if these are no two scales, or of a cache that has none."""
    try:
        right = len(values := [float(part) for part in scales.split(":")]) == 2 and min(values) > 0
    except ValueError:
        right = False
    if not right:
        raise typer.BadParameter(f"--kv-scales must be K:V, two numbers above 0, got {scales!r}")
    if not dtype.startswith("fp8"):
        raise typer.BadParameter(f"--kv-scales needs an 8-bit --kv-cache-dtype, got {dtype!r}")


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
    kv: Annotated[
        str, typer.Option("--kv-cache-dtype", help="SGLang's; fp8_e4m3, fp8_e5m2, ...")
    ] = "auto",
    kv_scales: Annotated[
        str, typer.Option(help="K:V, scales of an 8-bit KV cache; empty: none, as if 1")
    ] = "",
    together: Annotated[bool, typer.Option(help="All engines alive at once")] = False,
    graphs: Annotated[bool, typer.Option(help="CUDA graphs")] = True,
    prefill_graphs: Annotated[
        bool,
        typer.Option(
            help="Those of prefill as SGLang has them; stock E2B, E4B do not start with them"
        ),
    ] = False,
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
    if kv_scales:
        _of_an_8_bit_cache(kv_scales, kv)
    chosen = patches_of(patches)
    sizes = [int(size) for size in batches.split(",") if size]
    largest = max([*sizes, 8])
    words = agreeing >= 0
    results = Results(model, layers or None, chosen)
    results.base["weights"] = f"agreeing {agreeing}" if words else "random"
    results.base["kv"] = kv
    results.base["kv_scales"] = kv_scales
    results.base["prefill_graphs"] = graphs and prefill_graphs
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    target, draft = assistant.write_pair(scratch, model, layers or None, centroids, words)
    agreement = None
    os.environ |= {"BENCH_WEIGHT_RANGE": str(weight_range), "BENCH_RANGES": "1"}
    os.environ["BENCH_UNIT_NORMS"] = "1" if unit_norms and not words else "0"
    os.environ["BENCH_KV_SCALES"] = kv_scales
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
        "disable_piecewise_cuda_graph": not (graphs and prefill_graphs),
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
            session.stressed(engine, stress, stress_limit, agreement)
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
    if session.reports:
        require_any_ran("mtp.py", session.reports["processes"])


if __name__ == "__main__":
    typer.run(main)
