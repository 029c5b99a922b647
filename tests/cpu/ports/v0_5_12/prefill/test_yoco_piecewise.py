"""The cut inside SGLang's piecewise graphs: its own runner, compilation and splitter, on the CPU.

What SGLang would record as a CUDA graph runs as it was traced.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.prefill import yoco_cut, yoco_graph
from gemma4_turbo.ports.v0_5_12.prefill import piecewise as yoco_piecewise
from tests.cpu import piecewise, shared_kv
from tests.cpu.conftest import patched_sglang
from tests.op_schemas import checked

NAME = "yoco_piecewise"
PATCHES = ("yoco", "optional_kv", NAME)
SIZES = (8, 24)
ATTENTION = "sglang.unified_attention_with_output"
WITHOUT_KV = "gemma4_turbo.shared_kv_attention"
LAYERS = "gemma4_turbo.shared_kv_layers"

# Tokens of each request, and of its prefix.
BATCHES = [
    ({1: 10, 2: 6}, {}),  # padded to 24
    ({1: 16, 2: 8}, {}),  # exactly 24
    ({3: 8}, {}),
    ({0: 2, 1: 1, 2: 1}, {0: 20, 1: 5, 2: 12}),
    ({4: 5}, {4: 40}),
]
SINGLES = ({0: 1, 1: 1, 2: 1}, {0: 20, 1: 5, 2: 12})


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with (
        patched_sglang(tmp_path_factory, only=PATCHES),
        piecewise.stocks_operator(),
        piecewise.importable(),
    ):
        sglang_process.prepare_sglang()
        yield


@pytest.fixture(autouse=True)
def patched(applied: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    apply()
    for name in (*PATCHES, "yoco_graph"):
        monkeypatch.setattr(ENGINE.runs[name], "_decline_reason", "")
    with torch.no_grad():
        yield
    ENGINE.revert()


def apply(*more: str) -> None:
    ENGINE.apply(only=[*PATCHES, *more])
    for name in (*PATCHES, *more):
        assert ENGINE.runs[name].state == states.ACTIVE, ENGINE.runs[name].reason


def made(lengths: dict[int, int], prefixes: dict[int, int], memory: Any = None) -> tuple[Any, Any]:
    """Pools with the prefixes' random keys and values, and the batch, the same every time."""
    if memory is None:
        memory = shared_kv.Memory()
    else:
        memory.clear()
    generator = torch.Generator().manual_seed(1)
    for pool in (memory.kv.full_kv_pool, memory.kv.swa_kv_pool):
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer.normal_(generator=generator)
    if prefixes:
        memory.prefill(prefixes, {})
    return memory, memory.prefill(lengths, prefixes)


class Compiled(NamedTuple):
    """A model, SGLang's runner over it, compiled, and the pools of both."""

    memory: Any
    model: Any
    runner: Any

    def batch(self, lengths: dict[int, int], prefixes: dict[int, int]) -> Any:
        return made(lengths, prefixes, self.memory)[1]


def compiled(embedded: bool = False, **kwargs: Any) -> Compiled:
    """With what is applied now. Dynamo knows one at a time: those made before are of no use."""
    _usual.cache_clear()
    return _compiled(embedded, **kwargs)


def usual(embedded: bool = False, ple: bool = True) -> Compiled:
    """With these patches; tests share it until another is compiled, as that takes 10 s."""
    return _usual(embedded, ple)


@functools.lru_cache(maxsize=1)
def _usual(embedded: bool, ple: bool) -> Compiled:
    return _compiled(embedded, ple=ple)


def _compiled(embedded: bool, **kwargs: Any) -> Compiled:
    torch._dynamo.reset()
    memory, model = shared_kv.Memory(), shared_kv.build(**kwargs)
    return Compiled(memory, model, piecewise.runner(model, memory, SIZES, embedded))


def engaged(name: str = NAME) -> int:
    return ENGINE.runs[name].counters.engaged


def eager(model: Any, batch: Any) -> torch.Tensor:
    """As outside of a piecewise graph."""
    return type(model).forward(model, batch.input_ids, batch.positions, batch)


def last_rows(batch: Any) -> torch.Tensor:
    """The rows that SGLang's logits processor picks."""
    return torch.cumsum(batch.extend_seq_lens, dim=0) - 1


