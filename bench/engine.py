"""Stock against patched in SGLang's own engine, at a Gemma 4 geometry with random weights.

    python bench/engine.py --model 26b-a4b --patches router --together

Every measurement is one row of a CSV: GPU, versions, variant, quantity, value. Rounds alternate
between the variants; reported are medians and the ratio patched / stock from this one run.
``--together`` keeps both engines alive at once (two models must fit on the GPU), otherwise each
variant's engine is started afresh for every round.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.common.provenance import provenance  # noqa: E402
from bench.common.turns import turn  # noqa: E402
from gemma4_turbo.catalogue import BITWISE, PATCHES  # noqa: E402
from gemma4_turbo.cli import report  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

VOCABULARY = geometry.VOCABULARY
STOCK, PATCHED, CONTROL = "stock", "patched", "stock again"
BITS = "patched, bitwise"  # with the patches that have stock's bits, and no other
PIECEWISE = "stock, piecewise"
CHUNKS = "stock, chunks of "  # and how many tokens
EXACT = "stock, attention in fp32"
ARGUMENTS = {  # of every engine on a generated model
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "chunked_prefill_size": 4096,
    "log_level": "info",
}


class Piecewise(StrEnum):
    """Which engines have piecewise CUDA graphs of prefill."""

    STOCKS = "stock"
    PATCHED = "patched"
    NEITHER = "neither"


CLASSES = {
    "sums over GPUs": r"nccl|cross_device_reduce|all_?reduce|one_shot|two_shot|multimem",
    "norms": r"norm|_tail",
}
"""Kernels by name, whose share of a step is shown and kept; a name is of the first class that fits."""
EAGER = {"disable_cuda_graph": True, "disable_piecewise_cuda_graph": True}
console = Console(width=150)


class Engine:
    """A worker process and its pipe."""

    patience_s = 40.0  # until a process that was told to end is killed
    script = "workers/engine.py"
    untimed: frozenset[str] = frozenset()  # commands beside which others' may run

    def __init__(
        self, variant: str, patches: list[str], arguments: dict[str, Any], log: Path
    ) -> None:
        self.variant = variant
        self.log = log
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("GEMMA4_TURBO")
        }
        environment["PYTHONPATH"] = self.path()
        environment["PYTHONSAFEPATH"] = "1"  # bench/kernels.py is not the package kernels
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / self.script), str(log), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | self.switches(patches),
            start_new_session=True,
        )
        self.ready_s: float | None = None

    def path(self) -> str:
        """Where the process finds the package."""
        path = [str(HERE / "site"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        return os.pathsep.join(part for part in path if part)

    def switches(self, patches: list[str]) -> dict[str, str]:
        """What the process is told of the patches by its environment."""
        if self.variant in (PATCHED, BITS):
            names = patches_of("exact") if self.variant == BITS else patches
            only = ",".join(names) if names else "*"
            return {
                "BENCH_PATCHED": "1",
                "GEMMA4_TURBO_STRICT": "1",
                "GEMMA4_TURBO_SELECTION": f"only={only};skip=",
            }
        exact = {"BENCH_EXACT_ATTENTION": "1"} if self.variant == EXACT else {}
        return {"BENCH_PATCHED": "0", "GEMMA4_TURBO": "0", **exact}

    def wait_ready(self) -> None:
        """Until the engine stands."""
        if self.ready_s is None:
            self.ready_s = float(self._answer()["ready_s"])
            console.print(f"{self.variant}: ready after {self.ready_s:.0f} s")

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.wait_ready()
        assert self.process.stdin is not None
        with turn(do not in self.untimed):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = [text for text in self.log.read_text(errors="replace").splitlines() if text]
            sys.exit(
                f"engine.py: the {self.variant} engine died ({self.log}):\n" + "\n".join(tail[-12:])
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process and its children."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()


def fate(engine: Engine) -> str:
    """Whether an engine starts, or the error that its log ends with."""
    try:
        engine.wait_ready()
        return "starts"
    except SystemExit:
        lines = engine.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"(\[.*\] )?\w*Error: ", line)]
        return f"does not start: {errors[-1] if errors else lines[-1:]}"
    finally:
        engine.stop()


class Results:
    """Rows for the CSV, with everything that identifies the run."""

    pair = (STOCK, PATCHED)
    """The ratio is of the second to the first."""

    def __init__(self, model: str, layers: int | None, patches: list[str], tp: int = 1) -> None:
        self.rows: list[dict[str, Any]] = []
        self.base = {
            **provenance(),
            # Decides which RMSNorm stock runs; a library that is only on PYTHONPATH counts too.
            "norms": "cute" if find_spec("cutlass") else "cuda",
            "tp": tp,
            "model": model,
            "layers": layers or geometry.GEOMETRIES[model].layers,
            "patches": "+".join(patches) or "all",
        }

    def add(
        self, variant: str, quantity: str, x: int, round_: int, value: float, unit: str
    ) -> None:
        """One measurement."""
        self.rows.append(
            {
                **self.base,
                "variant": variant,
                "quantity": quantity,
                "x": x,
                "round": round_,
                "value": value,
                "unit": unit,
            }
        )

    def frame(self) -> pd.DataFrame:
        """All rows."""
        return pd.DataFrame(self.rows)

    def summary(self) -> pd.DataFrame:
        """Medians per variant and the ratio of the `pair`."""
        frame = self.frame()
        if frame.empty:
            return frame
        table = frame.pivot_table(
            index=["quantity", "x", "unit"], columns="variant", values="value", aggfunc="median"
        )
        if set(self.pair) <= set(table.columns):
            table["ratio"] = table[self.pair[1]] / table[self.pair[0]]
        return table.reset_index()

    def save(self, out: Path) -> None:
        """Append to the CSV and draw the ratios of this run beside it."""
        frame = self.frame()
        if frame.empty:
            return
        frame.to_csv(out, mode="a", header=not out.exists(), index=False)
        summary = self.summary()
        if "ratio" not in summary:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        timed = summary[summary["unit"] == "ms"]
        figure, axes = plt.subplots(figsize=(8, 4))
        labels = [f"{q}\n{x}" for q, x in zip(timed["quantity"], timed["x"], strict=True)]
        axes.bar(labels, timed["ratio"])
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylabel(" / ".join(reversed(self.pair)))
        axes.set_title(f"{self.base['model']}, {self.base['patches']}, {self.base['gpu']}")
        figure.tight_layout()
        figure.savefig(out.with_suffix(".png"), dpi=120)


def differences(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, int]:
    """How many tokens and logprobs differ in any bit between two engines' answers."""
    count = {"sequences": len(a), "tokens": 0, "token_diffs": 0, "logprobs": 0, "logprob_diffs": 0}
    for one, other in zip(a, b, strict=True):
        count["tokens"] += len(one["ids"])
        count["token_diffs"] += sum(x != y for x, y in zip(one["ids"], other["ids"], strict=True))
        for key in ("input", "output", "top"):
            flat_one = json.dumps(one[key]).replace("[", "").replace("]", "").split(", ")
            flat_other = json.dumps(other[key]).replace("[", "").replace("]", "").split(", ")
            count["logprobs"] += len(flat_one)
            count["logprob_diffs"] += abs(len(flat_one) - len(flat_other)) + sum(
                x != y for x, y in zip(flat_one, flat_other, strict=False)
            )
    return count


