"""The rewritten forwards on SGLang's real Gemma 4 layers, on the CPU through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.cli.small_model import build
from gemma4_turbo.engine import states
from gemma4_turbo.fusions.site import UNPROVEN
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import pdl
from tests.cpu import forward_batch
from tests.cpu.conftest import patched_sglang

STEPS = {
    "moe": {"layer_norms", "rope_store", "input_norm"},
    "ple": {"layer_norms", "rope_store", "input_norm", "ple_tail"},
    "dense": {"layer_norms", "rope_store", "input_norm"},
}
WITHOUT = {"qkv_norm": "rope_store", "router_norm": "layer_norms"}


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's Gemma 4 module imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory):
        yield


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """SGLang's compiled rotation runs as it is written: compiling it takes most of a minute."""
    with torch._dynamo.config.patch(disable=True), torch.no_grad():
        yield
    ENGINE.revert()


def run(model: Any, tokens: int = 2, batch: Any = None) -> torch.Tensor:
    """One step. A program of the interpreter takes as long for every token: two are several."""
    for layer in model.layers:
        layer.self_attn.attn.seen.clear()
    batch = forward_batch.prefill() if batch is None else batch
    return model(torch.arange(tokens) % 64, torch.arange(tokens), batch)


def stored(model: Any) -> list[bool]:
    """Whether each layer left its K and V to be stored."""
    return [keep for layer in model.layers for _, _, keep in layer.self_attn.attn.seen]


@pytest.mark.parametrize("kind", ["moe", "ple", "dense"])
def test_patched_model_agrees_with_stock_and_every_step_runs(kind: str):
    """Within rounding: the order of a CPU's sums is not the GPU's. Bits are compared on a GPU."""
    ENGINE.revert()
    model = build(kind)
    expected = run(model)
    theirs = stored(model)
    ENGINE.apply()
    before = {name: run_.counters.engaged for name, run_ in ENGINE.runs.items()}
    found = run(model)
    for name in STEPS[kind]:
        assert ENGINE.runs[name].state == states.ACTIVE, ENGINE.runs[name].reason
        assert ENGINE.runs[name].counters.engaged > before[name], name
    assert stored(model) == theirs
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference < 0.06, float(difference)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape


@pytest.mark.parametrize(("step", "covered_by"), WITHOUT.items())
def test_what_another_step_covers_runs_when_that_one_is_off(step: str, covered_by: str):
    ENGINE.apply(skip=[covered_by])
    model = build("moe")
    before = ENGINE.runs[step].counters.engaged
    run(model, tokens=1)
    assert ENGINE.runs[step].counters.engaged > before


@pytest.mark.parametrize("kind", ["moe", "ple", "dense"])
def test_skinny_gemm_takes_the_linear_layers_of_few_tokens(kind: str):
    """On the real layers: within rounding of stock."""
    ENGINE.revert()
    model = build(kind)
    expected = run(model)
    ENGINE.apply(only=["skinny_gemm", "qkv_norm"])
    counters = ENGINE.runs["skinny_gemm"].counters
    before = counters.engaged
    found = run(model)
    # qkv, o, gate and up, down; the gate of the per-layer input needs ple_tail's step.
    assert counters.engaged - before == 2 * 4
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert 0 < difference < 0.06, float(difference)
    for layer in model.layers:
        assert int(layer.mlp.down_proj._gemma4_turbo_site.arrived.sum()) == 0


def test_skinny_gemm_leaves_many_tokens_to_stock(monkeypatch):
    """More than it takes; the norms of Q and K are stock's too, which the interpreter is slow at."""
    monkeypatch.setattr("gemma4_turbo.kernels.qkv.INTERPRETED", False)
    ENGINE.apply(only=["skinny_gemm", "qkv_norm"])
    run_ = ENGINE.runs["skinny_gemm"]
    monkeypatch.setattr(run_, "_decline_reason", "")
    model = build("dense")
    before = run_.counters.engaged
    run(model, tokens=64)
    assert run_.counters.engaged - before == 2 * 4
    run(model, tokens=65)
    assert run_.counters.engaged - before == 2 * 4
    assert "at most 64 rows" in run_.full_reason()


def test_skinny_gemm_leaves_batch_invariant_mode_to_stock(monkeypatch):
    """Its sums are cut by the number of rows, and above 64 rows they are stock's."""
    from sglang.srt import batch_invariant_ops

    monkeypatch.setattr(batch_invariant_ops, "is_batch_invariant_mode_enabled", lambda: True)
    ENGINE.apply(only=["skinny_gemm", "qkv_norm"])
    counters = ENGINE.runs["skinny_gemm"].counters
    before = counters.engaged
    ENGINE.runs["skinny_gemm"]._decline_reason = ""
    run(build("dense"))
    assert counters.engaged == before
    assert "batch-invariant" in ENGINE.runs["skinny_gemm"].full_reason()


