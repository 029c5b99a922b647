"""The steps of ``Gemma4DecoderLayer.forward``, which patches can take over one by one.

Without any step they are stock's calls in stock's order. A step whose arguments do not fit makes
stock's calls for that part. How a release hands hidden states from layer to layer is its line's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.fusions import layer_norms, layer_tail, ple_tail
from gemma4_turbo.fusions.fusion import Step
from gemma4_turbo.fusions.site import UNPROVEN, Site, eps_of, first_unfit
from gemma4_turbo.fusions.stock import followed
from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.norms.layer_norms import Router
from gemma4_turbo.kernels.norms.layer_tail import COMPILED_SUM_ROWS, Experts, NextNorm
from gemma4_turbo.ports.any import linear, sglang_types
from gemma4_turbo.ports.any.decode_step import mlp_few
from gemma4_turbo.ports.any.experts import feed_forward_few, router_few
from gemma4_turbo.runtime import handed
from gemma4_turbo.runtime.custom_ops import TRACED, capturing

if TYPE_CHECKING:
    from gemma4_turbo.engine.checks import Check
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.kernels.norms.layer_norms import Outputs
    from gemma4_turbo.ports.any.model_protocols import (
        DecoderLayer,
        Norm,
        RMSNorm,
    )

LAYER_NORMS = layer_norms.LayerNorms("layer_norms")
PLE_TAIL = ple_tail.PleTail("ple_tail")
INPUT_NORM = layer_tail.LayerTail("input_norm")
PLE_INPUT_NORM = ple_tail.PleInputNorm("input_norm")
EXPERTS_SUM = layer_tail.ExpertsTail("experts_sum")
PDL = Step()
MLP_STREAM = Step()

Ends = tuple[torch.Tensor, torch.Tensor | None]

NO_EXPERTS = "the layer has no experts"
NOT_PER_LAYER = "the layer has no per-layer embeddings"
NO_PLE_TAIL = "`ple_tail` did not make the layer's end"
COVERED = "`feed_forward_few` computes the layer's feed-forward at once"
UNCOUNTED = "early launches in compiled code are not counted"
EAGER = "eager launches gain nothing from a second stream"

_enabled = [0]  # how many times fusions were given to a patch

MLP_STREAM_ROWS = 64
"""Above this many tokens the two branches no longer leave room for each other."""


class Sums(NamedTuple):
    """What sums a part of the layer's feed-forward over GPUs, where its modules do not do so themselves."""

    mlp: Callable[[torch.Tensor], torch.Tensor]
    experts: Callable[[torch.Tensor], torch.Tensor]


class Summing:
    """Hand-over of the experts' unsummed output from SGLang's reduction to the layer's tail."""

    wanted = False
    taken: torch.Tensor | None = None
    buffer: torch.Tensor | None = None  # that the reduction was to fill

    @classmethod
    def is_buffer(cls, summed: torch.Tensor) -> bool:
        """Whether what the experts returned is the very buffer, so that nothing was added since."""
        return cls.buffer is not None and handed.same(summed, cls.buffer)


