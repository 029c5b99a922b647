"""Stock against patched in SGLang's own engine, at a Gemma 4 geometry with random weights.

    python bench/engine.py --model 26b-a4b --patches router --together

Every measurement is one row of a CSV: GPU, versions, variant, quantity, value. Rounds alternate
between the variants; reported are medians and the ratio patched / stock from this one run.
``--together`` keeps both engines alive at once (two models must fit on the GPU), otherwise each
variant's engine is started afresh for every round.

``--quantization`` has SGLang quantise the drawn weights, in both engines: a decode step with FP8 weights at
a model's real sizes. Formats that exist as checkpoints alone (W4A16, AWQ, GPTQ) cannot be drawn.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.common.comparing import differences, divergence, require_any_ran  # noqa: E402
from bench.common.engines import (  # noqa: E402
    Engine,
    console,
    end_on_sigterm,
    engines,
    fate,
    in_turn,
)
from bench.common.options import parse_prefill, patches_of  # noqa: E402
from bench.common.results import Results  # noqa: E402
from bench.common.variants import (  # noqa: E402
    ARGUMENTS,
    BITS,
    CHUNKS,
    CONTROL,
    EXACT,
    PATCHED,
    PIECEWISE,
    STOCK,
)
from gemma4_turbo.cli import report  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

LONGEST = 700


class Piecewise(StrEnum):
    """Which engines have piecewise CUDA graphs of prefill."""

    STOCKS = "stock"
    PATCHED = "patched"
    NEITHER = "neither"


class Quantization(StrEnum):
    """What SGLang makes of random weights as it loads them.

    Both of its names for FP8 quantise linear layers by row, activations by token. They differ in the experts:
    ``fp8`` has a scale for each expert and one for all activations, ``w8a8_fp8`` one for each row and token.
    """

    NONE = "none"
    FP8 = "fp8"
    W8A8_FP8 = "w8a8_fp8"


CLASSES = {
    "sums over GPUs": r"nccl|cross_device_reduce|all_?reduce|one_shot|two_shot|multimem",
    "norms": r"norm|_tail",
}
"""Kernels by name, whose share of a step is shown and kept; a name is of the first class that fits."""
EAGER = {"disable_cuda_graph": True, "disable_piecewise_cuda_graph": True}


def by_class(kernels: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Launches and microseconds of each of `CLASSES`, of all that a profile has counted."""
    found = dict.fromkeys(CLASSES, (0.0, 0.0))
    for name, (count, microseconds) in kernels.items():
        for kind, pattern in CLASSES.items():
            if re.search(pattern, name, re.IGNORECASE):
                before = found[kind]
                found[kind] = before[0] + count, before[1] + microseconds
                break
    return found