@pytest.mark.parametrize("where", ["mlp", "act_fn"])
def test_skinny_gemm_runs_the_hooks_of_the_dense_mlp(where: str):
    """As SGLang's ``--forward-hooks`` registers them."""
    ENGINE.apply(only=["skinny_gemm", "qkv_norm"])
    ENGINE.runs["skinny_gemm"]._decline_reason = ""
    model = build("dense")
    called: list[Any] = []
    mlp = model.layers[0].mlp
    (mlp if where == "mlp" else mlp.act_fn).register_forward_hook(
        lambda *arguments: called.append(arguments)
    )
    run(model)
    assert len(called) == 1
    assert "hooks" in ENGINE.runs["skinny_gemm"].full_reason()


def test_skinny_gemm_takes_the_gate_of_the_per_layer_input():
    """With ple_tail: gate, activation and product in one launch, and the projection after it."""
    ENGINE.revert()
    model = build("ple")
    expected = run(model)
    ENGINE.apply(only=["skinny_gemm", "qkv_norm", "ple_tail"])
    before = ENGINE.runs["skinny_gemm"].counters.engaged
    found = run(model)
    assert ENGINE.runs["skinny_gemm"].counters.engaged - before == 2 * 6
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference < 0.06, float(difference)


def test_dependent_launch_is_declined_off_hopper(monkeypatch: pytest.MonkeyPatch):
    """Reported, not silently without effect; the layers run as without it."""
    ENGINE.apply(only=["pdl", "qkv_norm"])
    monkeypatch.setattr(ENGINE.runs["pdl"], "_decline_reason", "")  # the first one is kept
    model = build("dense")
    before = ENGINE.runs["pdl"].counters.engaged
    run(model)
    assert ENGINE.runs["pdl"].counters.engaged == before
    assert "compute capability 9.0" in ENGINE.runs["pdl"].full_reason()


def test_dependent_launch_needs_a_triton_that_has_it(monkeypatch: pytest.MonkeyPatch):
    """An older one would refuse the launch option at the first kernel."""
    hopper = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(pdl, "_supported", {})
    monkeypatch.setattr(pdl, "wanted", True)
    assert pdl.supported(hopper)
    pdl._supported.clear()
    monkeypatch.delattr(pdl.tl.extra.cuda, "gdc_wait")
    assert not pdl.supported(hopper)
    assert pdl.options(SimpleNamespace(device=hopper)) == {"PDL": False}


def test_without_any_step_the_shared_forwards_make_stock_calls_only():
    """One step alone is on and declines: the output is stock's, bit for bit."""
    ENGINE.revert()
    model = build("dense")
    expected = run(model)
    ENGINE.apply(only=["mlp_stream"])
    assert torch.equal(run(model), expected)
    ENGINE.revert()
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("where", ["rope_store", "layer_norms", "ple_tail"])
def test_a_module_that_runs_another_of_its_functions_is_called(
    where: str, monkeypatch: pytest.MonkeyPatch
):
    """As ``--rl-on-policy-target`` has the rotary embedding run the one in plain torch on a GPU."""
    from gemma4_turbo.ports.any.decode_step.attention import AttentionSite
    from gemma4_turbo.ports.any.decode_step.layer_steps import LayerSite

    ENGINE.apply()
    layer = build("ple").layers[0]
    part, make, module = {
        "rope_store": (layer.self_attn, AttentionSite, layer.self_attn.rotary_emb),
        "layer_norms": (layer, LayerSite, layer.pre_feedforward_layernorm),
        "ple_tail": (layer, LayerSite, layer.post_per_layer_input_norm),
    }[where]
    for other in layer.modules():  # put back: SGLang gives the rotary embedding to other models too
        if hasattr(other, "_forward_method"):
            monkeypatch.setattr(other, "_forward_method", other.forward_cuda)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    assert getattr(make(part), where) is UNPROVEN
    monkeypatch.setattr(module, "_forward_method", module.forward_native)
    assert "runs forward_native" in str(getattr(make(part), where))


def test_a_weight_update_reaches_every_fused_scale():
    """In place, as a weight update writes: the next call equals a model built with those weights."""
    ENGINE.apply()
    model, other = build("moe"), build("moe")
    run(model, tokens=1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        a.mul_(0.5)
        b.mul_(0.5)
    assert torch.equal(run(model, tokens=1), run(other, tokens=1))


def test_revert_puts_the_very_functions_back():
    from sglang.srt.models import gemma4_causal as stock

    ENGINE.revert()
    functions = stock.Gemma4DecoderLayer.forward, stock.Gemma4Attention.forward
    ENGINE.apply()
    assert stock.Gemma4DecoderLayer.forward is not functions[0]
    ENGINE.apply(skip=["layer_norms"])
    assert stock.Gemma4DecoderLayer.forward is not functions[0]
    ENGINE.revert()
    assert (stock.Gemma4DecoderLayer.forward, stock.Gemma4Attention.forward) == functions
