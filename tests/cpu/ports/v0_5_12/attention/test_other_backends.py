"""Attention backends other than Triton's: the attention kernels stand aside, and everything else works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from tests.cpu.ports import other_backends as others
from tests.cpu.ports.v0_5_12.decode_step.test_forwards import applied, no_grad  # noqa: F401 - fixtures of every test here


def pool() -> Any:
    """Of two layers."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    return MHATokenToKVPool(others.TOKENS, 1, torch.bfloat16, 1, 128, 2, "cpu", False)


def run(model: Any, inputs: tuple[Any, ...], given: Any) -> torch.Tensor:
    batch = inputs[2]
    batch.attn_backend, batch.token_to_kv_pool = given, given.token_to_kv_pool
    return model(*inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "mode", "kind"), others.CASES)
def test_the_attention_kernels_stand_aside(name: str, mode: str, kind: str):
    ENGINE.revert()
    others.check(name, mode, kind, pool, run)
