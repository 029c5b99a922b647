"""The end of a layer without per-layer embeddings: the experts' sum, norms, residual, the next norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gemma4_turbo.fusions.comparison import samples
from gemma4_turbo.fusions.examples import EPS, Examples, rows, scalar, weight
from gemma4_turbo.fusions.fusion import Fusion, Tensors
from gemma4_turbo.fusions.stock import Stock
from gemma4_turbo.kernels.norms import layer_tail as kernel
from gemma4_turbo.kernels.norms.layer_tail import Experts, NextNorm
from gemma4_turbo.runtime import custom_ops

Outputs = tuple[torch.Tensor, torch.Tensor | None]
NO_EXPERTS = (None, None, 0.0, None, 0.0)


class Args(NamedTuple):
    """As `gemma4_turbo.kernels.norms.layer_tail.layer_tail`; the kind in ``following`` is not read."""

    mlp_output: torch.Tensor
    weight: torch.Tensor
    eps: float
    residual: torch.Tensor
    scalar: torch.Tensor
    experts: Experts | None
    following: NextNorm | None


class LayerTail(Fusion[Args, Outputs]):
    """`gemma4_turbo.kernels.norms.layer_tail` with the norm that reads the result."""

    def unfit(self, args: Args) -> str | None:
        x, weight, _, residual, scalar, experts, following = args
        return kernel.unfit(x, weight, residual, scalar, experts, following)

    def launch(self, args: Args, kind: int) -> Outputs:
        following = args.following
        if following is not None:
            following = NextNorm(following.weight, following.eps, kind)
        return kernel.launch_layer_tail(*args[:6], following)

    def operator(self) -> Any:
        return custom_ops.register(
            "input_norm",
            "layer_tail(Tensor mlp_output, Tensor weight, float eps, Tensor residual, Tensor scalar,"
            " Tensor? experts_output, Tensor? experts_weight, float experts_eps, Tensor? mlp_weight,"
            " float mlp_eps, Tensor next_weight, float next_eps, int kind) -> (Tensor, Tensor)",
            _run,
            lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape)),
        )

    def traced(self, args: Args, kind: int) -> Outputs:
        assert args.following is not None
        weight, eps, _ = args.following
        return self.op(*args[:5], *(args.experts or NO_EXPERTS)[:5], weight, eps, kind)  # type: ignore[no-any-return]

    def theirs(self, stock: Stock, args: Args) -> Outputs:
        return self.repeated(stock, args)()

    def repeated(self, stock: Stock, args: Args) -> Callable[[], Outputs]:
        x, weight, eps, residual, scalar, experts, following = args
        total = None
        if experts is not None and experts.output.dim() == 3:
            total = torch.empty_like(x)

        def call() -> Outputs:
            if experts is None:
                out = stock.norm_residual(x, weight, residual, scalar, eps)
            else:
                if total is not None:
                    stock.sum_experts(experts.output, total)
                summed = experts.output if total is None else total
                every = experts.mlp_eps, experts.eps, eps
                out = stock.dual_norm_residual(
                    x, experts.mlp_weight, summed, experts.weight, weight, residual, scalar, every
                )
            if following is None:
                return out, None
            return out, stock.eager_norms().rmsnorm(out, following.weight, following.eps)

        return call

    def reference(self, args: Args) -> Outputs:
        return kernel.reference_layer_tail(*args)

    def drawn(self, args: Args) -> Args:
        """With what stock has summed, whoever calls first: `ExpertsTail` compares the sum."""
        x, experts = samples(96, args.residual), args.experts
        if experts is not None:
            experts = experts._replace(output=x.roll(1, 0).contiguous())
        return args._replace(mlp_output=x, residual=x.flip(0), experts=experts)

    def examples(self, device: str) -> Examples[Args]:
        """26B-A4B's tail with the next norm, the experts summed."""
        return [example(device, lambda choices: choices.float().sum(1).bfloat16())]

    def like(self, args: Args) -> torch.Tensor:
        return args.residual

    def written(self, args: Args, result: Outputs) -> Tensors:
        return result


class ExpertsTail(LayerTail):
    """The same where nobody asks for the next norm: no RMSNorm of stock's to tell apart."""

    follows_rmsnorm = False

    def drawn(self, args: Args) -> Args:
        assert args.experts is not None
        rows, like, choices = kernel.COMPILED_SUM_ROWS, args.residual, args.experts.output.shape[1]
        x, output = samples(rows, like), samples(rows, like, choices * like.shape[-1])
        experts = args.experts._replace(output=output.view(rows, choices, -1))
        return args._replace(mlp_output=x, residual=x.flip(0), experts=experts)


def example(
    device: str, made: Callable[[torch.Tensor], torch.Tensor], sums_from_zero: bool = False
) -> tuple[str, Callable[[], Args]]:
    """26B-A4B's width; ``made``: the experts' output of what eight of them give a token."""
    width = 2816

    def draw() -> Args:
        x, r = rows(device, width, 1)[:32], rows(device, width, 2)[:32]
        choices = torch.stack([rows(device, width, 10 + k)[:32] for k in range(8)], dim=1)
        w = [weight(device, width, seed) for seed in (3, 4, 5, 6)]
        experts = Experts(made(choices), w[1], EPS, w[0], EPS, sums_from_zero)
        return Args(x, w[2], EPS, r, scalar(device), experts, NextNorm(w[3], EPS, 0))

    return f"{32 if device == 'cuda' else 6} rows of width {width}", draw


def _run(
    mlp_output: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    scalar: torch.Tensor,
    *others: Any,
) -> Outputs:
    experts = None if others[0] is None else Experts(*others[:5])
    following = NextNorm(*others[5:])
    return kernel.launch_layer_tail(mlp_output, weight, eps, residual, scalar, experts, following)
