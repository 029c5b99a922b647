"""What trainings of small models share: data, optimiser, learning rate, and an end that saves."""

from __future__ import annotations

import functools
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console

from bench.models import small_tasks

console = Console(width=150)


class Settings(NamedTuple):
    """Of one training."""

    minutes: float = 5.0
    steps: int = 0  # 0: as many as the minutes allow
    seed: int = 0
    batch: int = 32
    length: int = small_tasks.LENGTH
    rate: float = 1.5e-3
    text_share: float = 0.4  # of rows and of the loss
    balance: float = 0.01  # weight of the auxiliary loss
    rows: int = 98_304  # of questions, made beforehand
    most_text: int = 0  # bytes; 0: all
    pieces: int = 64  # of held-out text, for the loss at the end
    questions: int = 600  # at the end


@functools.cache
def questions(count: int, seed: int) -> small_tasks.Rows:
    """Rows of questions, made once for all models."""
    return small_tasks.rows(count, seed)


class Data:
    """Text and rows of questions on the device, drawn from by a generator."""

    def __init__(self, settings: Settings, corpus: small_tasks.Corpus, device: str) -> None:
        self.settings = settings
        made = questions(settings.rows, settings.seed)
        self.text = torch.frombuffer(bytearray(corpus.train), dtype=torch.uint8).to(device)
        self.tokens = torch.from_numpy(made.tokens.astype("int16")).to(device)
        self.answers = torch.from_numpy(made.answers).to(device)
        self.generator = torch.Generator().manual_seed(settings.seed)

    def _draw(self, below: int, count: int) -> torch.Tensor:
        return torch.randint(below, (count,), generator=self.generator).to(self.text.device)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Tokens ``[batch, length + 1]``, which of them are to be learned, and how many rows are text."""
        s = self.settings
        texts = round(s.batch * s.text_share)
        starts = self._draw(len(self.text) - s.length, texts)
        at = torch.arange(s.length, device=self.text.device)
        text = self.text[starts[:, None] + at].long() + small_tasks.FIRST_BYTE
        text = torch.nn.functional.pad(text, (1, 0), value=small_tasks.BOS)
        rows = self._draw(len(self.tokens), s.batch - texts)
        asked = self.tokens[rows, : s.length + 1].long()
        learned = self.answers[rows, : s.length + 1]
        everything = torch.ones_like(text, dtype=torch.bool)
        return torch.cat([text, asked]), torch.cat([everything, learned]), texts


class Masters:
    """AdamW on fp32 copies of a model's weights."""

    def __init__(self, model: Any, rate: float) -> None:
        named = list(model.named_parameters())
        self.weights = [tensor for _, tensor in named]
        self.copies = [tensor.detach().float().clone() for tensor in self.weights]
        for copy in self.copies:
            copy.grad = torch.zeros_like(copy)
        decays = [t.dim() > 1 and "embed" not in name and "router" not in name for name, t in named]
        groups = [
            {
                "params": [c for c, decay in zip(self.copies, decays, strict=True) if decay == on],
                "weight_decay": 0.1 if on else 0.0,
            }
            for on in (True, False)
        ]
        on_gpu = self.weights[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=on_gpu)

    def step(self, rate: float) -> torch.Tensor:
        """One step; returns the gradient's norm before it was clipped to one."""
        gradients = [w.grad if w.grad is not None else torch.zeros_like(w) for w in self.weights]
        own = [copy.grad for copy in self.copies]
        torch._foreach_copy_(own, gradients)
        norm = torch.nn.utils.clip_grad_norm_(self.copies, 1.0, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.copies)
        for weight in self.weights:
            weight.grad = None
        return norm


WARM = 200  # steps in which the learning rate rises


def schedule(step: int, steps: int, highest: float) -> float:
    """The learning rate: up, then down along a cosine to a fiftieth.

    While it rises it does not depend on the number of steps, which is not known then.
    """
    warm = min(WARM, max(1, steps // 2))
    if step < warm:
        return highest * (step + 1) / warm
    part = (step - warm) / max(1, steps - warm)
    return highest * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, part))) / 2)


TIMED = range(10, 40)  # steps that say how long one takes


def experts_that_run(device: str) -> str:
    """Transformers' fastest experts that this PyTorch can train with.

    Builds of PyTorch differ in their grouped products; experts one after the other always run.
    """
    if device == "cpu":
        return "eager"
    try:
        given: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
        x, up, down = (torch.randn(s, **given) for s in ((64, 256), (4, 64, 256), (4, 256, 64)))
        ends = torch.tensor([8, 8, 40, 64], device=device, dtype=torch.int32)
        product = torch.nn.functional.grouped_mm
        both = product(product(x, up.mT, offs=ends), down.mT, offs=ends)
        both.square().sum().backward()  # an expanded gradient, as of a sum alone, is not taken
        torch.cuda.synchronize()
    except (RuntimeError, AttributeError) as error:
        console.print(f"experts one after the other: {str(error).splitlines()[0]}")
        return "eager"
    return "grouped_mm"


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came: what is trained by then is saved."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