class LayerSite(Site):
    """What a layer's modules allow, looked at once. None: allowed, else why not."""

    def __init__(self, layer: DecoderLayer) -> None:
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
        key: tuple[object, ...] = (str(type(weight)), moe)
        if sglang_types.norm_unfit(layer.input_layernorm) is None:
            key = (weight.shape[0], weight.dtype, str(weight.device), moe)  # type: ignore[union-attr]
        super().__init__(key, layer.input_layernorm)
        self.told = 0  # when `tell_absent` was last done, as `_enabled` counts

        reasons = [sglang_types.norm_unfit(norm) for norm in firsts]
        if moe:
            reasons.append(sglang_types.router_unfit(layer.router))
        self.layer_norms: str | None = first_unfit(reasons)
        reasons = [sglang_types.norm_unfit(norm) for norm in tails]
        self.ple_tail: str | None = first_unfit(reasons)
        self.input_norm: str | None = first_unfit(reasons)
        apart = sglang_types.experts_unfit(layer.moe) if moe else NO_EXPERTS
        # No arithmetic to compare.
        self.mlp_stream: str | None = apart or sglang_types.rules().branches_unfit(layer.moe)
        more = (
            apart
            or sglang_types.rules().parallel_unfit(layer.moe)
            or sglang_types.reduction_unfit(layer.moe.experts)
        )
        self.experts_sum: str | None = first_unfit([*reasons, more])
        # The norm, its class, the function that it has chosen, and why it is not ours to run.
        self.following: tuple[Norm | None, type | None, object, str | None] = (
            None,
            None,
            None,
            None,
        )

        routing = (layer.router, layer.router.norm) if self.layer_norms is UNPROVEN and moe else ()
        experts = (layer.moe, layer.moe.experts) if apart is None else ()
        self.cover("layer_norms", *firsts, *routing)
        self.cover("ple_tail", *tails)
        self.cover("input_norm", *tails)
        self.cover("experts_sum", *tails, *experts)
        if isinstance(layer.mlp, torch.nn.Module):
            self.cover("mlp_stream", *layer.mlp.modules())
        parts: list[tuple[object, str]] = [
            (layer, name) for name in (*first, *tail, "input_layernorm", "mlp")
        ]
        if moe:
            parts += [(layer, "router"), (layer, "moe")]
            parts += [(layer.router, "norm")] if routing else []
        if experts:
            parts += [(layer.moe, "experts"), (experts[1], "quant_method")]
            parts += [(experts[1], "dispatcher")]
            parts += sglang_types.reduction_parts(experts[1]) if more is None else []
        parts += [(n, "_forward_method") for n in (*firsts, *tails)]
        self.depends_on(*parts)

    def following_unfit(self, norm: Norm) -> str | None:
        """Why the norm that reads the layer's result is not ours to run, or None."""
        known, kind, method, reason = self.following
        traced = torch.compiler.is_compiling()
        if (
            known is not norm
            or type(norm) is not kind
            or not (traced or norm.__dict__.get("_forward_method") is method)
        ):
            # In some lines the norm chooses its function in here.
            reason = sglang_types.norm_unfit(norm)
            chosen = None if traced else norm.__dict__.get("_forward_method")
            self.following = norm, type(norm), chosen, reason
        return reason or sglang_types.hooks_unfit(norm)


def _modules(layer: DecoderLayer, names: list[str]) -> tuple[Norm, ...]:
    return tuple(getattr(layer, name) for name in names)


def enable(fusions: tuple[Step, ...], run: PatchRun) -> None:
    """Give fusions to a patch."""
    _enabled[0] += 1
    for fusion in fusions:
        fusion.enable(run)


def tell_covered() -> None:
    """Count the patches on parts that `feed_forward_few` has computed. It runs for a few tokens only."""
    for step in (EXPERTS_SUM, MLP_STREAM, router_few.ROUTER_FEW):
        if step.run is not None:
            step.run.declined(COVERED)


def tell_absent(layer: DecoderLayer) -> None:
    """Count, once for each layer and for each trace of it, the patches on parts that a layer does not have."""
    of_experts = (EXPERTS_SUM, MLP_STREAM, router_few.ROUTER_FEW, feed_forward_few.FEED_FORWARD_FEW)
    for steps, there, reason in (
        (of_experts, layer.enable_moe_block, NO_EXPERTS),
        ((mlp_few.MLP_FEW,), not layer.enable_moe_block, mlp_few.BESIDE_EXPERTS),
        ((PLE_TAIL,), layer.has_ple, NOT_PER_LAYER),
    ):
        for step in () if there else steps:
            step.declined(reason)


def early_launches() -> int:
    """So far. Not for traced code, which would be traced again whenever there are more."""
    return 0 if PDL.run is None or torch.compiler.is_compiling() else pdl.launches


def count_early_launches(before: int, device: torch.device) -> None:
    """Count a layer for `pdl`: whether more kernels were launched early than ``before`` it."""
    if PDL.run is None:
        return
    if torch.compiler.is_compiling():
        PDL.declined(UNCOUNTED)
    elif pdl.launches > before:
        PDL.run.engaged(capturing())
    elif pdl.supported(device):
        PDL.run.declined("none of the package's kernels was launched in the layer")
    else:
        PDL.run.declined(
            "needs a GPU of compute capability 9.0 or later, and a Triton that launches so"
        )


