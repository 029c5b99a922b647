"""Between attention and feed-forward: three RMSNorms, an addition, the router's scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from gemma4_turbo.fusions.comparison import samples
from gemma4_turbo.fusions.examples import EPS, Examples, root, rows, weight
from gemma4_turbo.fusions.fusion import Fusion, Tensors
from gemma4_turbo.fusions.stock import Stock, kept
from gemma4_turbo.fusions.stock import layer_norms as stock_layer_norms
from gemma4_turbo.kernels.norms import layer_norms as kernel
from gemma4_turbo.kernels.norms.layer_norms import Outputs, Router
from gemma4_turbo.runtime import custom_ops

NO_ROUTER = (None, None, 0.0, None, 0.0)


class Args(NamedTuple):
    """As `gemma4_turbo.kernels.norms.layer_norms.layer_norms`."""

    attention_output: torch.Tensor
    residual: torch.Tensor
    post_attention_weight: torch.Tensor
    post_attention_eps: float
    pre_feedforward_weight: torch.Tensor
    pre_feedforward_eps: float
    router: Router | None


class LayerNorms(Fusion[Args, Outputs]):
    """`gemma4_turbo.kernels.norms.layer_norms`."""

    def unfit(self, args: Args) -> str | None:
        return kernel.unfit(args[0], args[1], args[2], args[4], args[6])

    def launch(self, args: Args, kind: int) -> Outputs:
        return kernel.launch_layer_norms(*args, kind)

    def operator(self) -> Any:
        return custom_ops.register(
            self.patch,
            "layer_norms(Tensor attention_output, Tensor(a!) residual, Tensor w1, float eps1,"
            " Tensor w2, float eps2, Tensor? scale, Tensor? root_size, float eps3, Tensor? w3,"
            " float eps4, int kind) -> (Tensor, Tensor, Tensor)",
            _run,
            _fake,
        )

    def traced(self, args: Args, kind: int) -> Outputs:
        router = args.router or NO_ROUTER
        found = self.op(*args[:6], *router, kind)
        return found if args.router is not None else (found[0], None, None)

    def theirs(self, stock: Stock, args: Args) -> Outputs:
        return stock_layer_norms(stock.eager_norms(), *args)

    def repeated(self, stock: Stock, args: Args) -> Callable[[], Outputs]:
        router, made = args.router, None
        if router is not None:
            made = kept(router.scale, router.root_size, args.residual.dtype)
        return partial(stock_layer_norms, stock.eager_norms(), *args, made)

    def reference(self, args: Args) -> Outputs:
        return kernel.reference_layer_norms(*args)

    def drawn(self, args: Args) -> Args:
        x = samples(96, args.residual)
        return args._replace(attention_output=x, residual=x.flip(0))

    def examples(self, device: str) -> Examples[Args]:
        """Widths of 26B-A4B (with router) and E4B (without)."""

        def draw(width: int, with_router: bool) -> Args:
            x, r = rows(device, width, 1), rows(device, width, 2).flip(0).contiguous()
            w = [weight(device, width, seed) for seed in (3, 4, 5, 6)]
            router = Router(w[2], root(device, width), EPS, w[3], EPS) if with_router else None
            return Args(x, r, w[0], EPS, w[1], EPS, router)

        return [
            (f"width {width}, scales 0.01 to 30", partial(draw, width, with_router))
            for width, with_router in ((2816, True), (2560, False))
        ]

    def like(self, args: Args) -> torch.Tensor:
        return args.residual

    def written(self, args: Args, result: Outputs) -> Tensors:
        return *result, args.residual


def _run(
    attention_output: torch.Tensor,
    residual: torch.Tensor,
    w1: torch.Tensor,
    eps1: float,
    w2: torch.Tensor,
    eps2: float,
    *router: Any,
) -> tuple[torch.Tensor, ...]:
    *parts, kind = router
    found = kernel.launch_layer_norms(
        attention_output,
        residual,
        w1,
        eps1,
        w2,
        eps2,
        None if parts[0] is None else Router(*parts),
        kind,
    )
    return tuple(custom_ops.nothing(residual) if x is None else x for x in found)


def _fake(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    made = x.new_empty(x.shape)
    if rest[4] is None:
        return made, custom_ops.nothing(x), custom_ops.nothing(x)
    return made, x.new_empty(x.shape), x.new_empty(x.shape)
