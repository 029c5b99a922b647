"""The judge: transformers' own classes in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bench.answers.asking import Asked
from bench.common.turns import turn
from bench.models import small_models


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
