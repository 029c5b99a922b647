"""A comparison that cannot be made: the patch is `failed`, with the exception, and stock runs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.fusions.site import UNPROVEN, Site
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


class Compared(Fusion[Any, None]):
    """Whose comparison with stock raises."""

    follows_rmsnorm = False
    error: Exception

    def unfit(self, args: Any) -> str | None:
        return None

    def launch(self, args: Any, kind: int) -> None:
        raise AssertionError("launched")

    def like(self, args: Any) -> torch.Tensor:
        return args  # type: ignore[no-any-return]

    def differing(self, args: Any, kind: int) -> int:
        raise self.error


def compared(run: PatchRun, error: Exception) -> tuple[Compared, Site]:
    """A fusion that has not been compared yet, and where it would run."""
    fusion = Compared("layer_norms")
    fusion.error = error
    fusion.enable(run)
    site = Site((object(),), SimpleNamespace(is_torch_compile=False))
    site.layer_norms = UNPROVEN  # type: ignore[attr-defined]
    return fusion, site


LIKE: Any = SimpleNamespace(is_cuda=True, shape=(1, 256), dtype=torch.bfloat16, device="cuda:0")


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_fusion(error: Exception, run: PatchRun):
    fusion, site = compared(run, error)
    assert fusion(site, LIKE) is None
    assert run.state == states.FAILED
    fusion.error = AssertionError("asked again")
    assert fusion(site, LIKE) is None
    assert type(error).__name__ in str(site.layer_norms)  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_the_search_for_stocks_norm(
    error: Exception, run: PatchRun, monkeypatch: pytest.MonkeyPatch
):
    """Also where stock's norm is not even there."""
    from gemma4_turbo.fusions import norm_kinds
    from gemma4_turbo.ports.v0_5_12.stock import STOCK

    monkeypatch.setattr(norm_kinds, "_found", {})
    monkeypatch.setattr(norm_kinds, "compare", raising(error))
    monkeypatch.setattr(STOCK, "eager_norms", raising(error))
    found = norm_kinds.find(LIKE)
    assert type(error).__name__ in str(found.reason)
    assert type(error).__name__ in str(found.traced_reason)

    fusion, site = compared(run, AssertionError("compared without a kind"))
    fusion.follows_rmsnorm = True  # type: ignore[misc]
    assert fusion(site, LIKE) is None
    assert (run.state, run.reason) == (states.FAILED, found.reason)


def test_the_router(run: PatchRun, monkeypatch: pytest.MonkeyPatch):
    from gemma4_turbo.ports.v0_5_12.experts import router

    monkeypatch.setattr(router, "_verdicts", Verdicts())
    monkeypatch.setattr(router, "_compare", raising(ERRORS[0]))
    scale: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(128,))
    unfit = router.self_check(run, raising(ERRORS[0]), scale, torch.bfloat16, 8)
    assert "OutOfMemoryError" in str(unfit)
    assert router.self_check(run, raising(ERRORS[1]), scale, torch.bfloat16, 8) == unfit
    assert run.state == states.FAILED


def test_the_prologue(run: PatchRun, monkeypatch: pytest.MonkeyPatch):
    from gemma4_turbo.fusions import norm_kinds
    from gemma4_turbo.ports.any.decode_step import step_prologue

    monkeypatch.setattr(step_prologue, "_verdicts", Verdicts())
    monkeypatch.setattr(step_prologue, "_rms_norm", lambda: None)
    monkeypatch.setattr(norm_kinds, "find", lambda like, width: norm_kinds.Kinds())
    monkeypatch.setattr(step_prologue, "compare", raising(ERRORS[1]))
    like: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda:0")
    _, unfit = step_prologue.norm_kind(run, like, False, False)
    assert "RuntimeError" in str(unfit)
    assert run.state == states.FAILED


def test_what_is_no_exception_of_ours_goes_through(run: PatchRun):
    """A user's Ctrl-C is not a failed patch."""
    with pytest.raises(KeyboardInterrupt):
        attempts.attempt(run, "self-check", raising(KeyboardInterrupt()))  # type: ignore[arg-type]
