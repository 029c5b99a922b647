"""`router`: each constructed Gemma4MoE routes through `gemma4_turbo.kernels.router`.

Stock builds the routing function as a closure inside ``Gemma4MoE.__init__`` and hands it to TopK,
which reads it from its configuration at every call. So the constructor is wrapped, and what is
replaced is that one field; TopK and its methods stay as they are.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.kernels import router as kernel
from gemma4_turbo.kernels import topk_order
from gemma4_turbo.ports.v0_5_12.stock import stock_routing
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import MoE, TopK

TARGET = "sglang.srt.models.gemma4_causal:Gemma4MoE.__init__"
Routing = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_routed: weakref.WeakSet[MoE] = weakref.WeakSet()  # the Gemma4MoE whose routing is ours
_verdicts = Verdicts()  # of self_check, per device, dtypes and shape


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The wrapped constructor."""
    construct = stock[TARGET]

    @functools.wraps(construct)
    def __init__(self: MoE, *args: object, **kwargs: object) -> None:
        construct(self, *args, **kwargs)
        try:
            _take_over(run, self)
        except Exception as error:  # never in the way of a model that stock can build
            run.set(states.FAILED, f"{type(error).__name__}: {error}")

    return {TARGET: __init__}


def undo(run: PatchRun) -> None:
    """Give stock's closure back to every live Gemma4MoE that still has ours."""
    for moe in list(_routed):
        ours: Any = moe.topk.topk_config.custom_routing_function
        if getattr(ours, "gemma4_turbo_stock", None) is not None:
            moe.topk.topk_config.custom_routing_function = ours.gemma4_turbo_stock
    _routed.clear()


def _take_over(run: PatchRun, moe: MoE) -> None:
    config = moe.topk.topk_config
    stock = config.custom_routing_function
    if getattr(stock, "__qualname__", "") != "Gemma4MoE.__init__.<locals>.routing_function":
        run.set(states.CONFLICT, f"TopK was given {stock!r}, not stock's routing function")
        return
    bypass = _backend_unfit(moe.topk)
    ours = routing_function(run, stock, moe.per_expert_scale)
    # The logits have the model's dtype. Checking it now also compiles the kernel before any CUDA
    # graph is captured.
    failure = self_check(run, stock, moe.per_expert_scale, torch.get_default_dtype(), config.top_k)
    if failure is not None:
        run.set(states.FAILED, failure)
        return
    config.custom_routing_function = ours
    _routed.add(moe)
    if bypass is not None:
        run.set(states.UNSUPPORTED, bypass)


