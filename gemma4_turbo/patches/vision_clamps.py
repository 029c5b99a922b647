"""`vision_clamps`: activations are not clamped between minus and plus infinity.

The linear layers of the vision and audio encoders clamp what goes in and what comes out, with bounds
that the checkpoint may leave infinite; then a clamp is a copy. Whether bounds are finite is read from
the GPU once per layer, and again after ``load_weights``, which alone writes them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo import custom_ops
from gemma4_turbo.checks import Check

if TYPE_CHECKING:
    from gemma4_turbo.patching import PatchRun

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
_KNOWN = "_gemma4_turbo_bounded"


class _Loads:
    """How often weights were loaded: what was read of the bounds before is void."""

    count = 0


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Four forwards that clamp where there is something to clamp, and the loader that tells them."""
    load = stock[LOAD]

    def single(target: str) -> Any:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            bounded = _bounded(run, self, target)
            if bounded is None:
                return stock[target](self, x)  # type: ignore[no-any-return]
            x, _ = self.linear(_clamp(self, x, "input", bounded))
            return _clamp(self, x, "output", bounded)

        return forward

    def qkv_forward(
        self: Any, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bounded = _bounded(run, self, QKV)
        if bounded is None:
            return stock[QKV](self, hidden_states)  # type: ignore[no-any-return]
        qkv, _ = self.qkv_proj(_clamp(self, hidden_states, "input", bounded))
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        return (
            _clamp(self, q, "q_output", bounded),
            _clamp(self, k, "k_output", bounded),
            _clamp(self, v, "v_output", bounded),
        )

    def gate_up_forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bounded = _bounded(run, self, GATE_UP)
        if bounded is None:
            return stock[GATE_UP](self, x)  # type: ignore[no-any-return]
        gate_up, _ = self.gate_up_proj(_clamp(self, x, "input", bounded))
        gate, up = gate_up.split([self.proj_size, self.proj_size], dim=-1)
        return (
            _clamp(self, gate, "gate_output", bounded),
            _clamp(self, up, "up_output", bounded),
        )

    @functools.wraps(load)
    def load_weights(self: Any, weights: Any) -> Any:
        try:
            return load(self, weights)
        finally:
            _Loads.count += 1

    return {
        ROW: single(ROW),
        COLUMN: single(COLUMN),
        QKV: qkv_forward,
        GATE_UP: gate_up_forward,
        LOAD: load_weights,
    }


def undo(run: PatchRun) -> None:
    """What was read of the bounds is void: they may change while nobody watches."""
    _Loads.count += 1


def _bounded(run: PatchRun, module: Any, target: str) -> frozenset[str] | None:
    """The pairs that bound anything; None where stock's forward must run."""
    if torch.compiler.is_compiling():
        return None
    known = module.__dict__.get(_KNOWN)
    captured = custom_ops.capturing()
    if known is None or known[0] != _Loads.count:
        if captured:  # reading the bounds would end the capture
            run.declined("the bounds were not read before the capture")
            return None
        known = (_Loads.count, read_bounds(module, PAIRS[target]))
        module.__dict__[_KNOWN] = known
    if len(known[1]) == len(PAIRS[target]):
        run.declined("all bounds are finite")
        return None
    run.engaged(captured)
    return known[1]  # type: ignore[no-any-return]


def read_bounds(module: Any, pairs: tuple[str, ...]) -> frozenset[str]:
    """The pairs of which one bound is not infinite, or infinite the wrong way."""
    low = torch.stack([getattr(module, f"{pair}_min").detach() for pair in pairs])
    high = torch.stack([getattr(module, f"{pair}_max").detach() for pair in pairs])
    free = ((low == -torch.inf) & (high == torch.inf)).tolist()
    return frozenset(pair for pair, unbounded in zip(pairs, free, strict=True) if not unbounded)


def _clamp(module: Any, x: torch.Tensor, pair: str, bounded: frozenset[str]) -> torch.Tensor:
    if pair not in bounded:
        return x
    return torch.clamp(x, getattr(module, f"{pair}_min"), getattr(module, f"{pair}_max"))


def verify(run: PatchRun, device: str) -> list[Check]:
    """Nothing: what is left of the arithmetic is stock's."""
    return []
