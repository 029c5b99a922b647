"""A small Gemma 4 MoE layer from SGLang's own classes on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

from gemma4_turbo.cli.sglang_process import prepare_sglang

HIDDEN, EXPERTS, TOPK, WIDTH = 64, 128, 8, 32


class SmallMoE(NamedTuple):
    """Stock's router and experts with random weights."""

    router: Any  # Gemma4Router
    moe: Any  # Gemma4MoE


def build(seed: int = 0) -> SmallMoE:
    """Router and experts with 128 experts, top-8, bf16, all else small."""
    import torch
    from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native
    from sglang.srt.models.gemma4_causal import Gemma4MoE, Gemma4Router
    from transformers import Gemma4TextConfig

    prepare_sglang()
    config = Gemma4TextConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        enable_moe_block=True,
        num_experts=EXPERTS,
        top_k_experts=TOPK,
        moe_intermediate_size=WIDTH,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        router, moe = Gemma4Router(config), Gemma4MoE(HIDDEN, 0, config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (router, moe):
            for parameter in module.parameters():
                parameter.uniform_(-1.0, 1.0, generator=generator)
        moe.per_expert_scale.uniform_(0.5, 1.5, generator=generator)
    # SGLang's CPU experts know only SiLU; its native path, used under torch.compile, knows GELU.
    moe.experts.quant_method._forward_method = fused_moe_forward_native
    return SmallMoE(router, moe)


def tokens_without_ties(small: SmallMoE, count: int) -> Any:
    """``[count, hidden]`` tokens for which the nine greatest router logits are all different.

    ``torch.topk`` orders equal logits differently on a CPU than on a GPU, so only such tokens can
    be compared with stock here. About a third of random bf16 rows qualifies.
    """
    import torch

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(count * 64, HIDDEN, generator=generator).bfloat16()
    with torch.no_grad():
        top = small.router(tokens).float().topk(TOPK + 1, dim=-1)[0]
    distinct = (top.diff(dim=1) != 0).all(dim=1).nonzero().flatten()[:count]
    if len(distinct) < count:
        raise RuntimeError(f"only {len(distinct)} of {len(tokens)} random tokens have no ties")
    return tokens[distinct]


def run(small: SmallMoE, hidden_states: Any) -> tuple[Any, Any, Any]:
    """``(topk_weights, topk_ids, output)`` of router, top-k and experts."""
    import torch

    with torch.no_grad():
        router_logits = small.router(hidden_states)
        chosen = small.moe.topk(hidden_states, router_logits)
        output = small.moe(hidden_states, router_logits)
    return chosen.topk_weights, chosen.topk_ids, output
