"""`moe_configs` of 0.5.12: `gemma4_turbo.ports.any.experts.moe_configs`, and where the server's arguments are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any.experts import moe_configs as shared
from gemma4_turbo.ports.any.experts.moe_configs import undo, verify

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

__all__ = ("build", "undo", "verify")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The replacement."""
    return shared.build(run, stock, _deterministic)


def _deterministic() -> bool:
    from sglang.srt.server_args import get_global_server_args

    return bool(get_global_server_args().enable_deterministic_inference)