def routing_function(run: PatchRun, stock: Routing, per_expert_scale: torch.Tensor) -> Routing:
    """What TopK calls: the fused kernel where it fits and has passed its check, else stock."""
    traced = _custom_op()

    def routing_function(
        hidden_states: torch.Tensor,
        gating_output: torch.Tensor,
        topk: int,
        renormalize: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reason = kernel.unfit(gating_output, per_expert_scale, topk)
        if torch.compiler.is_compiling():
            if reason is None:
                return traced(gating_output, per_expert_scale, topk)
            custom_ops.not_traced("router")
            return stock(hidden_states, gating_output, topk, renormalize)
        if reason is None:
            capturing = custom_ops.capturing()
            dtype = gating_output.dtype
            reason = self_check(run, stock, per_expert_scale, dtype, topk, capturing)
            if reason is None:
                run.engaged(capturing)
                return kernel.launch_routing(gating_output, per_expert_scale, topk)
        run.declined(reason)
        return stock(hidden_states, gating_output, topk, renormalize)

    routing_function.gemma4_turbo_stock = stock  # type: ignore[attr-defined]
    return routing_function


def _custom_op() -> Routing:
    def fake(
        router_logits: torch.Tensor, per_expert_scale: torch.Tensor, topk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (router_logits.shape[0], topk)
        return (
            router_logits.new_empty(shape, dtype=torch.float32),
            router_logits.new_empty(shape, dtype=torch.int32),
        )

    return custom_ops.register(
        "router",
        "fused_routing(Tensor router_logits, Tensor per_expert_scale, int topk) -> (Tensor, Tensor)",
        lambda *args: kernel.launch_routing(*args),
        fake,
    )


def _backend_unfit(topk: TopK) -> str | None:
    """Why TopK will not call a routing function at all, or None. Mirrors TopK.forward_cuda."""
    from sglang.srt.layers.moe.topk import TopKOutputFormat
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    backend = get_moe_runner_backend()
    chosen = topk.topk_config.output_format
    elsewhere = (
        chosen != TopKOutputFormat.STANDARD
        if chosen is not None
        else backend.is_triton_kernels()
        or backend.is_flashinfer_trtllm()
        or (backend.is_flashinfer_mxfp4() and not getattr(topk, "is_fp4_experts", False))
    )
    if not elsewhere:
        return None
    return f"MoE backend {backend.value} routes by itself and never calls the routing function"


def self_check(
    run: PatchRun,
    stock: Routing,
    per_expert_scale: torch.Tensor,
    dtype: torch.dtype,
    topk: int,
    capturing: bool = False,
) -> str | None:
    """Why the kernel may not run here, or None: compared with stock's closure, every bit. Cached.

    The order of ties is PyTorch's, so another PyTorch or another GPU might have another one. Half of
    the rows are full of ties. Without a GPU there is nothing to compare with: `gemma4_turbo verify`
    uses the numpy oracle there.

    Args:
        run: of the patch; becomes `failed`.
        stock: stock's routing function, closed over ``per_expert_scale``.
        per_expert_scale: ``[E]``.
        dtype: of the router's logits.
        topk: K.
        capturing: into a CUDA graph, which forbids the synchronisation of a comparison.
    """
    device = per_expert_scale.device
    if device.type == "meta":
        return None  # no data yet: compared at the first call
    key = device, per_expert_scale.dtype, per_expert_scale.shape[0], dtype, topk
    waiting = None
    if capturing:
        waiting = f"{dtype} logits were not compared with stock before the capture"

    return _verdicts.unfit(
        run, key, waiting, lambda: _compare(stock, per_expert_scale, dtype, topk)
    )


@torch.no_grad()
def _compare(
    stock: Routing, per_expert_scale: torch.Tensor, dtype: torch.dtype, topk: int
) -> str | None:
    device = per_expert_scale.device
    if device.type != "cuda":
        return None
    generator = torch.Generator(device).manual_seed(0)  # the global state stays as it is
    rows = tie_rows(512, per_expert_scale.shape[0], generator).to(dtype)
    if kernel.unfit(rows, per_expert_scale, topk) is not None:
        return None  # declined call by call, with its own reason
    expected = stock(rows, rows, topk, True)
    got = kernel.launch_routing(rows, per_expert_scale, topk)
    bits = got[0].view(torch.int32) != expected[0].view(torch.int32)
    bits &= ~(got[0].isnan() & expected[0].isnan())  # the scale may not be loaded yet
    wrong = (got[1] != expected[1]) | bits
    count = int(wrong.any(dim=1).sum())
    if count == 0:
        return None
    return (
        f"self-check: {count} of {len(rows)} rows of {dtype} logits differ from stock on "
        f"{torch.cuda.get_device_name(device)} with torch {torch.__version__}"
    )


def tie_rows(rows: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """fp32 router logits, half of them coarse (ties everywhere), half as a router gives them."""
    device = generator.device
    drawn = torch.randint(-4, 5, (rows // 2, experts), generator=generator, device=device)
    coarse = drawn.float() / 4
    shape = (rows - rows // 2, experts)
    fine = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return torch.cat([coarse, fine])


def verify(run: PatchRun, device: str) -> list[Check]:
    """Fused routing against stock's own closure (on a GPU) or CUDA's order in numpy (without)."""
    construct: types.FunctionType = run.swaps[0].function
    generator = torch.Generator(device).manual_seed(1)
    return [
        _check(construct, rows, what)
        for what, rows in verification_rows(generator, 20_000 if device == "cuda" else 24)
    ]


def verification_rows(generator: torch.Generator, rows: int) -> list[tuple[str, torch.Tensor]]:
    """Router logits by kind, 128 experts, in every dtype the kernel takes."""
    kinds: list[tuple[str, torch.Tensor]] = []
    for dtype in kernel.LOGIT_DTYPES:
        name = str(dtype).removeprefix("torch.")
        made = tie_rows(rows, 128, generator).to(dtype)
        kinds.append((f"{name}, half of the rows full of ties", made))
        odd = made.clone()
        odd[::4, 7] = float("nan")
        odd[1::4, 9] = float("inf")
        odd[2::4, ::2] = float("-inf")
        odd[3::4] = torch.where(odd[3::4] > 0, odd[3::4] * 0, -odd[3::4] * 0)
        kinds.append((f"{name}, with NaN, infinities and signed zeros", odd))
    return kinds


@torch.no_grad()
def _check(construct: types.FunctionType, logits: torch.Tensor, what: str) -> Check:
    generator = torch.Generator(logits.device).manual_seed(2)
    scale = torch.rand(128, generator=generator, device=logits.device).to(logits.dtype) * 2
    weights, ids = kernel.fused_routing(logits, scale, 8)
    if logits.is_cuda:
        expected, expected_ids = stock_routing(construct, scale)(logits, logits, 8, True)
        against, allowed, slack = "stock's closure on this GPU", "not one bit", 0.0
    else:
        order = topk_order.cuda_topk_ids(logits.float().numpy(), 8)
        expected_ids = torch.from_numpy(order).int()
        top = logits.gather(1, expected_ids.long())
        expected = (top.softmax(dim=-1) * scale[expected_ids].to(logits.dtype)).float()
        # numpy's exp and torch's differ by an ulp of fp32 on a CPU, which now and then changes a
        # rounding to the logits' dtype, before and after the multiplication.
        against = "CUDA's order in numpy, torch's softmax on the CPU"
        allowed, slack = "ids: none; weights: 4 ulp", 4 * torch.finfo(logits.dtype).eps
        both_nan = weights.isnan() & expected.isnan()  # whose payload is the CPU's own
        expected = torch.where(both_nan, weights, expected)
    bits = int((weights.view(torch.int32) != expected.view(torch.int32)).sum())
    wrong_ids = int((ids != expected_ids).sum())
    near = bits == 0 or (
        slack > 0 and torch.allclose(weights, expected, rtol=slack, atol=0, equal_nan=True)
    )
    return Check(
        "router",
        what,
        against,
        weights.numel() + ids.numel(),
        bits + wrong_ids,
        allowed,
        wrong_ids == 0 and near,
    )
