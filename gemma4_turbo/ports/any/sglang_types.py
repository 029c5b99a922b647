"""What the fusions know by type: SGLang's own classes, exactly, with plain weights.

A subclass, a class of the same name, a quantisation method with packed weights, a tensor subclass as a
weight: each may compute something else. What is not known runs stock's way, with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.ports.any import ranks
from gemma4_turbo.runtime.hooks import HOOKED, hooked

if TYPE_CHECKING:
    from types import ModuleType

    from gemma4_turbo.ports.any.model_protocols import (
        MLP,
        DecoderLayer,
        FusedMoE,
        GeluAndMul,
        Gemma4RMSNorm,
        Group,
        Linear,
        MHAKVPool,
        MoE,
        PlatformOp,
        RadixAttention,
        RMSNorm,
        RotaryEmbedding,
        Router,
        SWAKVPool,
    )


class Types(NamedTuple):
    """SGLang's classes that a fusion may go round."""

    rms_norm: type[RMSNorm]
    gemma4_rms_norm: type[Gemma4RMSNorm]
    linear: tuple[type, ...]
    qkv_linear: type[Linear]
    row_linear: type[Linear]
    unquantized: type
    mlp: type[MLP]
    gelu_and_mul: type[GeluAndMul]
    rotary: tuple[type, ...]
    layer: type[DecoderLayer]
    router: type[Router]
    moe: type[MoE]
    fused_moe: type[FusedMoE]
    moe_methods: tuple[type, ...]  # whose result is the buffer that the reduction wrote
    dispatcher: type
    attention: type[RadixAttention]
    layernorm: ModuleType  # a module, whose batch-invariant mode is asked for at every call
    swa_pool: type[SWAKVPool]
    pool: type[MHAKVPool]


def _fits(module: object) -> str | None:
    return None


def _no_sum(module: object) -> None:
    return None


def _never() -> str | None:
    return None


class Rules(NamedTuple):
    """What a release line makes of its modules, beside the classes."""

    running: Callable[[PlatformOp], Callable[..., Any] | None]
    """The function that such a module runs when it is called now; None: another one each time."""
    output_unfit: Callable[[Any], str | None]  # of a linear layer: put together from several GPUs
    parallel_unfit: Callable[[Any], str | None]  # of experts: spread over several GPUs
    branches_unfit: Callable[[Any], str | None]
    """Of experts: summed over GPUs where two streams are open."""
    sums_from_zero: Callable[[], bool]  # does the sum over a token's experts, for few tokens
    tp_group: Callable[[], Group]  # SGLang's group of tensor parallelism
    now_unfit: Callable[[], str | None] = _never  # why no module runs its own function at present
    norm_unfit: Callable[[Any], str | None] = _fits  # more options of a norm
    linear_unfit: Callable[[Any], str | None] = _fits  # and of a linear layer
    sum_of: Callable[[Any], Callable[[torch.Tensor], torch.Tensor] | None] = _no_sum
    """A linear layer's own sum over GPUs."""
    logits_unfit: Callable[[], str | None] = _never
    """Why the router's logits are written over before the routing function sees them: at every call."""
    routing_unfit: Callable[[], str | None] = _never
    """Why what the routing function has found is written over before the experts run: at every call."""


_types: list[Types] = []
_rules: list[Rules] = []


def load(rules: Rules) -> None:
    """Look the classes up, for the process's one line. While a patch is built, never in traced code."""
    _rules[:] = [rules]
    ranks.load(rules.tp_group)
    if _types:
        return
    from sglang.srt.layers import activation, layernorm, linear, radix_attention
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
    from sglang.srt.layers.quantization import fp8, unquant
    from sglang.srt.layers.rotary_embedding import base, rope_variant
    from sglang.srt.mem_cache import memory_pool, swa_memory_pool
    from sglang.srt.models import gemma3_causal, gemma4_causal

    _types.append(
        Types(
            layernorm.RMSNorm,
            layernorm.Gemma4RMSNorm,
            (
                linear.ReplicatedLinear,
                linear.ColumnParallelLinear,
                linear.MergedColumnParallelLinear,
                linear.QKVParallelLinear,
                linear.RowParallelLinear,
            ),
            linear.QKVParallelLinear,
            linear.RowParallelLinear,
            unquant.UnquantizedLinearMethod,
            gemma3_causal.Gemma3MLP,
            activation.GeluAndMul,
            (base.RotaryEmbedding, rope_variant.Gemma4RotaryEmbedding),
            gemma4_causal.Gemma4DecoderLayer,
            gemma4_causal.Gemma4Router,
            gemma4_causal.Gemma4MoE,
            FusedMoE,
            (unquant.UnquantizedFusedMoEMethod, fp8.Fp8MoEMethod),
            StandardDispatcher,
            radix_attention.RadixAttention,
            layernorm,
            swa_memory_pool.SWAKVPool,
            memory_pool.MHATokenToKVPool,
        )
    )


