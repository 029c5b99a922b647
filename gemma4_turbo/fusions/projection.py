"""The rows of a QKV projection that are read."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_turbo.fusions.fusion import Fusion


class Args(NamedTuple):
    """``linear(x, weight[:rows])``."""

    x: torch.Tensor
    weight: torch.Tensor
    rows: int


class QProjection(Fusion[Args, torch.Tensor]):
    """Stock's product with fewer rows of the weight. No kernel of ours: nothing to compare."""

    follows_rmsnorm = False

    def unfit(self, args: Args) -> str | None:
        if args.x.dtype != args.weight.dtype:
            return f"the weight is {args.weight.dtype}, the activations {args.x.dtype}"
        return None

    def launch(self, args: Args, kind: int) -> torch.Tensor:
        return torch.nn.functional.linear(args.x, args.weight[: args.rows])

    def traced(self, args: Args, kind: int) -> torch.Tensor:
        return torch.nn.functional.linear(args.x, args.weight[: args.rows])

    def like(self, args: Args) -> torch.Tensor:
        return args.x

    def differing(self, args: Args, kind: int) -> int:
        return 0