def layer_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Number and rows of every layer that runs outside of what was traced."""
    seen: list[tuple[int, int]] = []
    numbers = {id(layer): index for index, layer in enumerate(model.layers)}
    kind = type(model.layers[0])
    run = kind.forward

    # On the class: a forward that is set on a layer is a hook, and all rows go through it.
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((numbers[id(self)], len(kwargs["hidden_states"])))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    return seen


@pytest.mark.parametrize(
    ("lengths", "prefixes", "ple", "embedded"),
    [
        (*BATCHES[0], False, False),
        (*BATCHES[3], True, True),
        *((*batch, True, False) for batch in BATCHES),
    ],
)
def test_the_rows_that_are_wanted_are_those_of_the_eager_cut(
    lengths: dict[int, int], prefixes: dict[int, int], ple: bool, embedded: bool
):
    """Bit for bit, and near stock's; all other rows, those of the padding too, are zeros."""
    _, model, runner = usual(embedded, ple)
    batch = usual(embedded, ple).batch(lengths, prefixes)
    assert runner.between() == [ATTENTION] * shared_kv.SHARED_FROM + [LAYERS]
    before = engaged()
    found = runner.prefill(batch)
    assert engaged() == before + 1
    assert not ENGINE.runs[NAME]._decline_reason
    rows = last_rows(batch)
    whole = torch.zeros_like(found)
    _, batch = made(lengths, prefixes)
    before = engaged("yoco")
    whole[rows] = eager(model, batch)[rows]
    assert engaged("yoco") == before + 1
    assert torch.equal(found, whole)
    assert found.abs().sum(1).count_nonzero() == len(rows)
    ENGINE.revert()
    _, batch = made(lengths, prefixes)
    expected = eager(model, batch).float()
    difference = (found[rows].float() - expected[rows]).abs().max()
    assert difference / expected.abs().max() < 0.01


def test_the_graph_takes_and_gives_tensors():
    """SGLang keeps the pieces' outputs as weak references, which it makes of tensors only."""
    runner = usual().runner
    graphs = [piece.graph.graph for piece in runner.pieces if not piece.is_splitting_graph]
    assert len(graphs) == shared_kv.SHARED_FROM + 1
    for graph in graphs:
        (output,) = [node for node in graph.nodes if node.op == "output"]
        given = output.args[0]
        for node in given if isinstance(given, (list, tuple)) else [given]:
            assert isinstance(node.meta["example_value"], torch.Tensor), node
        # SGLang finds a recorded graph by the number of tokens that a piece is handed.
        inputs = [node.meta["example_value"] for node in graph.nodes if node.op == "placeholder"]
        assert any(isinstance(value, torch.SymInt) for value in inputs)


def test_the_layers_behind_the_cut_see_the_rows_only(monkeypatch: pytest.MonkeyPatch):
    """The others are in the graphs: no layer of theirs runs by itself."""
    _, model, runner = usual()
    batch = usual().batch(*BATCHES[0])
    seen = layer_rows(model, monkeypatch)
    call_operator(runner, batch)
    assert seen == [(3, 2), (4, 2), (5, 2)]


@pytest.mark.parametrize("unfinished", [None, [True, True]])
def test_the_operator_writes_what_its_schema_says(
    unfinished: list[bool] | None, monkeypatch: pytest.MonkeyPatch
):
    """The output alone, also where no layer runs."""
    runner, batch = usual().runner, usual().batch(*BATCHES[0])
    if unfinished is not None:
        setattr(batch.seq_lens_cpu, yoco_cut.UNFINISHED, unfinished)
    operator = yoco_piecewise._ops["layers"]
    monkeypatch.setattr(yoco_piecewise, "shared_layers", functools.partial(checked, operator))
    call_operator(runner, batch)


@pytest.mark.parametrize("unfinished", [[True, False], [False, True], [True, True]])
def test_unfinished_prompts_cost_nothing_behind_the_cut(
    unfinished: list[bool], monkeypatch: pytest.MonkeyPatch
):
    """What the batch was told reaches the one that SGLang makes of it for the graphs."""
    _, model, runner = usual()
    batch = usual().batch(*BATCHES[0])
    setattr(batch.seq_lens_cpu, yoco_cut.UNFINISHED, unfinished)
    rows = last_rows(batch)[[not one for one in unfinished]]
    found = runner.prefill(batch)
    assert found.abs().sum(1).nonzero().flatten().tolist() == rows.tolist()
    _, again = made(*BATCHES[0])
    setattr(again.seq_lens_cpu, yoco_cut.UNFINISHED, unfinished)
    assert torch.equal(found[rows], eager(model, again)[rows])
    seen = layer_rows(model, monkeypatch)
    call_operator(runner, batch)
    assert seen == [(index, len(rows)) for index in (3, 4, 5) if len(rows)]


