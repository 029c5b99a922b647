"""Do answers change? Stock against patched on a trained model, with transformers in fp32 as the judge.

    python bench/quality.py small-models/moe
    python bench/quality.py small-models/ple --patches yoco,decode_attention --chunk 128
    python bench/quality.py small-models/moe-fp8 --chunk 0 --time 1,8

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
* calls of each patch's code on the host, eager and recorded;
* with ``--time``, milliseconds of a decode step, the median of rounds in which engines take turns.

Engines start side by side. Needs a GPU. Without ``--time`` others may use it too; with it they are kept
away by ``BENCH_LOCK``, a file that all of them are told (`bench.common.turns`).
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from rich.table import Table  # noqa: E402
from scipy.stats import binomtest  # noqa: E402

from bench.common.engines import Engine, console, end_on_sigterm, in_turn, outlived, started  # noqa: E402  # noqa: E402
from bench.common.options import patches_of  # noqa: E402
from bench.common.results import Results  # noqa: E402
from bench.common.turns import turn  # noqa: E402
from bench.common.variants import ARGUMENTS, PATCHED, STOCK  # noqa: E402
from bench.models import small_models, small_tasks  # noqa: E402
from bench.rendering.quality import in_order  # noqa: E402
from bench.speculation.engine import MtpEngine  # noqa: E402
from gemma4_turbo.catalogue import by_name  # noqa: E402
from gemma4_turbo.cli import report  # noqa: E402
from gemma4_turbo.engine import states  # noqa: E402

JUDGE, EXACT, DEFAULT = "transformers, fp32", "exact", "default"
BATCHES = f"{STOCK}, other batches"
AGAIN = f"{STOCK}, once more"
ALONE = {  # tolerance patches that a text-only model of this size can meet
    "moe": "skinny_gemm,extend_attention,decode_attention,experts_few,router_few",
    "ple": "skinny_gemm,extend_attention,decode_attention,qkv_proj,yoco",
}
PROMPT, GENERATED = "prompt", "generated"


class QualityEngine(MtpEngine):
    """With the commands of `workers.quality`; ``patches``: None is stock, an empty list the default."""

    script = "workers/quality.py"
    untimed = frozenset({"answers", "text", "distributions", "status"})

    def __init__(
        self, variant: str, patches: list[str] | None, arguments: dict[str, Any], log: Path
    ) -> None:
        super().__init__(STOCK if patches is None else PATCHED, patches or [], arguments, log)
        self.variant = variant


class Asked(NamedTuple):
    """What every engine is asked."""

    count: int  # questions
    seed: int
    longest: int  # tokens of a question with its answer
    text: list[list[int]]  # pieces for perplexity
    prompts: list[list[int]]  # pieces that are gone on with
    tail: int  # positions of each prompt whose distributions are compared
    new: int  # tokens generated after each

    def questions(self) -> list[small_tasks.Question]:
        """With their right answers."""
        return small_tasks.questions(self.count, self.seed, self.longest)


class Answer(NamedTuple):
    """What one engine said, or a part of it; fields that are not told are None."""

    rows: list[list[int]] | None = None  # answers to the questions, or to the first of them
    nats: np.ndarray | None = None  # [pieces, length - 1] of the text
    prompt: np.ndarray | None = None  # [prompts, tail, vocabulary] log-probabilities
    generated: np.ndarray | None = None  # [prompts, new, vocabulary]
    ids: list[list[int]] | None = None  # what was generated


# -- the judge ------------------------------------------------------------------------------------


class Judge:
    """The model in fp32, by transformers' own classes, experts one after the other; never beside a timing."""

    def __init__(self, folder: Path, device: str) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.model = small_models.load(folder, torch.float32, device, "eager")
        self.device = device

    @torch.no_grad()
    def distributions(self, rows: list[list[int]], first: int, batch: int = 16) -> np.ndarray:
        """Log-probabilities after each token of rows of one length, from position ``first`` to the last."""
        parts = []
        with turn(timed=False):
            for start in range(0, len(rows), batch):
                ids = torch.tensor(rows[start : start + batch], device=self.device)
                found = small_models.logits(self.model, ids)[:, first:]
                parts.append(found.float().log_softmax(-1).cpu().numpy())
        return np.concatenate(parts)

    def answer(self, asked: Asked) -> tuple[list[bool], float]:
        """Which questions it answers exactly, and nats a byte of the text."""
        with turn(timed=False):
            right, _ = small_models.answered(self.model, asked.questions(), 64)
            return right, small_models.text_loss(self.model, asked.text)


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL divergence of q from p, both log-probabilities ``[..., vocabulary]``, in nats; ``[...]``.

    ``sum p (r - 1 - log r)`` with r = q / p: equal to it where both sum to one, and without cancellation.
    """
    p, q = p.astype(np.float64), q.astype(np.float64)
    log_r = q - p
    return (np.exp(p) * (np.expm1(log_r) - log_r)).sum(-1)


def agreement(p: np.ndarray, q: np.ndarray) -> float:
    """How often both have the same likeliest token."""
    return float((p.argmax(-1) == q.argmax(-1)).mean())


def mean_and_error(by_prompt: np.ndarray) -> tuple[float, float]:
    """Of ``[prompts, positions]``: mean, and its standard error from the prompts' means."""
    means = by_prompt.mean(1)
    error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else math.nan
    return float(means.mean()), float(error)


