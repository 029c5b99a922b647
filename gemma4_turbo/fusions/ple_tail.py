"""The end of a layer with per-layer embeddings: two norms with residual, and the gate between them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.fusions.comparison import samples
from gemma4_turbo.fusions.examples import EPS, Examples, rows, scalar, weight
from gemma4_turbo.fusions.fusion import Fusion, Tensors
from gemma4_turbo.fusions.site import Site
from gemma4_turbo.fusions.stock import Stock
from gemma4_turbo.kernels.norms import ple_tail as kernel
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

Pair = tuple[torch.Tensor, torch.Tensor | None]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Args(NamedTuple):
    """The three launches of a layer's end.

    Before the two projections have run, tensors of the same shape stand for what they give.
    """

    x: torch.Tensor
    weight: torch.Tensor
    eps: float
    residual: torch.Tensor
    gate: torch.Tensor  # of the first projection
    per_layer_input: torch.Tensor
    contribution: torch.Tensor  # of the second
    last_weight: torch.Tensor
    last_eps: float
    scalar: torch.Tensor


class NormAdd(NamedTuple):
    """As `gemma4_turbo.kernels.norms.ple_tail.norm_add`."""

    x: torch.Tensor
    weight: torch.Tensor
    eps: float
    residual: torch.Tensor
    scalar: torch.Tensor | None = None
    next_weight: torch.Tensor | None = None
    next_eps: float = 0.0


class PleTail(Fusion[Args, Three]):
    """`gemma4_turbo.kernels.norms.ple_tail`, asked once for a layer's end, then launch by launch."""

    gelu_op: Any = None

    def unfit(self, args: Args) -> str | None:
        return kernel.norm_add_unfit(
            args.x, args.weight, args.residual, args.scalar
        ) or kernel.gelu_mul_unfit(args.gate, args.per_layer_input)

    def enable(self, run: PatchRun) -> None:
        self.gelu_op = gelu_mul_op()
        super().enable(run)

    def operator(self) -> Any:
        return norm_add_op()

    def norm_add(self, site: Site, args: NormAdd) -> Pair:
        """The first or the last launch, eager or traced."""
        if torch.compiler.is_compiling():
            out, following = self.op(*args, site.kinds.traced)
            return out, None if args.next_weight is None else following
        return kernel.launch_norm_add(*args, site.kinds.eager)

    def gelu_mul(self, gate: torch.Tensor, per_layer_input: torch.Tensor) -> torch.Tensor:
        """The launch between them, eager or traced."""
        if torch.compiler.is_compiling():
            return self.gelu_op(gate, per_layer_input)  # type: ignore[no-any-return]
        return kernel.launch_gelu_mul(gate, per_layer_input)

    def launch(self, args: Args, kind: int) -> Three:
        h, _ = kernel.launch_norm_add(*args[:4], None, None, 0.0, kind)
        gated = kernel.launch_gelu_mul(args.gate, args.per_layer_input)
        last = args.last_weight, args.last_eps
        out, _ = kernel.launch_norm_add(args.contribution, *last, h, args.scalar, None, 0.0, kind)
        return h, gated, out

    def theirs(self, stock: Stock, args: Args) -> Three:
        rmsnorm = stock.eager_norms().rmsnorm
        h = rmsnorm(args.x, args.weight, args.eps) + args.residual
        gate = torch.nn.functional.gelu(args.gate, approximate="tanh")
        last = rmsnorm(args.contribution, args.last_weight, args.last_eps)
        return h, gate * args.per_layer_input, (h + last) * args.scalar

    def reference(self, args: Args) -> Three:
        h, _ = kernel.reference_norm_add(*args[:4])
        gated = kernel.reference_gelu_mul(args.gate, args.per_layer_input)
        last = args.last_weight, args.last_eps
        out, _ = kernel.reference_norm_add(args.contribution, *last, h, args.scalar)
        return h, gated, out

    def drawn(self, args: Args) -> Args:
        x = samples(96, args.x)
        every = torch.arange(-32768, 32768, device=x.device, dtype=torch.int32).to(torch.int16)
        gate = every.view(x.dtype).view(256, 256)
        gate = torch.where(gate.isnan(), torch.zeros_like(gate), gate)
        return args._replace(
            x=x,
            residual=x.flip(0),
            gate=gate,
            per_layer_input=samples(256, gate),
            contribution=x,
        )

    def examples(self, device: str) -> Examples[Args]:
        """Widths of E2B and E4B."""

        def draw(width: int) -> Args:
            x, r = rows(device, width, 1), rows(device, width, 2).flip(0).contiguous()
            w, last = weight(device, width, 3), weight(device, width, 7)
            gate, factor = rows(device, 256, 5), rows(device, 256, 6)
            after = rows(device, width, 8)
            return Args(x, w, EPS, r, gate, factor, after, last, EPS, scalar(device))

        return [(f"width {width}", partial(draw, width)) for width in (1536, 2560)]

    def like(self, args: Args) -> torch.Tensor:
        return args.x

    def written(self, args: Args, result: Three) -> Tensors:
        return result


