"""Text and questions for small models that `train_small.py` trains and `quality.py` asks.

Tokens are bytes. Text is the source code of Python's standard library with its documentation strings,
which is on every machine. Questions have one right answer each: sums in steps, products in steps,
copying, recall from a table, sorting, closing brackets. Copies and tables can be longer than a
sliding window, so their answers need the layers that attend to everything.

Nothing here needs torch: worker processes import this file alone.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import random
import string
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAD, EOS, BOS, UNKNOWN = 0, 1, 2, 3
FIRST_BYTE = 4  # a byte's token is its value and this
VOCABULARY = 320  # 260 tokens, rounded up to a multiple of 64
USED = FIRST_BYTE + 256
LENGTH = 1024  # tokens of a training row, and at most of a question with its answer

HELD_OUT_OF = 24  # one file of so many is held out
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def encoded(text: bytes) -> list[int]:
    """Tokens of bytes."""
    return [FIRST_BYTE + byte for byte in text]


def decoded(tokens: list[int]) -> bytes:
    """Bytes of tokens; special ones have none."""
    return bytes(token - FIRST_BYTE for token in tokens if FIRST_BYTE <= token < USED)


# -- text -----------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Text to train on and text held out: different files."""

    train: bytes
    held_out: bytes
    digest: str  # of both: another Python has another library


def corpus(root: Path | None = None, most: int = 0) -> Corpus:
    """The standard library of this Python; ValueError where ``root`` has too little.

    Args:
        root: another folder with Python files.
        most: bytes at most, 0: all.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if SKIPPED & set(relative.parts) or not path.is_file():
            continue
        text = path.read_bytes()
        if most and total >= most:
            break
        total += len(text)
        name = hashlib.sha256(relative.as_posix().encode()).digest()
        parts[name[0] % HELD_OUT_OF == 0].append(text)
    train, held_out = (b"\n".join(part) for part in parts)
    if min(len(train), len(held_out)) <= LENGTH:
        raise ValueError(f"root must hold Python files, got {total} bytes below {folder}")
    return Corpus(train, held_out, hashlib.sha256(train + held_out).hexdigest()[:16])


def windows(text: bytes, count: int, length: int) -> list[list[int]]:
    """``count`` pieces of ``length`` bytes, evenly spread over the text, each after a BOS."""
    room = len(text) - length
    if room < 0:
        raise ValueError(f"text must have at least {length} bytes, got {len(text)}")
    starts = [room * i // max(1, count - 1) for i in range(count)]
    return [[BOS, *encoded(text[start : start + length])] for start in starts]


def bigram_loss(train: bytes, pieces: list[list[int]]) -> float:
    """Nats a token of a bigram model of the bytes in ``train``, on pieces of tokens.

    Counts have 0.01 added. What follows BOS is scored with the bytes' own frequencies.
    """
    bytes_ = np.frombuffer(train, np.uint8).astype(np.int64)
    pairs = np.bincount(bytes_[:-1] * 256 + bytes_[1:], minlength=65536).reshape(256, 256) + 0.01
    single = np.bincount(bytes_, minlength=256) + 0.01
    log_pairs = np.log(pairs / pairs.sum(1, keepdims=True))
    log_single = np.log(single / single.sum())
    total, count = 0.0, 0
    for piece in pieces:
        ids = np.array(piece[1:]) - FIRST_BYTE
        total -= log_single[ids[0]] + log_pairs[ids[:-1], ids[1:]].sum()
        count += len(ids)
    return float(total / count)


# -- questions ------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A prompt and the one right answer, as bytes; EOS ends the answer."""

    kind: str
    prompt: bytes
    answer: bytes

    def tokens(self) -> tuple[list[int], list[int]]:
        """Of the prompt with BOS, and of the answer with EOS."""
        return [BOS, *encoded(self.prompt)], [*encoded(self.answer), EOS]