def distances(one: dict[str, Any], other: dict[str, Any], strict: bool = True) -> list[float]:
    """Distances of logprobs over the leading tokens that two answers have in common.

    ``strict``: the answers must be of one length, or ValueError.
    """
    found = []
    tokens = zip(one["output"], other["output"], one["ids"], other["ids"], strict=strict)
    for x, y, id_x, id_y in tokens:
        if id_x != id_y:
            break
        found.append(abs(float.fromhex(x) - float.fromhex(y)))
    return found


def distance(one: dict[str, Any], other: dict[str, Any], strict: bool = True) -> tuple[int, float]:
    """Leading tokens in common, and the largest of their `distances`."""
    found = distances(one, other, strict)
    return len(found), max(found, default=0.0)


def divergence(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, float]:
    """KL divergence of two engines' next-token distributions, estimated, mean over positions.

    ``sum(p (r - 1 - log r))``, r = q / p, over all tokens is the divergence: each of its terms is at
    least 0, so a random sample of the tokens gives a steady estimate. Of the generated tokens only
    those up to the first in which the engines differ have the same tokens before them; the first of
    them ends the prefill, the others are decoding. With each its standard error, from the prompts.
    """
    terms: dict[str, list[Any]] = {"KL divergence": [], "KL divergence, decode": []}
    for one, other in zip(a, b, strict=True):
        same = zip(one["ids"], other["ids"], strict=True)
        valid = next((i + 1 for i, (x, y) in enumerate(same) if x != y), len(one["ids"]))
        for name, p_steps, q_steps in (
            (
                "KL divergence",
                one["before"] + one["after"][:1],
                other["before"] + other["after"][:1],
            ),
            ("KL divergence, decode", one["after"][1:valid], other["after"][1:valid]),
        ):
            p, q = np.array(p_steps), np.array(q_steps)
            if p.shape != q.shape:
                raise ValueError("the engines answered for different positions")
            log_r = q - p
            terms[name].append((np.exp(p) * (np.expm1(log_r) - log_r)).ravel())
    found = {}
    for name, parts in terms.items():
        means = [part.mean() for part in parts if part.size]
        if means:
            found[name] = float(np.concatenate(parts).mean()) * VOCABULARY
        if len(means) > 1:
            error = np.std(means, ddof=1) / len(means) ** 0.5
            found[f"{name}, standard error"] = float(error) * VOCABULARY
    return found


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


