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

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.prefill import yoco_cut, yoco_graph
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
    monkeypatch.setattr(yoco_graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(yoco_graph, "capture", Recorded)
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

    cut: yoco_cut.Cut
    tail: yoco_cut.Tail
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
    setattr(batch.seq_lens_cpu, yoco_cut.UNFINISHED, unfinished)
    found = yoco_cut.cut(model, batch, batch.positions, {})
    assert found is not None
    tokens, width = sum(lengths), model.config.hidden_size
    hidden, norm = torch.randn(2, tokens, width).to(shared_kv.DTYPE)
    ple = torch.randn(tokens, len(model.layers), 256).to(shared_kv.DTYPE)
    tail = yoco_cut.tail(found, batch, batch.positions, hidden, None, norm if normed else None, ple)
    return Case(found, tail, batch)


def eagerly(model: Any, given: Case) -> torch.Tensor:
    """The layers on the tail as it is. It stays as it is."""
    from gemma4_turbo.ports.v0_5_12 import layer_loop

    mine = given.tail._replace(hidden_states=given.tail.hidden_states.clone())
    return layer_loop.run_tail(model, given.cut.first, mine)


def run(model: Any, given: Case) -> torch.Tensor:
    return yoco_graph.run(model, given.cut, given.tail, given.batch)


def graphs(model: Any) -> yoco_graph.Graphs:
    return vars(model)[yoco_graph._GRAPHS]


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
    assert {key[0] for key in graphs(model).captured} == set(yoco_graph.SIZES)
    assert sum(recorded.replays for recorded in Recorded.every) > len(Recorded.every)
    assert len({id(recorded.pool) for recorded in Recorded.every}) == 1  # one memory for all
    assert yoco_graph.FIRST in ENGINE.runs[NAME].full_reason()  # the first of the reasons
    assert ENGINE.runs[NAME].state == states.ACTIVE


def forward(model: Any, batch: Any) -> torch.Tensor:
    return model(batch.input_ids, batch.positions, batch)


@pytest.mark.parametrize("more", [(), ("input_norm", "ple_tail", "layer_norms")])
def test_the_whole_model(model: Any, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """Three prefills through the model's forward are `yoco`'s to the bit, with a normed input too."""
    from gemma4_turbo.fusions.fusion import Fusion

    monkeypatch.setattr(Fusion, "_compared", lambda *args: None)  # no stock kernel to compare with
    lengths = [{1: 6, 2: 3, 3: 2}, {4: 5, 1: 1, 2: 2}, {3: 4, 2: 1, 5: 3}]
    outputs: list[list[torch.Tensor]] = []
    for graph in (False, True):
        ENGINE.apply(only=["yoco", *more, *([NAME] if graph else [])])
        before = ENGINE.runs[NAME].counters.engaged
        outputs.append([forward(model, shared_kv.Memory().prefill(n, {})) for n in lengths[:1]])
        at = shared_kv.Memory()
        kept = at.backend.sliding_window_size
        outputs[-1] += [forward(model, at.prefill(n, {})) for n in lengths]
        assert at.backend.sliding_window_size == kept
        assert ENGINE.runs[NAME].counters.engaged == before + 2 * graph  # what a graph was for
    for expected, found in zip(*outputs, strict=True):
        assert torch.equal(found, expected)
    (recorded,) = Recorded.every  # the first batch had other pools
    assert recorded.replays == 2
    ((key, tail),) = graphs(model).tails.items()
    assert key == (4, bool(more), True)
    assert tail.batch.attn_backend.sliding_window_size == shared_kv.WINDOW + 1


def test_our_decode_kernel(monkeypatch: pytest.MonkeyPatch):
    """It counts splits by all keys, so a batch of a graph's very size is `yoco`'s to the bit."""
    monkeypatch.setattr(shared_kv, "WINDOW", 64)
    monkeypatch.setattr(shared_kv, "HEAD", {"sliding_attention": 256, "full_attention": 512})
    wide, at = shared_kv.build(), memory()
    apply("decode_attention")
    kernel = ENGINE.runs["decode_attention"].counters
    for lengths in ([70, 3], [4, 2], [66, 68], [80]):
        given = case(wide, at, lengths)
        before = kernel.engaged
        expected = eagerly(wide, given)
        assert torch.equal(run(wide, given), expected)
        assert kernel.engaged == before + 6
        poison_floats(wide)
    for _ in range(3):
        given = case(wide, at, [70, 4, 9])
        expected, found = eagerly(wide, given), run(wide, given)
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
        poison_floats(wide)


def poison_floats(model: Any) -> None:
    buffers = graphs(model).buffers
    assert buffers is not None
    for tensor in (buffers.hidden_states, buffers.normed, buffers.per_layer_inputs):
        tensor.fill_(torch.nan)


# -- the rest needs no layers -----------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the layers a sum of everything that a tail holds, row by row."""
    from gemma4_turbo.ports.v0_5_12 import layer_loop

    def run_tail(model: Any, first: int, tail: yoco_cut.Tail) -> torch.Tensor:
        metadata = tail.batch.attn_backend.forward_metadata
        found = tail.hidden_states + tail.positions[:, None]
        for prefix in ("", "window_"):
            indptr = getattr(metadata, f"{prefix}kv_indptr").tolist()
            indices = getattr(metadata, f"{prefix}kv_indices")
            splits = getattr(metadata, f"{prefix}num_kv_splits")
            for row in range(len(found)):
                found[row] += indices[indptr[row] : indptr[row + 1]].sum() % 97 + splits[row]
        assert tail.per_layer_inputs is not None
        found += tail.per_layer_inputs[:, first].sum(-1, keepdim=True)
        return found if tail.normed is None else found + tail.normed

    monkeypatch.setattr(layer_loop, "run_tail", run_tail)


def three(model: Any, at: shared_kv.Memory | None = None, **options: Any) -> Case:
    """Three prompts; all of one engine if ``at`` is given."""
    return case(model, at or memory(), [4, 2, 3], **options)


def check(model: Any, given: Case) -> None:
    assert torch.equal(run(model, given), eagerly(model, given))


def test_eager_recorded_replayed(model: Any, short: None):
    at = memory()
    run_counters = ENGINE.runs[NAME].counters
    before = run_counters.engaged
    for recorded, replays in ((0, []), (1, [1]), (1, [2]), (1, [3])):
        check(model, three(model, at))
        assert len(Recorded.every) == recorded
        assert [graph.replays for graph in Recorded.every] == replays
    assert run_counters.engaged == before + 3  # the first batch had no graph
    assert "first batch of a size" in ENGINE.runs[NAME].full_reason()
    for recorded in (1, 2, 2):  # with a normed input it is another graph
        check(model, three(model, at, normed=True))
        assert len(Recorded.every) == recorded


def test_the_buffers_hold_nothing_of_a_batch(model: Any, short: None):
    """What a graph keeps for ever is the pools', not the first batch's."""
    at = memory()
    given = three(model, at)
    check(model, given)
    batch = graphs(model).tails[4, False, True].batch
    kept = {name for name, value in vars(batch).items() if value is not None}
    values = {name: getattr(batch, name) for name in kept}
    assert values["attn_backend"] is graphs(model).buffers.backend
    for name in ("input_ids", "seq_lens", "seq_lens_cpu", "req_pool_indices", "out_cache_loc"):
        assert name not in kept
    theirs = [value for value in vars(given.batch).values() if isinstance(value, torch.Tensor)]
    pointers = {tensor.data_ptr() for tensor in theirs}
    mine = [value for value in values.values() if isinstance(value, torch.Tensor)]
    assert not pointers & {tensor.data_ptr() for tensor in mine}


def test_the_buffers_of_sglangs_graphs_are_not_kept(model: Any, short: None):
    """A weight update may record SGLang's graphs again, over new buffers: the old ones go."""
    at = memory()
    at.backend.init_cuda_graph_state(8, 8)
    old = weakref.ref(at.backend.cuda_graph_kv_indices)
    thrice(model, at)
    assert at.backend.cuda_graph_kv_indices is old()
    at.backend.init_cuda_graph_state(8, 8)
    assert old() is None
    check(model, three(model, at))


@pytest.mark.parametrize("normed", [False, True])
def test_rows_beyond_the_batch_see_one_key_of_nobody(model: Any, short: None, normed: bool):
    at = memory()
    check(model, three(model, at, normed=normed))
    poison(model)
    given = three(model, at, normed=normed)
    buffers = graphs(model).buffers
    buffers.metadata.kv_indices.fill_(5)
    buffers.metadata.window_kv_indices.fill_(5)
    buffers.fill(8, given.tail)
    theirs, mine = given.tail.batch.attn_backend.forward_metadata, buffers.metadata
    for prefix in ("", "window_"):
        starts = getattr(theirs, f"{prefix}kv_indptr").tolist()
        total = starts[-1]
        starts += range(total + 1, total + 6)
        assert getattr(mine, f"{prefix}kv_indptr")[:9].tolist() == starts
        assert getattr(mine, f"{prefix}kv_indptr").dtype == torch.int32
        slots = getattr(theirs, f"{prefix}kv_indices").tolist() + [0] * 5
        assert getattr(mine, f"{prefix}kv_indices")[: total + 5].tolist() == slots
        splits = getattr(theirs, f"{prefix}num_kv_splits").tolist() + [1] * 5
        assert getattr(mine, f"{prefix}num_kv_splits")[:8].tolist() == splits
    assert not buffers.hidden_states[3:8].any()
    assert not buffers.per_layer_inputs[3:8].any()
    assert not buffers.positions[3:8].any()
    assert buffers.normed[3:8].isnan().all() != normed


SERVER = [
    ("CUDA graphs are switched off", "disable_cuda_graph"),
    ("debugs", "debug_cuda_graph"),
    ("torch.compile", "enable_torch_compile"),
    ("memory saver", "enable_memory_saver"),
    ("two streams", "enable_pdmux"),
]


def test_there_is_a_case_for_every_argument():
    assert {name for _, name in SERVER} == set(yoco_graph.OFF)


def declines(model: Any, given: Case, reason: str) -> None:
    run_ = ENGINE.runs[NAME]
    before = run_.counters.engaged
    check(model, given)
    assert run_.counters.engaged == before
    assert reason in run_.full_reason()
    assert not Recorded.every


@pytest.mark.parametrize(("reason", "name"), SERVER)
def test_servers_without(
    model: Any, short: None, reason: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    from sglang.srt.server_args import get_global_server_args

    monkeypatch.setattr(get_global_server_args(), name, True)
    declines(model, three(model), reason)


def test_what_runs_eagerly(model: Any, short: None, monkeypatch: pytest.MonkeyPatch):
    at = memory()
    run_ = ENGINE.runs[NAME]

    def each(reason: str, change: Callable[[pytest.MonkeyPatch, Case], Any]) -> None:
        given = three(model, at)
        with monkeypatch.context() as patch:
            patch.setattr(run_, "_decline_reason", "")
            changed = change(patch, given)
            declines(model, given if changed is None else changed, reason)

    parallel = "sglang.srt.distributed.get_tensor_model_parallel_world_size"
    each("tensor parallelism", lambda patch, given: patch.setattr(parallel, lambda: 2))
    each("not on a GPU", lambda patch, given: patch.setattr(yoco_graph, "DEVICES", ("cuda",)))
    each("room for 9", lambda patch, given: patch.setattr(yoco_graph, "ROOM", 9 * 8))
    each(
        "the attention backend is X",
        lambda patch, given: patch.setattr(given.batch, "attn_backend", type("X", (), {})()),
    )
    for pool in (at.kv, at.kv.swa_kv_pool):
        each(
            "layer by layer",
            lambda patch, given, pool=pool: patch.setattr(pool, "layer_transfer_counter", object()),
        )
    each(
        "residual",
        lambda patch, given: given._replace(
            tail=given.tail._replace(residual=given.tail.hidden_states)
        ),
    )
    layer = model.layers[shared_kv.SHARED_FROM]
    for part in (layer, layer.mlp.act_fn, model.norm):
        each(
            "hooks",
            lambda patch, given, part=part: patch.setitem(part._forward_hooks, 0, print),
        )
    assert run_.state == states.ACTIVE


def test_a_graph_that_cannot_be_recorded(model: Any, short: None, monkeypatch: pytest.MonkeyPatch):
    """Its size runs eagerly for good, also over other pools; the other sizes do not."""

    def fails(function: Any, pool: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    at = memory()
    with monkeypatch.context() as patch:
        patch.setattr(yoco_graph, "capture", fails)
        for _ in range(3):
            check(model, three(model, at))
    run_ = ENGINE.runs[NAME]
    assert run_.state == states.FAILED
    assert "no room" in run_.reason
    for _ in range(3):
        check(model, three(model, at))
    assert not Recorded.every
    for _ in range(3):
        check(model, case(model, at, [5]))
    assert [graph.replays for graph in Recorded.every] == [2]
    other = memory()
    for _ in range(3):
        check(model, three(model, other))
    assert len(Recorded.every) == 1


def test_a_first_run_that_fails(model: Any, short: None, monkeypatch: pytest.MonkeyPatch):
    """What the layers read of a batch beyond a decode step's is not there; the tail is as it was."""
    from gemma4_turbo.ports.v0_5_12 import layer_loop

    cheap = layer_loop.run_tail

    def reads_more(model: Any, first: int, tail: yoco_cut.Tail) -> torch.Tensor:
        tail.batch.seq_lens.sum()
        return cheap(model, first, tail)

    monkeypatch.setattr(layer_loop, "run_tail", reads_more)
    for _ in range(2):
        check(model, three(model))
    assert ENGINE.runs[NAME].state == states.FAILED
    assert "AttributeError" in ENGINE.runs[NAME].reason


def thrice(model: Any, at: shared_kv.Memory) -> Any:
    """The graph of three rows after as many prefills."""
    for _ in range(3):
        check(model, three(model, at))
    return Recorded.every[-1]


def test_another_pool_another_backend_drop_the_graphs(model: Any, short: None):
    at = memory()
    first = thrice(model, at)
    other = memory()
    second = thrice(model, other)
    assert second is not first
    assert (first.replays, second.replays) == (2, 2)
    assert second.given is None
    assert graphs(model).buffers.backend.req_to_token is other.backend.req_to_token
    pool = other.kv.full_kv_pool
    pool.v_buffer[0] = pool.v_buffer[0].clone()  # the same pool over other memory
    assert thrice(model, other) is not second


def test_weights_that_move_and_weights_that_are_written_over(model: Any, short: None):
    at = memory()
    first = thrice(model, at)
    norm = model.layers[-1].input_layernorm
    norm.weight.data.mul_(2)
    check(model, three(model, at))
    assert first.replays == 3
    for owner, name in (
        (norm, "weight"),
        (model.layers[-1], "layer_scalar"),
        (model.norm, "weight"),
    ):
        before = Recorded.every[-1]
        tensor = getattr(owner, name)
        tensor.data = tensor.data.clone()
        assert thrice(model, at) is not before
    norm.weight.data.div_(2)
    norm.weight = torch.nn.Parameter(norm.weight.data.clone(), requires_grad=False)
    last = Recorded.every[-1]
    assert thrice(model, at) is not last
    assert last.replays == 2


def test_undo_drops_everything(model: Any, short: None):
    at = memory()
    thrice(model, at)
    buffers = weakref.ref(graphs(model).buffers)
    recorded = weakref.ref(Recorded.every.pop())
    ENGINE.apply(only=["yoco"])
    gc.collect()
    assert buffers() is recorded() is None
    assert yoco_graph._GRAPHS not in vars(model)
    assert not yoco_graph._models
    assert yoco_graph.YOCO_GRAPH.run is None
    check(model, three(model, at))
    assert not Recorded.every
    apply()
    thrice(model, at)


def test_without_yoco_it_is_off():
    ENGINE.apply(only=[NAME])
    assert ENGINE.runs[NAME].state == states.OFF
    assert "yoco" in ENGINE.runs[NAME].reason


def test_the_memory_for_slots_is_bounded(model: Any, short: None, monkeypatch: pytest.MonkeyPatch):
    at = memory()
    check(model, three(model, at))
    metadata = graphs(model).buffers.metadata
    assert len(metadata.kv_indices) == 16 * shared_kv.CONTEXT
    assert len(metadata.window_kv_indices) == 16 * (shared_kv.WINDOW + 1)
    long = SimpleNamespace(attn_backend=SimpleNamespace(req_to_token=torch.empty(0, 2**20)))
    assert yoco_graph._room(long) * 8 == yoco_graph.ROOM == 2**26


@pytest.mark.parametrize("where", ["unfit", "_graphs"])
def test_a_look_that_fails(model: Any, short: None, where: str, monkeypatch: pytest.MonkeyPatch):
    def fails(*given: Any) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr(yoco_graph, where, fails)
    check(model, three(model))
    assert ENGINE.runs[NAME].state == states.FAILED
    assert "AttributeError: no such thing" in ENGINE.runs[NAME].reason


@pytest.mark.parametrize("where", ["all", "forward"])
def test_whoever_looks_at_a_layer(model: Any, short: None, where: str):
    """Hooks for all modules, and a forward that was set on a module itself."""
    given = three(model, memory())
    if where == "all":
        with torch.nn.modules.module.register_module_forward_hook(lambda *given: None):
            declines(model, given, "hooks")
    else:
        part = model.layers[-1].mlp
        part.forward = part.forward
        try:
            declines(model, given, "hooks")
        finally:
            del part.forward


def test_a_backend_of_the_same_name_is_not_known(
    model: Any, short: None, monkeypatch: pytest.MonkeyPatch
):
    given = three(model, memory())
    kind = type(given.batch.attn_backend)
    monkeypatch.setattr(given.batch.attn_backend, "__class__", type(kind.__name__, (kind,), {}))
    declines(model, given, "the attention backend is TritonAttnBackend")
