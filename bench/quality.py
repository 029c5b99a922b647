"""Do answers change? Stock against patched on a trained model, with transformers in fp32 as the judge.

    python bench/quality.py small-models/moe
    python bench/quality.py small-models/ple --patches yoco,decode_attention --chunk 128
    python bench/quality.py small-models/moe-fp8 --chunk 0

The folder is one that `train_small.py` wrote, or `quantise_small.py`: fp32 then reads what the quantised
weights stand for, so that the distance is the engine's and not that of rounding weights. Engines: stock,
the `exact` profile, all patches that are on by default, each ``--patches`` alone, and stock with smaller
prefill chunks. Each answers the same questions greedily, and says what it thinks of the same held-out
text. When all have, stock answers some of the questions once more, and in other batches: how far it is from
itself is its floor. Rows of a CSV, written as soon as they are known, so that a run which is cut off leaves
what it had; a comparison needs stock's part of it. Rows:

* questions answered exactly, and McNemar's exact test of that against stock: of the questions that one of
  the two got right, is either's part more than chance?
* answers that differ from stock's in any token;
* nats a byte of held-out text, and perplexity;
* KL divergence of the engine's next-token distributions from fp32's, over the whole vocabulary, and how
  often both have the same likeliest token: after the tokens of a prompt, and after tokens that the engine
  generated, which fp32 then reads. Beside it the difference to stock's divergence, with the standard error
  over prompts;
* calls of each patch's code on the host, eager and recorded.

Engines start side by side. Needs a GPU, which others may use too: nothing is timed. Decode steps of models
so small are bound by CPU launch overhead; ``engine.py`` times them at real sizes, with ``--quantization``
for FP8 weights.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import typer  # noqa: E402
from rich.table import Table  # noqa: E402

from bench.answers.asking import (  # noqa: E402
    Answer,
    Asked,
    QualityEngine,
    answers_of,
    arguments_of,
    ask,
    distributions_of,
)
from bench.answers.findings import Findings  # noqa: E402
from bench.answers.judge import Judge  # noqa: E402
from bench.answers.names import AGAIN, BATCHES, GENERATED, JUDGE, PROMPT  # noqa: E402
from bench.answers.running import add_calls, measure, results_of  # noqa: E402
from bench.common.engines import Engine, console, end_on_sigterm  # noqa: E402
from bench.common.options import named, patches_of, with_what_they_need  # noqa: E402
from bench.common.results import Results  # noqa: E402
from bench.common.variants import STOCK  # noqa: E402
from bench.models import small_tasks  # noqa: E402
from bench.rendering.quality import UNUSED, in_order  # noqa: E402
from gemma4_turbo.catalogue import by_name  # noqa: E402
from gemma4_turbo.cli import report  # noqa: E402
from gemma4_turbo.engine import states  # noqa: E402
from gemma4_turbo.instance import ENGINE  # noqa: E402

EXACT, DEFAULT = "exact", "default"
ALONE = {  # tolerance patches that a text-only model of this size can meet
    "moe": "skinny_gemm,extend_attention,decode_attention,experts_few,router_few,feed_forward_few",
    "ple": "skinny_gemm,extend_attention,decode_attention,qkv_proj,yoco",
}


def that_run(names: list[str]) -> list[str]:
    """Those that this SGLang takes; alone, any other would be stock under a patch's name."""
    found = []
    for name in names:
        state, reason = ENGINE.outlook(by_name(name))
        if state == states.ACTIVE:
            found.append(name)
        else:
            console.print(f"{name}: left out, {state}: {reason}")
    return found


def variants(patches: list[str], chunk: int) -> dict[str, tuple[list[str] | None, dict[str, Any]]]:
    """By name: its patches, None for stock, and arguments of its own."""
    found: dict[str, tuple[list[str] | None, dict[str, Any]]] = {
        STOCK: (None, {}),
        EXACT: (patches_of(EXACT), {}),
        DEFAULT: ([], {}),
    }
    found |= {name: (with_what_they_need([name]), {}) for name in patches}
    if chunk:
        found[f"{STOCK}, chunks of {chunk}"] = (None, {"chunked_prefill_size": chunk})
    return found


