"""``Gemma4DecoderLayer.forward``, in steps that patches can take over one by one.

Without any step it makes stock's calls in stock's order. A step whose arguments do not fit makes
stock's calls for that part.
"""

from __future__ import annotations

from typing import Any

import torch

from gemma4_turbo.fusions import operators, steps
from gemma4_turbo.fusions.steps import UNPROVEN, Step, differing, eps_of, samples
from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.norms import layer_norms, layer_tail, ple_tail
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.ports.v0_5_12 import linear, sglang_types, stock
from gemma4_turbo.runtime.custom_ops import capturing

TARGET = "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward"

LAYER_NORMS = Step()
PLE_TAIL = Step()
INPUT_NORM = Step()
EXPERTS_SUM = Step()
PDL = Step()
MLP_STREAM = Step()

MLP_STREAM_ROWS = 64
"""Above this many tokens the two branches no longer leave room for each other."""

_ops: dict[str, Any] = {}


class Summing:
    """Hand-over of the experts' unsummed output from SGLang's reduction to the layer's tail."""

    wanted = False
    taken: torch.Tensor | None = None
    buffer: torch.Tensor | None = None  # that the reduction was to fill

    @classmethod
    def is_buffer(cls, summed: torch.Tensor) -> bool:
        """Whether what the experts returned is the very buffer, so that nothing was added since."""
        buffer = cls.buffer
        return (
            buffer is not None
            and summed.data_ptr() == buffer.data_ptr()
            and summed.shape == buffer.shape
            and summed.stride() == buffer.stride()
            and summed.dtype == buffer.dtype
        )


class Plan(steps.Plan):
    """What a layer's modules allow, looked at once. None: allowed, else why not."""

    def __init__(self, layer: Any) -> None:
        moe = layer.enable_moe_block
        first = ["post_attention_layernorm", "pre_feedforward_layernorm"]
        tail = ["post_feedforward_layernorm"]
        if layer.has_ple:
            tail.append("post_per_layer_input_norm")
        if moe:
            first.append("pre_feedforward_layernorm_2")
            tail += ["post_feedforward_layernorm_1", "post_feedforward_layernorm_2"]
        firsts, tails = _modules(layer, first), _modules(layer, tail)
        weight = getattr(layer.input_layernorm, "weight", None)
        key: tuple[Any, ...] = (str(type(weight)), moe)
        if sglang_types.norm_unfit(layer.input_layernorm) is None:
            key = (weight.shape[0], weight.dtype, str(weight.device), moe)  # type: ignore[union-attr]
        super().__init__(key, layer.input_layernorm)

        reasons = [sglang_types.norm_unfit(norm) for norm in firsts]
        if moe:
            reasons.append(sglang_types.router_unfit(layer.router))
        self.layer_norms: str | None = _first(reasons)
        reasons = [sglang_types.norm_unfit(norm) for norm in tails]
        self.ple_tail: str | None = _first(reasons)
        self.input_norm: str | None = _first(reasons)
        apart = sglang_types.experts_unfit(layer.moe) if moe else "the layer has no experts"
        self.mlp_stream: str | None = apart  # no arithmetic to compare
        more = apart or sglang_types.reduction_unfit(layer.moe.experts)
        self.experts_sum: str | None = _first([*reasons, more])
        self.following: tuple[Any, str | None] = (None, None)

        routing = (layer.router, layer.router.norm) if self.layer_norms is UNPROVEN and moe else ()
        experts = (layer.moe, layer.moe.experts) if apart is None else ()
        self.cover("layer_norms", *firsts, *routing)
        self.cover("ple_tail", *tails)
        self.cover("input_norm", *tails)
        self.cover("experts_sum", *tails, *experts)
        if isinstance(layer.mlp, torch.nn.Module):
            self.cover("mlp_stream", *layer.mlp.modules())
        parts = [(layer, name) for name in (*first, *tail, "input_layernorm", "mlp")]
        if moe:
            parts += [(layer, "router"), (layer, "moe")]
            parts += [(layer.router, "norm")] if routing else []
        if experts:
            parts += [(layer.moe, "experts"), (experts[1], "quant_method")]
            parts += [(experts[1], "dispatcher")]
            parts += sglang_types.reduction_parts(experts[1]) if more is None else []
        parts += [(n, "_forward_method") for n in (*firsts, *tails)]
        self.made_for(*parts)

    def following_unfit(self, norm: Any) -> str | None:
        """Why the norm that reads the layer's result is not ours to run, or None."""
        if self.following[0] is not norm:
            self.following = norm, sglang_types.norm_unfit(norm)
        return self.following[1] or sglang_types.hooks_unfit(norm)