class PleInputNorm(Fusion[NormAdd, Pair]):
    """The last launch with the norm that reads the result."""

    def unfit(self, args: NormAdd) -> str | None:
        if args.next_weight is None:
            return "nobody asks for the next norm"
        return norms.weight_unfit("next_weight", args.next_weight, args.x)

    def operator(self) -> Any:
        return norm_add_op()

    def launch(self, args: NormAdd, kind: int) -> Pair:
        return kernel.launch_norm_add(*args, kind)

    def traced(self, args: NormAdd, kind: int) -> Pair:
        return self.op(*args, kind)  # type: ignore[no-any-return]

    def theirs(self, stock: Stock, args: NormAdd) -> Pair:
        x, weight, eps, residual, scalar, next_weight, next_eps = args
        rmsnorm = stock.eager_norms().rmsnorm
        out = residual + rmsnorm(x, weight, eps)
        out = out if scalar is None else out * scalar
        return out, None if next_weight is None else rmsnorm(out, next_weight, next_eps)

    def reference(self, args: NormAdd) -> Pair:
        return kernel.reference_norm_add(*args)

    def drawn(self, args: NormAdd) -> NormAdd:
        x = samples(96, args.x)
        return args._replace(x=x, residual=x.flip(0))

    def examples(self, device: str) -> Examples[NormAdd]:
        """Widths of E2B and E4B."""

        def draw(width: int) -> NormAdd:
            x, r = rows(device, width, 1), rows(device, width, 2).flip(0).contiguous()
            w, after = weight(device, width, 3), weight(device, width, 4)
            return NormAdd(x, w, EPS, r, scalar(device), after, EPS)

        return [
            (f"width {width}, with the next norm", partial(draw, width)) for width in (1536, 2560)
        ]

    def like(self, args: NormAdd) -> torch.Tensor:
        return args.x

    def written(self, args: NormAdd, result: Pair) -> Tensors:
        return result


def gelu_mul_op() -> Any:
    """``gelu_mul``, registered."""
    return custom_ops.register(
        "ple_tail",
        "gelu_mul(Tensor gate, Tensor per_layer_input) -> Tensor",
        kernel.launch_gelu_mul,
        lambda gate, per_layer_input: gate.new_empty(gate.shape),
    )


def norm_add_op() -> Any:
    """``norm_add``, registered."""
    return custom_ops.register(
        "ple_tail",
        "norm_add(Tensor x, Tensor weight, float eps, Tensor residual, Tensor? scalar,"
        " Tensor? next_weight, float next_eps, int kind) -> (Tensor, Tensor)",
        _run,
        _fake,
    )


def _run(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, following = kernel.launch_norm_add(x, *rest)
    return out, custom_ops.nothing(x) if following is None else following


def _fake(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), custom_ops.nothing(x) if rest[4] is None else x.new_empty(x.shape)