def main(
    model: Annotated[str, typer.Option(help=" | ".join(geometry.GEOMETRIES))] = "26b-a4b",
    patches: Annotated[
        str,
        typer.Option(help="Comma list; exact: all bitwise ones; empty: all that are on by default"),
    ] = "",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all")] = 0,
    batches: Annotated[str, typer.Option(help="Decode batch sizes; empty: none")] = "1,8,32,64",
    prefill: Annotated[
        str, typer.Option(help="Comma list of BATCHxLENGTH or BATCHxLENGTH+TOKENS; empty: none")
    ] = "8x4096",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    equality: Annotated[
        int, typer.Option(help="Prompts of the bit-for-bit comparison; 0: none")
    ] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens per prompt of that comparison")] = 64,
    longest: Annotated[
        int,
        typer.Option(
            min=5,
            help="Tokens of its longest prompt; for 3000, --max-total-tokens 131072 keeps 64 at once",
        ),
    ] = LONGEST,
    control: Annotated[
        bool, typer.Option(help="Also compare stock with a second stock engine")
    ] = True,
    bits: Annotated[
        bool,
        typer.Option(help="Also compare stock with an engine that has the bitwise patches alone"),
    ] = False,
    breakdown: Annotated[
        int, typer.Option(help="Profile decoding at this batch size; 0: none")
    ] = 32,
    update: Annotated[
        bool, typer.Option(help="Also compare after a weight update in the running engines")
    ] = False,
    kl: Annotated[
        int, typer.Option(help="Prompts of the KL divergence, and of stock's own; 0: none")
    ] = 0,
    prompt_logprobs: Annotated[
        bool,
        typer.Option(help="Compare logprobs of the prompts' ends as well; `yoco` declines these"),
    ] = True,
    kl_new: Annotated[int, typer.Option(min=1, help="Tokens generated for it")] = 1,
    kl_chunk: Annotated[
        int, typer.Option(help="Also the divergence of stock with chunks of so many tokens; 0: not")
    ] = 0,
    kl_exact: Annotated[
        bool, typer.Option(help="Also how far stock and patched are from attention in fp32")
    ] = False,
    together: Annotated[bool, typer.Option(help="Both engines alive at once")] = False,
    graphs: Annotated[bool, typer.Option(help="CUDA graphs, decode and piecewise prefill")] = True,
    also: Annotated[
        str, typer.Option(help="Comma list of patches besides --patches, off by default")
    ] = "",
    attention_backend: Annotated[str, typer.Option(help="SGLang's")] = "triton",
    stock_backend: Annotated[
        str, typer.Option(help="Stock's own attention backend; empty: the same")
    ] = "",
    piecewise: Annotated[
        Piecewise,
        typer.Option(
            help="Piecewise CUDA graphs of prefill: as SGLang has it (E2B, E4B: in neither engine, as "
            "stock cannot start with them), in the patched engine only, or in neither"
        ),
    ] = Piecewise.STOCKS,
    stock_piecewise: Annotated[
        bool, typer.Option(help="E2B, E4B: also show how stock fails with piecewise graphs")
    ] = False,
    max_total_tokens: Annotated[int, typer.Option(help="Size of the KV pool")] = 49152,
    mem_fraction: Annotated[float, typer.Option(help="SGLang's mem_fraction_static")] = 0.85,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel size")] = 1,
    quantization: Annotated[
        Quantization,
        typer.Option(
            help="SGLang's, of the random weights in both engines; W4A16 needs a checkpoint"
        ),
    ] = Quantization.NONE,
    weight_range: Annotated[
        float, typer.Option(help="Random weights are uniform in +-this")
    ] = 3e-2,
    unit_norms: Annotated[
        bool, typer.Option(help="Norms around one: what attention reads decides about tokens")
    ] = False,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-engine.csv"),
) -> None:
    """Stock against patched, whole engine."""
    chosen = patches_of(patches)
    sizes = [int(size) for size in batches.split(",") if size]
    prefills = [parse_prefill(text) for text in prefill.split(",") if text]
    besides = patches_of(also, "--also")
    results = Results(model, layers or None, [*(chosen or ["all"] * bool(besides)), *besides], tp)
    results.base["attention_backend"] = attention_backend
    results.base["stock_backend"] = stock_backend or attention_backend
    results.base["longest_prompt"] = longest
    results.base["quantization"] = quantization.value
    os.environ["BENCH_WEIGHT_RANGE"] = str(weight_range)
    os.environ["BENCH_UNIT_NORMS"] = str(int(unit_norms))
    results.base["norm_weights"] = "around one" if unit_norms else "around zero"
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    folder = geometry.write_model(scratch / "model", model, layers or None)
    arguments: dict[str, Any] = {
        "model_path": str(folder),
        **ARGUMENTS,
        "attention_backend": attention_backend,
        "disable_radix_cache": True,
        "max_total_tokens": max_total_tokens,
        "mem_fraction_static": mem_fraction,
        "tp_size": tp,
        "cuda_graph_max_bs": max([*sizes, equality, 1]),
    }
    if quantization != Quantization.NONE:
        arguments["quantization"] = quantization.value
    if not graphs:
        arguments |= EAGER
    shares = geometry.GEOMETRIES[model].kv_shared_layers > 0
    if shares or piecewise != Piecewise.STOCKS:
        # Stock 0.5.12.post1 cannot start models that share KV with piecewise graphs.
        arguments["disable_piecewise_cuda_graph"] = True
    results.base["piecewise"] = piecewise.value

    def make(variant: str) -> Engine:
        log = out.with_name(f"{out.stem}-{variant.split()[-1]}.log")
        changed: dict[str, Any] = {}
        asked_for = variant == PATCHED and graphs and piecewise == Piecewise.PATCHED
        if asked_for or variant == PIECEWISE:
            changed = {"disable_piecewise_cuda_graph": False}
        elif variant == EXACT:
            changed = EAGER
        elif variant.startswith(CHUNKS):
            changed = {"chunked_prefill_size": kl_chunk}
        if stock_backend and variant not in (PATCHED, BITS):
            changed["attention_backend"] = stock_backend
        return Engine(variant, chosen, {**arguments, **changed}, log, besides)

    compared = {"count": equality, "new": new_tokens, "seed": 99, "longest": longest}
    compared["tail"] = 16 if prompt_logprobs else 0
    asked = {"count": kl, "sample": 1024, "seed": 97, "new": kl_new}
    asked["tail"] = 8 if prompt_logprobs else 0
    answers: dict[str, list[dict[str, Any]]] = {}
    profiles: dict[str, dict[str, Any]] = {}
    distributions: dict[str, list[dict[str, Any]]] = {}
    reports: dict[str, dict[str, Any]] = {}

    def measure(engine: Engine, round_: int) -> None:
        for size in sizes:
            length = 128 if size == 1 else 512
            value = engine("decode", batch=size, length=length, seed=round_)["value"]
            results.add(engine.variant, "decode step", size, round_, value, "ms")
        for count, length, new in prefills:
            value = engine("prefill", batch=count, length=length, seed=round_, new=new)["value"]
            name = f"prefill of {length}" + (f" and {new} tokens" if new > 1 else "")
            results.add(engine.variant, name, count, round_, value, "ms")

    def once(engine: Engine) -> None:
        """What needs no repetition."""
        if equality:
            answers[engine.variant] = engine("tokens", **compared)["rows"]
        if kl:
            name = engine.variant
            distributions[name] = engine("distribution", alone=False, **asked)["rows"]
            if name == STOCK:
                again = engine("distribution", alone=True, **asked)["rows"]
                distributions[f"{STOCK}, one at a time"] = again
        if update:
            changed = {"size": geometry.GEOMETRIES[model].hidden, "layers": results.base["layers"]}
            few = {"count": 16, "new": 16, "seed": 98}
            answers[f"{engine.variant}, before"] = engine("tokens", **few)["rows"]
            engine("update", suffix="pre_feedforward_layernorm.weight", seed=5, **changed)
            answers[f"{engine.variant}, updated"] = engine("tokens", **few)["rows"]
            if geometry.GEOMETRIES[model].experts and engine.variant == PATCHED:
                # Stock keeps the product of the router's scale from its first call: no comparison.
                for seed in (6, 7, 6):
                    engine("update", suffix="router.scale", seed=seed, **changed)
                    name = f"router {seed}" if f"router {seed}" not in answers else "router again"
                    answers[name] = engine("tokens", **few)["rows"]
        if breakdown:
            profiles[engine.variant] = engine(
                "profile", batch=breakdown, length=512, steps=8, seed=7
            )
        if engine.variant == PATCHED:
            reports[engine.variant] = engine("status")

    def run() -> None:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("starting engines", total=2 * (rounds + 2) + control)
            if together:
                with engines(make, [STOCK, PATCHED]) as live:
                    for step in (once, lambda engine: measure(engine, -1)):
                        for engine in live.values():
                            progress.update(task, description=f"warm-up: {engine.variant}")
                            step(engine)
                            progress.advance(task)
                    for round_ in range(rounds):
                        for engine in in_turn(live, round_):
                            progress.update(task, description=f"round {round_}: {engine.variant}")
                            measure(engine, round_)
                            progress.advance(task)
                    # Again: the first one stands for a run that is cut off before this.
                    reports[PATCHED] = live[PATCHED]("status")
            else:
                for round_ in range(rounds):
                    for variant in (STOCK, PATCHED) if round_ % 2 == 0 else (PATCHED, STOCK):
                        progress.update(task, description=f"round {round_}: {variant}")
                        with engines(make, [variant]) as live:
                            measure(live[variant], -1)
                            measure(live[variant], round_)
                            if round_ == 0:
                                once(live[variant])
                        progress.advance(task)
            for variant, wanted in ((BITS, bits), (CONTROL, control)):
                if equality and wanted:
                    progress.update(task, description=variant)
                    with engines(make, [variant]) as live:
                        answers[variant] = live[variant]("tokens", **compared)["rows"]
            for variant, wanted in ((f"{CHUNKS}{kl_chunk}", kl_chunk > 0), (EXACT, kl_exact)):
                if kl and wanted:
                    progress.update(task, description=variant)
                    with engines(make, [variant]) as live:
                        rows = live[variant]("distribution", alone=False, **asked)["rows"]
                        distributions[variant] = rows
            if stock_piecewise and shares:
                progress.update(task, description=PIECEWISE)
                console.print(f"{PIECEWISE}: {fate(make(PIECEWISE))}")

    end_on_sigterm()
    try:
        run()
    finally:  # where a limit on its time cuts a run off, what there is still counts
        # Round -1 paid for what is compiled on first use.
        results.rows = [row for row in results.rows if row["round"] >= 0]
        pairs = [(STOCK, other) for other in distributions if other not in (STOCK, EXACT)]
        pairs += [(EXACT, other) for other in distributions if other != EXACT]
        for one, other in pairs:
            if one in distributions and other in distributions:
                found = divergence(distributions[one], distributions[other])
                for name, value in found.items():
                    console.print(f"{name}, {one} against {other}: {value:.3e} nats")
                    results.add(f"{one} vs {other}", name, kl, 0, value, "nats")
        show(results, answers, profiles, reports)
        results.save(out)
    if PATCHED in reports:
        require_any_ran("engine.py", reports[PATCHED]["processes"])