def _modules(layer: Any, names: list[str]) -> tuple[Any, ...]:
    return tuple(getattr(layer, name) for name in names)


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), UNPROVEN)


def enable(step: Step, run: Any) -> dict[str, Any]:
    """Give a step to a patch; returns the replacement."""
    sglang_types.load()
    for name, make in (
        ("layer_norms", operators.layer_norms_op),
        ("norm_add", operators.norm_add_op),
        ("gelu_mul", operators.gelu_mul_op),
        ("layer_tail", operators.layer_tail_op),
    ):
        _ops[name] = make()
    step.run = run
    return {TARGET: forward}


def forward(
    self: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    per_layer_input: torch.Tensor,
    forward_batch: Any,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """One layer. Returns hidden states, None, and the next layer's normed input or None.

    ``kwargs`` may hold ``normed``, the input already through ``input_layernorm``, and ``following``,
    the norm that reads the result; `gemma4_turbo.ports.v0_5_12.text_model` passes them.
    """
    if PDL.run is None or torch.compiler.is_compiling():
        return _forward(self, positions, hidden_states, per_layer_input, forward_batch, **kwargs)
    before = pdl.launches
    outputs = _forward(self, positions, hidden_states, per_layer_input, forward_batch, **kwargs)
    if pdl.launches > before:
        PDL.run.engaged(capturing())
    elif pdl.supported(hidden_states.device):
        PDL.run.declined("none of the package's kernels was launched in the layer")
    else:
        PDL.run.declined(
            "needs a GPU of compute capability 9.0 or later, and a Triton that launches so"
        )
    return outputs


def _forward(
    self: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    per_layer_input: torch.Tensor,
    forward_batch: Any,
    normed: torch.Tensor | None = None,
    following: Any = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    plan = steps.plan_of(self, Plan)
    residual = hidden_states

    hidden_states = self.input_layernorm(hidden_states) if normed is None else normed
    hidden_states = self.self_attn(
        positions=positions, hidden_states=hidden_states, forward_batch=forward_batch
    )

    router_input: Any = None
    experts_input: Any = None
    fused = _layer_norms(self, plan, hidden_states, residual)
    if fused is not None:
        mlp_input, router_input, experts_input = fused
    else:
        hidden_states = self.post_attention_layernorm(hidden_states)
        mlp_input, residual = self.pre_feedforward_layernorm(hidden_states, residual)

    if not self.enable_moe_block:
        mlp_output = linear.mlp(self.mlp, mlp_input)
        return _finish(self, plan, mlp_output, None, residual, per_layer_input, following)

    side = _side_stream(self, plan, mlp_input)
    if side is not None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            mlp_output = linear.mlp(self.mlp, mlp_input)
    else:
        mlp_output = linear.mlp(self.mlp, mlp_input)
    if router_input is not None:
        router_logits, _ = self.router.proj(router_input)
    else:
        router_logits = self.router(residual)
        experts_input = self.pre_feedforward_layernorm_2(residual)
    experts_output = _experts(self, plan, experts_input, router_logits, residual, mlp_output)
    if side is not None:
        main.wait_stream(side)
    return _finish(self, plan, mlp_output, experts_output, residual, per_layer_input, following)


# -- between attention and feed-forward --------------------------------------------------------


def _router(self: Any) -> layer_norms.Router | None:
    if not self.enable_moe_block:
        return None
    return layer_norms.Router(
        self.router.scale.data,
        self.router.root_size,
        eps_of(self.router.norm),
        self.pre_feedforward_layernorm_2.weight.data,
        eps_of(self.pre_feedforward_layernorm_2),
    )


def _layer_norms(
    self: Any, plan: Plan, attention_output: torch.Tensor, residual: torch.Tensor
) -> Any:
    if LAYER_NORMS.settled(plan, "layer_norms"):
        return None
    router = _router(self)
    w1 = self.post_attention_layernorm.weight.data
    w2 = self.pre_feedforward_layernorm.weight.data
    reason = batch_invariant() or layer_norms.unfit(attention_output, residual, w1, w2, router)
    if not LAYER_NORMS.may_run(
        plan, "layer_norms", reason, lambda: _compare_layer_norms(self, plan, residual), residual
    ):
        return None
    eps1 = eps_of(self.post_attention_layernorm)
    eps2 = eps_of(self.pre_feedforward_layernorm)
    if torch.compiler.is_compiling():
        mine: Any = router or (None, None, 0.0, None, 0.0)
        found = _ops["layer_norms"](
            attention_output, residual, w1, eps1, w2, eps2, *mine, plan.kinds.traced
        )
        return found if router is not None else (found[0], None, None)
    return layer_norms.launch_layer_norms(
        attention_output, residual, w1, eps1, w2, eps2, router, plan.kinds.eager
    )


def _compare_layer_norms(self: Any, plan: Plan, like: torch.Tensor) -> int:
    x, residual = samples(96, like), samples(96, like).flip(0)
    ours_residual = residual.clone()
    router = _router(self)
    ours = layer_norms.launch_layer_norms(
        x.clone(),
        ours_residual,
        self.post_attention_layernorm.weight.data,
        eps_of(self.post_attention_layernorm),
        self.pre_feedforward_layernorm.weight.data,
        eps_of(self.pre_feedforward_layernorm),
        router,
        plan.kinds.eager,
    )
    normed = self.post_attention_layernorm(x)
    mlp_input, residual = self.pre_feedforward_layernorm(normed, residual)
    pairs = [(ours[0], mlp_input), (ours_residual, residual)]
    if router is not None and ours[1] is not None and ours[2] is not None:
        scale = (self.router.scale * self.router.root_size).to(x.dtype)
        pairs.append((ours[1], self.router.norm(residual) * scale))
        pairs.append((ours[2], self.pre_feedforward_layernorm_2(residual)))
    return differing(pairs)


# -- experts ------------------------------------------------------------------------------------


def _side_stream(self: Any, plan: Plan, x: torch.Tensor) -> Any:
    """The stream for the dense MLP, or None. Only into CUDA graphs: eager launches gain nothing."""
    if MLP_STREAM.run is None or torch.compiler.is_compiling() or not capturing():
        return None
    reason = plan.mlp_stream or plan.hooks("mlp_stream")
    if reason is None and x.shape[0] > MLP_STREAM_ROWS:
        reason = f"more than {MLP_STREAM_ROWS} tokens"
    if reason is not None:
        MLP_STREAM.run.declined(reason)
        return None
    MLP_STREAM.run.engaged(True)
    if x.device not in _streams:
        _streams[x.device] = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
    return _streams[x.device]


_streams: dict[torch.device, Any] = {}


def _experts(
    self: Any,
    plan: Plan,
    x: Any,
    router_logits: torch.Tensor,
    residual: torch.Tensor,
    mlp_output: torch.Tensor,
) -> torch.Tensor:
    """The experts' output, summed or, if the tail can sum it, ``[M, K, N]``."""
    if torch.compiler.is_compiling() or EXPERTS_SUM.settled(plan, "experts_sum"):
        return self.moe(x, router_logits)  # type: ignore[no-any-return]
    reason = None
    if x.shape[0] > layer_tail.COMPILED_SUM_ROWS:
        reason = f"more than {layer_tail.COMPILED_SUM_ROWS} tokens"
    elif self.has_ple:
        reason = "the layer has per-layer embeddings"
    reason = (
        reason
        or batch_invariant()
        or norms.rows_unfit("residual", residual)
        or norms.rows_unfit("experts_input", x, residual)
        or norms.rows_unfit("mlp_output", mlp_output, residual)
    )
    topk = self.moe.topk.topk_config.top_k
    run = EXPERTS_SUM.admits(
        plan, "experts_sum", reason, lambda: _compare_tail(self, plan, residual, topk)
    )
    if run is None:
        return self.moe(x, router_logits)  # type: ignore[no-any-return]
    Summing.wanted, Summing.taken, Summing.buffer = True, None, None
    try:
        summed = self.moe(x, router_logits)
        taken, same = Summing.taken, Summing.taken is None or Summing.is_buffer(summed)
    finally:
        Summing.wanted, Summing.taken, Summing.buffer = False, None, None
    if taken is None:
        run.declined("the experts did not end in SGLang's reduction for few tokens")
        return summed  # type: ignore[no-any-return]
    if same:
        run.engaged(capturing())  # the tail sums it: `_finish`
        return taken
    # The buffer was never filled, and somebody went on with it: once more, as stock.
    plan.experts_sum = "somebody goes on with the experts' sum before the layer gets it"
    run.declined(plan.experts_sum)
    return self.moe(x, router_logits)


# -- the layer's end ------------------------------------------------------------------------------


def _finish(
    self: Any,
    plan: Plan,
    mlp_output: torch.Tensor,
    experts_output: torch.Tensor | None,
    residual: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    following: Any,
) -> tuple[Any, ...]:
    if self.has_ple:
        return _finish_ple(
            self, plan, mlp_output, experts_output, residual, per_layer_input, following
        )
    unsummed = experts_output is not None and experts_output.dim() == 3
    after = experts = None
    if unsummed or not (following is None or INPUT_NORM.settled(plan, "input_norm")):
        experts = None if experts_output is None else _branch(self, experts_output)
        after = _following(self, plan, mlp_output, residual, experts, following)
    if after is None and not unsummed:
        return _stock_tail(self, mlp_output, experts_output, residual), None
    norm = self.post_feedforward_layernorm
    if torch.compiler.is_compiling():
        mine: Any = experts or (None, None, 0.0, None, 0.0)
        following_norm: Any = after
        out, normed = _ops["layer_tail"](
            mlp_output,
            norm.weight.data,
            eps_of(norm),
            residual,
            self.layer_scalar,
            *mine,
            *following_norm,
        )
        return out, None, normed
    return _outputs(
        layer_tail.launch_layer_tail(
            mlp_output, norm.weight.data, eps_of(norm), residual, self.layer_scalar, experts, after
        )
    )


def _branch(self: Any, output: torch.Tensor) -> layer_tail.Experts:
    norm1, norm2 = self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2
    return layer_tail.Experts(
        output, norm2.weight.data, eps_of(norm2), norm1.weight.data, eps_of(norm1)
    )


def _outputs(pair: tuple[Any, Any]) -> tuple[Any, ...]:
    """Stock's two results, and the third only where the next layer wants it."""
    return (pair[0], None) if pair[1] is None else (pair[0], None, pair[1])


def _following(
    self: Any, plan: Plan, x: torch.Tensor, residual: torch.Tensor, experts: Any, following: Any
) -> layer_tail.NextNorm | None:
    if following is None or INPUT_NORM.run is None:
        return None
    unfit = plan.following_unfit(following)
    after = None if unfit is not None else _next_norm(plan, following)
    reason = (
        unfit
        or batch_invariant()
        or layer_tail.unfit(
            x,
            self.post_feedforward_layernorm.weight.data,
            residual,
            self.layer_scalar,
            experts,
            after,
        )
    )
    if INPUT_NORM.may_run(
        plan, "input_norm", reason, lambda: _compare_tail(self, plan, residual, 0, following), x
    ):
        return _next_norm(plan, following)
    return None


def _next_norm(plan: Plan, following: Any) -> layer_tail.NextNorm:
    kinds = plan.kinds
    kind = kinds.traced if torch.compiler.is_compiling() else kinds.eager
    return layer_tail.NextNorm(following.weight.data, eps_of(following), kind)


def _stock_tail(
    self: Any, mlp_output: torch.Tensor, experts_output: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """Stock's last calls on a layer without per-layer embeddings."""
    norm = self.post_feedforward_layernorm
    fits = mlp_output.is_cuda and mlp_output.dim() == 2
    if experts_output is not None:
        norm1, norm2 = self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2
        if fits:
            return stock.dual_norm_residual(
                mlp_output,
                norm1.weight.data,
                experts_output,
                norm2.weight.data,
                norm.weight.data,
                residual,
                self.layer_scalar,
                (norm1.variance_epsilon, norm2.variance_epsilon, norm.variance_epsilon),
            )
        mlp_output = norm1(mlp_output) + norm2(experts_output)
    elif fits:
        return stock.norm_residual(
            mlp_output, norm.weight.data, residual, self.layer_scalar, norm.variance_epsilon
        )
    out = norm(mlp_output) + residual
    return out * self.layer_scalar  # type: ignore[no-any-return]


def _compare_tail(
    self: Any, plan: Plan, like: torch.Tensor, topk: int, following: Any = None
) -> int:
    rows = layer_tail.COMPILED_SUM_ROWS if topk else 96
    x, residual = samples(rows, like), samples(rows, like).flip(0)
    experts = summed = None
    if self.enable_moe_block:
        if topk:
            output = samples(rows, like, topk * like.shape[-1]).view(rows, topk, -1)
            summed = torch.empty_like(x)
            Summing.wanted = False
            stock.sum_experts(output, summed)
        else:
            output = summed = samples(rows, like).roll(1, 0).contiguous()
        experts = _branch(self, output)
    norm = self.post_feedforward_layernorm
    after = None if following is None else _next_norm(plan, following)
    out, normed = layer_tail.launch_layer_tail(
        x, norm.weight.data, eps_of(norm), residual, self.layer_scalar, experts, after
    )
    expected = _stock_tail(self, x, summed, residual)
    pairs = [(out, expected)]
    if normed is not None:
        pairs.append((normed, following(expected)))
    return differing(pairs)


# -- the end of a layer with per-layer embeddings --------------------------------------------------


def _finish_ple(
    self: Any,
    plan: Plan,
    x: torch.Tensor,
    experts_output: torch.Tensor | None,
    residual: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    following: Any,
) -> tuple[Any, ...]:
    if experts_output is not None:
        x = self.post_feedforward_layernorm_1(x) + self.post_feedforward_layernorm_2(experts_output)
    norm, last = self.post_feedforward_layernorm, self.post_per_layer_input_norm
    reason: str | None = "there is no per-layer input"
    settled = PLE_TAIL.settled(plan, "ple_tail")
    if not settled and per_layer_input is not None:
        reason = (
            batch_invariant()
            or ple_tail.norm_add_unfit(x, norm.weight.data, residual, self.layer_scalar)
            or ple_tail.gelu_mul_unfit(per_layer_input, per_layer_input)
        )
    if settled or not PLE_TAIL.may_run(
        plan, "ple_tail", reason, lambda: _compare_ple(self, plan, residual), x
    ):
        out = norm(x) + residual
        if per_layer_input is not None:
            gate, _ = self.per_layer_input_gate(out)
            gate = torch.nn.functional.gelu(gate, approximate="tanh")
            contribution, _ = self.per_layer_projection(gate * per_layer_input)
            out = out + last(contribution)
        return out * self.layer_scalar, None
    assert per_layer_input is not None
    compiling = torch.compiler.is_compiling()
    weight, eps = norm.weight.data, eps_of(norm)
    if compiling:
        out, _ = _ops["norm_add"](x, weight, eps, residual, None, None, 0.0, plan.kinds.traced)
    else:
        out, _ = ple_tail.launch_norm_add(
            x, weight, eps, residual, None, None, 0.0, plan.kinds.eager
        )
    gated = linear.gate_times(self.per_layer_input_gate, out, per_layer_input)
    if gated is None:
        gate, _ = self.per_layer_input_gate(out)
        if compiling:
            gated = _ops["gelu_mul"](gate, per_layer_input)
        else:
            gated = ple_tail.launch_gelu_mul(gate, per_layer_input)
    contribution = linear.project(self.per_layer_projection, gated)
    after = _following_ple(self, plan, contribution, following)
    next_weight = None if after is None else after.weight
    next_eps = 0.0 if after is None else after.eps
    weight, eps, scalar = last.weight.data, eps_of(last), self.layer_scalar
    if compiling:
        out, normed = _ops["norm_add"](
            contribution, weight, eps, out, scalar, next_weight, next_eps, plan.kinds.traced
        )
        return _outputs((out, None if after is None else normed))
    return _outputs(
        ple_tail.launch_norm_add(
            contribution, weight, eps, out, scalar, next_weight, next_eps, plan.kinds.eager
        )
    )


def _following_ple(
    self: Any, plan: Plan, x: torch.Tensor, following: Any
) -> layer_tail.NextNorm | None:
    if following is None or INPUT_NORM.run is None:
        return None
    reason = plan.following_unfit(following) or norms.weight_unfit(
        "following.weight", following.weight.data, x
    )
    if INPUT_NORM.may_run(
        plan, "input_norm", reason, lambda: _compare_ple(self, plan, x, following), x
    ):
        return _next_norm(plan, following)
    return None


def _compare_ple(self: Any, plan: Plan, like: torch.Tensor, following: Any = None) -> int:
    x, residual = samples(96, like), samples(96, like).flip(0)
    norm, last = self.post_feedforward_layernorm, self.post_per_layer_input_norm
    kind = plan.kinds.eager
    out, _ = ple_tail.launch_norm_add(
        x, norm.weight.data, eps_of(norm), residual, None, None, 0.0, kind
    )
    pairs = [(out, norm(x) + residual)]
    every = torch.arange(-32768, 32768, device=x.device, dtype=torch.int32).to(torch.int16)
    gate = every.view(x.dtype).view(256, 256)
    gate = torch.where(gate.isnan(), torch.zeros_like(gate), gate)
    factor = samples(256, gate)
    stock = torch.nn.functional.gelu(gate, approximate="tanh") * factor
    pairs.append((ple_tail.launch_gelu_mul(gate, factor), stock))
    weight = None if following is None else following.weight.data
    eps = 0.0 if following is None else eps_of(following)
    ours, normed = ple_tail.launch_norm_add(
        x, last.weight.data, eps_of(last), residual, self.layer_scalar, weight, eps, kind
    )
    expected = (residual + last(x)) * self.layer_scalar
    pairs.append((ours, expected))
    if normed is not None:
        pairs.append((normed, following(expected)))
    return differing(pairs)


def batch_invariant() -> str | None:
    """Why stock's norms are not ``sgl_kernel``'s at the moment, or None."""
    from sglang.srt.layers import layernorm

    if layernorm.is_batch_invariant_mode_enabled():
        return "batch-invariant mode has norms of its own"
    return None
