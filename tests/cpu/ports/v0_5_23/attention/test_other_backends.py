"""Attention backends other than Triton's: the attention kernels stand aside, and everything else works."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.cpu.ports import other_backends as others
from tests.cpu.ports.v0_5_23 import models
from tests.cpu.ports.v0_5_23.decode_step.test_store import pool


@pytest.fixture(autouse=True)
def stock(tmp_path: Any) -> Iterator[None]:
    """Stock at first; reverted at the end."""
    importlib.import_module(f"{others.ATTENTION}.triton_backend")
    with models.stock(tmp_path):
        yield


def run(model: Any, inputs: tuple[Any, ...], given: Any) -> torch.Tensor:
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    with forward_context(ForwardContext(attn_backend=given)):
        return model(*inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "mode", "kind"), others.CASES)
def test_the_attention_kernels_stand_aside(name: str, mode: str, kind: str):
    others.check(name, mode, kind, lambda: pool("one"), run)
