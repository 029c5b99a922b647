"""SGLang's own Gemma 4 text model of this line on the CPU, small, without a server."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4_turbo.cli.sglang_process import prepare_sglang
from gemma4_turbo.cli.small_model import Uniform, build, run
from gemma4_turbo.instance import ENGINE

__all__ = ["Uniform", "build", "norms_as_on_a_gpu", "prepare_sglang", "run", "stock"]


def norms_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """The router's norm times its weight: stock's function in plain torch leaves the folded scale out."""
    from sglang.srt.layers.layernorm import Gemma4RMSNorm

    def forward_native(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (self._norm(x.float()) * (self.weight.float() + self.scale_shift)).type_as(x)

    patch.setattr(Gemma4RMSNorm, "forward_native", forward_native)


@contextlib.contextmanager
def stock(state: Path) -> Iterator[None]:
    """Stock at first, on layers as a GPU has them; reverted at the end. ``state``: our folder."""
    for module in ("attention.triton_backend", "moe.moe_runner.triton_utils.fused_moe"):
        importlib.import_module(f"sglang.srt.layers.{module}")  # as a server has them
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("GEMMA4_TURBO_STATE_DIR", str(state))
        norms_as_on_a_gpu(patch)
        for run in ENGINE.runs.values():
            patch.setattr(run, "_decline_reason", "")
        yield
        ENGINE.revert()
