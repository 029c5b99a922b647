"""Patches are for Gemma 4: with another model in the process SGLang's functions are its own again."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.catalogue import by_name
from gemma4_turbo.cli.sglang_process import prepare_sglang
from gemma4_turbo.engine import states
from gemma4_turbo.engine.served_models import Models
from gemma4_turbo.engine.swap import Swap
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.launch import launch_gates
from gemma4_turbo.ports.any.sources import GEMMA4_KINDS, GEMMA4_MODELS
from tests.cpu.conftest import patched_sglang, state_by_default


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory):
        prepare_sglang()
        ENGINE.give_up_waiting()
        yield


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ENGINE, "models", Models(GEMMA4_MODELS, GEMMA4_KINDS))
    ENGINE.apply()
    ENGINE.give_up_waiting()
    yield
    ENGINE.revert()


def made(name: str, module: str) -> Any:
    """A model of a class of this name, as SGLang's module defines it."""
    return type(name, (torch.nn.Module,), {"__module__": module})()


def built(model: Any) -> Any:
    """SGLang's own function builds it: through the gate around that."""
    from sglang.srt.model_loader import loader

    class Config:
        hf_config = None
        model_path = ""

    class Load:
        draft_model_idx = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "get_model_architecture", lambda config: (lambda **kw: model, ""))
        return loader._initialize_model(Config(), Load())


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("LlamaForCausalLM", "sglang.srt.models.llama"),
        ("Qwen3ForCausalLM", "sglang.srt.models.qwen3"),
        ("Gemma3ForConditionalGeneration", "sglang.srt.models.gemma3_mm"),
        ("TransformersForCausalLM", "sglang.srt.models.transformers"),
        ("Gemma4ForCausalLM", "somebody.elses_gemma4"),
        ("DiffusionGemmaForBlockDiffusion", "sglang.srt.models.gemma4_diffusion"),
    ],
)
def test_another_model_runs_stock(name: str, module: str):
    """Also Gemma 4 through another implementation, which is not SGLang's class."""
    functions = {t: Swap(t).raw for r in ENGINE.runs.values() if r.swaps for t in r.targets}
    ours = [t for t, raw in functions.items() if _is_ours(raw)]
    assert len(ours) > 20
    model = built(made(name, module))
    assert not [t for t in functions if _is_ours(Swap(t).raw)]
    for row in ENGINE.status():
        if row.state != states.OFF:
            assert (row.state, row.reason) == (states.UNSUPPORTED, f"the model is a {name}")
    assert type(model).__name__ == name


def _is_ours(raw: Any) -> bool:
    function = getattr(raw, "__func__", raw)
    code = getattr(function, "__code__", None)
    return code is not None and "gemma4_turbo/" in code.co_filename


def test_a_gemma_4_keeps_its_patches():
    for name, module in (
        ("Gemma4ForCausalLM", "sglang.srt.models.gemma4_causal"),
        ("Gemma4ForConditionalGeneration", "sglang.srt.models.gemma4_mm"),
        ("Gemma4UnifiedForConditionalGeneration", "sglang.srt.models.gemma4_unified"),
        ("Gemma4AssistantForCausalLM", "sglang.srt.models.gemma4_mtp"),
    ):
        model = built(made(name, module))
        for row in ENGINE.status():
            assert row.state == state_by_default(by_name(row.name)), (row, model)


def test_beside_a_gemma_4_only_shared_functions_are_stocks():
    """A draft of another architecture: Gemma 4's own layers stay patched."""
    target = built(made("Gemma4ForCausalLM", "sglang.srt.models.gemma4_causal"))
    draft = built(made("LlamaForCausalLMEagle3", "sglang.srt.models.llama_eagle3"))
    rows = {row.name: row for row in ENGINE.status()}
    assert rows["layer_norms"].state == rows["rope_store"].state == states.ACTIVE
    for name in ("decode_attention", "extend_attention", "moe_align"):
        assert rows[name].state == states.UNSUPPORTED
        assert "LlamaForCausalLMEagle3" in rows[name].reason
    del draft
    gc.collect()
    built(target)
    assert ENGINE.runs["decode_attention"].state == states.ACTIVE


def test_a_gemma_4_after_another_model():
    """That was let go, though it still holds itself."""
    other = built(made("LlamaForCausalLM", "sglang.srt.models.llama"))
    other.itself = [other]
    del other
    model = built(made("Gemma4ForCausalLM", "sglang.srt.models.gemma4_causal"))
    ENGINE.give_up_waiting()
    for row in ENGINE.status():
        assert row.state == state_by_default(by_name(row.name)), (row, model)


def test_an_off_patch_stays_off_and_strict_mode_has_nothing_against_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("GEMMA4_TURBO_ROUTER", "0")
    monkeypatch.setenv("GEMMA4_TURBO_STRICT", "1")
    ENGINE.revert()
    ENGINE.apply()
    model = built(made("LlamaForCausalLM", "sglang.srt.models.llama"))
    assert ENGINE.runs["router"].state == states.OFF
    assert not [r for r in ENGINE.status() if r.state in states.REFUSED_WHEN_STRICT]
    assert model is not None
    assert launch_gates.AFTER_LOADING


def test_weights_that_are_written_are_noticed():
    """By SGLang's own writers, before and after; and a write that fails half-way."""
    from gemma4_turbo.runtime import weights

    runner = "sglang.srt.model_executor.model_runner"
    writers = importlib.import_module(runner)
    if not hasattr(writers, "_model_load_weights_direct"):
        writers = importlib.import_module(f"{runner}_components.weight_updater")

    linear = torch.nn.Linear(2, 2, bias=False)
    before = weights.stamp([linear.weight])
    assert weights.stamp([linear.weight]) == before
    writers._model_load_weights_direct(linear, [("weight", torch.zeros(2, 2))])
    after = weights.stamp([linear.weight])
    assert after != before
    with pytest.raises(KeyError):
        writers._model_load_weights_direct(linear, [("nothing", torch.zeros(2, 2))])
    assert weights.stamp([linear.weight]) != after
    after = weights.stamp([linear.weight])
    with torch.no_grad():
        linear.weight.add_(1.0)
    assert weights.stamp([linear.weight]) != after
