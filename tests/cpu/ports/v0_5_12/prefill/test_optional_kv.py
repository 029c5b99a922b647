"""Attention without key and value inside a piecewise graph: stock fails, the patch does not."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_12.prefill import optional_kv as patch
from tests.cpu import piecewise
from tests.cpu.conftest import patched_sglang
from tests.op_schemas import checked

NAME = "optional_kv"
TOKENS, PADDED = 3, 5


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(scope="module", autouse=True)
def stocks_operator_on_the_cpu(applied: None) -> Iterator[None]:
    with piecewise.stocks_operator():
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    ENGINE.apply(only=[NAME])
    assert ENGINE.runs[NAME].state == states.ACTIVE, ENGINE.runs[NAME].reason
    torch._dynamo.reset()
    yield
    ENGINE.revert()


class Backend:
    """Doubles the query, or adds the key; keeps what it was called with."""

    def __init__(self, in_place: bool = False) -> None:
        self.in_place, self.calls = in_place, []

    def forward(self, q, k, v, layer, batch, save_kv_cache, **kwargs):
        seen = (q.shape[0], k, layer.layer_id, len(batch.out_cache_loc), save_kv_cache)
        self.calls.append((*seen, batch.token_to_kv_pool.swa_loc.tolist()))
        found = q * 2 if k is None else q + k.flatten(1)
        if self.in_place:
            return batch._attn_output.copy_(found)
        return found


class Pool:
    """The sliding-window pool's location, as far as the operator touches it."""

    swa_loc = torch.tensor([9])

    def set_swa_loc(self, loc: torch.Tensor) -> None:
        self.swa_loc = loc


def setting(in_place: bool = False, head: int = 8) -> tuple[Any, Any]:
    """Stock's attention layer and a padded batch."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    layer = RadixAttention(2, 8, 1.0, 2, layer_id=0, v_head_dim=head)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        num_token_non_padded_cpu=TOKENS,
        out_cache_loc=torch.arange(PADDED),
        out_cache_loc_swa=torch.arange(PADDED) + 20,
        token_to_kv_pool=Pool(),
        attn_backend=Backend(in_place),
    )
    return layer, batch


def call(layer: Any, batch: Any, *arguments: Any, compiled: bool = False) -> torch.Tensor:
    from sglang.srt.compilation.piecewise_context_manager import set_forward_context

    def run(q, k, v):
        return layer(q, k, v, batch, save_kv_cache=False)

    function = torch.compile(run, backend="eager", fullgraph=True) if compiled else run
    with set_forward_context(batch, [layer], None, [], []):
        return function(*arguments)


def query() -> torch.Tensor:
    return torch.arange(PADDED * 16, dtype=torch.float32).view(PADDED, 16)


@pytest.mark.parametrize("compiled", [False, True])
def test_stock_fails(compiled: bool):
    """The defect that the patch is for."""
    ENGINE.revert()
    layer, batch = setting()
    with pytest.raises(TypeError, match="'NoneType' object is not subscriptable"):
        call(layer, batch, query(), None, None, compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_patch_serves(compiled: bool, in_place: bool):
    """Real tokens only reach the backend; the batch is as it was afterwards."""
    layer, batch = setting(in_place)
    before = ENGINE.runs[NAME].counters.engaged
    found = call(layer, batch, query(), None, None, compiled=compiled)
    assert ENGINE.runs[NAME].counters.engaged == before + 1
    assert torch.equal(found[:TOKENS], query()[:TOKENS] * 2)
    assert found.shape == (PADDED, 16)
    assert batch.attn_backend.calls == [(TOKENS, None, 0, TOKENS, False, [20, 21, 22])]
    assert len(batch.out_cache_loc) == len(batch.out_cache_loc_swa) == PADDED
    assert batch.token_to_kv_pool.swa_loc.tolist() == [9]


@pytest.mark.parametrize("in_place", [False, True])
def test_the_operator_writes_what_its_schema_says(in_place: bool):
    """The output alone."""
    from sglang.srt.compilation.piecewise_context_manager import set_forward_context

    layer, batch = setting(in_place)
    operator = torch.ops.gemma4_turbo.shared_kv_attention.default
    with set_forward_context(batch, [layer], None, [], []):
        checked(operator, query(), torch.zeros(PADDED, 16), False, 0)


def test_a_failing_backend_leaves_the_batch_whole():
    layer, batch = setting()
    batch.attn_backend = SimpleNamespace(forward=lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(layer, batch, query(), None, None)
    assert len(batch.out_cache_loc) == len(batch.out_cache_loc_swa) == PADDED
    assert batch.token_to_kv_pool.swa_loc.tolist() == [9]


@pytest.mark.parametrize("compiled", [False, True])
def test_with_key_and_value_stock_runs(compiled: bool):
    layer, batch = setting()
    before = ENGINE.runs[NAME].counters.engaged
    key = torch.ones(PADDED, 16)
    found = call(layer, batch, query(), key, key, compiled=compiled)
    assert ENGINE.runs[NAME].counters.engaged == before
    assert torch.equal(found[:TOKENS], query()[:TOKENS] + 1)
    assert batch.attn_backend.calls[0][0] == TOKENS


def test_outside_a_piecewise_graph_stock_runs():
    layer, batch = setting()
    layer(query(), None, None, batch, save_kv_cache=False)
    assert batch.attn_backend.calls[0][0] == PADDED


def test_the_graph_is_cut_at_the_operator():
    """SGLang's own splitter finds it in what Dynamo traced, and not after a revert."""
    with piecewise.importable():
        from sglang.srt.compilation.backend import split_graph
    from sglang.srt.compilation.compilation_config import CompilationConfig
    from sglang.srt.compilation.piecewise_context_manager import set_forward_context

    layer, batch = setting()
    splits: list[list[bool]] = []

    def backend(graph, example_inputs):
        _, pieces = split_graph(graph, CompilationConfig([1]).split_ops)
        splits.append([piece.is_splitting_graph for piece in pieces])
        return graph

    def run(q):
        return layer(q * 2, None, None, batch, save_kv_cache=False) + 1

    with set_forward_context(batch, [layer], None, [], []):
        torch.compile(run, backend=backend, fullgraph=True)(query())
    assert splits == [[False, True, False]]
    ENGINE.revert()
    assert not set(patch.SPLIT_NAMES) & set(CompilationConfig([1]).split_ops)
    assert "sglang.unified_attention_with_output" in CompilationConfig([1]).split_ops


def test_another_value_size_gets_its_own_output():
    layer, batch = setting(head=4)
    batch.attn_backend.forward = lambda q, *rest: q.view(-1, 2, 8)[..., :4].flatten(1)
    found = call(layer, batch, query(), None, None)
    assert found.shape == (PADDED, 8)
    assert torch.equal(found[:TOKENS], query().view(-1, 2, 8)[:TOKENS, :, :4].flatten(1))
