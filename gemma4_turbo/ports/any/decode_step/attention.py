"""``Gemma4Attention.forward``, in steps that patches can take over one by one.

Without any step it makes stock's calls in stock's order. A step whose arguments do not fit makes
stock's calls for that part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.fusions import projection, qkv
from gemma4_turbo.fusions.fusion import Step
from gemma4_turbo.fusions.site import UNPROVEN, Site, site_of
from gemma4_turbo.fusions.stock import followed
from gemma4_turbo.kernels import qkv as kernel
from gemma4_turbo.kernels.qkv import Rope, Store
from gemma4_turbo.ports.any import linear, sglang_types

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import (
        Attention,
        ForwardBatch,
        RadixAttention,
    )

TARGET = "sglang.srt.models.gemma4_causal:Gemma4Attention.forward"  # in every line

QKV_NORM = qkv.Qkv("qkv_norm")
ROPE_STORE = qkv.Qkv("rope_store")
QKV_PROJ = projection.QProjection("qkv_proj")

NORM_ROWS = 256
"""Above this many tokens one program per token, as stock has it, is as fast."""

ROPE_ROWS, ROPE_WIDTH = 1024, 3072
"""With more tokens of no more numbers in Q, K and V, stock's two launches are faster than our one."""

FUSIONS = (QKV_PROJ, QKV_NORM, ROPE_STORE)

Slots = Callable[["RadixAttention", "ForwardBatch", torch.Tensor], "Store | None"]
"""A line's own: where stock would store K of a decode step, or None."""

_stock: dict[str, Callable[..., torch.Tensor]] = {}
_slots: list[Slots] = []


class AttentionSite(Site):
    """What an attention's modules allow, looked at once. None: allowed, else why not."""

    def __init__(self, attention: Attention) -> None:
        norms = attention.q_norm, attention.k_norm, attention.v_norm
        self.shared = attention.is_kv_shared_layer and attention.kv_shared_layer_index is not None
        # Without types that are known, nothing here may even read the norms' options: stock decides.
        self.stocks: str | None = next(filter(None, map(_norm_unfit, norms)), None)
        key: tuple[object, ...] = ()
        if self.stocks is None:
            self.stocks = sglang_types.device_unfit(attention.q_norm.weight)
        if self.stocks is None:
            weight = attention.q_norm.weight
            key = (
                attention.head_dim,
                attention.num_heads,
                attention.num_kv_heads,
                self.shared,
                weight.dtype,
                str(weight.device),
            )
        super().__init__(key, attention.q_norm)
        self.canonical = self.stocks is None and (
            attention.q_norm.scale_shift == 0.0
            and attention.k_norm.scale_shift == 0.0
            and not attention.v_norm.with_scale
        )
        self.qkv_norm: str | None = UNPROVEN
        if self.stocks is not None:
            self.qkv_norm = self.stocks
        elif not self.canonical or attention.k_norm.eps != attention.q_norm.eps:
            self.qkv_norm = "the norms of Q, K and V are not Gemma 4's usual ones"
        self.rope_store: str | None = self.qkv_norm
        if self.rope_store is UNPROVEN:
            self.rope_store = (
                sglang_types.rope_unfit(attention.rotary_emb, attention.head_dim) or UNPROVEN
            )
        self.qkv_proj: str | None = _projection_unfit(attention) or UNPROVEN
        self.cover("qkv_norm", *norms)
        # The attention is called without K and V that are in the pool already.
        self.cover("rope_store", *norms, attention.rotary_emb, attention.attn)
        self.cover("qkv_proj", attention.qkv_proj)
        names = ("q_norm", "k_norm", "v_norm", "rotary_emb", "qkv_proj", "attn")
        parts: list[tuple[object, str]] = [(attention, name) for name in names]
        parts += [(attention.rotary_emb, "_forward_method")]
        parts += sglang_types.linear_parts(attention.qkv_proj)
        self.depends_on(*parts)


def _norm_unfit(norm: object) -> str | None:
    if type(norm) is not sglang_types.types().gemma4_rms_norm:
        return f"a norm of Q, K or V is a {sglang_types.name(norm)}"
    return sglang_types.weight_unfit(norm.weight) or sglang_types.method_unfit(norm)


def _projection_unfit(attention: Attention) -> str | None:
    """Why all rows of the QKV weight are multiplied, or None: only Q's are read.

    Whether V's rows equal K's (``attention_k_eq_v``) is a fact about data that any write may end, so
    nothing is left out for it.
    """
    if type(attention.qkv_proj) is not sglang_types.types().qkv_linear:
        return f"the projection is a {sglang_types.name(attention.qkv_proj)}"
    reason = sglang_types.linear_unfit(attention.qkv_proj)
    if reason is None and not attention.is_kv_shared_layer:
        reason = "the layer needs Q, K and V"
    elif reason is None and attention.kv_shared_layer_index is None:
        reason = "the layer whose KV it shares is not known"
    return reason