class Recorded:
    """A graph's stand-in. What it records is not run before `replay`, as on a GPU."""

    replays = 0

    def __init__(self, function: Callable[[], torch.Tensor], pool: Any) -> None:
        self.function, self.pool = function, object()

    def replay(self) -> torch.Tensor:
        Recorded.replays += 1
        return self.function()


def test_the_layers_run_in_a_graph_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """Together with `yoco_graph`: eager, recorded, run; every time the same bits."""
    apply("yoco_graph")
    monkeypatch.setattr(yoco_graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(yoco_graph, "capture", Recorded)
    monkeypatch.setattr(Recorded, "replays", 0)
    batch, runner = usual().batch({1: 10, 2: 6}, {}), usual().runner
    before = engaged("yoco_graph")
    found = [runner.prefill(batch)[last_rows(batch)].clone() for _ in range(3)]
    assert engaged("yoco_graph") == before + 2  # the first one ran eagerly
    assert ENGINE.runs["yoco_graph"]._decline_reason == yoco_graph.FIRST
    assert Recorded.replays == 2
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_without_the_patch_every_layer_is_traced():
    ENGINE.apply(only=["yoco", "optional_kv"])
    memory, _, runner = compiled()
    _, batch = made(*BATCHES[0], memory)
    assert runner.between() == [ATTENTION] * 3 + [WITHOUT_KV] * 3
    found = runner.prefill(batch)
    assert found[: batch.extend_num_tokens].abs().sum(1).count_nonzero() == batch.extend_num_tokens
    assert "runs in a piecewise CUDA graph" in ENGINE.runs["yoco"].full_reason()


def test_made_up_batches_run_no_layer(monkeypatch: pytest.MonkeyPatch):
    """While SGLang compiles and records, the operator only clears the rows."""
    from sglang.srt.compilation import piecewise_context_manager as context

    before = engaged()
    memory, model, _ = compiled()
    assert engaged() == before
    _, batch = made(*BATCHES[0], memory)
    seen = layer_rows(model, monkeypatch)
    for state in ("compile", "capture"):
        with monkeypatch.context() as patch:
            if state == "compile":
                patch.setattr(context, "_in_pcg_torch_compile", True)
            else:
                patch.setattr(context, "_pcg_capture_stream", object())
            output = torch.ones(24, 256, dtype=shared_kv.DTYPE)
            number, _ = vars(model)[yoco_piecewise._CUT]
            yoco_piecewise.shared_layers(output, None, None, None, batch.positions, output, number)
        assert not output.any()
    assert seen == []
    assert engaged() == before


def test_the_first_layers_input_comes_normed(monkeypatch: pytest.MonkeyPatch):
    """From the last piece, where `input_norm` is in; its rows are cut like the others."""
    apply("input_norm", "ple_tail")
    memory, model, runner = compiled()
    _, batch = made(*BATCHES[0], memory)
    seen: list[yoco_cut.Tail] = []
    cut = yoco_cut.tail

    def tail(*args: Any) -> yoco_cut.Tail:
        seen.append(cut(*args))
        return seen[-1]

    monkeypatch.setattr(yoco_cut, "tail", tail)
    rows = last_rows(batch)
    found = runner.prefill(batch)[rows].clone()
    _, batch = made(*BATCHES[0])
    assert torch.equal(found, eager(model, batch)[rows])
    traced, plain = (one.normed for one in seen)
    assert traced is not None
    assert plain is not None
    assert torch.equal(traced, plain)


# -- batches that are not cut -----------------------------------------------------------------------


Tokens = tuple[tuple[int, int], ...]


@pytest.fixture(scope="module")
def stocks(applied: None) -> dict[Tokens, torch.Tensor]:
    """All rows of two batches through SGLang's pieces, without the cut."""
    ENGINE.apply(only=["optional_kv"])
    with torch.no_grad():
        memory, _, runner = compiled()
        rows = {}
        for lengths, prefixes in (BATCHES[0], SINGLES):
            _, batch = made(lengths, prefixes, memory)
            rows[tuple(lengths.items())] = runner.prefill(batch)[: batch.extend_num_tokens].clone()
    return rows


def assert_stocks(
    found: torch.Tensor, stocks: dict[Tokens, torch.Tensor], lengths: dict[int, int]
) -> None:
    expected = stocks[tuple(lengths.items())]
    assert torch.equal(found[: len(expected)], expected)


def test_every_row_is_wanted(stocks: dict[Tokens, torch.Tensor]):
    lengths, prefixes = SINGLES
    batch, runner = usual().batch(lengths, prefixes), usual().runner
    before = engaged()
    found = runner.prefill(batch).clone()
    assert engaged() == before
    assert "every row's logits are wanted" in ENGINE.runs[NAME].full_reason()
    assert_stocks(found, stocks, lengths)


def test_a_batch_that_is_refused(
    monkeypatch: pytest.MonkeyPatch, stocks: dict[Tokens, torch.Tensor]
):
    batch, runner = usual().batch(*BATCHES[0]), usual().runner
    monkeypatch.setattr(yoco_cut, "batch_unfit", lambda *args: "of a reason")
    before = engaged()
    found = runner.prefill(batch).clone()
    assert engaged() == before
    assert "of a reason" in ENGINE.runs[NAME].full_reason()
    assert_stocks(found, stocks, BATCHES[0][0])


@pytest.mark.parametrize("left", [("yoco", "optional_kv"), ("optional_kv",)])
def test_graphs_outlive_the_patch(left: tuple[str, ...], stocks: dict[Tokens, torch.Tensor]):
    """They call the operator, which runs all rows from then on."""
    batch, runner = usual().batch(*BATCHES[0]), usual().runner
    before = engaged()
    found = runner.prefill(batch)
    assert engaged() == before + 1
    assert found.abs().sum(1).count_nonzero() == batch.batch_size
    ENGINE.apply(only=left)
    found = runner.prefill(batch).clone()
    assert_stocks(found, stocks, BATCHES[0][0])


def call_operator(runner: Any, batch: Any) -> torch.Tensor:
    """What the operator gives for random hidden states, Dynamo's guards apart."""
    from sglang.srt.compilation import piecewise_context_manager as context

    number, _ = vars(runner.text)[yoco_piecewise._CUT]
    hidden = torch.randn(batch.extend_num_tokens, 256, generator=torch.Generator().manual_seed(3))
    hidden = hidden.to(shared_kv.DTYPE)
    output = torch.full_like(hidden, torch.nan)
    ple = torch.randn(len(hidden), 6, 256, generator=torch.Generator().manual_seed(4))
    with (
        context.enable_piecewise_cuda_graph(),
        context.set_forward_context(batch, runner.attention_layers, None, [], []),
    ):
        runner.model_runner.attn_backend.init_forward_metadata(batch)
        yoco_piecewise.shared_layers(
            hidden, None, None, ple.to(hidden.dtype), batch.positions, output, number
        )
    return output


# -- servers whose graphs are not cut -------------------------------------------------------------


def test_every_refusal_of_the_server(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.server_args import get_global_server_args

    _, batch = made(*BATCHES[0])
    model = shared_kv.build()
    arguments = get_global_server_args()
    assert yoco_piecewise.unfit(model, batch, {}) is None
    values = dict.fromkeys(yoco_piecewise.OFF, True) | {"speculative_algorithm": "EAGLE"}
    for name, reason in yoco_piecewise.OFF.items():
        with monkeypatch.context() as patch:
            patch.setattr(arguments, name, values[name])
            assert yoco_piecewise.unfit(model, batch, {}) == reason
    with monkeypatch.context() as patch:
        patch.setattr("sglang.srt.distributed.get_tensor_model_parallel_world_size", lambda: 2)
        assert "tensor parallelism" in (yoco_piecewise.unfit(model, batch, {}) or "")
    with monkeypatch.context() as patch:
        patch.setattr(ENGINE.runs["optional_kv"], "state", states.DRIFTED)
        assert "`optional_kv` is off" in (yoco_piecewise.unfit(model, batch, {}) or "")
    with monkeypatch.context() as patch:
        patch.setattr(yoco_cut.YOCO, "run", None)
        assert yoco_piecewise.unfit(model, batch, {}) == "`yoco` is off"
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "is_embedding", True)  # one of those that `yoco` has too
        assert "embeddings" in (yoco_piecewise.unfit(model, batch, {}) or "")
    assert yoco_piecewise.unfit(model, batch, {"pp_proxy": 1}) == "the caller passes pp_proxy"


def test_a_refused_server_is_stocks(
    monkeypatch: pytest.MonkeyPatch, stocks: dict[Tokens, torch.Tensor]
):
    from sglang.srt.server_args import get_global_server_args

    monkeypatch.setattr(get_global_server_args(), "enable_mis", True)
    memory, model, runner = compiled()
    _, batch = made(*BATCHES[0], memory)
    assert not hasattr(model, yoco_piecewise._CUT)
    assert runner.between() == [ATTENTION] * 3 + [WITHOUT_KV] * 3
    assert "multi-item scoring" in ENGINE.runs[NAME].full_reason()
    found = runner.prefill(batch).clone()
    assert_stocks(found, stocks, BATCHES[0][0])


def test_a_model_whose_layers_share_nothing():
    memory, _, runner = compiled(shared=0)
    _, batch = made(*BATCHES[0], memory)
    assert runner.between() == [ATTENTION] * 6
    assert "no KV-shared layers" in ENGINE.runs[NAME].full_reason()
    found = runner.prefill(batch)
    assert found[: batch.extend_num_tokens].abs().sum(1).count_nonzero() == batch.extend_num_tokens


def test_revert_and_the_end_of_a_model():
    from sglang.srt.compilation.compilation_config import CompilationConfig

    assert set(yoco_piecewise.SPLIT_NAMES) <= set(CompilationConfig([1]).split_ops)
    model = shared_kv.build()
    number = next(yoco_piecewise._numbers)
    yoco_piecewise._models[number] = model
    ENGINE.revert()
    assert not set(yoco_piecewise.SPLIT_NAMES) & set(CompilationConfig([1]).split_ops)
    assert yoco_piecewise.YOCO_PIECEWISE.run is None
    del model
    gc.collect()
    assert number not in yoco_piecewise._models


def test_an_eager_prefill_prepares_nothing():
    """Only the step right before SGLang compiles decides."""
    model = shared_kv.build()
    _, batch = made(*BATCHES[0])
    eager(model, batch)
    assert not hasattr(model, yoco_piecewise._CUT)
    assert engaged("yoco")


# -- who sees the rows -----------------------------------------------------------------------------------


def test_a_hook_before_the_trace_is_traced_with_all_rows():
    """As by stock: every layer is in the graphs, and the hook with it."""
    _, batch = made(*BATCHES[0])
    model = shared_kv.build()
    assert yoco_piecewise.unfit(model, batch, {}) is None
    with model.norm.register_forward_hook(lambda *given: None):
        assert "has forward hooks" in str(yoco_piecewise.unfit(model, batch, {}))


def test_a_hook_that_comes_later_gets_all_rows(stocks: dict[Tokens, torch.Tensor]):
    """The operator is there: it cuts nothing for as long as there is a hook."""
    _, model, runner = usual()
    batch = usual().batch(*BATCHES[0])
    seen: list[int] = []
    before = engaged()
    with model.layers[-1].mlp.register_forward_hook(
        lambda module, given, found: seen.append(given[0].shape[0])
    ):
        found = runner.prefill(batch).clone()
    assert seen == [len(found)]
    assert engaged() == before
    runner.prefill(batch)
    assert engaged() == before + 1
    assert_stocks(found, stocks, BATCHES[0][0])


@pytest.mark.parametrize("where", ["batch_unfit", "tail", "plan"])
def test_an_error_of_ours_leaves_all_rows(
    where: str, monkeypatch: pytest.MonkeyPatch, stocks: dict[Tokens, torch.Tensor]
):
    batch, runner = usual().batch(*BATCHES[0]), usual().runner
    tries: list[Any] = []

    def fails(*given: Any) -> Any:
        tries.append(given)
        raise AttributeError("no such thing")

    with monkeypatch.context() as context:
        context.setattr(yoco_cut, where, fails)
        outputs = [runner.prefill(batch).clone() for _ in range(2)]
    assert len(tries) == 1
    assert ENGINE.runs[NAME].state == states.FAILED
    for found in outputs:
        assert_stocks(found, stocks, BATCHES[0][0])
