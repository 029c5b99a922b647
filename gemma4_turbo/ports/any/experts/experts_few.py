"""`experts_few`: the experts of up to four tokens in two launches, a product with a vector in each.

The function that is replaced is the inside of SGLang's opaque fused-experts operators, which torch.compile
does not look into. Quantised experts, biases, other activations and whatever else the call may ask for are
stock's. Under tensor parallelism each rank has a slice of every expert; the all-reduce
stays the layer's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions.fusion import Step
from gemma4_turbo.kernels import experts_few as kernel
from gemma4_turbo.kernels import measured
from gemma4_turbo.ports.any.experts import feed_forward_few
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.fallback import Fallback
from gemma4_turbo.runtime.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

TARGET = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:fused_experts_impl"
MOST_TOKENS = 4
BOUND = 2.0**-7
"""Of the largest in a row: a rounding of bf16 in the last step, and one of a term before it."""

EITHER: tuple[Any, ...] = ()
TAKEN: dict[str, tuple[Any, ...]] = {
    "inplace": EITHER,
    "filter_expert": EITHER,  # ids of other ranks' experts are negative, and are left out
    "gate_up_interleaved": EITHER,  # of another activation
    "activation": ("gelu",),
    "is_gated": (True,),
    "routed_scaling_factor": (None, 1.0),
}
"""Values of the call's options. Of those that are not named here: the default."""

SUMMED = "enable_fused_moe_sum_all_reduce: the experts' sum is a sum over the ranks as well"

EXPERTS_FEW = Step()

_verdicts = Verdicts()
_fallback = Fallback("the launch")