def after_attention(
    self: DecoderLayer,
    site: LayerSite,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    following: RMSNorm | None,
    router_of: Callable[[Any], Router],
    sums: Sums | None = None,
) -> Ends:
    """The layer from the attention's output on; ``residual``, its input, is overwritten, as by stock.

    ``sums``: over GPUs, of what the MLP and the experts leave to the layer. They are launched one after the
    other, on one stream, in stock's order: GPUs that sum in different orders wait for each other for ever.

    Returns:
        the layer's result; of ``following``, the norm that reads it, the normed rows or None.
    """
    if torch.compiler.is_compiling():
        tell_absent(self)
    elif site.told != _enabled[0]:
        site.told = _enabled[0]
        tell_absent(self)
    router_input: torch.Tensor | None = None
    experts_input: Any = None
    fused = None
    if LAYER_NORMS.run is not None:
        fused = _layer_norms(self, site, hidden_states, residual, router_of)
    if fused is not None:
        mlp_input, router_input, experts_input = fused
    else:
        hidden_states = self.post_attention_layernorm(hidden_states)
        mlp_input, residual = self.pre_feedforward_layernorm(hidden_states, residual)

    if not self.enable_moe_block:
        mlp_output = mlp_few.mlp(self.mlp, mlp_input)
        if sums is not None:
            mlp_output = sums.mlp(mlp_output)
        return _finish(self, site, mlp_output, None, residual, per_layer_input, following)

    few = feed_forward_few.FEED_FORWARD_FEW
    if few.run is None:
        pass
    elif sums is not None:
        few.declined(feed_forward_few.SUMMED)
    elif router_input is None:
        few.declined(feed_forward_few.NO_NORMS)
    else:
        at_once = feed_forward_few.outputs(self, mlp_input, router_input, experts_input)
        if at_once is not None:
            tell_covered()
            return _finish(self, site, *at_once, residual, per_layer_input, following)

    side = None if MLP_STREAM.run is None else _side_stream(MLP_STREAM.run, site, mlp_input)
    if side is not None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            mlp_output = linear.mlp(self.mlp, mlp_input)
    else:
        mlp_output = linear.mlp(self.mlp, mlp_input)
        if sums is not None:
            mlp_output = sums.mlp(mlp_output)
    if router_input is not None:
        router_logits = router_few.logits(self, router_input)
    else:
        if router_few.ROUTER_FEW.run is not None:
            router_few.ROUTER_FEW.declined(feed_forward_few.NO_NORMS)
        router_logits = self.router(residual)
        experts_input = self.pre_feedforward_layernorm_2(residual)
    if EXPERTS_SUM.run is None:
        experts_output = self.moe(experts_input, router_logits)
    else:
        experts_output = _experts(self, site, experts_input, router_logits, residual, mlp_output)
    if router_few.ROUTER_FEW.run is not None:
        router_few.done(self, residual)
    if side is not None:
        main.wait_stream(side)
        if sums is not None:
            mlp_output = sums.mlp(mlp_output)
    if sums is not None:
        experts_output = sums.experts(experts_output)
    return _finish(self, site, mlp_output, experts_output, residual, per_layer_input, following)


# -- between attention and feed-forward --------------------------------------------------------


def _layer_norms(
    self: DecoderLayer,
    site: LayerSite,
    attention_output: torch.Tensor,
    residual: torch.Tensor,
    router_of: Callable[[Any], Router],
) -> Outputs | None:
    if LAYER_NORMS.settled(site):
        return None
    first, second = self.post_attention_layernorm, self.pre_feedforward_layernorm
    router = router_of(self) if self.enable_moe_block else None
    args = layer_norms.Args(
        attention_output,
        residual,
        first.weight.data,
        eps_of(first),
        second.weight.data,
        eps_of(second),
        router,
    )
    return LAYER_NORMS(site, args, sglang_types.batch_invariant_unfit())


# -- experts ------------------------------------------------------------------------------------


