"""A comparison that cannot be made: the patch is `failed`, with the exception, and stock runs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.runtime import attempts
from gemma4_turbo.runtime.verdicts import Verdicts

# Of the three kinds: memory, compiler, a symbol that SGLang does not have.
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory (simulated)"),
    RuntimeError("CompilationError: " + "x" * 5000),
    ImportError("cannot import name 'rmsnorm'"),
)


@pytest.fixture
def run() -> Iterator[PatchRun]:
    """A patch whose state is put back."""
    found = ENGINE.runs["layer_norms"]
    kept = found.state, found.reason
    yield found
    found.state, found.reason = kept


def raising(error: Exception) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_verdict(error: Exception, run: PatchRun):
    verdicts = Verdicts()
    reason = verdicts.unfit(run, (1,), None, raising(error))
    assert type(error).__name__ in str(reason)
    assert (run.state, run.reason) == (states.FAILED, reason)
    assert len(str(reason)) < 500
    assert verdicts.unfit(run, (1,), None, raising(AssertionError("asked again"))) == reason


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_step(error: Exception, run: PatchRun):
    from gemma4_turbo.fusions import steps

    step = steps.Step()
    step.run = run
    plan = steps.Plan((object(),), SimpleNamespace(is_torch_compile=False))
    plan.layer_norms = steps.UNPROVEN  # type: ignore[attr-defined]
    assert not step.may_run(plan, "layer_norms", None, raising(error))
    assert run.state == states.FAILED
    assert not step.may_run(plan, "layer_norms", None, raising(AssertionError("asked again")))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_the_search_for_stocks_norm(
    error: Exception, run: PatchRun, monkeypatch: pytest.MonkeyPatch
):
    """Also where stock's norm is not even there."""
    from gemma4_turbo.fusions import norm_kinds, steps
    from gemma4_turbo.ports.v0_5_12 import stock

    monkeypatch.setattr(norm_kinds, "_found", {})
    like = SimpleNamespace(is_cuda=True, shape=(1, 256), dtype=torch.bfloat16, device="cuda:0")
    monkeypatch.setattr(norm_kinds, "compare", raising(error))
    monkeypatch.setattr(stock, "eager_norms", raising(error))
    found = norm_kinds.find(like)  # type: ignore[arg-type]
    assert type(error).__name__ in str(found.reason)
    assert type(error).__name__ in str(found.traced_reason)

    step = steps.Step()
    step.run = run
    plan = steps.Plan((object(),), SimpleNamespace(is_torch_compile=False))
    plan.layer_norms = steps.UNPROVEN  # type: ignore[attr-defined]
    assert not step.may_run(plan, "layer_norms", None, lambda: 0, like)  # type: ignore[arg-type]
    assert run.state == states.FAILED


def test_the_router(monkeypatch: pytest.MonkeyPatch):
    from gemma4_turbo.ports.v0_5_12 import router

    monkeypatch.setattr(router, "_verdicts", {})
    monkeypatch.setattr(router, "_compare", raising(ERRORS[0]))
    scale = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(128,))
    told = router.self_check(raising(ERRORS[0]), scale, torch.bfloat16, 8)  # type: ignore[arg-type]
    assert "OutOfMemoryError" in str(told)
    again = router.self_check(raising(ERRORS[1]), scale, torch.bfloat16, 8)  # type: ignore[arg-type]
    assert again == told


def test_the_prologue(run: PatchRun, monkeypatch: pytest.MonkeyPatch):
    from gemma4_turbo.ports.v0_5_12 import step_prologue

    monkeypatch.setattr(step_prologue, "_kinds", {})
    monkeypatch.setattr(step_prologue, "_rms_norm", lambda: None)
    monkeypatch.setattr(step_prologue, "find_kind", raising(ERRORS[1]))
    like = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda:0")
    kind = step_prologue.norm_kind(run, like, False, False)  # type: ignore[arg-type]
    assert "RuntimeError" in str(kind)
    assert step_prologue._failure(kind) == kind
    assert run.state == states.FAILED


def test_what_is_no_exception_of_ours_goes_through(run: PatchRun):
    """A user's Ctrl-C is not a failed patch."""
    with pytest.raises(KeyboardInterrupt):
        attempts.attempt(run, "self-check", raising(KeyboardInterrupt()))  # type: ignore[arg-type]
