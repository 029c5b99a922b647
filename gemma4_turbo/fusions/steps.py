"""A step of a rewritten forward: which patch owns it, and whether it may run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.runtime.custom_ops import capturing
from gemma4_turbo.runtime.hooks import FOR_ALL, HOOKED
from gemma4_turbo.runtime.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

UNPROVEN = "not compared with stock on this GPU yet"
Compare = Callable[[], int]
T = TypeVar("T", bound="Plan")

NOT_COMPARED = norm_kinds.Kinds(reason=UNPROVEN, traced_reason=UNPROVEN)

_verdicts = Verdicts()


PLAN = "_gemma4_turbo_plan"  # on a module


class Plan:
    """What a module allows, looked at once: an attribute per patch, None or why not.

    It holds for the parts that it was made for: `plan_of` makes another when one of them is replaced.
    """

    def __init__(self, key: tuple[Any, ...], norm: Any) -> None:
        self.key = key  # modules of equal key share a comparison, which is about code, not data
        self.norm = norm  # one of the module's norms
        self.kinds = NOT_COMPARED
        self.covers: dict[str, tuple[Any, ...]] = {}  # the modules that each patch goes round
        self._parts: tuple[tuple[dict[str, Any], str, Any], ...] = ()

    def made_for(self, *parts: tuple[Any, str]) -> None:
        """Attributes, ``(object, name)``, whose replacement ends the plan.

        None and others without attributes of their own are passed over: nothing can be set on them.
        """
        self._parts = tuple(_place(of, name) for of, name in parts if hasattr(of, "__dict__"))

    def moved(self) -> bool:
        """Whether a part is another object than when the plan was made."""
        for store, name, part in self._parts:  # noqa: SIM110 - a generator takes three times as long
            if store.get(name) is not part:
                return True
        return False

    def cover(self, name: str, *modules: Any) -> None:
        """The modules that a patch goes round, or calls on something else than stock does."""
        self.covers[name] = tuple(m for m in modules if isinstance(m, torch.nn.Module))

    def hooks(self, name: str) -> str | None:
        """Why the modules that a patch goes round have to be called, or None. Asked at every call."""
        for module in self.covers.get(name, ()):
            if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                return HOOKED.format(f"a {type(module).__name__}")
        return HOOKED.format("every module") if FOR_ALL[0] or FOR_ALL[1] else None


def _place(of: Any, name: str) -> tuple[dict[str, Any], str, Any]:
    """Where an object keeps an attribute, and the attribute: a module finds its own but slowly."""
    for store in (getattr(of, "_modules", {}), getattr(of, "_parameters", {}), vars(of)):
        if store.get(name) is not None:
            return store, name, store[name]
    return vars(of), name, None


def plan_of(module: Any, make: Callable[..., T], *more: Any) -> T:
    """The module's plan; a new one, ``make(module, *more)``, when a part of it was replaced."""
    plan: T | None = module.__dict__.get(PLAN)
    if plan is None or (not torch.compiler.is_compiling() and plan.moved()):
        plan = module.__dict__[PLAN] = make(module, *more)
    return plan


class Step:
    """One patch's part of a shared forward. ``run`` is None while the patch is not installed."""

    def __init__(self) -> None:
        self.run: PatchRun | None = None

    def settled(self, plan: Plan, name: str) -> bool:
        """Whether the step is off, or the plan's last word is no: then it is counted as declined.

        For the part of a forward that may not even look at what its modules hold.
        """
        if self.run is None:
            return True
        verdict = getattr(plan, name)
        if verdict is None or verdict is UNPROVEN:
            return False
        if not torch.compiler.is_compiling():
            self.run.declined(verdict)
        return True

    def may_run(
        self,
        plan: Plan,
        name: str,
        reason: str | None,
        compare: Compare,
        normed: torch.Tensor | None = None,
    ) -> bool:
        """Whether the step's kernel runs for this call, which is then launched; counts it.

        Args:
            plan: of the module: its attribute ``name`` is None, or why the kernel may not run.
            name: of the patch.
            reason: why the arguments of this call do not fit, or None.
            compare: counts differing bits between kernel and stock; asked once per key.
            normed: what goes through an RMSNorm of stock's that the kernel follows, if any.
        """
        if self.run is None:
            return False
        if torch.compiler.is_compiling():
            # The module runs its native form, for Inductor.
            if getattr(plan.norm, "is_torch_compile", False):
                return False
            proven = normed is None or plan.kinds.traced_reason is None
            reason = reason or plan.hooks(name)
            return getattr(plan, name) is None and reason is None and proven
        run = self.admits(plan, name, reason, compare, normed)
        if run is not None:
            run.engaged(capturing())
        return run is not None

    def admits(
        self,
        plan: Plan,
        name: str,
        reason: str | None,
        compare: Compare,
        normed: torch.Tensor | None = None,
    ) -> PatchRun | None:
        """The patch if the kernel may run, None and counted as declined if not. Never traced.

        For a step that knows only later whether its kernel was launched, and counts then itself.
        """
        run = self.run
        if run is None:
            return None
        verdict = getattr(plan, name)
        reason = reason or plan.hooks(name)
        if reason is None and verdict is UNPROVEN and not capturing():
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
            return run
        run.declined(reason)
        return None


def _prove(run: PatchRun, key: tuple[Any, ...], compare: Compare) -> str | None:
    def compared() -> str | None:
        wrong = compare()
        return f"self-check: {wrong} values differ from stock for {key}" if wrong else None

    return _verdicts.unfit(run, key, None, compared)


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


def eps_of(norm: Any) -> float:
    """A norm's epsilon."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
