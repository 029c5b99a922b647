"""A product of few rows with a weight, and what stock computes with it next."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_turbo.fusions.comparison import samples, telling
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.kernels import skinny_gemm as kernel
from gemma4_turbo.kernels.skinny_gemm import Config, Epilogue


class Args(NamedTuple):
    """As `gemma4_turbo.kernels.skinny_gemm.skinny_gemm`, with both cuts."""

    x: torch.Tensor
    weight: torch.Tensor
    few: Config  # up to FEW_ROWS rows
    many: Config
    epilogue: Epilogue
    extra: torch.Tensor | None
    arrived: torch.Tensor | None


class SkinnyGemm(Fusion[Args, torch.Tensor]):
    """`gemma4_turbo.kernels.skinny_gemm`. Within bounds: the order of its sums is its own."""

    follows_rmsnorm = False

    def unfit(self, args: Args) -> str | None:
        if args.arrived is None:
            return "a linear layer was not run before the capture"
        return kernel.unfit(args.x, args.weight, args.epilogue, args.extra)

    def launch(self, args: Args, kind: int) -> torch.Tensor:
        x, weight, few, many, epilogue, extra, arrived = args
        assert arrived is not None
        config = few if x.shape[0] <= kernel.FEW_ROWS else many
        return kernel.launch_skinny_gemm(x, weight, config, epilogue, extra, arrived)

    def reference(self, args: Args) -> torch.Tensor:
        return kernel.reference_skinny_gemm(args.x, args.weight, args.epilogue, args.extra)

    def like(self, args: Args) -> torch.Tensor:
        return args.x

    def differing(self, args: Args, kind: int) -> int:
        """Elements farther from stock's than two roundings of the largest in their row."""
        weight, found = telling(args.weight), 0
        for rows in (kernel.FEW_ROWS, kernel.MAX_ROWS):
            drawn = args._replace(
                x=samples(rows, args.x),
                weight=weight,
                extra=None if args.extra is None else samples(rows, args.extra),
            )
            if kernel.unfit(drawn.x, weight, drawn.epilogue, drawn.extra) is not None:
                continue  # measured here, and left to stock
            ours, stock = self.launch(drawn, kind).float(), self.reference(drawn).float()
            bound = stock.abs().amax(-1, keepdim=True) * 2.0**-6
            found += int(((ours - stock).abs() > bound).sum()) + int((~ours.isfinite()).sum())
        return found