def _scaled(source: random.Random, low: int, high: int) -> int:
    """A size from ``low`` to ``high``, small ones as often as large ones on a logarithmic scale."""
    return min(high, int(math.exp(source.uniform(math.log(low), math.log(high + 1)))))


def _number(source: random.Random, digits: int) -> int:
    """From 1, with up to so many digits."""
    return source.randrange(1, 10 ** source.randint(1, digits))


def sums(source: random.Random, hard: bool) -> Question:
    """``sum 12+7-30=`` is answered in steps: ``12+7=19;19-30=-11``."""
    terms = source.randint(4, 7) if hard else source.randint(2, 6)
    total = _number(source, 3)
    prompt, steps = str(total), []
    for _ in range(terms - 1):
        sign, term = source.choice("+-"), _number(source, 3)
        after = total + term if sign == "+" else total - term
        prompt += f"{sign}{term}"
        steps.append(f"{total}{sign}{term}={after}")
        total = after
    return Question("sums", f"sum {prompt}=".encode(), ";".join(steps).encode())


def products(source: random.Random, hard: bool) -> Question:
    """``mul 37*4=`` is answered in steps: ``30*4=120;7*4=28;120+28=148``."""
    factor = source.randint(2, 9)
    number = _number(source, 4) if not hard else source.randrange(100, 10_000)
    text = str(number)
    steps, parts = [], []
    for place, digit in enumerate(text):
        if digit != "0":
            part = int(digit) * 10 ** (len(text) - 1 - place)
            parts.append(part * factor)
            steps.append(f"{part}*{factor}={part * factor}")
    total = parts[0]
    for part in parts[1:]:
        steps.append(f"{total}+{part}={total + part}")
        total += part
    return Question("products", f"mul {text}*{factor}=".encode(), ";".join(steps).encode())


LETTERS = string.ascii_lowercase + string.digits


def copying(source: random.Random, hard: bool) -> Question:
    """``copy abc|`` is answered ``abc``; hard ones are longer than a window of 256."""
    length = source.randint(257, 320) if hard else _scaled(source, 3, 320)
    text = "".join(source.choices(LETTERS, k=length))
    return Question("copying", f"copy {text}|".encode(), text.encode())


def _table(source: random.Random, pairs: int) -> dict[str, str]:
    table: dict[str, str] = {}
    while len(table) < pairs:
        table["".join(source.choices(string.ascii_lowercase, k=3))] = "".join(
            source.choices(string.digits, k=3)
        )
    return table


def recall(source: random.Random, hard: bool) -> Question:
    """``get abc=123;xyz=456;?abc=`` is answered ``123``; hard ones ask for what left the window."""
    table = _table(source, source.randint(60, 110) if hard else _scaled(source, 1, 110))
    text = ";".join(f"{key}={value}" for key, value in table.items())
    keys = list(table)
    key = source.choice(keys[: len(keys) - 34] if hard else keys)  # 34 pairs are 272 bytes
    return Question("recall", f"get {text};?{key}=".encode(), table[key].encode())


def sorting(source: random.Random, hard: bool) -> Question:
    """``sort 53 7 91|`` is answered ``7 53 91``."""
    count = source.randint(12, 24) if hard else _scaled(source, 2, 24)
    numbers = [source.randrange(1000) for _ in range(count)]
    told = " ".join(map(str, numbers))
    return Question(
        "sorting", f"sort {told}|".encode(), " ".join(map(str, sorted(numbers))).encode()
    )


CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def brackets(source: random.Random, hard: bool) -> Question:
    """``close ([]{|`` is answered ``})``."""
    length = source.randint(60, 160) if hard else _scaled(source, 2, 160)
    open_: list[str] = []
    text = ""
    for _ in range(length):
        if open_ and source.random() < (0.5 if len(open_) < 24 else 1.0):
            text += CLOSING[open_.pop()]
        else:
            open_.append(source.choice("([{<"))
            text += open_[-1]
    if not open_:
        open_.append("(")
        text += "("
    answer = "".join(CLOSING[bracket] for bracket in reversed(open_))
    return Question("brackets", f"close {text}|".encode(), answer.encode())


