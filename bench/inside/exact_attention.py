"""SGLang's Triton attention computed in fp32 by plain torch: what kernels' divergence is measured from.

Takes the place of ``extend_attention_fwd`` and ``decode_attention_fwd`` in one engine of `engine.py`
(``--kl-exact``), with their signatures. Inputs and outputs keep their types, nothing between is rounded
to less than fp32. One query head at a time, a sequence at a time: slow, and no CUDA graph holds it.
"""

from __future__ import annotations

from typing import Any

import torch

from gemma4_turbo.kernels.attention.decode import reference_decode_attention
from gemma4_turbo.kernels.attention.extend import reference_extend_attention


def _heads(q: torch.Tensor, k: torch.Tensor) -> list[tuple[slice, slice]]:
    group = q.shape[1] // k.shape[1]
    return [(slice(h, h + 1), slice(h // group, h // group + 1)) for h in range(q.shape[1])]


def extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    custom_mask: torch.Tensor | None,
    is_causal: bool,
    mask_indptr: torch.Tensor | None,
    max_len_extend: int,
    k_scale: float,
    v_scale: float,
    sm_scale: float,
    *,
    logit_cap: float = 0.0,
    sliding_window_size: int = -1,
    sinks: Any = None,
    window_kv_offsets: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
    page_size: int = 1,
    extend_seq_lens_cpu: Any = None,
    **others: Any,
) -> None:
    """Stock's ``extend_attention_fwd`` for causal text. Raises ValueError for anything else.

    Slots are tokens' whatever the page, and the lengths are on the device as well.
    """
    plain = custom_mask is None and not logit_cap and sinks is None and xai_temperature_len <= 0
    asked = sorted(name for name, value in others.items() if value not in (None, False))
    if not plain or asked or k_scale != 1 or v_scale != 1:
        raise ValueError(
            "exact_attention: only causal attention without cap, sinks and scales, and without "
            f"{', '.join(asked) or 'anything else'}"
        )
    for heads, kv in _heads(q, k):
        out[:, heads] = reference_extend_attention(
            q[:, heads], k[:, kv], v[:, kv], k_buffer[:, kv], v_buffer[:, kv],
            qo_indptr, kv_indptr, kv_indices, sm_scale=sm_scale, is_causal=is_causal,
            sliding_window_size=sliding_window_size, dtype=torch.float32,
        ).to(out.dtype)  # fmt: skip


def decode(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    out: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    attn_logits: torch.Tensor,
    attn_lse: torch.Tensor,
    num_kv_splits: torch.Tensor,
    max_kv_splits: int,
    sm_scale: float,
    k_scale: float,
    v_scale: float,
    **others: Any,
) -> None:
    """Stock's ``decode_attention_fwd``. Raises ValueError with a logit cap or sinks."""
    if others.get("logit_cap") or others.get("sinks") is not None or k_scale != 1 or v_scale != 1:
        raise ValueError("exact_attention: no cap, no sinks, no scales")
    if others.get("score_mod") is not None:
        raise ValueError("exact_attention: no score_mod")
    out.copy_(reference_decode_attention(q, k_buffer, v_buffer, kv_indptr, kv_indices, sm_scale))


FUNCTIONS = {"extend_attention": extend, "decode_attention": decode}
"""By the name of SGLang's module, which has its own under that name and ``_fwd``."""


def install(module: Any) -> None:
    """Into one of these modules, when it is imported."""
    name = module.__name__.rpartition(".")[2]
    setattr(module, f"{name}_fwd", FUNCTIONS[name])