def _side_stream(run: PatchRun, site: LayerSite, x: torch.Tensor) -> torch.cuda.Stream | None:
    """The stream for the dense MLP, or None. Only into CUDA graphs: eager launches gain nothing."""
    if torch.compiler.is_compiling():
        MLP_STREAM.declined(TRACED)
        return None
    unfit = site.mlp_stream or site.hooks_unfit("mlp_stream")
    if unfit is None and not capturing():
        run.declined(EAGER, provisional=True)  # a reason of a capture's says more
        return None
    if unfit is None and x.shape[0] > MLP_STREAM_ROWS:
        unfit = f"more than {MLP_STREAM_ROWS} tokens"
    if unfit is not None:
        run.declined(unfit)
        return None
    run.engaged(True)
    if x.device not in _streams:
        _streams[x.device] = torch.cuda.Stream(x.device)
    return _streams[x.device]


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _experts(
    self: DecoderLayer,
    site: LayerSite,
    x: torch.Tensor,
    router_logits: torch.Tensor,
    residual: torch.Tensor,
    mlp_output: torch.Tensor,
) -> torch.Tensor:
    """The experts' output, summed or, if the tail can sum it, ``[M, K, N]``."""
    if EXPERTS_SUM.settled(site):
        return self.moe(x, router_logits)
    if torch.compiler.is_compiling():
        EXPERTS_SUM.declined(TRACED)
        return self.moe(x, router_logits)
    unfit = None
    if x.shape[0] > COMPILED_SUM_ROWS:
        unfit = f"more than {COMPILED_SUM_ROWS} tokens"
    elif self.has_ple:
        unfit = "the layer has per-layer embeddings"
    unfit = (
        unfit
        or sglang_types.batch_invariant_unfit()
        or norms.rows_unfit("residual", residual)
        or norms.rows_unfit("experts_input", x, residual)
        or norms.rows_unfit("mlp_output", mlp_output, residual)
    )

    def unsummed() -> layer_tail.Args:
        choices = residual.new_empty((1, self.moe.topk.topk_config.top_k, residual.shape[1]))
        return _tail(self, mlp_output, residual, choices, None)

    run = EXPERTS_SUM.admit(site, unfit, unsummed)
    if run is None:
        return self.moe(x, router_logits)
    Summing.wanted, Summing.taken, Summing.buffer = True, None, None
    try:
        summed = self.moe(x, router_logits)
        taken, same = Summing.taken, Summing.taken is None or Summing.is_buffer(summed)
    finally:
        Summing.wanted, Summing.taken, Summing.buffer = False, None, None
    if taken is None:
        run.declined("the experts did not end in SGLang's reduction for few tokens")
        return summed
    if same:
        run.engaged(capturing())  # the tail sums it: `_finish`
        return taken
    # The buffer was never filled, and somebody went on with it: once more, as stock.
    site.experts_sum = "somebody goes on with the experts' sum before the layer gets it"
    run.declined(site.experts_sum)
    return self.moe(x, router_logits)


def experts_sum_checks(device: str) -> list[Check]:
    """`EXPERTS_SUM` against stock, the sum started as this release starts it."""
    from_zero = sglang_types.rules().sums_from_zero()
    what, draw = layer_tail.example(device, torch.Tensor.contiguous, from_zero)
    return [EXPERTS_SUM.check(device, what, draw)]


# -- the layer's end ------------------------------------------------------------------------------


def _finish(
    self: DecoderLayer,
    site: LayerSite,
    mlp_output: torch.Tensor,
    experts_output: torch.Tensor | None,
    residual: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    following: RMSNorm | None,
) -> Ends:
    if self.has_ple:
        return _finish_ple(
            self, site, mlp_output, experts_output, residual, per_layer_input, following
        )
    unsummed = experts_output is not None and experts_output.dim() == 3
    if following is not None and not INPUT_NORM.settled(site):
        unfit = site.following_unfit(following)
        after = None if unfit is not None else _next_norm(following)
        args = _tail(self, mlp_output, residual, experts_output, after)
        found = INPUT_NORM(site, args, unfit or sglang_types.batch_invariant_unfit())
        if found is not None:
            return found[0], found[1]
    if unsummed:  # admitted by `_experts`
        args = _tail(self, mlp_output, residual, experts_output, None)
        return EXPERTS_SUM.launch(args, site.kinds.eager)
    return _stock_tail(self, mlp_output, experts_output, residual), None


