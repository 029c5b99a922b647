"""`vision_rope`: the vision encoder rotates Q and K in one launch each instead of eleven.

Compared with stock's function before the first use, once per device, type and head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.kernels import vision_rope as kernel
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.fallback import DeclinedError, Fallback
from gemma4_turbo.runtime.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

TARGET = "sglang.srt.models.gemma4_vision:_apply_multidimensional_rope"
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_verdicts = Verdicts()
_fallback = Fallback("the rotation")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernel where it fits and has passed its check, else stock."""
    rotate: Rotate = stock[TARGET]

    @functools.wraps(rotate)
    def _apply_multidimensional_rope(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return rotate(x, cos, sin)

        def ours() -> torch.Tensor:
            reason = kernel.unfit(x, cos, sin)
            if reason is None:
                reason = _check_unfit(run, rotate, x, custom_ops.capturing())
            if reason is not None:
                raise DeclinedError(reason)
            return kernel.launch_vision_rope(x, cos, sin)

        key = x.device, x.dtype, x.shape[1:]
        return _fallback.call(run, ours, lambda: rotate(x, cos, sin), key)

    return {TARGET: _apply_multidimensional_rope}


def undo(run: PatchRun) -> None:
    """The next installation compares again."""
    _verdicts.clear()
    _fallback.clear()


def _check_unfit(run: PatchRun, rotate: Rotate, x: torch.Tensor, captured: bool) -> str | None:
    """Why the kernel may not run for this type and head size, or None."""
    key = (x.device, x.dtype, x.shape[1], x.shape[2])

    def compare() -> str | None:
        wrong = differing(rotate, *key)
        return f"self-check: {wrong} numbers differ from stock for {key}" if wrong else None

    waiting = "not compared with stock before the capture" if captured else None
    return _verdicts.unfit(run, key, waiting, compare)


def differing(
    rotate: Rotate, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> int:
    """Numbers whose bits differ from stock's, of random ones at scales from 0.01 to 30."""
    x, cos, sin = samples(device, dtype, heads, head_dim)
    found = kernel.launch_vision_rope(x, cos, sin)
    expected = rotate(x, cos, sin)
    return int((found.view(torch.int16) != expected.view(torch.int16)).sum())


def samples(
    device: torch.device | str, dtype: torch.dtype, heads: int, head_dim: int, tokens: int = 192
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x``, ``cos`` and ``sin``; the global generator stays as it is."""
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn((tokens, heads, head_dim), generator=generator, device=device)
    x *= torch.logspace(-2, 1.5, tokens, device=device)[:, None, None]
    angles = torch.rand((tokens, 1, head_dim), generator=generator, device=device) * 60
    return x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def verify(run: PatchRun, device: str) -> list[Check]:
    """Against stock's function, at Gemma 4's head size."""
    rotate: Rotate = run.swaps[0].function
    checks = []
    for dtype in kernel.DTYPES:
        wrong = differing(rotate, torch.device(device), dtype, 12, 64)
        checks.append(
            Check(
                run.patch.name,
                f"192 patches, 12 heads of 64, {dtype}",
                "stock's function",
                192 * 12 * 64,
                wrong,
                "not one bit",
                wrong == 0,
            )
        )
    return checks
