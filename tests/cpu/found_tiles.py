"""What a kernel makes of one row of a GPU profile: asked through the kernel's own look-up."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from gemma4_turbo.engine import gpu_profile
from gemma4_turbo.engine.gpu_profile import Shape
from gemma4_turbo.kernels import experts_few, measured, moe_tables, skinny_gemm
from gemma4_turbo.kernels.attention import decode, extend_tiles

CPU = torch.device("cpu")


def found_by_the_kernel(shape: Shape) -> tuple[int, ...] | None:
    """The tile that the kernel takes from a profile with this shape alone; None: none.

    ValueError or TypeError where the kernel spells no shape like this.
    """
    with mock.patch.object(measured, "source", return_value=gpu_profile.by_place([shape])):
        measured.forget()
        try:
            row = _row(shape.kernel, shape.shape)
        finally:
            measured.forget()
    if row is None or row.tile is None:
        return None
    if shape.kernel == "moe_configs":
        return moe_tables.numbers(row.tile)
    return tuple(map(int, sum(row.tile, ()) if shape.kernel == "experts_few" else row.tile))


def _row(kernel: str, words: Any) -> Any:
    if kernel == "skinny_gemm":
        n, k, epilogue, rows = words
        return skinny_gemm.measured_row((n, k), skinny_gemm.Epilogue(epilogue), rows, CPU)
    if kernel == "decode_attention":
        head_dim, group, pairs = words
        return decode.measured_row(pairs, 1, group, head_dim, CPU)
    if kernel == "experts_few":
        return experts_few.measured_row(*words, CPU)
    if kernel == "moe_configs":
        return moe_tables.measured_row(*words, CPU)
    if kernel == extend_tiles.NAME:
        head_dim, group, kind = words
        if kind == extend_tiles.SPLIT_KIND:
            return extend_tiles.found_split(head_dim, group, CPU)
        return extend_tiles.found_dense(head_dim, group, kind == extend_tiles.MASKED, CPU)
    raise ValueError(f"no kernel with tiles: {kernel}")
