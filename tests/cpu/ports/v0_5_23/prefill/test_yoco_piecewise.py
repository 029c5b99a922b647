"""The cut between two breakable graphs of prefill, recorded and replayed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.prefill import yoco_cut
from gemma4_turbo.ports.v0_5_23.prefill import yoco
from gemma4_turbo.ports.v0_5_23.prefill import yoco_piecewise as patch
from tests.cpu import interpreted, shared_kv
from tests.cpu.conftest import patched_sglang
from tests.cpu.ports.v0_5_23 import sharing

NAME = "yoco_piecewise"
ALL = ("yoco", "optional_kv", NAME)
SIZE = 8  # of the graph
pytestmark = interpreted.MARKS


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=ALL):
        yield


@pytest.fixture(autouse=True)
def patched(applied: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as context, torch.no_grad():
        apply()
        context.setattr(ENGINE.runs[NAME], "_decline_reason", "")
        yield
        ENGINE.revert()


def apply() -> None:
    ENGINE.apply(only=ALL)
    for name in ALL:
        assert ENGINE.runs[name].state == states.ACTIVE, ENGINE.runs[name].reason


@pytest.fixture(scope="module")
def model(applied: None) -> Any:
    return sharing.build()


@pytest.fixture(scope="module")
def graph(model: Any) -> Any:
    """Recorded once, with the patch on."""
    with torch.no_grad():
        apply()
        made = sharing.Graph(model, SIZE)
        ENGINE.revert()
    return made


def filled() -> sharing.Memory:
    return sharing.Memory().fill()


def prefill(memory: sharing.Memory, **changes: Any) -> Any:
    """Two prompts of six tokens together, one after a prefix; two rows of padding."""
    return memory.prefill({2: 4, 4: 2}, {2: 9}, **changes)


LAST = torch.tensor([3, 5])


def expected(model: Any) -> torch.Tensor:
    """Stock's eager prefill."""
    ENGINE.revert()
    memory = filled()
    found = memory.run(model, prefill(memory))
    apply()
    return found


def replay(model: Any, graph: Any, batch: Any, memory: Any) -> tuple[torch.Tensor, list[int]]:
    """Hidden states, and how many rows each layer was given that ran between the graphs."""
    with pytest.MonkeyPatch.context() as context:
        seen = shared_kv.rows_per_layer(model, context)
        found = graph.replay(memory, batch).clone()
    return found, seen


def test_the_graph_ends_before_the_layers_that_share_kv(model: Any, graph: Any):
    """Attention of each layer before, and one function more; what it gives is stock's."""
    assert len(graph.graph._break_fns) == shared_kv.SHARED_FROM + 1
    stocks = expected(model)
    before = ENGINE.runs[NAME].counters.engaged
    memory = filled()
    found, seen = replay(model, graph, prefill(memory), memory)
    assert ENGINE.runs[NAME].counters.engaged == before + 1
    assert seen == [2] * 3
    assert found.shape == (SIZE, model.config.hidden_size)
    shared_kv.assert_near(found[LAST], stocks[LAST])
    others = torch.ones(SIZE, dtype=torch.bool)
    others[LAST] = False
    assert not found[others].any()


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("logprobs", {"return_logprob": True, "extend_logprob_start_lens_cpu": [0, 0]}),
        ("", {}),  # the patch is out, and the graphs are there
    ],
)
def test_a_batch_that_is_not_cut_goes_through_the_layers(
    model: Any, graph: Any, word: str, changes: dict[str, Any]
):
    stocks = expected(model)
    if not word:
        ENGINE.revert()
    before = ENGINE.runs[NAME].counters.engaged
    memory = filled()
    found, seen = replay(model, graph, prefill(memory, **changes), memory)
    assert seen == [SIZE] * 3
    shared_kv.assert_near(found[:6], stocks)
    assert word in ENGINE.runs[NAME].full_reason()
    assert ENGINE.runs[NAME].counters.engaged == before


def test_prompts_that_go_on_in_a_later_chunk(model: Any, graph: Any):
    memory = filled()
    batch = prefill(memory)
    setattr(batch.seq_lens_cpu, yoco_cut.UNFINISHED, [True, True])
    found, seen = replay(model, graph, batch, memory)
    assert seen == []
    assert not found.any()


@pytest.mark.parametrize("where", [(yoco_cut, "tail"), (yoco_cut, "plan")])
def test_an_error_of_ours_leaves_all_rows(model: Any, graph: Any, where: tuple[Any, str]):
    def fails(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    stocks = expected(model)
    memory = filled()
    with pytest.MonkeyPatch.context() as context:
        context.setattr(*where, fails)
        found, seen = replay(model, graph, prefill(memory), memory)
    assert seen == [SIZE] * 3
    assert ENGINE.runs[NAME].state == states.FAILED
    shared_kv.assert_near(found[:6], stocks)


def first(model: Any, breakable: bool = True, full: bool = False) -> int | None:
    """What is decided where SGLang's runner makes a graph."""
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import context
    from sglang.srt.model_executor.runner_utils.prefill_graph import prefill_graph_scope

    memory = sharing.Memory()
    batch = memory.prefill({1: 4}, {})
    ENGINE.runs[NAME]._decline_reason = ""
    with (
        pytest.MonkeyPatch.context() as patching,
        forward_context(ForwardContext(attn_backend=memory.backend), forward_batch=batch),
        prefill_graph_scope(full_graph=full),
    ):
        patching.setattr(context, "_in_breakable_cuda_graph", breakable)
        return patch.first_layer(model, batch, {})


SERVER = [
    ("hidden states", "exec", "features", "enable_return_hidden_states", True),
    ("hidden states", "exec", "features", "return_hidden_states_mode", "last"),
    ("speculative", "spec", "", "speculative_algorithm", "EAGLE"),
    ("mixed", "schedule", "", "enable_mixed_chunk", True),
    ("multi-item", "exec", "features", "enable_mis", True),
    ("debugs", "exec", "graph", "debug_cuda_graph", True),
]


def test_servers_whose_graphs_are_stocks(model: Any, monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.runtime_context import get_context

    run = ENGINE.runs[NAME]
    assert {name for _, _, _, name, _ in SERVER} == set(patch.OFF)
    assert first(model) == shared_kv.SHARED_FROM
    for word, space, part, name, value in SERVER:
        bag = get_context().config_bag(space)
        with (getattr(bag, part) if part else bag).override(**{name: value}):
            assert first(model) is None, name
        assert word in run.full_reason()
    with monkeypatch.context() as context:
        context.setattr(yoco, "_gpus", lambda: 2)
        assert first(model) is None
    assert first(model, breakable=False) is None
    assert first(model, full=True) is None
    assert "no breaks" in run.full_reason()
    with monkeypatch.context() as context:
        context.setattr(model, "layers_to_capture", [1])
        assert first(model) is None
    with monkeypatch.context() as context:
        context.setattr(ENGINE.runs["optional_kv"], "state", states.OFF)
        assert first(model) is None
    with model.norm.register_forward_hook(lambda *given: None):
        assert first(model) is None
    assert first(sharing.build(shared=0)) is None
    assert "no KV-shared layers" in run.full_reason()
    monkeypatch.setattr(yoco_cut.YOCO, "run", None)
    assert first(model) is None


def test_an_eager_prefill_is_no_graph(model: Any):
    memory = sharing.Memory()
    assert patch.first_layer(model, memory.prefill({1: 4}, {}), {}) is None
    assert ENGINE.runs[NAME]._decline_reason == ""
