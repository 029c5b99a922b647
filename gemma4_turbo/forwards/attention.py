"""``Gemma4Attention.forward``, in steps that patches can take over one by one.

Without any step it makes stock's calls in stock's order. A step whose arguments do not fit makes
stock's calls for that part.
"""

from __future__ import annotations

from typing import Any

import torch

from gemma4_turbo.forwards import linear, ops, steps
from gemma4_turbo.forwards.steps import UNPROVEN, Step, differing, samples
from gemma4_turbo.kernels import qkv as kernel
from gemma4_turbo.kernels.qkv import Mode, Rope, Store

TARGET = "sglang.srt.models.gemma4_causal:Gemma4Attention.forward"

QKV_NORM = Step()
ROPE_STORE = Step()
QKV_PROJ = Step()

NORM_ROWS = 256
"""Above this many tokens one program per token, as stock has it, is as fast."""

ROPE_ROWS, ROPE_WIDTH = 1024, 3072
"""With more tokens of no more numbers in Q, K and V, stock's two launches are faster than our one."""

_ops: dict[str, Any] = {}


class Plan(steps.Plan):
    """What an attention's modules allow, looked at once. None: allowed, else why not."""

    def __init__(self, attention: Any) -> None:
        weight = attention.q_norm.weight
        self.shared = attention.is_kv_shared_layer and attention.kv_shared_layer_index is not None
        key = (
            attention.head_dim,
            attention.num_heads,
            attention.num_kv_heads,
            self.shared,
            weight.dtype,
            str(weight.device),
        )
        super().__init__(key, attention.q_norm)
        self.canonical = (
            attention.q_norm.scale_shift == 0.0
            and attention.k_norm.scale_shift == 0.0
            and not attention.v_norm.with_scale
        )
        self.qkv_norm: str | None = UNPROVEN
        if not self.canonical or attention.k_norm.eps != attention.q_norm.eps:
            self.qkv_norm = "the norms of Q, K and V are not Gemma 4's usual ones"
        self.rope_store: str | None = self.qkv_norm
        if self.rope_store is UNPROVEN:
            self.rope_store = _rope_reason(attention) or UNPROVEN
        self.qkv_proj: str | None = _projection_reason(attention) or UNPROVEN
        self.mode = Mode.Q if self.shared else Mode.QKV
        if not self.shared and _k_is_v(attention):
            self.mode = Mode.QK


def _k_is_v(attention: Any) -> bool:
    config = attention.config
    return bool(getattr(config, "attention_k_eq_v", False)) and attention.sliding_window is None


def _rope_reason(attention: Any) -> str | None:
    rope = attention.rotary_emb
    if type(rope).__name__ not in ("RotaryEmbedding", "Gemma4RotaryEmbedding"):
        return f"the rotary embedding is a {type(rope).__name__}"
    if rope.use_fallback_kernel or not rope.is_neox_style:
        return "the rotary embedding does not run SGLang's rope kernel"
    if rope.rotary_dim != attention.head_dim or rope.head_size != attention.head_dim:
        return "the rotary embedding does not rotate the whole head"
    return None


def _projection_reason(attention: Any) -> str | None:
    linear = attention.qkv_proj
    if type(linear).__name__ != "QKVParallelLinear":
        return f"the projection is a {type(linear).__name__}"
    if type(linear.quant_method).__name__ != "UnquantizedLinearMethod":
        return f"the projection's method is {type(linear.quant_method).__name__}"
    if linear.bias is not None:
        return "the projection has a bias"
    if not attention.is_kv_shared_layer and not _k_is_v(attention):
        return "the layer needs Q, K and V"
    return None


def enable(step: Step, run: Any) -> dict[str, Any]:
    """Give a step to a patch; returns the replacement."""
    _ops["qkv"] = ops.qkv_op()
    step.run = run
    return {TARGET: forward}