def _tail(
    self: DecoderLayer,
    mlp_output: torch.Tensor,
    residual: torch.Tensor,
    experts_output: torch.Tensor | None,
    after: NextNorm | None,
) -> layer_tail.Args:
    experts = None
    if experts_output is not None:
        norm1, norm2 = self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2
        branch = norm2.weight.data, eps_of(norm2), norm1.weight.data, eps_of(norm1)
        experts = Experts(experts_output, *branch, sglang_types.rules().sums_from_zero())
    norm = self.post_feedforward_layernorm
    return layer_tail.Args(
        mlp_output, norm.weight.data, eps_of(norm), residual, self.layer_scalar, experts, after
    )


def _next_norm(following: RMSNorm) -> NextNorm:
    return NextNorm(following.weight.data, eps_of(following), 0)  # the fusion knows the kind


def _stock_tail(
    self: DecoderLayer,
    mlp_output: torch.Tensor,
    experts_output: torch.Tensor | None,
    residual: torch.Tensor,
) -> torch.Tensor:
    """Stock's last calls on a layer without per-layer embeddings."""
    norm = self.post_feedforward_layernorm
    fits = mlp_output.is_cuda and mlp_output.dim() == 2
    if experts_output is not None:
        norm1, norm2 = self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2
        if fits:
            return followed().dual_norm_residual(
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
        return followed().norm_residual(
            mlp_output, norm.weight.data, residual, self.layer_scalar, norm.variance_epsilon
        )
    out = norm(mlp_output) + residual
    return out * self.layer_scalar


# -- the end of a layer with per-layer embeddings --------------------------------------------------


def _finish_ple(
    self: DecoderLayer,
    site: LayerSite,
    x: torch.Tensor,
    experts_output: torch.Tensor | None,
    residual: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    following: RMSNorm | None,
) -> Ends:
    if experts_output is not None:
        x = self.post_feedforward_layernorm_1(x) + self.post_feedforward_layernorm_2(experts_output)
    if not _ple_tail_runs(self, site, x, residual, per_layer_input):
        out = self.post_feedforward_layernorm(x) + residual
        if per_layer_input is not None:
            gate, _ = self.per_layer_input_gate(out)
            gate = torch.nn.functional.gelu(gate, approximate="tanh")
            contribution, _ = self.per_layer_projection(gate * per_layer_input)
            out = out + self.post_per_layer_input_norm(contribution)
        if following is not None:
            PLE_INPUT_NORM.declined(NO_PLE_TAIL)
        return out * self.layer_scalar, None
    assert per_layer_input is not None
    norm, last = self.post_feedforward_layernorm, self.post_per_layer_input_norm
    first = ple_tail.NormAdd(x, norm.weight.data, eps_of(norm), residual)
    out, _ = PLE_TAIL.norm_add(site, first)
    gated = linear.gate_times(self.per_layer_input_gate, out, per_layer_input)
    if gated is None:
        gate, _ = self.per_layer_input_gate(out)
        gated = PLE_TAIL.gelu_mul(gate, per_layer_input)
    contribution = linear.project(self.per_layer_projection, gated)
    second = ple_tail.NormAdd(contribution, last.weight.data, eps_of(last), out, self.layer_scalar)
    if following is not None and PLE_INPUT_NORM.run is not None:
        unfit = site.following_unfit(following)
        asked = second
        if unfit is None:
            asked = second._replace(next_weight=following.weight.data, next_eps=eps_of(following))
        found = PLE_INPUT_NORM(site, asked, unfit)
        if found is not None:
            return found[0], found[1]
    return PLE_TAIL.norm_add(site, second)


def _ple_tail_runs(
    self: DecoderLayer,
    site: LayerSite,
    x: torch.Tensor,
    residual: torch.Tensor,
    per_layer_input: torch.Tensor | None,
) -> bool:
    if PLE_TAIL.settled(site):
        return False
    unfit = "there is no per-layer input" if per_layer_input is None else None
    gate = residual if per_layer_input is None else per_layer_input
    norm, last = self.post_feedforward_layernorm, self.post_per_layer_input_norm
    args = ple_tail.Args(
        x,
        norm.weight.data,
        eps_of(norm),
        residual,
        gate,
        gate,
        x,
        last.weight.data,
        eps_of(last),
        self.layer_scalar,
    )
    return PLE_TAIL.runs(site, args, unfit or sglang_types.batch_invariant_unfit())
