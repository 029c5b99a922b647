"""A product of few rows with a weight, and what stock computes with it next."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions.comparison import samples, telling
from gemma4_turbo.fusions.examples import rows
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.kernels import skinny_gemm as kernel
from gemma4_turbo.kernels.skinny_gemm import Config, Epilogue


class Args(NamedTuple):
    """As `gemma4_turbo.kernels.skinny_gemm.skinny_gemm`, with all cuts."""

    x: torch.Tensor
    weight: torch.Tensor
    cuts: tuple[Config, ...]  # one for each of `kernel.ROWS`
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
        x, weight, cuts, epilogue, extra, arrived = args
        assert arrived is not None
        config = cuts[kernel.ROWS.index(kernel.room(x.shape[0]))]
        return kernel.launch_skinny_gemm(x, weight, config, epilogue, extra, arrived)

    def reference(self, args: Args) -> torch.Tensor:
        return kernel.reference_skinny_gemm(args.x, args.weight, args.epilogue, args.extra)

    def like(self, args: Args) -> torch.Tensor:
        return args.x

    def checks(self, device: str) -> list[Check]:
        """Against fp64, at shapes of E4B (of a toy without a GPU): no farther than cuBLAS plus 10 %."""
        checks = []
        shapes = ((20480, 2560), (2560, 10240), (256, 2560)) if device == "cuda" else ((64, 256),)
        for (n, k), epilogue in zip(shapes, (1, 0, 2), strict=False):
            x = rows(device, k, 1)[-16:] / 30
            generator = torch.Generator(device).manual_seed(3)
            w = torch.randn(n, k, generator=generator, device=device) / k**0.5
            w = w.bfloat16()
            extra = rows(device, n, 4)[-x.shape[0] :] / 30 if epilogue == 2 else None
            kind = Epilogue(epilogue)
            config = kernel.choose(w.shape, kind, 132)
            ours = kernel.skinny_gemm(x, w, config, kind, extra).double()
            stock = kernel.reference_skinny_gemm(x, w, kind, extra).double()
            wide = None if extra is None else extra.double()
            exact = kernel.reference_skinny_gemm(x.double(), w.double(), kind, wide).double()
            error, allowed = (float((y - exact).norm() / exact.norm()) for y in (ours, stock))
            passed = error <= 1.1 * allowed
            checks.append(
                Check(
                    self.patch,
                    f"[{x.shape[0]}, {k}] x [{n}, {k}], {kind.name.lower()}",
                    "fp64",
                    ours.numel(),
                    int((ours != stock).sum()),
                    f"relative error {1.1 * allowed:.2e} (stock's plus 10 %), is {error:.2e}",
                    passed,
                )
            )
        return checks

    def differing(self, args: Args, kind: int) -> int:
        """Elements farther from stock's than two roundings of the largest in their row."""
        weight, found = telling(args.weight), 0
        for count in kernel.ROWS:
            drawn = args._replace(
                x=samples(count, args.x),
                weight=weight,
                extra=None if args.extra is None else samples(count, args.extra),
            )
            if kernel.unfit(drawn.x, weight, drawn.epilogue, drawn.extra) is not None:
                continue  # measured here, and left to stock
            ours, stock = self.launch(drawn, kind).float(), self.reference(drawn).float()
            bound = stock.abs().amax(-1, keepdim=True) * 2.0**-6
            found += int(((ours - stock).abs() > bound).sum()) + int((~ours.isfinite()).sum())
        return found
