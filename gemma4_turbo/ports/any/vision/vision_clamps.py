"""`vision_clamps`: activations are not clamped between minus and plus infinity.

The linear layers of the vision and audio encoders clamp what goes in and what comes out, with bounds
that the checkpoint may leave infinite; then a clamp is a copy. Whether bounds are finite is read from
the GPU once per layer, and again as soon as one is replaced or written to, or SGLang may have loaded
weights (`gemma4_turbo.runtime.weights`). Other code's write through ``.data`` leaves no trace on the host: it is
seen at the next loading.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.runtime import custom_ops, hooks, weights
from gemma4_turbo.runtime.fallback import Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import (
        ClippableGateUpLinear,
        ClippableLinear,
        ClippableQKVLinear,
        Module,
    )

ROW = "sglang.srt.layers.clippable_linear:ClippableRowParallelLinear.forward"
COLUMN = "sglang.srt.layers.clippable_linear:ClippableColumnParallelLinear.forward"
QKV = "sglang.srt.layers.clippable_linear:ClippableQKVParallelLinear.forward"
GATE_UP = "sglang.srt.layers.clippable_linear:ClippableGateUpParallelLinear.forward"
LOAD = "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.load_weights"

# The pairs of bounds of each class, as the names of their buffers without _min and _max.
PAIRS = {
    ROW: ("input", "output"),
    COLUMN: ("input", "output"),
    QKV: ("input", "q_output", "k_output", "v_output"),
    GATE_UP: ("input", "gate_output", "up_output"),
}
NAMES = {
    target: tuple(f"{pair}_{end}" for pair in pairs for end in ("min", "max"))
    for target, pairs in PAIRS.items()
}
_KNOWN = "_gemma4_turbo_bounded"
_fallback = Fallback("reading the bounds")


class Known(NamedTuple):
    """What was read of a module's bounds."""

    stamp: weights.Stamp
    # Kept, for another tensor might get the identity of one that is gone.
    bounds: list[torch.Tensor | None]
    bounded: frozenset[str]


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Four forwards that clamp where there is something to clamp, and the loader that tells them."""
    load = stock[LOAD]

    def single(target: str) -> Callable[[ClippableLinear, torch.Tensor], torch.Tensor]:
        def forward(self: ClippableLinear, x: torch.Tensor) -> torch.Tensor:
            bounded = _bounded(run, self, target, "linear")
            if bounded is None:
                return stock[target](self, x)  # type: ignore[no-any-return]
            x, _ = self.linear(_clamp(self, x, "input", bounded))
            return _clamp(self, x, "output", bounded)

        return forward

    def qkv_forward(
        self: ClippableQKVLinear, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bounded = _bounded(run, self, QKV, "qkv_proj")
        if bounded is None:
            return stock[QKV](self, hidden_states)  # type: ignore[no-any-return]
        qkv: Any  # `split` has no types
        qkv, _ = self.qkv_proj(_clamp(self, hidden_states, "input", bounded))
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        return (
            _clamp(self, q, "q_output", bounded),
            _clamp(self, k, "k_output", bounded),
            _clamp(self, v, "v_output", bounded),
        )

    def gate_up_forward(
        self: ClippableGateUpLinear, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bounded = _bounded(run, self, GATE_UP, "gate_up_proj")
        if bounded is None:
            return stock[GATE_UP](self, x)  # type: ignore[no-any-return]
        gate_up: Any  # as above
        gate_up, _ = self.gate_up_proj(_clamp(self, x, "input", bounded))
        gate, up = gate_up.split([self.proj_size, self.proj_size], dim=-1)
        return (
            _clamp(self, gate, "gate_output", bounded),
            _clamp(self, up, "up_output", bounded),
        )

    @functools.wraps(load)
    def load_weights(self: object, *args: object, **kwargs: object) -> object:
        try:
            return load(self, *args, **kwargs)
        finally:
            weights.written()

    return {
        ROW: single(ROW),
        COLUMN: single(COLUMN),
        QKV: qkv_forward,
        GATE_UP: gate_up_forward,
        LOAD: load_weights,
    }


def undo(run: PatchRun) -> None:
    """What was read of the bounds is void: they may change while nobody watches."""
    weights.written()
    _fallback.clear()


def _bounded(run: PatchRun, module: Module, target: str, inner: str) -> frozenset[str] | None:
    """The pairs that bound anything; None where stock's forward must run."""
    if torch.compiler.is_compiling():
        return None
    captured = custom_ops.capturing()
    try:
        reason = _fallback.unfit(target)
        if reason is None:
            # What a hook does to a tensor in place is to reach stock's copy, not the caller's tensor.
            if hooks.hooked(module._modules[inner]):
                reason = hooks.HOOKED.format(inner)
            else:
                known = _known(module, target, captured)
                reason = known if isinstance(known, str) else None
    except Exception as error:
        reason = _fallback.failed(run, target, error)
    if reason is not None:
        run.declined(reason)
        return None
    run.engaged(captured)
    return known  # type: ignore[return-value]


def _known(module: Module, target: str, captured: bool) -> frozenset[str] | str:
    """The pairs that bound anything, or why stock's forward must run."""
    buffers = module._buffers
    bounds = [buffers.get(name) for name in NAMES[target]]
    try:
        now = weights.stamp(bounds)
    except (AttributeError, RuntimeError):  # no buffers any more, or made in inference mode
        return "the bounds do not tell when they are written to"
    known: Known | None = module.__dict__.get(_KNOWN)
    if known is None or known.stamp != now:
        if captured:  # reading the bounds would end the capture
            return "the bounds were not read before the capture"
        known = Known(now, bounds, read_bounds(module, PAIRS[target]))
        module.__dict__[_KNOWN] = known
    if len(known.bounded) == len(PAIRS[target]):
        return "all bounds are finite"
    return known.bounded


def read_bounds(module: Module, pairs: tuple[str, ...]) -> frozenset[str]:
    """The pairs of which one bound is not infinite, or infinite the wrong way."""
    low = torch.stack([getattr(module, f"{pair}_min").detach() for pair in pairs])
    high = torch.stack([getattr(module, f"{pair}_max").detach() for pair in pairs])
    free = ((low == -torch.inf) & (high == torch.inf)).tolist()
    return frozenset(pair for pair, unbounded in zip(pairs, free, strict=True) if not unbounded)


def _clamp(module: Module, x: torch.Tensor, pair: str, bounded: frozenset[str]) -> torch.Tensor:
    if pair not in bounded:
        return x
    return torch.clamp(x, getattr(module, f"{pair}_min"), getattr(module, f"{pair}_max"))