KINDS: dict[str, Callable[[random.Random, bool], Question]] = {
    "sums": sums,
    "products": products,
    "copying": copying,
    "recall": recall,
    "sorting": sorting,
    "brackets": brackets,
}


def questions(count: int, seed: int, longest: int = LENGTH) -> list[Question]:
    """Of all kinds in turn, every other round hard ones; a prompt is asked once.

    Training draws from other seeds. Only the shortest prompts can have been seen there.

    Args:
        count: how many.
        seed: of the draw.
        longest: tokens at most of a question with its answer, for models that were trained on less.
    """
    source = random.Random(f"questions {seed}")
    found: dict[bytes, Question] = {}
    kinds = list(KINDS.values())
    while len(found) < count:
        index = len(found)
        hard = longest == LENGTH and (index // len(kinds)) % 2 == 1
        made = kinds[index % len(kinds)](source, hard)
        if sum(map(len, made.tokens())) <= longest:
            found.setdefault(made.prompt, made)
    return list(found.values())


# -- training rows --------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of ``LENGTH + 1`` tokens with questions one after the other."""

    tokens: np.ndarray  # [rows, LENGTH + 1] uint16
    answers: np.ndarray  # bool: a token that is to be learned, which a question's own are not


def document(source: random.Random) -> tuple[list[int], list[bool]]:
    """A question with its answer, and which of its tokens are the answer.

    A table is asked several times, as one answer would be few tokens to learn from.
    """
    kind = source.choice(list(KINDS))
    made = KINDS[kind](source, source.random() < 0.25)
    tokens, answer = made.tokens()
    learned = [False] * len(tokens) + [True] * len(answer)
    tokens += answer
    if kind == "recall":
        table = dict(pair.split(b"=") for pair in made.prompt[4:].split(b";?")[0].split(b";"))
        keys = source.choices(list(table), k=min(8, len(table)))
        for key in keys:
            if len(tokens) + 12 > LENGTH:
                break
            asked, value = encoded(b"?" + key + b"="), [*encoded(table[key]), EOS]
            tokens += asked + value
            learned += [False] * len(asked) + [True] * len(value)
    return tokens, learned


WAITING = 8


def shard(task: tuple[int, int, int]) -> Rows:
    """``count`` rows of a seed and a number; documents are never cut."""
    count, seed, number = task
    source = random.Random(f"training {seed} {number}")
    tokens = np.full((count, LENGTH + 1), PAD, np.uint16)
    answers = np.zeros((count, LENGTH + 1), bool)
    waiting = [document(source) for _ in range(WAITING)]  # the first that fits comes next
    for row in range(count):
        at = 0
        while True:
            fits = (i for i, (made, _) in enumerate(waiting) if at + len(made) <= LENGTH + 1)
            index = next(fits, None)
            if index is None:
                break
            made, learned = waiting.pop(index)
            end = at + len(made)
            tokens[row, at:end], answers[row, at:end] = made, learned
            at = end
            waiting.append(document(source))
    return Rows(tokens, answers)


SHARDS = 64


def rows(count: int, seed: int) -> Rows:
    """``count`` rows, the same on every machine; made by all cores."""
    sizes = [count * (i + 1) // SHARDS - count * i // SHARDS for i in range(SHARDS)]
    tasks = [(size, seed, i) for i, size in enumerate(sizes)]
    cores = len(os.sched_getaffinity(0))
    if count < 4 * SHARDS or cores == 1:
        parts = [shard(task) for task in tasks]
    else:
        with multiprocessing.get_context("fork").Pool(min(cores, SHARDS)) as pool:
            parts = pool.map(shard, tasks, chunksize=1)
    return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