def enable(
    fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any], slots: Slots
) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement. ``slots``: see `Slots`."""
    _stock[TARGET] = stock[TARGET]
    _slots[:] = [slots]
    for fusion in fusions:
        fusion.enable(run)
    return {TARGET: forward}


def forward(
    self: Attention,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: ForwardBatch,
    **kwargs: object,
) -> torch.Tensor:
    """Projection, norms, rotation, attention, output projection."""
    site = site_of(self, AttentionSite)
    unfit = site.stocks or sglang_types.rules().now_unfit()
    if unfit is not None:
        for fusion in FUSIONS:
            if fusion.run is not None:
                fusion.declined(unfit)
        return _stock[TARGET](self, positions, hidden_states, forward_batch, **kwargs)
    q, k, v = _project(self, site, hidden_states)
    fits = site.canonical and (
        q.is_cuda or (kernel.INTERPRETED and not site.hooks_unfit("qkv_norm"))
    )
    if fits and not ROPE_STORE.settled(site):
        rope = Rope(positions, self.rotary_emb.cos_sin_cache)
        store = _store(self, forward_batch, k, v)
        found = ROPE_STORE(site, _args(self, q, k, v, rope, store), _rope_slower(q, k))
        if found is not None:
            return _attend(self, *found, forward_batch, store is not None)
    elif not fits:
        ROPE_STORE.settled(site)  # counts what the norms are
    normed = None
    if not fits:
        QKV_NORM.settled(site)
    elif not QKV_NORM.settled(site):
        normed = QKV_NORM(site, _args(self, q, k, v, None, None), _norms_slower(q))
    if normed is not None:
        q, k, v = normed
    elif fits and q.is_cuda:
        _stock_norms(self, q, k, v)
    else:
        q, k, v = _plain_norms(self, q, k, v)
    if k is not None:
        q, k = self.rotary_emb(positions, q, k.flatten(1))
    else:
        q, _ = self.rotary_emb(positions, q, torch.zeros_like(q[:, : self.kv_size]))
    return _attend(self, q, k, v, forward_batch, False)


def _attend(
    self: Attention,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: Any,
    forward_batch: ForwardBatch,
    stored: bool,
) -> torch.Tensor:
    q = q.unflatten(-1, (self.num_heads, self.head_dim))
    if stored or k is None:
        k = v = None
    else:
        k = k.reshape(-1, self.num_kv_heads, self.head_dim)
        v = v.reshape(-1, self.num_kv_heads, self.head_dim)
    keep = not self.is_kv_shared_layer and not stored
    output = self.attn(q, k, v, forward_batch=forward_batch, save_kv_cache=keep)
    if output.dim() == 3:
        output = output.flatten(-2, -1)
    return linear.project(self.o_proj, output)


# -- projection, norms, rotation ------------------------------------------------------------------


def _project(self: Attention, site: AttentionSite, x: torch.Tensor) -> qkv.Heads:
    """Q, K and V before the norms; K and V None on layers that share them."""
    if not QKV_PROJ.settled(site):
        q = QKV_PROJ(site, projection.Args(x, self.qkv_proj.weight, self.q_size))
        if q is not None:
            return q, None, None
    whole = linear.project(self.qkv_proj, x)
    q, k, v = torch.split(whole, [self.q_size, self.kv_size, self.kv_size], dim=-1)
    return (q, None, None) if site.shared else (q, k, v)


def _args(
    self: Attention,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    rope: Rope | None,
    store: Store | None,
) -> qkv.Args:
    norm = self.q_norm
    weights = norm.weight.data, self.k_norm.weight.data
    return qkv.Args(q, k, v, *weights, norm.eps, self.head_dim, rope, store)


def _norms_slower(q: torch.Tensor) -> str | None:
    """Why stock's launch is as fast, or None."""
    if q.shape[0] > NORM_ROWS and not torch.compiler.is_compiling():
        return f"more than {NORM_ROWS} tokens"
    return None


def _rope_slower(q: torch.Tensor, k: torch.Tensor | None) -> str | None:
    """Why stock's two launches are faster, or None."""
    if q.shape[0] <= ROPE_ROWS or torch.compiler.is_compiling() or k is None:
        return None
    if q.shape[1] + 2 * k.shape[1] > ROPE_WIDTH:
        return None
    return f"more than {ROPE_ROWS} tokens of no more than {ROPE_WIDTH} numbers"


def _plain_norms(self: Attention, q: Any, k: Any, v: Any) -> qkv.Heads:
    q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2, -1)
    if k is None:
        return q, None, None
    k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim)))
    v = self.v_norm(v.unflatten(-1, (self.num_kv_heads, self.head_dim)))
    return q, k.flatten(-2, -1), v


def _stock_norms(
    self: Attention, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
) -> None:
    """Stock's kernel, in place."""
    key_weight = None if k is None else self.k_norm.weight.data
    sizes = self.num_heads, self.num_kv_heads, self.head_dim
    followed().qkv_rmsnorm(q, k, v, self.q_norm.weight.data, key_weight, *sizes, self.q_norm.eps)


def _store(
    self: Attention, forward_batch: ForwardBatch, k: torch.Tensor | None, v: torch.Tensor | None
) -> Store | None:
    """The layer's slots in the KV pool, when stock would store there at once; else None."""
    if k is None or self.is_kv_shared_layer or torch.compiler.is_compiling():
        return None
    if not forward_batch.forward_mode.is_decode():
        return None
    layer = self.attn
    if type(layer) is not sglang_types.types().attention or "forward" in layer.__dict__:
        return None
    if layer.k_scale is not None or layer.v_scale is not None:
        return None
    store = _slots[0](layer, forward_batch, k)
    if store is None:
        return None
    weights = self.q_norm.weight.data, self.k_norm.weight.data
    reason = kernel.unfit(k, k, v, *weights, self.head_dim, None, store)
    return store if reason is None else None


def pool_slots(
    pool: object, index: int, locations: torch.Tensor | None, k: torch.Tensor
) -> Store | None:
    """A layer's part of a pool for K of this dtype, or None: not a pool whose store is pool."""
    if type(pool) is not sglang_types.types().pool or locations is None:
        return None
    if "set_kv_buffer" in vars(pool):  # somebody's own
        return None
    if pool.dtype != k.dtype or pool.store_dtype != k.dtype:
        return None
    at = index - (pool.start_layer or 0)
    return Store(locations, pool.k_buffer[at], pool.v_buffer[at])
