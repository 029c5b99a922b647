"""The rows of a QKV projection that are read."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions.examples import rows
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

    def checks(self, device: str) -> list[Check]:
        """Rows of the weight against the whole product, within the rounding of the output."""
        x, weight = rows(device, 1536, 1), rows("cpu", 1536, 2).to(device)
        weight = torch.cat([weight] * 64)[:256] * 0.02
        whole = torch.nn.functional.linear(x, weight)[:, :128]
        part = torch.nn.functional.linear(x, weight[:128])
        bits = int((whole.contiguous().view(torch.int16) != part.view(torch.int16)).sum())
        near = torch.allclose(whole.float(), part.float(), rtol=2**-7, atol=2**-7)
        what, allowed = "the first half of the rows", "an ulp of the output"
        against = "the whole product"
        return [Check(self.patch, what, against, part.numel(), bits, allowed, near)]

    def differing(self, args: Args, kind: int) -> int:
        return 0
