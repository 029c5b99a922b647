"""The layers behind the cut through graphs: a stand-in records the call and repeats it at a replay.

SGLang's text model, pools and Triton attention on the CPU, against the same layers run eagerly.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from gemma4_turbo import states
from gemma4_turbo.forwards import fast_prefill, tail_graph
from gemma4_turbo.patching import ENGINE
from tests.cpu import shared_kv
from tests.cpu.conftest import patched_sglang

NAME = "yoco_graph"
BOTH = ("yoco", NAME)
SLOTS, REQUESTS = 1200, 24


class Recorded:
    """A graph's stand-in. What it records is not run before `replay`, as on a GPU."""

    every: list[Recorded]

    def __init__(self, function: Callable[[], torch.Tensor], pool: Any) -> None:
        self.function, self.given = function, pool
        self.pool = object() if pool is None else pool
        self.replays = 0
        self.every.append(self)

    def replay(self) -> torch.Tensor:
        self.replays += 1
        return self.function()


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=BOTH):
        yield


@pytest.fixture(autouse=True)
def patched(applied: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tail_graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(tail_graph, "capture", Recorded)
    monkeypatch.setattr(Recorded, "every", [], raising=False)
    apply()
    monkeypatch.setattr(ENGINE.runs[NAME], "_decline_reason", "")
    with torch._dynamo.config.patch(disable=True), torch.no_grad():
        yield
    ENGINE.revert()


def apply(*more: str) -> None:
    ENGINE.apply(only=[*BOTH, *more])
    for name in BOTH:
        assert ENGINE.runs[name].state == states.ACTIVE, ENGINE.runs[name].reason


@pytest.fixture(scope="module")
def model(applied: None) -> Any:
    return shared_kv.build()


def memory() -> shared_kv.Memory:
    """Pools full of random keys and values; the slot of nobody holds NaN in every pool."""
    made = shared_kv.Memory(SLOTS, requests=REQUESTS)
    made.backend.init_forward_metadata = lambda batch: None  # of the layers before the cut
    generator = torch.Generator().manual_seed(1)
    for pool in (made.kv.full_kv_pool, made.kv.swa_kv_pool):
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer.normal_(generator=generator)
            buffer[0] = torch.nan
    return made


class Case(NamedTuple):
    """A batch right before the cut."""

    cut: fast_prefill.Cut
    tail: fast_prefill.Tail
    batch: Any


def case(
    model: Any,
    at: shared_kv.Memory,
    lengths: list[int],
    prefixes: list[int] | None = None,
    unfinished: list[bool] | None = None,
    normed: bool = False,
) -> Case:
    """Prompts of random activations; their slots are taken from the pools and given back."""
    numbers = range(1, len(lengths) + 1)
    order = random.Random(sum(lengths)).sample(numbers, len(numbers))
    before = dict(zip(order, prefixes or [0] * len(order), strict=True))
    for request, length in before.items():  # slots of the prefix, all over the pool
        at.requests.req_to_token[request, :length] = torch.randint(1, SLOTS, (length,))
    batch = at.prefill(dict(zip(order, lengths, strict=True)), before)
    at.allocator.free(batch.out_cache_loc)
    at.allocator.full_to_swa_index_mapping[1 : SLOTS + 1] = torch.arange(SLOTS, 0, -1)
    setattr(batch, fast_prefill.UNFINISHED, unfinished)
    found = fast_prefill.cut(model, batch, batch.positions, {})
    assert found is not None
    tokens, width = sum(lengths), model.config.hidden_size
    hidden, norm = torch.randn(2, tokens, width).to(shared_kv.DTYPE)
    ple = torch.randn(tokens, len(model.layers), 256).to(shared_kv.DTYPE)
    tail = fast_prefill.tail(
        found, batch, batch.positions, hidden, None, norm if normed else None, ple
    )
    return Case(found, tail, batch)


def eagerly(model: Any, given: Case) -> torch.Tensor:
    """The layers on the tail as it is. It stays as it is."""
    from gemma4_turbo.forwards import text_model

    mine = given.tail._replace(hidden_states=given.tail.hidden_states.clone())
    return text_model.run_tail(model, given.cut.first, mine)


def run(model: Any, given: Case) -> torch.Tensor:
    return tail_graph.run(model, given.cut, given.tail, given.batch)


def graphs(model: Any) -> tail_graph.Graphs:
    return vars(model)[tail_graph._GRAPHS]


def poison(model: Any) -> None:
    """Nothing that an earlier batch left in a buffer may be read: NaN, and the NaN slot's number."""
    buffers = graphs(model).buffers
    assert buffers is not None
    everything = [*vars(buffers).values(), *vars(buffers.metadata).values()]
    for tensor in everything:
        if isinstance(tensor, torch.Tensor) and tensor is not buffers.steps:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


COUNTS = (3, 1, 20, 4, 1, 7, 2, 15, 1, 8, 2, 16, 5, 2, 3, 18, 9, 6)


def drawn(seed: int) -> tuple[list[int], list[int], list[bool]]:
    """1 to 20 prompts, with and without a prefix, some of which go on in a later chunk."""
    source = random.Random(seed)
    count = COUNTS[seed]
    lengths = [source.randint(1, 12) for _ in range(count)]
    lengths[0] += 1  # a row at least that is not wanted
    prefixes = [source.choice([0, 0, 1, 6, 7, 8, 21]) for _ in range(count)]
    unfinished = [source.random() < 0.1 for _ in range(count)]
    unfinished[source.randrange(count)] = False
    return lengths, prefixes, unfinished


def test_random_batches_bit_by_bit(model: Any):
    """Eager, recorded and replayed calls of every size, in any order, on buffers full of NaN."""
    at, sizes = memory(), []
    for seed in range(len(COUNTS)):
        given = case(model, at, *drawn(seed))
        expected = eagerly(model, given)
        assert expected.isfinite().all()
        if seed:
            poison(model)
        found = run(model, given)
        assert torch.equal(found, expected), seed
        sizes.append(len(given.cut.rows))
    assert min(sizes) == 1
    assert max(sizes) > 16
    assert {key[0] for key in graphs(model).captured} == set(tail_graph.SIZES)
    assert sum(recorded.replays for recorded in Recorded.every) > len(Recorded.every)
    assert len({id(recorded.pool) for recorded in Recorded.every}) == 1  # one memory for all
    assert "more than 16 rows" in ENGINE.runs[NAME].full_reason()
    assert ENGINE.runs[NAME].state == states.ACTIVE
