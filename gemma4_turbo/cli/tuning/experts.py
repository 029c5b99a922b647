"""The experts of a few tokens: `gemma4_turbo.kernels.experts_few` against SGLang's fused experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.cli.tuning.moe import prepare_sglang
from gemma4_turbo.cli.tuning.timing import Call
from gemma4_turbo.kernels import experts_few as kernel
from gemma4_turbo.kernels.experts_few import Down, Tiles, Up
from gemma4_turbo.kernels.gpu import Gpu
from gemma4_turbo.models import geometry

CALLS = 16  # each with a routing of its own, so that the experts' weights come from memory
TOKENS = (1, 4)
UPS = (Up(4, 1, 256, 1), Up(4, 1, 256, 4), Up(2, 1, 256, 1), Up(2, 2, 256, 4))
DOWNS = (Down(8, 1, 128, 1, 0), Down(8, 1, 128, 4, 0), Down(4, 1, 256, 4, 0))


class FewExperts(NamedTuple):
    """A layer's experts."""

    experts: int
    choices: int
    width: int
    hidden: int

    @property
    def kernel(self) -> str:
        """As a profile calls it."""
        return "experts_few"

    @property
    def place(self) -> tuple[int, ...]:
        """As in a profile."""
        return self.choices, self.width, self.hidden

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.experts} experts of {self.width}, up to {max(TOKENS)} tokens"

    @property
    def bytes(self) -> int:
        """Of the weights, and of fp64's of the experts of one call."""
        each = 6 * self.width * self.hidden
        return each * (self.experts + 4 * self.choices * max(TOKENS))

    def candidates(self, gpu: Gpu) -> list[Tiles]:
        """What `choose` has, and others; fetched ahead is as much as there."""
        own = kernel.choose(self.choices)
        downs = [down._replace(prefetch=own.down.prefetch) for down in DOWNS]
        found = [own, *(own._replace(up=up) for up in UPS), *(own._replace(down=d) for d in downs)]
        return [tiles for tiles in found if kernel.tiles_unfit(tiles, self.choices) is None]

    def numbers(self, tile: Tiles) -> tuple[int, ...]:
        """Of the first launch, and of the second."""
        return *tile.up, *tile.down

    def benches(self, device: str) -> Iterator[ExpertsBench]:
        """One for each number of tokens."""
        for tokens in TOKENS:
            yield ExpertsBench(self, tokens, device)

    def alike(self, tile: Tiles) -> tuple[FewExperts, Tiles]:
        """Widths are compiled into the kernel; a token has no more experts than it chooses."""
        return self._replace(experts=self.choices), tile

    def compile(self, tile: Tiles, device: str) -> None:
        """For each number of tokens."""
        for bench in self.benches(device):
            bench.ours(tile)(0)

    @property
    def like_stock(self) -> FewExperts:
        """This one."""
        return self

    def compile_stock(self, device: str) -> None:
        """For each number of tokens."""
        for bench in self.benches(device):
            bench.stock()(0)


class ExpertsBench:
    """Weights of a layer, activations and routings."""

    calls = CALLS

    def __init__(self, subject: FewExperts, tokens: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(tokens)

        def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            made = torch.empty(shape, device=device, dtype=torch.bfloat16)
            return made.normal_(0, scale, generator=generator)

        count, choices, width, hidden = subject
        self.subject = subject
        self.w13 = randn(count, 2 * width, hidden, scale=hidden**-0.5)
        self.w2 = randn(count, hidden, width, scale=width**-0.5)
        self.x = [randn(tokens, hidden) for _ in range(CALLS)]
        chosen = [
            torch.randn(tokens, count, generator=generator, device=device).topk(choices, dim=-1)
            for _ in range(CALLS)
        ]
        self.ids = [ids.int() for _, ids in chosen]
        self.factors = [scores.softmax(dim=-1) for scores, _ in chosen]

    def ours(self, tile: Tiles) -> Call:
        """Both launches."""
        return lambda i: kernel.launch_experts_few(
            self.x[i], self.w13, self.w2, self.factors[i], self.ids[i], None, tile
        )

    def stock(self) -> Call:
        """SGLang's fused experts; without a GPU the equation itself."""
        if self.w13.device.type != "cuda":
            return lambda i: kernel.reference_experts_few(
                self.x[i], self.w13, self.w2, self.factors[i], self.ids[i]
            )
        prepare_sglang()
        stock = lines.stock()
        return lambda i: stock.fused_experts(
            self.x[i], self.w13, self.w2, self.factors[i], self.ids[i]
        )

    def error(self, call: Call) -> float:
        """Against fp64."""
        got = call(0)
        assert isinstance(got, torch.Tensor)
        return float((got.double() - self.exact).norm() / self.exact.norm())

    @cached_property
    def exact(self) -> torch.Tensor:
        """Of the first call, in fp64."""
        unique: Any = torch.unique
        chosen, places = unique(self.ids[0], return_inverse=True)
        return kernel.reference_experts_few(
            self.x[0].double(),
            self.w13[chosen].double(),
            self.w2[chosen].double(),
            self.factors[0].double(),
            places.int(),
        )


def layers(g: geometry.Geometry) -> list[FewExperts]:
    """Of a model with experts."""
    if not g.experts or g.topk not in kernel.CHOICES:
        return []
    return [FewExperts(g.experts, g.topk, g.expert_width, g.hidden)]