def patches_of(text: str) -> list[str]:
    """Names of a comma list; ``exact``: of every bitwise patch that is on by default."""
    if text == "exact":
        return [patch.name for patch in PATCHES if patch.numerics == BITWISE and patch.default]
    return [name for name in text.split(",") if name]


def parse_prefill(text: str) -> tuple[int, int, int]:
    """Prompts, their length and the tokens to generate, of ``BATCHxLENGTH[+TOKENS]``."""
    found = re.fullmatch(r"(\d+)x(\d+)(?:\+(\d+))?", text)
    if not found:
        raise typer.BadParameter(f"--prefill must be BATCHxLENGTH[+TOKENS], got {text!r}")
    return int(found[1]), int(found[2]), int(found[3] or 1)


def end_on_sigterm() -> None:
    """`timeout` ends a run as an error would: what is known is saved, no engine or server stays."""

    def terminated(*_: object) -> None:
        Engine.patience_s = 0
        sys.exit(143)

    signal.signal(signal.SIGTERM, terminated)


def in_turn(live: dict[str, Any], round_: int) -> list[Any]:
    """The variants of a round, in the other order every other round."""
    order = list(live.values())
    return order if round_ % 2 == 0 else order[::-1]


@contextlib.contextmanager
def engines(make: Any, variants: list[str]) -> Iterator[dict[str, Engine]]:
    """Several engines at once, stopped at the end."""
    live = {variant: make(variant) for variant in variants}
    try:
        for engine in live.values():
            engine.wait_ready()
        yield live
    finally:
        for engine in live.values():
            engine.stop()


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
    results = Results(model, layers or None, chosen, tp)
    os.environ["BENCH_WEIGHT_RANGE"] = str(weight_range)
    os.environ["BENCH_UNIT_NORMS"] = str(int(unit_norms))
    results.base["norm_weights"] = "around one" if unit_norms else "around zero"
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    folder = geometry.write_model(scratch / "model", model, layers or None)
    arguments: dict[str, Any] = {
        "model_path": str(folder),
        **ARGUMENTS,
        "disable_radix_cache": True,
        "max_total_tokens": max_total_tokens,
        "mem_fraction_static": mem_fraction,
        "tp_size": tp,
        "cuda_graph_max_bs": max([*sizes, equality, 1]),
    }
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
        return Engine(variant, chosen, {**arguments, **changed}, log)

    compared = {"count": equality, "new": new_tokens, "seed": 99}
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
            for variant, wanted in ((f"{CHUNKS}{kl_chunk}", kl_chunk), (EXACT, kl_exact)):
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