def forward(
    self: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Projection, norms, rotation, attention, output projection."""
    plan = self.__dict__.get("_gemma4_turbo_plan")
    if plan is None:
        plan = self.__dict__["_gemma4_turbo_plan"] = Plan(self)
    q, k, v = _project(self, plan, hidden_states)
    fits = (q.is_cuda or kernel.INTERPRETED) and plan.canonical
    rope = _rope(self, plan, positions, q, k, v) if fits else None
    compiling = torch.compiler.is_compiling()
    if k is not None and v is None and (rope is None or compiling):
        v = k.clone()
    if rope is not None:
        store = _store(self, forward_batch, k, v)
        weights = self.q_norm.weight.data, self.k_norm.weight.data
        if compiling:
            _ops["qkv"](q, k, v, *weights, self.q_norm.eps, self.head_dim, *rope)
        else:
            q, k, v = kernel.launch_qkv(
                q, k, v, *weights, self.q_norm.eps, self.head_dim, rope, store
            )
        return _attend(self, q, k, v, forward_batch, store is not None)

    if not fits:
        q, k, v = _plain_norms(self, plan, q, k, v)
    elif not _norms(self, plan, q, k, v):
        _stock_norms(self, plan, q, k, v)
    if k is not None:
        q, k = self.rotary_emb(positions, q, k.flatten(1))
    else:
        q, _ = self.rotary_emb(positions, q, torch.zeros_like(q[:, : self.kv_size]))
    return _attend(self, q, k, v, forward_batch, False)


def _attend(
    self: Any, q: torch.Tensor, k: Any, v: Any, forward_batch: Any, stored: bool
) -> torch.Tensor:
    q = q.unflatten(-1, (self.num_heads, self.head_dim))  # type: ignore[no-untyped-call]
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


# -- projection -----------------------------------------------------------------------------------


def _project(self: Any, plan: Plan, x: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
    """Q, K and V before the norms; K and V None on layers that share them, V None where it is K."""
    if QKV_PROJ.run is not None:
        weight = self.qkv_proj.weight
        reason = None
        if x.dtype != weight.dtype:
            reason = f"the weight is {weight.dtype}, the activations {x.dtype}"
        if QKV_PROJ.may_run(plan, "qkv_proj", reason, lambda: _compare_rows(self, plan)):
            rows = self.q_size if plan.mode == Mode.Q else self.q_size + self.kv_size
            out = torch.nn.functional.linear(x, weight[:rows])
            if plan.mode == Mode.Q:
                return out, None, None
            q, k = torch.split(out, [self.q_size, self.kv_size], dim=-1)
            return q, k, None
    qkv = linear.project(self.qkv_proj, x)
    q, k, v = torch.split(qkv, [self.q_size, self.kv_size, self.kv_size], dim=-1)
    return (q, None, None) if plan.shared else (q, k, v)


def _compare_rows(self: Any, plan: Plan) -> int:
    """Whether V's rows are K's where only K's are multiplied. Random weights are not."""
    if plan.mode != Mode.QK:
        return 0
    weight = self.qkv_proj.weight
    k = weight[self.q_size : self.q_size + self.kv_size]
    v = weight[self.q_size + self.kv_size :]
    return int((k != v).sum())


# -- norms ----------------------------------------------------------------------------------------


def _plain_norms(self: Any, plan: Plan, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2, -1)
    if k is None:
        return q, None, None
    k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim)))
    v = self.v_norm(v.unflatten(-1, (self.num_kv_heads, self.head_dim)))
    return q, k.flatten(-2, -1), v


def _stock_norms(self: Any, plan: Plan, q: Any, k: Any, v: Any) -> None:
    """Stock's kernel, in place."""
    from sglang.srt.models import gemma4_causal

    gemma4_causal.gemma_qkv_rmsnorm(
        q,
        k,
        v,
        self.q_norm.weight.data,
        None if k is None else self.k_norm.weight.data,
        num_q_heads=self.num_heads,
        num_kv_heads=self.num_kv_heads,
        head_dim=self.head_dim,
        eps=self.q_norm.eps,
    )


def _norms(self: Any, plan: Plan, q: torch.Tensor, k: Any, v: Any) -> bool:
    """Norms alone, in place. False: nothing done."""
    if QKV_NORM.run is None:
        return False
    weights = self.q_norm.weight.data, self.k_norm.weight.data
    reason = kernel.decline_reason(q, k, v, *weights, self.head_dim)
    if reason is None and not torch.compiler.is_compiling() and q.shape[0] > NORM_ROWS:
        reason = f"more than {NORM_ROWS} tokens"
    if not QKV_NORM.may_run(plan, "qkv_norm", reason, lambda: _compare_norms(self, plan, q)):
        return False
    if torch.compiler.is_compiling():
        _ops["qkv"](q, k, v, *weights, self.q_norm.eps, self.head_dim, None, None)
    else:
        kernel.launch_qkv(q, k, v, *weights, self.q_norm.eps, self.head_dim, None, None)
    return True