def types() -> Types:
    """The classes; IndexError before `load`."""
    return _types[0]


def rules() -> Rules:
    """The line's; IndexError before `load`."""
    return _rules[0]


def is_a(thing: object, known: tuple[str, str]) -> bool:
    """Whether it is of this very class of SGLang's, by module and name; nothing is imported."""
    module, name = known
    return type(thing) is getattr(sys.modules.get(module), name, None)


def name(thing: object) -> str:
    """Of its class, for a reason."""
    return type(thing).__name__


def weight_unfit(weight: object) -> str | None:
    """Why a weight is not a plain parameter of numbers that a kernel can read, or None."""
    if type(weight) is not torch.nn.Parameter and type(weight) is not torch.Tensor:
        return f"a weight is a {name(weight)}"
    if weight.layout != torch.strided or weight.is_meta:
        return f"a weight is {weight.layout} on {weight.device}"
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"a weight is {weight.dtype}"
    return None


def norm_unfit(norm: Any) -> str | None:
    """Why a norm module does not run ``sgl_kernel.rmsnorm`` over its whole width, or None.

    Hooks are asked apart, at every call.
    """
    known, kind = types(), type(norm)
    if kind is known.rms_norm:
        if norm.variance_size_override is not None or norm.cast_x_before_out_mul:
            return "an RMSNorm has options that the kernel does not know"
        if getattr(norm, "fp32_residual", False) or norm.override_orig_dtype is not None:
            return "an RMSNorm keeps another dtype than its input's"
    elif kind is known.gemma4_rms_norm:
        if norm.scale_shift != 0.0:
            return f"a Gemma4RMSNorm has scale_shift {norm.scale_shift}"
    else:
        return f"a norm is a {kind.__module__}.{kind.__qualname__}"
    return rules().norm_unfit(norm) or weight_unfit(norm.weight) or method_unfit(norm, norm.weight)


def method_unfit(module: PlatformOp, tensor: torch.Tensor | None = None) -> str | None:
    """Why a module that chooses its function by platform runs another than it should, or None.

    Args:
        module: SGLang's.
        tensor: of the module, where the kernel stands for its function for CUDA. A self-check calls
            that function's kernel, not the module; ``--rl-on-policy-target`` has the rotary
            embedding run the one in plain torch.
    """
    if torch.compiler.is_compiling():  # Dynamo's methods are not Python's; looked at before
        return None
    method = rules().running(module)
    function = getattr(method, "__func__", None)
    called = getattr(function, "__name__", "")
    own = getattr(type(module), called, None)
    if function is None or function is not own or getattr(method, "__self__", None) is not module:
        return f"a {name(module)} runs a function of somebody else's"
    if tensor is not None and tensor.is_cuda and called != "forward_cuda":
        return f"a {name(module)} runs {called}"
    return None


def batch_invariant_unfit() -> str | None:
    """Why stock's norms are not ``sgl_kernel``'s at the moment, or None."""
    if _types[0].layernorm.is_batch_invariant_mode_enabled():
        return "batch-invariant mode has norms of its own"
    return None


def device_unfit(weight: torch.Tensor) -> str | None:
    """Why stock takes other ways than for CUDA and a CPU, or None."""
    if weight.device.type in ("cuda", "cpu"):
        return None
    return f"the weights are on {weight.device.type}"


def hooks_unfit(module: object) -> str | None:
    """Why a module has to be called, or None."""
    return HOOKED.format(f"a {name(module)}") if hooked(module) else None


