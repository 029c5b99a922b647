"""The kernels as operators for traced code. An output that is not asked for has no element."""

from __future__ import annotations

from typing import Any

import torch

from gemma4_turbo.kernels import qkv
from gemma4_turbo.kernels.norms import layer_norms, layer_tail, ple_tail, router_norm
from gemma4_turbo.runtime import custom_ops

Maybe = torch.Tensor | None


def _none(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((0,))


def layer_norms_op() -> Any:
    """``layer_norms``, `gemma4_turbo.kernels.norms.layer_norms`."""

    def run(
        attention_output: torch.Tensor,
        residual: torch.Tensor,
        w1: torch.Tensor,
        eps1: float,
        w2: torch.Tensor,
        eps2: float,
        scale: Maybe,
        root_size: Maybe,
        eps3: float,
        w3: Maybe,
        eps4: float,
        kind: int,
    ) -> tuple[torch.Tensor, ...]:
        router = None
        if scale is not None and root_size is not None and w3 is not None:
            router = layer_norms.Router(scale, root_size, eps3, w3, eps4)
        found = layer_norms.launch_layer_norms(
            attention_output, residual, w1, eps1, w2, eps2, router, kind
        )
        return tuple(_none(residual) if x is None else x for x in found)

    def fake(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        made = x.new_empty(x.shape)
        if rest[4] is None:
            return made, _none(x), _none(x)
        return made, x.new_empty(x.shape), x.new_empty(x.shape)

    return custom_ops.register(
        "layer_norms",
        "layer_norms(Tensor attention_output, Tensor(a!) residual, Tensor w1, float eps1, Tensor w2,"
        " float eps2, Tensor? scale, Tensor? root_size, float eps3, Tensor? w3, float eps4, int kind)"
        " -> (Tensor, Tensor, Tensor)",
        run,
        fake,
    )


def router_norm_op() -> Any:
    """``router_norm``, `gemma4_turbo.kernels.norms.router_norm`."""
    return custom_ops.register(
        "router_norm",
        "router_norm(Tensor x, Tensor scale, Tensor root_size, float eps, int kind) -> Tensor",
        router_norm.launch_router_norm,
        lambda x, *rest: x.new_empty(x.shape),
    )


def norm_add_op() -> Any:
    """``norm_add``, `gemma4_turbo.kernels.norms.ple_tail`."""

    def run(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, following = ple_tail.launch_norm_add(x, *rest)
        return out, _none(x) if following is None else following

    def fake(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(x.shape), _none(x) if rest[4] is None else x.new_empty(x.shape)

    return custom_ops.register(
        "ple_tail",
        "norm_add(Tensor x, Tensor weight, float eps, Tensor residual, Tensor? scalar,"
        " Tensor? next_weight, float next_eps, int kind) -> (Tensor, Tensor)",
        run,
        fake,
    )


def gelu_mul_op() -> Any:
    """``gelu_mul``, `gemma4_turbo.kernels.norms.ple_tail`."""
    return custom_ops.register(
        "ple_tail",
        "gelu_mul(Tensor gate, Tensor per_layer_input) -> Tensor",
        ple_tail.launch_gelu_mul,
        lambda gate, per_layer_input: gate.new_empty(gate.shape),
    )


def layer_tail_op() -> Any:
    """``layer_tail`` with the next norm, `gemma4_turbo.kernels.norms.layer_tail`."""

    def run(
        mlp_output: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        residual: torch.Tensor,
        scalar: torch.Tensor,
        experts_output: Maybe,
        experts_weight: Maybe,
        experts_eps: float,
        mlp_weight: Maybe,
        mlp_eps: float,
        next_weight: torch.Tensor,
        next_eps: float,
        kind: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        experts = None
        if experts_output is not None and experts_weight is not None and mlp_weight is not None:
            experts = layer_tail.Experts(
                experts_output, experts_weight, experts_eps, mlp_weight, mlp_eps
            )
        out, following = layer_tail.launch_layer_tail(
            mlp_output,
            weight,
            eps,
            residual,
            scalar,
            experts,
            layer_tail.NextNorm(next_weight, next_eps, kind),
        )
        assert following is not None
        return out, following

    return custom_ops.register(
        "input_norm",
        "layer_tail(Tensor mlp_output, Tensor weight, float eps, Tensor residual, Tensor scalar,"
        " Tensor? experts_output, Tensor? experts_weight, float experts_eps, Tensor? mlp_weight,"
        " float mlp_eps, Tensor next_weight, float next_eps, int kind) -> (Tensor, Tensor)",
        run,
        lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape)),
    )


def qkv_op() -> Any:
    """``qkv``: norms and rotation in place, `gemma4_turbo.kernels.qkv`."""

    def run(
        q: torch.Tensor,
        k: Maybe,
        v: Maybe,
        q_weight: torch.Tensor,
        k_weight: Maybe,
        eps: float,
        head_dim: int,
        positions: Maybe,
        cos_sin_cache: Maybe,
    ) -> None:
        rope = None
        if positions is not None and cos_sin_cache is not None:
            rope = qkv.Rope(positions, cos_sin_cache)
        qkv.launch_qkv(q, k, v, q_weight, k_weight, eps, head_dim, rope, None)

    return custom_ops.register(
        "qkv_norm",
        "qkv(Tensor(a!) q, Tensor(b!)? k, Tensor(c!)? v, Tensor q_weight, Tensor? k_weight,"
        " float eps, int head_dim, Tensor? positions, Tensor? cos_sin_cache) -> ()",
        run,
        lambda *args: None,
    )
