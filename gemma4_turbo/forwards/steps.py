"""A step of a rewritten forward: which patch owns it, and whether it may run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo import states
from gemma4_turbo.custom_ops import capturing
from gemma4_turbo.forwards import norm_kinds
from gemma4_turbo.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.patching import PatchRun

UNPROVEN = "not compared with stock on this GPU yet"
Compare = Callable[[], int]

NOT_COMPARED = norm_kinds.Kinds(reason=UNPROVEN, traced_reason=UNPROVEN)

_verdicts = Verdicts()


class Plan:
    """What a module allows, looked at once: an attribute per patch, None or why not."""

    def __init__(self, key: tuple[Any, ...], norm: Any) -> None:
        self.key = key  # modules of equal key share a comparison
        self.norm = norm  # one of the module's norms
        self.kinds = NOT_COMPARED


class Step:
    """One patch's part of a shared forward. ``run`` is None while the patch is not installed."""

    def __init__(self) -> None:
        self.run: PatchRun | None = None

    def may_run(
        self,
        plan: Plan,
        name: str,
        reason: str | None,
        compare: Compare,
        normed: torch.Tensor | None = None,
    ) -> bool:
        """Whether the step's kernel runs for this call; counts it.

        Args:
            plan: of the module: its attribute ``name`` is None, or why the kernel may not run.
            name: of the patch.
            reason: why the arguments of this call do not fit, or None.
            compare: counts differing bits between kernel and stock; asked once per key.
            normed: what goes through an RMSNorm of stock's that the kernel follows, if any.
        """
        run = self.run
        if run is None:
            return False
        verdict = getattr(plan, name)
        if torch.compiler.is_compiling():
            if plan.norm.is_torch_compile:  # the module runs its native form, for Inductor
                return False
            known = normed is None or plan.kinds.traced_reason is None
            return verdict is None and reason is None and known
        captured = capturing()
        if reason is None and verdict is UNPROVEN and not captured:
            if normed is not None:
                plan.kinds = norm_kinds.find(normed)
            verdict = plan.kinds.reason if normed is not None else None
            if verdict is None:
                verdict = _prove(run, (name, *plan.key), compare)
            else:
                run.set(states.FAILED, verdict)
            setattr(plan, name, verdict)
        reason = reason or verdict
        if reason is None:
            run.engaged(captured)
            return True
        run.declined(reason)
        return False


def _prove(run: PatchRun, key: tuple[Any, ...], compare: Compare) -> str | None:
    def compared() -> str | None:
        wrong = compare()
        return f"self-check: {wrong} values differ from stock for {key}" if wrong else None

    return _verdicts.why_not(run, key, None, compared)


def forget(patch: str) -> None:
    """Drop a patch's verdicts: the next call compares again."""
    for key in [key for key in _verdicts if key[0] == patch]:
        del _verdicts[key]
    norm_kinds.forget()


def samples(rows: int, like: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Random rows like an activation, scales from 0.01 to 30, the global generator untouched."""
    generator = torch.Generator(like.device).manual_seed(rows)
    shape = (rows, like.shape[-1] if width is None else width)
    drawn = torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32)
    scale = torch.logspace(-2, 1.5, rows, device=like.device, dtype=torch.float32)
    return (drawn * scale[:, None]).to(like.dtype)


def differing(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Elements that differ in any bit. Off a GPU there is no stock kernel to compare with: 0."""
    if not pairs[0][0].is_cuda:
        return 0
    return sum(norm_kinds.different_bits(a, b) for a, b in pairs)


def hooked(module: Any) -> bool:
    """Whether somebody wants to see, or change, what a module is given or returns."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def norm_reason(norm: Any) -> str | None:
    """Why a norm module does not run ``sgl_kernel.rmsnorm`` over its whole width, or None."""
    kind = type(norm).__name__
    if kind == "RMSNorm":
        if norm.variance_size_override is not None or norm.cast_x_before_out_mul:
            return "an RMSNorm has options that the kernel does not know"
        if getattr(norm, "fp32_residual", False):
            return "an RMSNorm keeps its residual in fp32"
    elif kind == "Gemma4RMSNorm":
        if norm.scale_shift != 0.0:
            return f"a Gemma4RMSNorm has scale_shift {norm.scale_shift}"
    else:
        return f"a norm is a {kind}"
    if hooked(norm):
        return "a norm has forward hooks"
    return None


def eps_of(norm: Any) -> float:
    """A norm's epsilon."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