def show(
    results: Results,
    answers: dict[str, list[dict[str, Any]]],
    profiles: dict[str, dict[str, Any]],
    reports: dict[str, dict[str, Any]],
) -> None:
    """Tables for the terminal; the comparison and the launch counts also become rows."""
    for process in reports.get(PATCHED, {}).get("processes", []):
        console.print(
            report.table(process["patches"], f"pid {process['pid']}: {process['command'][:80]}")
        )
    for other in (PATCHED, BITS, CONTROL):
        if STOCK in answers and other in answers:
            found = differences(answers[STOCK], answers[other])
            console.print(f"{STOCK} against {other}: {found}")
            for name in ("token_diffs", "logprob_diffs", "tokens", "logprobs"):
                results.add(
                    f"{STOCK} vs {other}", name, found["sequences"], 0, found[name], "count"
                )
    for one, other in (
        (f"{STOCK}, updated", f"{PATCHED}, updated"),
        (f"{STOCK}, before", f"{STOCK}, updated"),
        ("router 6", "router 7"),
        ("router 6", "router again"),
    ):
        if one in answers and other in answers:
            found = differences(answers[one], answers[other])
            console.print(f"{one} against {other}: {found}")
            for name in ("token_diffs", "logprob_diffs", "tokens", "logprobs"):
                results.add(f"{one} vs {other}", name, found["sequences"], 0, found[name], "count")
    for stage in ("decode", "prefill"):
        for variant, profile in profiles.items():
            if stage not in profile:
                continue
            steps, kernels = profile[stage]["steps"], profile[stage]["kernels"]
            launches = sum(count for count, _ in kernels.values()) / steps
            busy = sum(us for _, us in kernels.values())
            layers = int(results.base["layers"])
            if stage == "decode":
                results.add(variant, "launches per layer", layers, 0, launches / layers, "launches")
            table = Table(
                title=f"{stage}, {variant}: {launches:.0f} launches a step, "
                f"{launches / layers:.1f} a layer, {busy / steps / 1e3:.2f} of "
                f"{profile[stage]['span_us'] / steps / 1e3:.2f} ms in kernels",
                title_justify="left",
            )
            for heading in ("kernel", "a step", "us a step", "us each"):
                table.add_column(heading)
            ranked = sorted(kernels.items(), key=lambda item: -item[1][1])
            for name, (count, microseconds) in ranked[:24]:
                table.add_row(
                    name[:90],
                    f"{count / steps:.1f}",
                    f"{microseconds / steps:.1f}",
                    f"{microseconds / count:.2f}",
                )
            console.print(table)
            span = profile[stage]["span_us"]
            for kind, (count, microseconds) in by_class(kernels).items():
                console.print(
                    f"  {kind}: {count / steps:.1f} launches and {microseconds / steps:.0f} us a step, "
                    f"{microseconds / span:.1%} of it"
                )
                share = f"{kind}, share of a {stage} step"
                results.add(variant, share, layers, 0, microseconds / span * 100, "%")
    console.print(results.summary().to_string(index=False, float_format=lambda v: f"{v:.3f}"))


if __name__ == "__main__":
    typer.run(main)