# -- comparing ------------------------------------------------------------------------------------


def mcnemar(one: list[bool], other: list[bool]) -> tuple[int, int, float]:
    """Questions that only ``one`` got right, that only ``other`` did, and the exact two-sided p."""
    only_one = sum(x and not y for x, y in zip(one, other, strict=True))
    only_other = sum(y and not x for x, y in zip(one, other, strict=True))
    either = only_one + only_other
    p = float(binomtest(only_one, either).pvalue) if either else 1.0
    return only_one, only_other, p


def rights(rows: list[list[int]], questions: list[small_tasks.Question]) -> list[bool]:
    """Which answers are the right ones, EOS included."""
    return [row == one.tokens()[1] for row, one in zip(rows, questions, strict=True)]


class Findings:
    """Rows of the CSV, as engines come to tell; what must be compared with stock waits for stock."""

    def __init__(self, results: Results, asked: Asked, judge: Judge, out: Path) -> None:
        self.results, self.asked, self.judge, self.out = results, asked, judge, out
        self.questions = asked.questions()
        self.stock: list[list[int]] = []  # its answers
        self.right: dict[str, list[bool]] = {}
        self.far: dict[tuple[str, str], np.ndarray] = {}
        self.waiting: list[tuple[str, Answer]] = []
        self.written = 0
        self.lock = Lock()
        first = len(asked.prompts[0]) - asked.tail - 1
        self.prompt = judge.distributions(asked.prompts, first)[:, :-1]

    def save(self) -> None:
        """Append to the CSV what it has not."""
        with self.lock:
            new = self.results.rows[self.written :]
            self.written += len(new)
            if new:
                frame = pd.DataFrame(new)
                frame.to_csv(self.out, mode="a", header=not self.out.exists(), index=False)

    def add(self, variant: str, quantity: str, x: int, value: float, unit: str) -> None:
        """One row."""
        self.results.add(variant, quantity, x, 0, value, unit)

    def answered(self, variant: str, right: list[bool]) -> None:
        """Questions answered exactly, in all and by kind, and the test against stock."""
        self.right[variant] = right
        questions = self.questions[: len(right)]
        self.add(variant, "answered exactly", len(right), sum(right), "questions")
        for kind in small_tasks.KINDS:
            of_kind = [r for r, one in zip(right, questions, strict=True) if one.kind == kind]
            self.add(variant, f"answered exactly, {kind}", len(of_kind), sum(of_kind), "questions")
        if STOCK in self.right and variant != STOCK:
            ours, theirs, p = mcnemar(right, self.right[STOCK][: len(right)])
            self.add(variant, "right where stock is wrong", len(right), ours, "questions")
            self.add(variant, "wrong where stock is right", len(right), theirs, "questions")
            self.add(variant, "McNemar's p", ours + theirs, p, "probability")

    def text(self, variant: str, nats: float) -> None:
        """Loss on the held-out text."""
        count = sum(len(piece) - 1 for piece in self.asked.text)
        self.add(variant, "held-out text", count, nats, "nats a byte")
        self.add(variant, "perplexity", count, math.exp(nats), "a byte")

    def distances(self, variant: str, where: str, p: np.ndarray, q: np.ndarray) -> None:
        """From fp32, and how much more than stock's."""
        positions = p.shape[0] * p.shape[1]
        far = self.far[variant, where] = divergences(p, q)
        names = [(f"KL divergence from fp32, {where}", far)]
        if variant != STOCK and (STOCK, where) in self.far:
            names.append((f"KL divergence beyond stock's, {where}", far - self.far[STOCK, where]))
        for name, values in names:
            mean, error = mean_and_error(values)
            self.add(variant, name, positions, mean, "nats")
            self.add(variant, f"{name}, standard error", positions, error, "nats")
        self.add(variant, f"same token as fp32, {where}", positions, agreement(p, q), "part")

    def take(self, variant: str, answer: Answer) -> None:
        """A part of what an engine said."""
        if variant != STOCK and not self._stock_told(answer):
            self.waiting.append((variant, answer))
            return
        self._compare(variant, answer)
        if variant == STOCK:
            waiting, self.waiting = self.waiting, []
            for other, part in waiting:
                self.take(other, part)

    def without_stock(self) -> None:
        """What waits for a part that stock will never tell."""
        for variant, answer in self.waiting:
            self._compare(variant, answer)
        self.waiting = []

    def _stock_told(self, answer: Answer) -> bool:
        told = {"rows": bool(self.stock), "nats": True}
        told |= {where: (STOCK, where) in self.far for where in (PROMPT, GENERATED)}
        return all(getattr(answer, name) is None or there for name, there in told.items())

    def _compare(self, variant: str, answer: Answer) -> None:
        if answer.rows is not None:
            self.answered(variant, rights(answer.rows, self.questions[: len(answer.rows)]))
            if variant == STOCK:
                self.stock = answer.rows
            elif self.stock:
                pairs = zip(answer.rows, self.stock[: len(answer.rows)], strict=True)
                differing = sum(one != other for one, other in pairs)
                name = "answers that differ from stock's"
                self.add(variant, name, len(answer.rows), differing, "questions")
        if answer.nats is not None:
            self.text(variant, float(answer.nats.mean()))
        if answer.prompt is not None:
            self.distances(variant, PROMPT, self.prompt, answer.prompt)
        if answer.generated is not None and answer.ids is not None:
            rows = [
                [*prompt, *ids[:-1]]
                for prompt, ids in zip(self.asked.prompts, answer.ids, strict=True)
            ]
            first = len(self.asked.prompts[0]) - 1
            p = self.judge.distributions(rows, first)
            self.distances(variant, GENERATED, p, answer.generated)
        self.save()

    def judged(self, right: list[bool], nats: float) -> None:
        """The judge's own answers."""
        self.answered(JUDGE, right)
        self.text(JUDGE, nats)
        self.save()


