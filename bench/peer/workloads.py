"""What ``peers.py`` asks of every engine: the same models, prompts and sampling."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.pictures import prompt
from bench.models import assistant
from gemma4_turbo.models import geometry, geometry_mm

BENCH = Path(__file__).resolve().parents[1]
TEXT, PICTURES, MTP = "text", "pictures", "mtp"
DRAFT_TOKENS = 3
IMAGES, SIDE = 6, 480  # of a prompt; pixels
WARM_UP_TOKENS = 32
MOST_WARM_UPS = 5
MOST_ROUNDS = 10  # so that a hundred numbers suffice for the prompts of a workload
DEFAULTS, CHUNK = "own defaults", "same chunk"


class Workload(NamedTuple):
    """So many prompts of one length at once, so many new tokens each.

    Attributes:
        model: empty: that of ``--model``.
        prompt: tokens; 0: from `chat_lengths`, or what the images make.
    """

    name: str
    model: str
    kind: str
    requests: int
    prompt: int
    new: int

    def told(self) -> str:
        """For a table."""
        if self.kind == PICTURES:
            return f"{self.name}: {self.requests} x {IMAGES} images, {self.new} out"
        if not self.prompt:
            return f"{self.name}: {self.requests} of a chat trace"
        return f"{self.name}: {self.requests} x {self.prompt} in, {self.new} out"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("A", "", TEXT, 30, 3000, 100),
        Workload("B", "", TEXT, 50, 500, 500),
        Workload("C", "", TEXT, 30, 100, 1000),
        Workload("chat", "", TEXT, 200, 0, 0),
        Workload("E2B", "e2b", TEXT, 30, 7000, 10),
        Workload("E4B", "e4b", TEXT, 30, 7000, 10),
        Workload("images", "", PICTURES, 16, 0, 16),
        Workload("MTP", "e4b", MTP, 8, 512, 256),
        Workload("MTP1", "e4b", MTP, 1, 512, 256),
    )
}


def chat_lengths() -> list[tuple[int, int]]:
    """Tokens in and out of 300 requests to a chat service: every 64th of a published trace."""
    with (BENCH / "chat_lengths.csv").open() as file:
        return [(int(row["input"]), int(row["output"])) for row in csv.DictReader(file)]


def requests(workload: Workload, round_: int) -> list[dict[str, Any]]:
    """For every engine the same; others in every round and workload, as both engines keep prefixes.

    Rounds below 0 warm up, with few new tokens: see `warm_ups`.
    """
    seed = (list(WORKLOADS).index(workload.name) * 100 + round_ + 50) * 10_000
    if workload.kind == PICTURES:
        made = [picture_request(workload, seed + i) for i in range(workload.requests)]
    else:
        lengths = [(workload.prompt, workload.new)] * workload.requests
        if not workload.prompt:
            lengths = chat_lengths()[: workload.requests]
        made = [
            {"ids": tokens(length, seed + i), "new": new} for i, (length, new) in enumerate(lengths)
        ]
    if round_ < 0:
        made = [one | {"new": min(one["new"], WARM_UP_TOKENS)} for one in made]
    return made


def warm_ups(workload: Workload, round_: int) -> Iterator[list[dict[str, Any]]]:
    """What may be run before a round, from 0 to `MOST_ROUNDS` - 1; prompts of its own each time."""
    for number in range(MOST_WARM_UPS):
        yield requests(workload, -1 - (round_ * MOST_WARM_UPS + number))


def tokens(count: int, seed: int) -> list[int]:
    """Random ones."""
    source = random.Random(seed)
    return [source.randrange(10, 250_000) for _ in range(count)]


def picture_request(workload: Workload, seed: int) -> dict[str, Any]:
    """Words with images between them."""
    body = prompt(IMAGES, SIDE, seed)
    return {"text": body["text"], "images": body["image_data"], "new": workload.new}


# -- models ---------------------------------------------------------------------------------------


def as_published(name: str, layers: int | None) -> dict[str, Any]:
    """The config.json of a text-only model with its own names, which vLLM reads."""
    text: dict[str, Any] = geometry_mm.config(name, layers)["text_config"]
    # No image is in the text: as in SGLang's folder, no token sees what follows it.
    own = {"model_type": "gemma4_text", "use_bidirectional_attention": None}
    return {"architectures": ["Gemma4ForCausalLM"], **text, **own}


def write(scratch: Path, name: str, kind: str, layers: int | None, engine: str) -> Path:
    """The model's folder for an engine; SGLang and vLLM have text-only ones of their own."""
    folder = scratch / f"{name}-{kind}-{'vllm' if engine == 'vllm' else 'sglang'}"
    if (folder / "config.json").exists():
        return folder
    if kind == PICTURES:
        return geometry_mm.write_model(folder, name, layers)
    geometry.write_model(folder, name, layers)
    if engine == "vllm":
        (folder / "config.json").write_text(json.dumps(as_published(name, layers), indent=1))
    return folder


def write_words(folder: Path) -> Path:
    """A tokenizer into a text-only folder: a word is a token, and any tokens survive being text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = [*special, *(f"t{i}" for i in range(len(special), geometry.VOCABULARY))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    names = {f"{word.strip('<>')}_token": word for word in special}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072, **names}
    config["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_draft(scratch: Path, name: str) -> Path:
    """The folder of an MTP assistant, the same for all engines."""
    folder = scratch / f"{name}-assistant"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(assistant.config(name), indent=1))
    return folder


def arguments(engine: str, folder: Path, kind: str, draft: Path | None) -> dict[str, Any]:
    """What a comparison without weights needs, and nothing that tunes."""
    vllm = engine == "vllm"
    found: dict[str, Any] = {"model" if vllm else "model_path": str(folder)}
    found["load_format"] = "dummy"
    if kind != PICTURES:
        found["skip_tokenizer_init"] = True
    if not vllm:
        found |= {"grammar_backend": "none", "log_level": "info"}
    elif kind == PICTURES:
        found["limit_mm_per_prompt"] = {"image": IMAGES}
    if draft is not None and vllm:
        found["speculative_config"] = {
            "method": "mtp",
            "model": str(draft),
            "num_speculative_tokens": DRAFT_TOKENS,
        }
    elif draft is not None:
        found |= assistant.speculation(draft, DRAFT_TOKENS)
    return found


def chunked(engine: str, chunk: int) -> dict[str, Any]:
    """Prompts in pieces of so many tokens."""
    return {"max_num_batched_tokens" if engine == "vllm" else "chunked_prefill_size": chunk}