def _split(self: Any, plan: Plan, rows: int, like: torch.Tensor) -> tuple[Any, Any, Any]:
    whole = samples(rows, like, self.q_size + 2 * self.kv_size)
    q, k, v = torch.split(whole, [self.q_size, self.kv_size, self.kv_size], dim=-1)
    return (q, None, None) if plan.shared else (q, k, v)


def _compare_norms(self: Any, plan: Plan, like: torch.Tensor) -> int:
    if not like.is_cuda:
        return 0
    weights = self.q_norm.weight.data, self.k_norm.weight.data
    found = 0
    for several in (False, True):  # heads of a program
        ours, stock = _split(self, plan, 64, like), _split(self, plan, 64, like)
        kernel.launch_qkv(*ours, *weights, self.q_norm.eps, self.head_dim, None, None, several)
        _stock_norms(self, plan, *stock)
        found += differing([(a, b) for a, b in zip(ours, stock, strict=True) if a is not None])
    return found


# -- rotation and store -----------------------------------------------------------------------------


def _rope(self: Any, plan: Plan, positions: torch.Tensor, q: Any, k: Any, v: Any) -> Rope | None:
    if ROPE_STORE.run is None:
        return None
    rope = Rope(positions, self.rotary_emb.cos_sin_cache)
    reason = kernel.decline_reason(
        q, k, v, self.q_norm.weight.data, self.k_norm.weight.data, self.head_dim, rope
    )
    if reason is None and q.shape[0] > ROPE_ROWS and not torch.compiler.is_compiling():
        heads = q.shape[1] + (0 if k is None else 2 * k.shape[1])
        if heads <= ROPE_WIDTH and k is not None:
            reason = f"more than {ROPE_ROWS} tokens of no more than {ROPE_WIDTH} numbers"
    if ROPE_STORE.may_run(
        plan, "rope_store", reason, lambda: _compare_rope(self, plan, positions, q)
    ):
        return rope
    return None


def _compare_rope(self: Any, plan: Plan, positions: torch.Tensor, like: torch.Tensor) -> int:
    if not like.is_cuda:
        return 0
    rows = 64
    last = self.rotary_emb.cos_sin_cache.shape[0] - 1
    places = torch.linspace(0, last, rows, device=like.device).to(positions.dtype)
    rope = Rope(places, self.rotary_emb.cos_sin_cache)
    weights = self.q_norm.weight.data, self.k_norm.weight.data
    q, k, v = _split(self, plan, rows, like)
    _stock_norms(self, plan, q, k, v)
    key = torch.zeros_like(q[:, : self.kv_size]) if k is None else k.flatten(1).contiguous()
    q, key = self.rotary_emb(places, q, key)
    found = 0
    for several in (False, True):  # heads of a program
        ours = _split(self, plan, rows, like)
        kernel.launch_qkv(*ours, *weights, self.q_norm.eps, self.head_dim, rope, None, several)
        pairs = [(ours[0], q)]
        if k is not None:
            pairs += [(ours[1], key), (ours[2], v)]
        found += differing(pairs)
    return found


def _store(self: Any, forward_batch: Any, k: Any, v: Any) -> Store | None:
    """The layer's slots in the KV pool, when stock would store there at once; else None."""
    if k is None or self.is_kv_shared_layer or torch.compiler.is_compiling():
        return None
    if not forward_batch.forward_mode.is_decode():
        return None
    if type(forward_batch.attn_backend).__name__ != "TritonAttnBackend":
        return None
    layer = self.attn
    if layer.k_scale is not None or layer.v_scale is not None:
        return None
    pool, locations, index = (
        forward_batch.token_to_kv_pool,
        forward_batch.out_cache_loc,
        layer.layer_id,
    )
    if type(pool).__name__ == "SWAKVPool":
        index, sliding = pool.layers_mapping[index]
        if sliding:
            locations = pool.swa_loc
        pool = pool.swa_kv_pool if sliding else pool.full_kv_pool
    if type(pool).__name__ != "MHATokenToKVPool" or locations is None:
        return None
    if pool.dtype != k.dtype or pool.store_dtype != k.dtype:
        return None
    at = index - (pool.start_layer or 0)
    store = Store(locations, pool.k_buffer[at], pool.v_buffer[at])
    weights = self.q_norm.weight.data, self.k_norm.weight.data
    reason = kernel.decline_reason(k, k, v, *weights, self.head_dim, None, store)
    return store if reason is None else None