# -- engines --------------------------------------------------------------------------------------


def answers_of(engine: Engine, asked: Asked, group: int = 0, first: int = 0) -> Answer:
    """To the ``first`` questions, 0: all; ``group``: so many requests at a time, 0: all at once."""
    count = min(first or asked.count, asked.count)
    said = engine("answers", count=count, seed=asked.seed, group=group, longest=asked.longest)
    return Answer(rows=said["rows"])


def distributions_of(
    engine: Engine, asked: Asked, scratch: Path, group: int = 0
) -> Iterator[Answer]:
    """Those of prompts, then those of what is generated; ``group``: so many prompts at a time."""

    def array(tail: int, new: int) -> tuple[dict[str, Any], np.ndarray]:
        out = scratch / f"{engine.variant}-{group}-{tail}.npy".replace(" ", "_")
        few = {"pieces": asked.prompts, "group": group, "tail": tail, "new": new}
        said = engine("distributions", out=str(out), **few)
        return said, np.load(out)

    _, prompt = array(asked.tail, 1)
    yield Answer(prompt=prompt[:, : asked.tail])
    said, generated = array(0, asked.new)
    yield Answer(generated=generated, ids=said["ids"])


def ask(engine: Engine, asked: Asked, scratch: Path) -> Iterator[Answer]:
    """What every engine is asked, part by part; what tells most first."""
    yield answers_of(engine, asked)
    out = scratch / f"{engine.variant}-text.npy".replace(" ", "_")
    engine("text", pieces=asked.text, out=str(out))
    yield Answer(nats=np.load(out))
    yield from distributions_of(engine, asked, scratch)


def arguments_of(folder: Path, running: int, pool: int = 131_072) -> dict[str, Any]:
    """Of every engine on a trained folder; ``pool``: tokens of its KV."""
    made: dict[str, Any] = {
        "model_path": str(folder),
        **{name: value for name, value in ARGUMENTS.items() if name != "load_format"},
        "disable_radix_cache": True,
        "max_total_tokens": pool,
        "max_running_requests": running,
        "cuda_graph_max_bs": running,
        "mem_fraction_static": 0.85,
        "sleep_on_idle": True,  # there can be more engines than cores
    }
    if json.loads((folder / "config.json").read_text())["num_kv_shared_layers"]:
        # Stock 0.5.12.post1 cannot start models that share KV with such graphs.
        made["disable_piecewise_cuda_graph"] = True
    return made


def with_what_they_need(names: list[str]) -> list[str]:
    """Patches and those that they stand on."""
    found: dict[str, None] = {}
    for name in names:
        for needed in with_what_they_need(list(by_name(name).requires)):
            found[needed] = None
        found[name] = None
    return list(found)


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