def enable(
    fusions: tuple[Step, ...],
    run: PatchRun,
    stock: dict[str, Any],
    sums_over_ranks: Callable[[], bool],
    empty_like: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement of ``fused_experts_impl``, which they share.

    Args:
        fusions: `EXPERTS_FEW`, or `feed_forward_few`'s.
        run: of the patch.
        stock: of the targets.
        sums_over_ranks: whether the line's server is told to make one sum of both.
        empty_like: memory for the output, where the line's stock takes it from.
    """
    for fusion in fusions:
        fusion.enable(run)
    return {TARGET: _replacement(stock[TARGET], sums_over_ranks, empty_like)}


@functools.cache
def _replacement(
    stock: Callable[..., torch.Tensor],
    sums_over_ranks: Callable[[], bool],
    empty_like: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """The same for each patch: they share it."""
    options = list(inspect.signature(stock).parameters.values())[5:]
    names = [option.name for option in options]
    defaults = {option.name: option.default for option in options}
    allowed = {option.name: TAKEN.get(option.name, (option.default,)) for option in options}

    @functools.wraps(stock)
    def fused_experts_impl(
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        given = hidden_states, w1, w2, topk_weights, topk_ids

        def stocks() -> torch.Tensor:
            return stock(*given, *args, **kwargs)

        def chosen() -> dict[str, Any]:
            return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}

        if feed_forward_few.are_computed(*given):
            values = chosen()
            plain = values["inplace"] and _options_unfit(allowed, values) is None
            if plain and not sums_over_ranks():
                return feed_forward_few.taken(hidden_states)
        run = EXPERTS_FEW.run
        if run is None:
            return stocks()
        if hidden_states.shape[0] > MOST_TOKENS:  # every prefill: no time for more
            run.declined(f"more than {MOST_TOKENS} tokens")
            return stocks()
        values = chosen()
        reason = (
            _options_unfit(allowed, values)
            or kernel.unfit(*given)
            or (SUMMED if sums_over_ranks() else None)
            or _mode_unfit()
            or check_unfit(run, *given)
        )
        if reason is not None:
            run.declined(reason)
            return stocks()
        tiles = kernel.cut(topk_ids.shape[1], w2.shape[2], w2.shape[1], w2.device)
        out = hidden_states if values["inplace"] else empty_like(hidden_states)
        # The output is written by the second launch alone: whatever fails before, stock can begin anew.
        return _fallback.call(
            run,
            lambda: kernel.launch_experts_few(*given, out, tiles),
            stocks,
            (hidden_states.device, w1.shape, w1.dtype, topk_ids.shape[1]),
        )

    return fused_experts_impl


def _options_unfit(allowed: dict[str, tuple[Any, ...]], chosen: dict[str, Any]) -> str | None:
    """Why a call is not the plain one. No option is compared by value where it is a tensor."""
    for name, value in chosen.items():
        if name not in allowed:
            return f"{name} is not known"
        values = allowed[name]
        if values is EITHER:
            continue
        if isinstance(value, torch.Tensor) or value not in values:
            return f"{name} is {value if not isinstance(value, torch.Tensor) else 'given'}"
    return None


def _mode_unfit() -> str | None:
    from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled

    if is_batch_invariant_mode_enabled():  # also what deterministic inference sets
        return f"batch-invariant mode: {MOST_TOKENS} tokens and more are summed in different orders"
    return None


def check_unfit(
    run: PatchRun,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> str | None:
    """Why these compiled kernels may not run here, or None. Without a GPU nothing is compared."""
    key = x.device, x.dtype, w13.shape[1] // 2, w13.shape[2], topk_ids.shape[1]
    waiting = None
    if custom_ops.capturing():
        waiting = f"{x.shape[0]} tokens were not run before the capture"
    return _verdicts.unfit(run, key, waiting, lambda: _compare(key) if x.is_cuda else None)


def _compare(key: tuple[Any, ...]) -> str | None:
    device, dtype, width, hidden, choices = key
    error = farthest(MOST_TOKENS, choices, width, hidden, dtype, str(device))
    if error <= BOUND:  # written so that a NaN fails
        return None
    return (
        f"self-check: {error:.2e} of the largest from the reference, experts of {width} x {hidden}, "
        f"on {torch.cuda.get_device_name(device)} with torch {torch.__version__}"
    )


def farthest(
    tokens: int, choices: int, width: int, hidden: int, dtype: torch.dtype, device: str
) -> float:
    """The largest difference from the reference on random experts, in parts of its row's largest.

    As many experts as a token chooses, all in use: the kernels do not look at how many there are.
    """
    generator = torch.Generator(device).manual_seed(width)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.empty(shape, device=device, dtype=dtype)
        return drawn.normal_(0, scale, generator=generator)

    w13 = randn(choices, 2 * width, hidden, scale=hidden**-0.5)
    w2 = randn(choices, hidden, width, scale=width**-0.5)
    x = randn(tokens, hidden)
    scores = torch.rand(tokens, choices, generator=generator, device=device)
    factors, ids = scores.softmax(-1).topk(choices, dim=-1)
    given = x, w13, w2, factors, ids.int()
    tiles = kernel.cut(choices, width, hidden, x.device)
    ours = kernel.launch_experts_few(*given, None, tiles).double()
    theirs = kernel.reference_experts_few(*given).double()
    return float(((ours - theirs).abs() / theirs.abs().amax(-1, keepdim=True)).max())


def undo(run: PatchRun) -> None:
    """Forget the checks; nothing live was changed, and the forward may live on for another patch."""
    EXPERTS_FEW.run = None
    _verdicts.clear()
    _fallback.clear()


def verify(run: PatchRun, device: str) -> list[Check]:
    """The kernels against plain torch with stock's roundings."""
    # In Triton's interpreter a program takes 15 ms: few tiles there.
    sizes = ((704, 2816), (352, 2816)) if device == "cuda" else ((8, 72),)
    dtype = torch.bfloat16
    found = []
    for width, hidden in sizes:
        place = torch.empty(0, device=device).device
        row = kernel.measured_row(8, width, hidden, place)
        if device == "cuda" and measured.unfit("x", place, row) is not None:
            continue  # stock's code runs here
        for tokens in (1, MOST_TOKENS):
            error = farthest(tokens, 8, width, hidden, dtype, device)
            found.append(
                Check(
                    "experts_few",
                    f"{tokens} tokens, 8 experts of {width}",
                    "plain torch with stock's roundings",
                    tokens * hidden,
                    0,
                    f"{BOUND:.1e} of a row's largest; found {error:.1e}",
                    error <= BOUND,
                )
            )
    return found
