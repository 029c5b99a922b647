"""Speculative decoding with a trained assistant: stock against patched, and against no speculation.

    python bench/train_assistant.py small-models/moe
    python bench/quality_mtp.py small-models/moe

On random weights an assistant is right by chance (`mtp.py`); here it has learned from its target. Engines:
stock without speculation, stock's MTP, and MTP with all patches that are on by default. Each goes on with
pieces of held-out text and answers questions, greedily, one request at a time and in batches of 8. Rows of
a CSV:

* accept length: tokens a verify step brings, after the first of each answer, which prefill brings;
* questions answered exactly;
* tokens and answers that differ: stock's MTP from patched MTP, either from no speculation, and as stock's
  floor one request at a time from batches, with MTP and without;
* tokens a second of all requests together, and milliseconds a verify step, at 1 and 8 requests: the median
  of rounds in which engines take turns, on text;
* calls of each patch's code on the host.

Engines start side by side; ``BENCH_LOCK`` keeps others away while one is timed (`bench.common.turns`). Needs a GPU
and transformers 5.8, which 0.5.12.post1 does not bring.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402
from rich.table import Table  # noqa: E402

from bench.answers.asking import arguments_of  # noqa: E402
from bench.answers.pace import Pace  # noqa: E402
from bench.answers.running import add_calls, measure, results_of  # noqa: E402
from bench.answers.statistics import rights  # noqa: E402
from bench.common.engines import Engine, console, end_on_sigterm  # noqa: E402
from bench.common.results import Results, append  # noqa: E402
from bench.common.variants import PATCHED, STOCK  # noqa: E402
from bench.models import small_tasks  # noqa: E402
from bench.models.assistant import speculation as speculation_of  # noqa: E402
from bench.speculation.comparing import DRAFT_STEPS, PLAIN, Rows, accept_length  # noqa: E402
from bench.speculation.engine import MtpEngine  # noqa: E402

TEXT, QUESTIONS = "text", "questions"
BATCHES = {"alone": 1, "in batches of 8": 8}
PAIRS = ((STOCK, PATCHED), (PLAIN, STOCK), (PLAIN, PATCHED))


class QualityMtpEngine(MtpEngine):
    """With the commands of `workers.quality_mtp`; patched: all that are on by default."""

    script = "workers/quality_mtp.py"
    untimed = frozenset({"continued", "status"})


class Asked(NamedTuple):
    """What every engine is asked of one kind."""

    prompts: list[list[int]]
    new: list[int]  # tokens at most
    to_eos: bool = False


def differing(truth: Rows, other: Rows) -> tuple[int, int]:
    """Tokens and answers that differ; one that ends earlier differs in what it lacks."""
    tokens = answers = 0
    for one, two in zip(truth, other, strict=True):
        x, y = one["ids"], two["ids"]
        wrong = sum(a != b for a, b in zip(x, y, strict=False)) + abs(len(x) - len(y))
        tokens += wrong
        answers += wrong > 0
    return tokens, answers


class Findings:
    """What engines said, by engine, kind and how they were asked; and the rows of the CSV."""

    def __init__(self, results: Results, questions: list[small_tasks.Question]) -> None:
        self.results, self.questions = results, questions
        self.said: dict[tuple[str, str, str], Rows] = {}

    def add(self, variant: str, quantity: str, x: int, value: float, unit: str) -> None:
        """One row."""
        self.results.add(variant, quantity, x, 0, value, unit)

    def take(self, variant: str, kind: str, how: str, rows: Rows) -> None:
        """One part of what an engine said."""
        self.said[variant, kind, how] = rows
        length = accept_length(rows)
        if length is not None:
            self.add(variant, f"accept length, {kind}, {how}", len(rows), length, "tokens")
        if kind == QUESTIONS:
            right = sum(rights([row["ids"] for row in rows], self.questions))
            self.add(variant, f"answered exactly, {how}", len(rows), right, "questions")

    def compare(self) -> None:
        """All pairs of engines, and stock's own floors."""
        kinds = [kind for kind in (TEXT, QUESTIONS) if any(kind in key for key in self.said)]
        for kind in kinds:
            for how in BATCHES:
                for one, other in PAIRS:
                    self._pair(
                        f"{one} vs {other}", f"{kind}, {how}", (one, kind, how), (other, kind, how)
                    )
            alone, batches = BATCHES
            for variant in (PLAIN, STOCK, PATCHED):
                self._pair(
                    f"{variant}, {alone} vs {batches}",
                    kind,
                    (variant, kind, alone),
                    (variant, kind, batches),
                )

    def _pair(self, name: str, what: str, one: Any, other: Any) -> None:
        if one not in self.said or other not in self.said:
            return
        truth = self.said[one]
        tokens, answers = differing(truth, self.said[other])
        count = sum(len(row["ids"]) for row in truth)
        self.add(name, f"tokens that differ, {what}", count, tokens, "tokens")
        self.add(name, f"answers that differ, {what}", len(truth), answers, "answers")


