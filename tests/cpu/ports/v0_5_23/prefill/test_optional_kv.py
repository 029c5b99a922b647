"""Layers that share KV in this line's prefill graphs: stock refuses them, the patch does not."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.prefill import mm_prefill_graph
from gemma4_turbo.ports.v0_5_23.prefill import optional_kv as patch
from tests.cpu import interpreted, shared_kv
from tests.cpu.conftest import patched_sglang
from tests.cpu.ports.v0_5_23 import sharing

NAME = "optional_kv"
pytestmark = interpreted.MARKS


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(scope="module")
def model(applied: None) -> Any:
    return sharing.build()


@pytest.fixture(autouse=True)
def patched(applied: None) -> Iterator[None]:
    ENGINE.apply(only=[NAME])
    assert ENGINE.runs[NAME].state == states.ACTIVE, ENGINE.runs[NAME].reason
    with pytest.MonkeyPatch.context() as context, torch.no_grad():
        context.setattr(ENGINE.runs[NAME], "_decline_reason", "")
        yield
        ENGINE.revert()


def runner(model: Any, kind: str = "Gemma4ForCausalLM", **changes: Any) -> Any:
    """What a model runner of a server of its own is to the patch; the model is in a class of ``kind``."""
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.models.gemma4_causal import Gemma4ForCausalLM
    from sglang.srt.models.gemma4_mm import Gemma4ForConditionalGeneration

    classes = (Gemma4ForCausalLM, Gemma4ForConditionalGeneration)
    (chosen,) = [each for each in classes if each.__name__ == kind]
    made: Any = ModelRunner.__new__(ModelRunner)
    fields = {
        "model": chosen.__new__(chosen),
        "is_draft_worker": False,
        "attn_backend": sharing.Memory().backend,
        **changes,
    }
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def tables(model: Any, made: Any) -> tuple[list[Any], list[Any]]:
    """As `capture_prefill_graph` has them made."""
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup

    layers = made.get_cuda_graph_layers(model)
    return cuda_graph_setup.index_attention_layers_by_global_id(
        layers.attention_layers, layers.mha_companion_layers, model
    )


@pytest.fixture
def breakable(model: Any) -> Iterator[Any]:
    """The server's prefill graphs are breakable."""
    from sglang.srt.runtime_context import get_exec

    graphs = get_exec().graph
    config = SimpleNamespace(prefill=SimpleNamespace(backend="breakable"))
    with graphs.override(cuda_graph_config=config):
        yield config.prefill


def goes_on(model: Any, attention: list[Any]) -> bool:
    """Whether stock makes graphs with such a table."""
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup

    return cuda_graph_setup.has_standard_gqa_for_all_local_layers(
        attention_layer_count=sum(layer is not None for layer in attention),
        start_layer=0,
        end_layer=len(model.layers),
    )


def test_stock_refuses(model: Any, breakable: Any):
    """The defect that the patch is for."""
    ENGINE.revert()
    with pytest.raises(ValueError, match="invalid or duplicate attention layer_id: 1"):
        tables(model, runner(model))


def test_the_table_is_by_position(model: Any, breakable: Any):
    before = ENGINE.runs[NAME].counters.engaged
    attention, companions = tables(model, runner(model))
    assert attention == [layer.self_attn.attn for layer in model.layers]
    assert companions == [None] * len(model.layers)
    assert goes_on(model, attention)
    assert ENGINE.runs[NAME].counters.engaged == before + 1


REFUSED = [
    ("lose its per-layer inputs", {"kind": "Gemma4ForConditionalGeneration"}),
    ("draft model", {"is_draft_worker": True}),
    ("attention backend is SimpleNamespace", {"attn_backend": SimpleNamespace()}),
]


@pytest.mark.parametrize(("reason", "changes"), REFUSED)
def test_elsewhere_the_model_starts_without_graphs(
    model: Any, breakable: Any, reason: str, changes: dict[str, Any]
):
    attention, _ = tables(model, runner(model, **changes))
    assert not goes_on(model, attention)
    assert reason in ENGINE.runs[NAME].full_reason()


def test_a_model_that_is_recorded_with_its_per_layer_inputs_has_the_table(
    model: Any, breakable: Any, monkeypatch: pytest.MonkeyPatch
):
    """One that takes pictures, while `mm_prefill_graph` records it."""
    monkeypatch.setitem(mm_prefill_graph.recording, model, model.forward)
    made = runner(model, kind="Gemma4ForConditionalGeneration")
    assert goes_on(model, tables(model, made)[0])
    breakable.backend = "full"  # nothing else is lifted
    assert not goes_on(model, tables(model, made)[0])