def table(results: Results) -> Table:
    """A row a variant for the terminal."""
    frame = results.frame()
    values = frame.set_index(["variant", "quantity"])["value"]
    columns = {
        "exactly": ("answered exactly", "{:.0f}"),
        "only it": ("right where stock is wrong", "{:.0f}"),
        "only stock": ("wrong where stock is right", "{:.0f}"),
        "p": ("McNemar's p", "{:.3g}"),
        "differ": ("answers that differ from stock's", "{:.0f}"),
        "perplexity": ("perplexity", "{:.5f}"),
        "KL, prompt": (f"KL divergence from fp32, {PROMPT}", "{:.2e}"),
        "beyond": (f"KL divergence beyond stock's, {PROMPT}", "{:+.1e}"),
        "KL, generated": (f"KL divergence from fp32, {GENERATED}", "{:.2e}"),
        "beyond ": (f"KL divergence beyond stock's, {GENERATED}", "{:+.1e}"),
        "same token": (f"same token as fp32, {GENERATED}", "{:.4f}"),
    }
    made = Table("", *columns)
    for variant in in_order(frame["variant"]):
        if values.get((variant, f"calls of {variant}")) == 0:
            made.add_row(variant, UNUSED)
            continue
        cells = []
        for quantity, form in columns.values():
            value = values.get((variant, quantity))
            cells.append("-" if value is None else form.format(value))
        made.add_row(variant, *cells)
    return made


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder of train_small.py")],
    patches: Annotated[
        str, typer.Option(help="Each alone, a comma list; auto: what a model of its kind can meet")
    ] = "auto",
    count: Annotated[int, typer.Option(min=1, help="Questions")] = 4002,
    seed: Annotated[int, typer.Option(help="Of the questions")] = 20_260,
    pieces: Annotated[int, typer.Option(min=1, help="Of 1023 bytes of text, for perplexity")] = 96,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose distributions count")] = 48,
    length: Annotated[int, typer.Option(help="Tokens of such a prompt")] = 640,
    tail: Annotated[int, typer.Option(min=1, help="Positions of each prompt")] = 128,
    new: Annotated[int, typer.Option(min=2, help="Tokens generated after each")] = 64,
    group: Annotated[int, typer.Option(min=1, help="Stock's other batches have so many")] = 24,
    floor: Annotated[
        int, typer.Option(min=0, help="Questions of stock's other batches, and once more; 0: all")
    ] = 1002,
    chunk: Annotated[int, typer.Option(help="Stock's other chunks; 0: none")] = 256,
    running: Annotated[int, typer.Option(help="Requests that run at once, at most")] = 64,
    together: Annotated[int, typer.Option(help="Engines at once; 0: all")] = 5,
    prefill_graphs: Annotated[
        bool, typer.Option(help="CUDA graphs of prefill; never on models that share KV")
    ] = True,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-quality.csv"),
) -> None:
    """Stock against patched on a trained model."""
    notes = json.loads((folder / "training.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    if patches == "auto":  # of quantised weights, which few of these take, none
        patches = ALONE.get(notes["model"], "")
    wanted = variants(that_run(named(patches)), chunk)
    longest = notes["length"]
    text = (folder / "held_out.txt").read_bytes()
    asked = Asked(
        count,
        seed,
        longest,
        small_tasks.windows(text, pieces, longest - 1),
        small_tasks.windows(text, prompts, min(length, longest - new) - 1),
        tail,
        new,
    )
    results = results_of(notes, config, "each")
    arguments = arguments_of(folder, running)
    if not prefill_graphs:
        arguments["disable_piecewise_cuda_graph"] = True
    results.base["running"] = running
    results.base["prefill_graphs"] = "disable_piecewise_cuda_graph" not in arguments
    reports: dict[str, Any] = {}

    def make(variant: str) -> Engine:
        chosen, changed = wanted[variant]
        name = variant.replace(", ", "-").replace(" ", "-")
        log = out.with_name(f"{out.stem}-{notes['model']}-{name}.log")
        log.write_text("")
        return QualityEngine(variant, chosen, arguments | changed, log)

    end_on_sigterm()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="gemma4_turbo-quality-") as scratch:
        console.print(f"{JUDGE}: reading the text")
        findings = Findings(results, asked, Judge(folder, device), out)
        judged = ThreadPoolExecutor(1).submit(findings.judge.answer, asked)  # while engines start
        taken = ThreadPoolExecutor(1)  # in one thread, one after the other
        taking: list[Future[None]] = []

        def say(variant: str, answer: Answer) -> None:
            taking.append(taken.submit(findings.take, variant, answer))

        def talk(engine: Engine) -> None:
            for part in ask(engine, asked, Path(scratch)):
                say(engine.variant, part)
            if wanted[engine.variant][0] is not None:
                reports[engine.variant] = engine("status")
            console.print(f"{engine.variant}: answered")

        def floors(stock: Engine) -> None:
            say(AGAIN, answers_of(stock, asked, first=floor))
            say(BATCHES, answers_of(stock, asked, group, floor))
            for part in distributions_of(stock, asked, Path(scratch), max(1, group // 8)):
                say(BATCHES, part)

        try:
            died = measure(make, list(wanted), together, talk, {STOCK: floors})
            judged.result()
        finally:  # where a limit on its time cuts a run off, what there is still counts
            taken.shutdown()
            findings.without_stock()
            if judged.done() and judged.exception() is None:
                findings.judged(*judged.result())
            for variant, status in reports.items():
                add_calls(results, variant, status)
            with contextlib.suppress(KeyError):
                for process in reports[DEFAULT]["processes"]:
                    console.print(report.table(process["patches"], f"{DEFAULT}: {process['pid']}"))
            findings.save()
            if results.rows:
                console.print(table(results))
        for part in taking:
            part.result()
    if STOCK in died:
        raise SystemExit(
            f"quality.py: stock died ({died[STOCK]}): nothing is compared with what it did not tell"
        )
    if died:
        raise SystemExit(f"quality.py: {', '.join(died)} died; their logs lie beside {out}")


if __name__ == "__main__":
    typer.run(main)