def ask(engine: Engine, asked: dict[str, Asked]) -> Iterator[tuple[str, str, Rows]]:
    """Everything, of one engine, part by part: kind, how it was asked, and what it said."""
    for kind, one in asked.items():
        for how, batch in BATCHES.items():
            given = {"ids": one.prompts, "new": one.new, "batch": batch, "to_eos": one.to_eos}
            yield kind, how, engine("continued", **given)["rows"]


def table(results: Results) -> Table:
    """A row a quantity for the terminal, a column an engine or pair of engines."""
    frame = results.frame()
    frame = frame[~frame["quantity"].str.startswith("calls of ")]
    frame = frame[~frame["quantity"].str.endswith("range")]
    made = Table("", "of", "", title=str(results.base["model"]), title_justify="left")
    for row in frame.to_dict("records"):
        made.add_row(
            f"{row['variant']}: {row['quantity']}", f"{row['x']:,}", f"{row['value']:,.4g}"
        )
    return made


def main(
    folder: Annotated[Path, typer.Argument(help="The target, a folder of train_small.py")],
    assistant: Annotated[
        Path | None, typer.Option(help="Of train_assistant.py; default: FOLDER-assistant")
    ] = None,
    pieces: Annotated[int, typer.Option(min=8, help="Pieces of text to go on with")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of such a piece")] = 512,
    new: Annotated[int, typer.Option(min=2, help="Tokens after each, and of a timing")] = 128,
    count: Annotated[int, typer.Option(min=1, help="Questions")] = 192,
    seed: Annotated[int, typer.Option(help="Of the questions")] = 20_260,
    batches: Annotated[str, typer.Option(help="Requests at once of timings; empty: none")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Of timings")] = 5,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-quality-mtp.csv"),
) -> None:
    """Stock's MTP against patched MTP on a trained pair."""
    if find_spec("transformers.models.gemma4_assistant") is None:
        raise SystemExit("quality_mtp.py: needs transformers 5.8, which knows Gemma 4's assistants")
    draft = assistant or folder.with_name(f"{folder.name}-assistant")
    if not (draft / "config.json").exists():
        raise SystemExit(f"quality_mtp.py: {draft} holds no assistant; see train_assistant.py")
    notes, drafts_notes = (json.loads((f / "training.json").read_text()) for f in (folder, draft))
    config = json.loads((folder / "config.json").read_text())
    text, longest = (folder / "held_out.txt").read_bytes(), notes["length"]
    questions = small_tasks.questions(count, seed, longest)
    parts = [question.tokens() for question in questions]
    asked = {
        TEXT: Asked(
            small_tasks.windows(text, pieces, min(length, longest - new) - 1), [new] * pieces
        ),
        QUESTIONS: Asked([p for p, _ in parts], [len(answer) for _, answer in parts], True),
    }
    results = results_of(notes, config, "all")
    results.base |= {
        "assistant_steps": drafts_notes["steps"],
        "assistant_seed": drafts_notes["seed"],
    }
    sizes = [int(size) for size in batches.split(",") if size]
    arguments = arguments_of(folder, max([*sizes, *BATCHES.values()]), 32_768)
    arguments["disable_piecewise_cuda_graph"] = True
    speculation = speculation_of(draft, DRAFT_STEPS)

    def make(variant: str) -> Engine:
        log = out.with_name(f"{out.stem}-{notes['model']}-{variant.replace(' ', '-')}.log")
        log.write_text("")
        given = arguments if variant == PLAIN else arguments | speculation
        return QualityMtpEngine(variant, [], given, log)

    findings = Findings(results, questions)
    pace = Pace(sizes, asked[TEXT].prompts, new, rounds)
    reports: dict[str, Any] = {}

    def talk(engine: Engine) -> None:
        for kind, how, rows in ask(engine, asked):
            findings.take(engine.variant, kind, how, rows)
        if engine.variant == PATCHED:
            reports[PATCHED] = engine("status")
        console.print(f"{engine.variant}: answered")

    end_on_sigterm()
    try:
        died = measure(
            make, [PLAIN, STOCK, PATCHED], 0, talk, last=lambda live: pace(live, results)
        )
    finally:  # where a limit on its time cuts a run off, what there is still counts
        findings.compare()
        with contextlib.suppress(KeyError):
            add_calls(results, PATCHED, reports[PATCHED])
        if results.rows:
            console.print(table(results))
            append(results.frame(), out)
    if died:
        raise SystemExit(f"quality_mtp.py: {died} died; logs lie beside {out}")


if __name__ == "__main__":
    typer.run(main)
