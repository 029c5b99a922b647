"""One kernel in the place of a run of stock's calls: may it run, does it agree, eager or traced."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.fusions.comparison import different_bits
from gemma4_turbo.fusions.site import UNPROVEN, Site
from gemma4_turbo.fusions.stock import Stock, followed
from gemma4_turbo.runtime.custom_ops import TRACED, capturing, not_traced
from gemma4_turbo.runtime.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.examples import Examples

A = TypeVar("A")
R = TypeVar("R")
Tensors = tuple[torch.Tensor | None, ...]

_verdicts = Verdicts()


class Step:
    """One patch's part of a shared forward. ``run`` is None while the patch is not in."""

    def __init__(self) -> None:
        self.run: PatchRun | None = None

    def enable(self, run: PatchRun) -> None:
        """Switch it on. Never from traced code."""
        self.run = run

    def checks(self, device: str) -> list[Check]:
        """What `verify` says of it: nothing, where it has no arithmetic."""
        return []

    def declined(self, reason: str) -> None:
        """Count a call of stock's, if the patch is in; in traced code, too."""
        run = self.run
        if run is None:
            return
        if torch.compiler.is_compiling():
            not_traced(run.patch.name, reason)
        else:
            run.declined(reason)


class Fusion(Step, Generic[A, R]):
    """A kernel with arguments ``A`` and result ``R``, for every release line.

    A subclass says what the kernel is: `unfit`, `launch`, `theirs`, `reference`, `drawn`, `examples`;
    `operator` and `traced` where it may run inside piecewise CUDA graphs. A forward calls the fusion
    with its `Site` and the arguments; None means that stock's calls are to be made.
    """

    follows_rmsnorm: ClassVar[bool] = True
    """Whether the kernel reproduces an RMSNorm of stock's, whose kind must be known first."""

    def __init__(self, patch: str) -> None:
        super().__init__()
        self.patch = patch
        self.op: Any = None
        # `PleTail` has no `traced`: its launches are asked for one by one.
        own = type(self)
        self.traceable = own.traced is not Fusion.traced or own.operator is not Fusion.operator

    # -- what the kernel is ------------------------------------------------------------------------

    def unfit(self, args: A) -> str | None:
        """Why the kernel does not take these tensors, or None. Host checks only."""
        raise NotImplementedError

    def launch(self, args: A, kind: int) -> R:
        """The kernel, without its checks.

        Args:
            args: what `unfit` accepts.
            kind: a `gemma4_turbo.kernels.norms.rmsnorm.Kind`, stock's RMSNorm that is followed.
        """
        raise NotImplementedError

    def operator(self) -> Callable[..., Any]:
        """The kernel as an operator for traced code; registered once per process."""
        raise NotImplementedError

    def traced(self, args: A, kind: int) -> R:
        """`launch`, in code that Dynamo traces: through ``self.op``."""
        raise NotImplementedError

    def theirs(self, stock: Stock, args: A) -> R:
        """The same with stock's calls. On a GPU."""
        raise NotImplementedError

    def repeated(self, stock: Stock, args: A) -> Callable[[], R]:
        """`theirs` as a call that is made again and again: what stock itself makes once is made here."""
        return partial(self.theirs, stock, args)

    def reference(self, args: A) -> R:
        """The same in plain torch, rounding where stock rounds."""
        raise NotImplementedError

    def drawn(self, args: A) -> A:
        """Random activations in the place of this call's, its weights kept; the same every time."""
        raise NotImplementedError

    def examples(self, device: str) -> Examples[A]:
        """What `verify` compares with stock's bits; a kernel within bounds has `checks` of its own."""
        return []

    def like(self, args: A) -> torch.Tensor:
        """The activation whose width, dtype and device decide about stock's RMSNorm."""
        raise NotImplementedError

    def written(self, args: A, result: R) -> Tensors:
        """All that a call has computed, also in place."""
        raise NotImplementedError

    # -- what a forward asks -----------------------------------------------------------------------

    def enable(self, run: PatchRun) -> None:
        """Switch the fusion on, its operator registered. Never from traced code."""
        if type(self).operator is not Fusion.operator:
            self.op = self.operator()
        super().enable(run)

    def settled(self, site: Site) -> bool:
        """Whether the fusion is off, or the site's last word is no: then it is counted as declined.

        For the part of a forward that may not even look at what its modules hold.
        """
        if self.run is None:
            return True
        verdict = getattr(site, self.patch)
        if verdict is None or verdict is UNPROVEN:
            return False
        self.declined(verdict)
        return True

    def __call__(self, site: Site, args: A, unfit: str | None = None) -> R | None:
        """The kernel's result, launched and counted; or None, counted as declined.

        Args:
            site: of the module: its attribute of the patch's name is None, or why not.
            args: of this call.
            unfit: why this call is not for the kernel although its tensors are, or None.
        """
        if torch.compiler.is_compiling():
            runs = self.runs(site, args, unfit)
            return self.traced(args, site.kinds.traced) if runs else None
        return self.launch(args, site.kinds.eager) if self._runs(site, args, unfit) else None

    def runs(self, site: Site, args: A, unfit: str | None = None) -> bool:
        """Whether the kernel runs for this call, which is counted; the caller launches it then."""
        if torch.compiler.is_compiling():
            fits = self.run is not None and self.fits_traced(site, unfit or self.unfit(args))
            if not fits:
                self.declined(TRACED)
            return fits
        return self._runs(site, args, unfit)

    def _runs(self, site: Site, args: A, unfit: str | None) -> bool:
        run = self.run
        if run is None:
            return False
        unfit = unfit or self.unfit(args)
        # Nearly every call: prefill in eager mode is bound by CPU overhead.
        fits = unfit is None and getattr(site, self.patch) is None
        if not (fits and site.hooks_unfit(self.patch) is None):
            run = self.admit(site, unfit, lambda: args)
        if run is not None:
            run.engaged(capturing())
        return run is not None

    def fits_traced(self, site: Site, unfit: str | None) -> bool:
        """Whether traced code calls the operator."""
        if not self.traceable:
            return False
        if getattr(site.norm, "is_torch_compile", False):  # its native form, for Inductor
            return False
        proven = not self.follows_rmsnorm or site.kinds.traced_reason is None
        unfit = unfit or site.hooks_unfit(self.patch)
        return getattr(site, self.patch) is None and unfit is None and proven

    def admit(self, site: Site, unfit: str | None, example: Callable[[], A]) -> PatchRun | None:
        """The patch if the kernel may run; None, and counted as declined, if not. Never traced.

        For a forward that knows only later whether the kernel was launched, and counts then itself.

        Args:
            site: of the module.
            unfit: why this call is not for the kernel, or None.
            example: arguments to compare with, asked for once per key.
        """
        run = self.run
        if run is None:
            return None
        verdict = getattr(site, self.patch)
        unfit = unfit or site.hooks_unfit(self.patch)
        if unfit is None and verdict is UNPROVEN and not capturing():
            verdict = self._compared(run, site, example())
            setattr(site, self.patch, verdict)
        unfit = unfit or verdict
        if unfit is None:
            return run
        run.declined(unfit)
        return None

    # -- verify ------------------------------------------------------------------------------------

    def checks(self, device: str) -> list[Check]:
        """Each of the examples: bits of stock's calls on a GPU, plain torch within rounding without one."""
        return [self.check(device, what, draw) for what, draw in self.examples(device)]

    def check(self, device: str, what: str, draw: Callable[[], A]) -> Check:
        """One comparison; ValueError if the kernel does not take what is drawn."""
        args, others = draw(), draw()
        unfit = self.unfit(args)
        if unfit is not None:
            raise ValueError(unfit)
        kind = norm_kinds.find(self.like(args)).eager
        ours = self.written(args, self.launch(args, kind))
        on_gpu = device == "cuda"
        result = self.theirs(followed(), others) if on_gpu else self.reference(others)
        pairs = [
            (a.contiguous(), b.contiguous())
            for a, b in zip(ours, self.written(others, result), strict=True)
            if a is not None and b is not None
        ]
        bits = sum(int((a.view(torch.int16) != b.view(torch.int16)).sum()) for a, b in pairs)
        if on_gpu:
            against, allowed, passed = "stock's calls on this GPU", "not one bit", bits == 0
        else:
            # The order of a sum shifts a value by an ulp of fp32 and now and then flips a rounding.
            against, allowed = "plain torch", "2 ulp"
            slack = 2 * torch.finfo(torch.bfloat16).eps
            passed = all(
                torch.allclose(a.float(), b.float(), rtol=slack, atol=1e-2) for a, b in pairs
            )
        count = sum(a.numel() for a, _ in pairs)
        return Check(self.patch, what, against, count, bits, allowed, passed)

    # -- the self-check ----------------------------------------------------------------------------

    def _compared(self, run: PatchRun, site: Site, args: A) -> str | None:
        if self.follows_rmsnorm:
            site.kinds = norm_kinds.find(self.like(args))
            if site.kinds.reason is not None:
                run.set(states.FAILED, site.kinds.reason)
                return site.kinds.reason
        key = (self.patch, type(self).__name__, *site.key)

        def compared() -> str | None:
            wrong = self.differing(args, site.kinds.eager) if self.like(args).is_cuda else 0
            return f"self-check: {wrong} values differ from stock for {key}" if wrong else None

        return _verdicts.unfit(run, key, None, compared)

    def differing(self, args: A, kind: int) -> int:
        """Elements of which a bit differs from stock's, on random activations. On a GPU."""
        mine, stocks = self.drawn(args), self.drawn(args)
        ours = self.written(mine, self.launch(mine, kind))
        theirs = self.written(stocks, self.theirs(followed(), stocks))
        return differing(ours, theirs)


def differing(ours: Tensors, theirs: Tensors) -> int:
    """Elements of which a bit differs, two NaN counting as equal."""
    pairs = zip(ours, theirs, strict=True)
    return sum(different_bits(a, b) for a, b in pairs if a is not None and b is not None)


def forget(patch: str) -> None:
    """Drop a patch's verdicts: the next call compares again."""
    for key in [key for key in _verdicts if key[0] == patch]:
        del _verdicts[key]
    norm_kinds.forget()
