"""`vision_positions`: two rows of the position table are looked up instead of multiplied out.

Stock builds a one-hot matrix ``[batch, patches, 2, positions]`` of int64, copies it into the weights'
type and multiplies it with the table: some 200 KB a patch for the 10240 positions of Gemma 4, and
the encoder's peak of memory. A product with a one-hot row is that row, and the sum of the two rows
is stock's own, so the bits are stock's wherever the table is finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.runtime.fallback import DeclinedError, Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.protocols import PatchEmbedder

TARGET = "sglang.srt.models.gemma4_vision:Gemma4VisionPatchEmbedder._position_embeddings"

_fallback = Fallback("the look-up")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The look-up; stock for ids that its one-hot would refuse."""
    one_hot: Callable[..., torch.Tensor] = stock[TARGET]

    def _position_embeddings(
        self: PatchEmbedder, patch_positions: torch.Tensor, padding_positions: torch.Tensor
    ) -> torch.Tensor:
        def ours() -> torch.Tensor:
            table = self.position_embedding_table
            reason = unfit(patch_positions, table)
            if reason is not None:
                raise DeclinedError(reason)
            return look_up(patch_positions, padding_positions, table)

        def stocks() -> torch.Tensor:
            return one_hot(self, patch_positions, padding_positions)

        if torch.compiler.is_compiling():
            return stocks()
        return _fallback.call(run, ours, stocks)

    return {TARGET: _position_embeddings}


def undo(run: PatchRun) -> None:
    """Live objects were not changed."""
    _fallback.clear()


def unfit(patch_positions: torch.Tensor, table: torch.Tensor) -> str | None:
    """Why the table is not two rows a patch, or None."""
    if patch_positions.dtype != torch.int64:
        return f"patch_positions must be int64, got {patch_positions.dtype}"
    if patch_positions.dim() != 3 or patch_positions.shape[-1] != 2 or table.shape[0] != 2:
        return f"patch_positions must be [batch, patches, 2], got {tuple(patch_positions.shape)}"
    if patch_positions.device != table.device:
        return f"patch_positions on {patch_positions.device}, table on {table.device}"
    return None


def look_up(
    patch_positions: torch.Tensor, padding_positions: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """``table[0][x] + table[1][y]``, zeros for padding: ``[batch, patches, hidden]``."""
    places = patch_positions.clamp(min=0)
    columns = torch.nn.functional.embedding(places[..., 0], table[0])
    rows = torch.nn.functional.embedding(places[..., 1], table[1])
    # A sum as stock's, from zero: two negative zeros make a positive one.
    total = torch.stack((columns, rows), dim=1).sum(dim=1)
    return torch.where(padding_positions.unsqueeze(-1), 0.0, total)


def verify(run: PatchRun, device: str) -> list[Check]:
    """Against the one-hot product, on random tables with signed zeros."""
    from types import SimpleNamespace

    generator = torch.Generator(device).manual_seed(0)
    checks = []
    for dtype in (torch.bfloat16, torch.float16):
        table = torch.randn(2, 1024, 96, generator=generator, device=device).to(dtype)
        table[table.abs() < 0.2] = -0.0
        places = torch.randint(-1, 1024, (2, 65, 2), generator=generator, device=device)
        padding = (places == -1).all(dim=-1)
        owner = SimpleNamespace(position_embedding_table=table, position_embedding_size=1024)
        expected = run.swaps[0].function(owner, places, padding)
        found = look_up(places, padding, table)
        bits = int((found.view(torch.int16) != expected.view(torch.int16)).sum())
        checks.append(
            Check(
                run.patch.name,
                f"1024 positions, {dtype}",
                "stock's one-hot product",
                found.numel(),
                bits,
                "not one bit",
                bits == 0,
            )
        )
    return checks