def measure(
    make: Callable[[str], Engine],
    names: list[str],
    together: int,
    talk: Callable[[Engine], None],
    more: dict[str, Callable[[Engine], None]] | None = None,
    last: Callable[[dict[str, Engine]], None] = lambda live: None,
) -> dict[str, str]:
    """Engines in groups, each asked in a thread of its own; causes of death of those that died.

    Args:
        make: starts an engine.
        names: of all engines.
        together: how many at once; 0: all.
        talk: asks an engine what every engine is asked.
        more: by name, what is asked of one when all engines have answered; it lives until then.
        last: what is asked of a group's engines at the end; one that dies ends the run.
    """
    died: dict[str, str] = {}
    more = more or {}
    size = together or len(names)
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    kept: dict[str, Engine] = {}

    def survived(name: str, cause: str | None) -> bool:
        if cause is not None:
            console.print(f"{name}: died: {cause}")
            died[name] = cause
        return cause is None

    with contextlib.ExitStack() as stack:
        for group in groups:
            console.print(f"starting {', '.join(group)}")
            live = stack.enter_context(started(make, group))
            died |= {name: "did not start" for name in group if name not in live}
            causes = _at_once(live, talk)
            live = {name: live[name] for name, cause in causes.items() if survived(name, cause)}
            kept |= {name: engine for name, engine in live.items() if name in more}
            if group is groups[-1]:
                for name, engine in kept.items():
                    if not survived(name, outlived(engine, partial(more[name], engine))):
                        live.pop(name, None)
            last(live)
            for name, engine in live.items():
                if name not in more:
                    engine.stop()
    return died


def _at_once(live: dict[str, Engine], talk: Callable[[Engine], None]) -> dict[str, str | None]:
    """Each engine in a thread of its own: what it died of, or None."""
    with ThreadPoolExecutor(max(1, len(live))) as pool:
        try:
            causes = pool.map(lambda engine: outlived(engine, partial(talk, engine)), live.values())
            return dict(zip(live, causes, strict=True))
        except BaseException:
            for engine in live.values():
                engine.process.kill()  # or its thread would wait for it
            raise


def results_of(notes: dict[str, Any], config: dict[str, Any], patches: str) -> Results:
    """Rows that say how the model was trained; from a folder's training.json and config.json."""
    made = Results(notes["model"], config["num_hidden_layers"], [patches])
    made.base |= {
        "trained_steps": notes["steps"],
        "trained_seed": notes["seed"],
        "corpus": notes["corpus"],
    }
    return made


class Pace(NamedTuple):
    """How decode steps are timed."""

    sizes: list[int]  # of batches; none: not at all
    prompts: list[list[int]]
    new: int = 96  # tokens timed
    rounds: int = 3

    def read(self, engine: Engine, size: int) -> dict[str, float]:
        """One reading: milliseconds of a step."""
        return {"decode step": engine("pace", ids=self.prompts[:size], new=self.new)["ms"]}

    def __call__(self, live: dict[str, Engine], results: Results) -> None:
        """Median and range of the rounds of each engine and size; the first, which warms up, is left out."""
        found: dict[tuple[str, str, int], list[float]] = {}
        if not self.sizes:
            return
        with turn():  # all rounds in one go
            for round_ in range(-1, self.rounds):
                for engine in in_turn(live, round_):
                    for size in self.sizes:
                        for name, value in self.read(engine, size).items():
                            if round_ >= 0:
                                found.setdefault((engine.variant, name, size), []).append(value)
        for (variant, name, size), values in found.items():
            unit, spread = UNITS[name], max(values) - min(values)
            results.add(variant, f"{name}, batch {size}", size, 0, float(np.median(values)), unit)
            results.add(variant, f"{name}, batch {size}, range", size, 0, spread, unit)


UNITS = {"decode step": "ms", "verify step": "ms", "tokens a second": "1/s"}
"""Of what is timed."""


def add_calls(results: Results, variant: str, status: dict[str, Any]) -> None:
    """How often each active patch's code ran on the host, over all processes of an engine."""
    calls: dict[str, int] = {}
    for process in status["processes"]:
        for patch in process["patches"]:
            if patch["state"] == states.ACTIVE:
                calls[patch["name"]] = calls.get(patch["name"], 0) + patch["engaged"]
    for name, count in calls.items():
        results.add(variant, f"calls of {name}", len(status["processes"]), 0, count, "calls")


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
    timed = frame.loc[frame["unit"] == "ms", "quantity"].unique()
    columns |= {
        name.replace("decode step, batch", "ms,"): (name, "{:.3f}")
        for name in timed
        if not name.endswith("range")
    }
    made = Table("", *columns)
    for variant in in_order(frame["variant"]):
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
    time: Annotated[str, typer.Option(help="Batch sizes of timed decode steps; empty: none")] = "",
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
    sizes = [int(size) for size in time.split(",") if size]
    wanted = variants(patches_of(patches), chunk)
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
        pace = Pace(sizes, small_tasks.windows(text, max([*sizes, 1]), min(256, longest) - 1))
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

        def timed(live: dict[str, Engine]) -> None:
            pace(live, results)
            findings.save()

        try:
            died = measure(make, list(wanted), together, talk, {STOCK: floors}, timed)
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
