"""The router's RMSNorm and its scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from gemma4_turbo.fusions.comparison import samples
from gemma4_turbo.fusions.examples import EPS, Examples, root, rows, weight
from gemma4_turbo.fusions.fusion import Fusion, Tensors
from gemma4_turbo.fusions.stock import Stock, kept
from gemma4_turbo.fusions.stock import router_norm as stock_router_norm
from gemma4_turbo.kernels.norms import router_norm as kernel
from gemma4_turbo.runtime import custom_ops


class Args(NamedTuple):
    """As `gemma4_turbo.kernels.norms.router_norm.router_norm`."""

    x: torch.Tensor
    scale: torch.Tensor
    root_size: torch.Tensor
    eps: float


class RouterNorm(Fusion[Args, torch.Tensor]):
    """`gemma4_turbo.kernels.norms.router_norm`."""

    def unfit(self, args: Args) -> str | None:
        return kernel.unfit(*args[:3])

    def launch(self, args: Args, kind: int) -> torch.Tensor:
        return kernel.launch_router_norm(*args, kind)

    def operator(self) -> Any:
        return custom_ops.register(
            self.patch,
            "router_norm(Tensor x, Tensor scale, Tensor root_size, float eps, int kind) -> Tensor",
            kernel.launch_router_norm,
            lambda x, *rest: x.new_empty(x.shape),
        )

    def traced(self, args: Args, kind: int) -> torch.Tensor:
        return self.op(*args, kind)  # type: ignore[no-any-return]

    def theirs(self, stock: Stock, args: Args) -> torch.Tensor:
        return self.repeated(stock, args)()

    def repeated(self, stock: Stock, args: Args) -> Callable[[], torch.Tensor]:
        made = kept(args.scale, args.root_size, args.x.dtype)
        return partial(stock_router_norm, stock.eager_norms(), args.x, made, args.eps)

    def reference(self, args: Args) -> torch.Tensor:
        return kernel.reference_router_norm(*args)

    def drawn(self, args: Args) -> Args:
        return args._replace(x=samples(96, args.x))

    def examples(self, device: str) -> Examples[Args]:
        """Width of 26B-A4B."""

        def draw() -> Args:
            return Args(rows(device, 2816, 1), weight(device, 2816, 2), root(device, 2816), EPS)

        return [("width 2816, scales 0.01 to 30", draw)]

    def like(self, args: Args) -> torch.Tensor:
        return args.x

    def written(self, args: Args, result: torch.Tensor) -> Tensors:
        return (result,)