def test_of_another_kind_of_graph_nothing_is_known(model: Any, breakable: Any):
    breakable.backend = "full"
    assert not goes_on(model, tables(model, runner(model))[0])
    assert "prefill graphs are full" in ENGINE.runs[NAME].full_reason()


def test_a_model_that_shares_nothing_is_stocks(breakable: Any):
    plain = sharing.build(shared=0)
    attention, _ = tables(plain, runner(plain))
    assert attention == [layer.self_attn.attn for layer in plain.layers]
    assert "no KV-shared layers" in ENGINE.runs[NAME].full_reason()


def test_another_table_is_stocks_error(model: Any, breakable: Any):
    """Two layers of one number for another reason than shared KV."""
    made, attention = runner(model), model.layers[0].self_attn.attn
    with pytest.MonkeyPatch.context() as context:
        context.setattr(attention, "layer_id", 1)
        with pytest.raises(ValueError, match="duplicate"):
            tables(model, made)
    assert patch.OTHER_TABLE in ENGINE.runs[NAME].full_reason()


def test_asked_by_nobody_known(model: Any, breakable: Any):
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup, layer_setup

    layers = layer_setup.compute_attention_and_moe_layers(model)
    attention, _ = cuda_graph_setup.index_attention_layers_by_global_id(
        layers.attention_layers, layers.mha_companion_layers, model
    )
    assert not goes_on(model, attention)
    assert "somebody else" in ENGINE.runs[NAME].full_reason()


def test_a_runner_that_is_gone_is_not_kept(model: Any, breakable: Any):
    made = runner(model)
    made.get_cuda_graph_layers(model)
    del made
    gc.collect()
    assert patch._runners[model]() is None


BATCHES = [
    ({3: 11}, {}),  # padding
    ({5: 6, 1: 8, 2: 2}, {}),  # several requests, no padding
    ({2: 3, 4: 9, 1: 1}, {2: 9, 4: 3, 1: 13}),  # after prefixes
]


def test_a_replay_is_stocks_prefill(model: Any):
    """Each layer's attention runs between two graphs on the live batch; a shared one on the other's KV."""
    graph = sharing.Graph(model, 16)
    assert len(graph.graph._break_fns) == len(model.layers)
    for lengths, prefixes in BATCHES:
        found = []
        for replayed in (False, True):
            memory = sharing.Memory()
            if prefixes:
                memory.run(model, memory.prefill(prefixes, {}))
            batch = memory.prefill(lengths, prefixes)
            if replayed:
                hidden = graph.replay(memory, batch)[: len(batch.input_ids)]
            else:
                hidden = memory.run(model, batch)
            found.append([hidden.clone(), *memory.buffers()])
        expected, seen = found
        # A GEMM over more rows may add in another order on the CPU, too.
        difference = (seen[0].float() - expected[0].float()).abs().max()
        assert difference < 0.02 * expected[0].float().abs().max(), float(difference)
        assert all(
            torch.allclose(a, b, atol=0.02) for a, b in zip(seen[1:], expected[1:], strict=True)
        )


def test_a_shared_layer_reads_what_the_other_one_wrote(model: Any):
    """In a replay: the value of one token in the pool, made huge behind the layer that writes it."""
    graph = sharing.Graph(model, 8)
    shared = model.layers[shared_kv.SHARED_FROM].self_attn.attn
    assert shared.layer_id == 1
    found = []
    for huge in (False, True):
        memory = sharing.Memory()
        attend = type(memory.backend).forward_extend

        def poisoned(self, q, k, v, layer, *rest, at=(huge, memory, attend), **more):
            huge, memory, attend = at
            if k is None and huge:
                slot = memory.allocator.full_to_swa_index_mapping[memory.table[2, 4].long()]
                memory.pool.swa_kv_pool.v_buffer[1][slot] = 500.0
            return attend(self, q, k, v, layer, *rest, **more)

        with pytest.MonkeyPatch.context() as context:
            context.setattr(type(memory.backend), "forward_extend", poisoned)
            found.append(graph.replay(memory, memory.prefill({2: 6}, {}))[:6].clone())
    assert torch.equal(found[0][:4], found[1][:4])  # tokens before it do not see it
    assert not torch.equal(found[0][4:], found[1][4:])
