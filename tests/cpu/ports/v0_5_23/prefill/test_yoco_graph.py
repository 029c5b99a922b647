"""The layers behind the cut through graphs, in this line: a stand-in records the call and repeats it.

What does not depend on the line is tested in `tests.cpu.ports.v0_5_12.prefill.test_yoco_graph`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.prefill import yoco_graph
from tests.cpu import interpreted, shared_kv
from tests.cpu.conftest import patched_sglang
from tests.cpu.ports.v0_5_23 import sharing

NAME = "yoco_graph"
BOTH = ("yoco", NAME)
pytestmark = interpreted.MARKS


class Recorded:
    """A graph's stand-in. What it records is not run before `replay`, as on a GPU."""

    every: list[Recorded]

    def __init__(self, function: Callable[[], torch.Tensor], pool: Any) -> None:
        self.function, self.pool = function, object() if pool is None else pool
        self.every.append(self)

    def replay(self) -> torch.Tensor:
        return self.function()


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=BOTH):
        yield


@pytest.fixture(autouse=True)
def patched(applied: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as context, torch.no_grad():
        context.setattr(yoco_graph, "DEVICES", ("cpu",))
        context.setattr(yoco_graph, "capture", Recorded)
        context.setattr(Recorded, "every", [], raising=False)
        ENGINE.apply(only=BOTH)
        for name in BOTH:
            assert ENGINE.runs[name].state == states.ACTIVE, ENGINE.runs[name].reason
            context.setattr(ENGINE.runs[name], "_decline_reason", "")
        yield
        ENGINE.revert()


def test_first_recorded_replayed():
    """One size: eagerly on the buffers, recorded, replayed with other lengths and fewer rows."""
    model, memory = sharing.build(), sharing.Memory().fill()
    batches = [
        ({1: 3, 2: 2, 3: 2}, {}),
        ({4: 2, 2: 5, 3: 1, 1: 2}, {4: 9, 3: 4}),
        ({3: 6, 5: 2, 1: 2}, {3: 11}),
    ]
    before = ENGINE.runs[NAME].counters.engaged
    found = []
    for lengths, prefixes in batches:
        batch = memory.prefill(lengths, prefixes)
        rows = torch.cumsum(batch.extend_seq_lens, dim=0) - 1
        found.append(memory.run(model, batch)[rows].clone())
    assert len(Recorded.every) == 1
    assert ENGINE.runs[NAME].counters.engaged == before + 2
    assert yoco_graph.FIRST in ENGINE.runs[NAME].full_reason()
    ENGINE.apply(only=["yoco"])
    for (lengths, prefixes), graphs in zip(batches, found, strict=True):
        batch = memory.prefill(lengths, prefixes)
        rows = torch.cumsum(batch.extend_seq_lens, dim=0) - 1
        assert torch.equal(memory.run(model, batch)[rows], graphs)


def test_a_graphs_batch_knows_nothing_of_the_one_it_was_made_for():
    model, memory = sharing.build(), sharing.Memory()
    memory.backend.enable_lean_attention = None
    memory.backend.cuda_graph_kv_indices = torch.zeros(3)
    batch = memory.prefill({1: 3}, {})
    memory.run(model, batch)
    graphs = vars(model)[yoco_graph._GRAPHS]
    (tail,) = graphs.tails.values()
    assert tail.backend is graphs.buffers.backend
    assert tail.backend.enable_lean_attention is False
    assert tail.backend.cuda_graph_kv_indices is None
    assert memory.backend.enable_lean_attention is None
    assert graphs.window == shared_kv.WINDOW
    nothing = ("input_ids", "req_pool_indices", "seq_lens", "out_cache_loc", "kv_loc_plan")
    assert all(getattr(tail.batch, name) is None for name in nothing)


SERVER = [
    ("switched off", "exec", "graph", "disable_cuda_graph"),
    ("debugs", "exec", "graph", "debug_cuda_graph"),
    ("torch.compile", "exec", "graph", "enable_torch_compile"),
    ("memory saver", "exec", "features", "enable_memory_saver"),
    ("two streams", "disagg", "", "enable_pdmux"),
]


def test_servers_without_graphs():
    from sglang.srt.runtime_context import get_context

    assert {name for *_, name in SERVER} == set(yoco_graph.OFF)
    model, memory = sharing.build(), sharing.Memory()
    run, batch = ENGINE.runs[NAME], memory.prefill({1: 2}, {})
    for word, space, part, name in SERVER:
        run._decline_reason = ""
        bag = get_context().config_bag(space)
        with (getattr(bag, part) if part else bag).override(**{name: True}):
            memory.run(model, copy.copy(batch))
        assert word in run.full_reason()
    assert not Recorded.every