def linear_unfit(module: object) -> str | None:
    """Why a linear layer is not a product with a plain weight, or None. Hooks are asked apart."""
    known, kind = types(), type(module)
    if kind not in known.linear:
        return f"a linear layer is a {kind.__module__}.{kind.__qualname__}"
    method = getattr(module, "quant_method", None)
    if type(method) is not known.unquantized:
        return f"a linear layer's method is {name(method)}"
    if "apply" in vars(method):
        return "a linear layer's method has an apply of its own"
    weight = getattr(module, "weight", None)
    if weight is None:
        return "a linear layer has no weight"
    reason = weight_unfit(weight)
    if reason is not None:
        return reason
    if weight.dim() != 2:
        return f"a weight has {weight.dim()} dimensions"
    if getattr(module, "bias", None) is not None:
        return "a linear layer has a bias"
    if getattr(module, "use_intel_amx_backend", False):
        return "a linear layer's weight is packed"
    return rules().linear_unfit(module)


def router_unfit(router: object) -> str | None:
    """Why a router is not a norm without weight, a scale and a product, or None."""
    if type(router) is not types().router:
        return f"the router is a {name(router)}"
    reason = norm_unfit(router.norm) or weight_unfit(router.scale)
    if reason is None and router.norm.with_scale:
        reason = "the router's norm has a weight"
    return reason


def linear_parts(module: object) -> list[tuple[object, str]]:
    """What somebody may set on a linear layer and its method, for `gemma4_turbo.fusions.site.Site.depends_on`."""
    parts = [(module, name) for name in ("quant_method", "weight", "bias")]
    method = getattr(module, "quant_method", None)
    return [*parts, (method, "apply")] if hasattr(method, "__dict__") else parts


def rope_unfit(rope: RotaryEmbedding, head_dim: int) -> str | None:
    """Why a rotary embedding does not run SGLang's kernel over whole heads, or None."""
    if type(rope) not in types().rotary:
        return f"the rotary embedding is a {name(rope)}"
    if rope.use_fallback_kernel or not rope.is_neox_style:
        return "the rotary embedding does not run SGLang's rope kernel"
    if rope.rotary_dim != head_dim or rope.head_size != head_dim:
        return "the rotary embedding does not rotate the whole head"
    return method_unfit(rope, rope.cos_sin_cache)


def experts_unfit(moe: object) -> str | None:
    """Why a layer's experts cannot be treated apart from its dense MLP, or None."""
    known = types()
    if type(moe) is not known.moe:
        return f"the experts' block is a {name(moe)}"
    if type(moe.experts) is not known.fused_moe:
        return f"the experts are a {name(moe.experts)}"
    return None


def reduction_unfit(experts: FusedMoE) -> str | None:
    """Why what the experts return may be more than their reduction's buffer, or None."""
    method = getattr(experts, "quant_method", None)
    if type(method) not in types().moe_methods:
        return f"the experts' method is {name(method)}"
    runner = getattr(method, "runner", None)
    if runner is None or not runner.runner_backend.is_triton():
        backend = None if runner is None else runner.runner_backend.value
        return f"the experts run on {backend or 'no runner'}, not on triton"
    if getattr(method, "use_flashinfer_cutlass", False):
        return "the experts run on flashinfer_cutlass, not on triton"
    dispatcher = experts.dispatcher
    if type(dispatcher) is not types().dispatcher:
        return f"the experts' dispatcher is a {name(dispatcher)}"
    for of, attribute in reduction_parts(experts):
        if attribute in vars(of):
            return f"the experts have {attribute} of somebody else's"
    return None


def reduction_parts(experts: FusedMoE) -> list[tuple[object, str]]:
    """What somebody may set between the reduction and the layer, for `gemma4_turbo.fusions.site.Site.depends_on`."""
    method = experts.quant_method
    return [
        (method, "apply"),
        (method, "forward"),
        (method.runner, "run"),
        (experts.dispatcher, "combine"),
        (experts.dispatcher, "dispatch"),
        (experts, "forward_impl"),
        (experts, "run_moe_core"),
    ]


def is_triton_backend(backend: object) -> bool:
    """Whether an attention backend is SGLang's for Triton, which nobody has unless it is imported."""
    module = sys.modules.get("sglang.srt.layers.attention.triton_backend")
    return module is not None and type(backend) is module.TritonAttnBackend
