"""Stock's own calls, as a fusion needs them: what a release line's ``stock.py`` has to offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from gemma4_turbo.kernels.norms.layer_norms import Outputs, Router


class Functions(NamedTuple):
    """Stock's two norms."""

    rmsnorm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    fused_add_rmsnorm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], None]  # in place


class Kept(NamedTuple):
    """What a router's norm has at a call: stock makes it once."""

    weight: torch.Tensor
    factor: torch.Tensor | None  # behind the norm; None: it is in the weight already


def kept(scale: torch.Tensor, root_size: torch.Tensor | None, dtype: torch.dtype) -> Kept:
    """Of a router's scale, which with ``root_size`` is a factor behind the norm."""
    if root_size is None:
        return Kept(scale, None)
    return Kept(torch.ones_like(scale), (scale * root_size).to(dtype))


def router_norm(norms: Functions, x: torch.Tensor, made: Kept, eps: float) -> torch.Tensor:
    """Stock's calls of `gemma4_turbo.kernels.norms.router_norm`."""
    normed = norms.rmsnorm(x, made.weight, eps)
    return normed if made.factor is None else normed * made.factor


def layer_norms(
    norms: Functions,
    x: torch.Tensor,
    residual: torch.Tensor,
    w1: torch.Tensor,
    eps1: float,
    w2: torch.Tensor,
    eps2: float,
    router: Router | None,
    made: Kept | None = None,
) -> Outputs:
    """Stock's calls of `gemma4_turbo.kernels.norms.layer_norms`, its arguments; ``residual`` in place.

    ``made``: of the router, where it was made before.
    """
    mlp_input = norms.rmsnorm(x, w1, eps1)
    norms.fused_add_rmsnorm(mlp_input, residual, w2, eps2)
    if router is None:
        return mlp_input, None, None
    if made is None:
        made = kept(router.scale, router.root_size, x.dtype)
    router_input = router_norm(norms, residual, made, router.eps)
    w3, eps3 = router.pre_feedforward_2_weight, router.pre_feedforward_2_eps
    return mlp_input, router_input, norms.rmsnorm(residual, w3, eps3)


class Stock(Protocol):
    """One function per stage; each looks its kernel up where SGLang's model does."""

    def eager_norms(self) -> Functions:
        """What runs in eager mode."""

    def traced_norms(self) -> Functions:
        """What runs where Dynamo traced the model."""

    def norms_are_cute(self) -> bool:
        """Whether their library says that those of eager mode are CuTe kernels."""

    def qkv_rmsnorm(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor | None,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> None:
        """Norms of Q, K and V over each head, in place."""

    def rotate(
        self,
        positions: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        cos_sin_cache: torch.Tensor,
    ) -> None:
        """Rotary embedding of Q and K ``[rows, heads, head_dim]``, in place."""

    def norm_residual(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
        scalar: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """``(norm(x) + residual) * scalar``."""

    def dual_norm_residual(
        self,
        mlp: torch.Tensor,
        mlp_weight: torch.Tensor,
        experts: torch.Tensor,
        experts_weight: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
        scalar: torch.Tensor,
        eps: tuple[float, float, float],
    ) -> torch.Tensor:
        """``(norm(norm_1(mlp) + norm_2(experts)) + residual) * scalar``."""

    def sum_experts(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``x [rows, topk, hidden]`` summed over a token's experts into ``out``."""


_stock: list[Stock] = []


def follow(stock: Stock) -> None:
    """Whose calls fusions are compared with. Of a process's one release line, before the first call."""
    _stock[:] = [stock]


def followed() -> Stock:
    """The release line's; IndexError before `follow`."""
    return _stock[0]
