"""What every engine is asked, and what it said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.common.engines import Engine
from bench.common.variants import ARGUMENTS, PATCHED, STOCK
from bench.models import small_tasks
from bench.speculation.engine import MtpEngine


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

    number: int  # of questions
    seed: int
    longest: int  # tokens of a question with its answer
    text: list[list[int]]  # pieces for perplexity
    prompts: list[list[int]]  # pieces that are gone on with
    tail: int  # positions of each prompt whose distributions are compared
    new: int  # tokens generated after each

    def questions(self) -> list[small_tasks.Question]:
        """With their right answers."""
        return small_tasks.questions(self.number, self.seed, self.longest)


class Answer(NamedTuple):
    """What one engine said, or a part of it; fields that are not told are None."""

    rows: list[list[int]] | None = None  # answers to the questions, or to the first of them
    nats: np.ndarray | None = None  # [pieces, length - 1] of the text
    prompt: np.ndarray | None = None  # [prompts, tail, vocabulary] log-probabilities
    generated: np.ndarray | None = None  # [prompts, new, vocabulary]
    ids: list[list[int]] | None = None  # what was generated


def answers_of(engine: Engine, asked: Asked, group: int = 0, first: int = 0) -> Answer:
    """To the ``first`` questions, 0: all; ``group``: so many requests at a time, 0: all at once."""
    count = min(first or asked.number, asked.number)
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
