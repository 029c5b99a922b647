"""`mm_prefill_graph` of E2B and E4B with pictures: a replay is stock's eager prefill."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.prefill import mm_prefill_graph as common
from tests.cpu import interpreted, shared_kv
from tests.cpu.conftest import patched_sglang
from tests.cpu.ports.v0_5_23 import pictures
from tests.cpu.ports.v0_5_23.pictures import Prompt

NAME = "mm_prefill_graph"
WHOLE = (NAME, "optional_kv")
CUT = (*WHOLE, "yoco", "yoco_piecewise")
pytestmark = interpreted.MARKS


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    sglang_process.prepare_sglang()
    with patched_sglang(tmp_path_factory, only=WHOLE):
        import sglang.srt.arg_groups.cuda_graph_hook
        import sglang.srt.model_executor.model_runner  # noqa: F401

        yield


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        pictures.exact_products(patch)
        yield


def serve(patches: tuple[str, ...]) -> Any:
    """A server with these patches and no others."""
    ENGINE.revert()
    ENGINE.apply(only=patches)
    for name in patches:
        run = ENGINE.runs[name]
        assert run.state == states.ACTIVE, f"{name}: {run.reason}"
        run._decline_reason = ""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        pictures.exact_products(patch)
        made = pictures.Server()
    assert made.graphs != "eager", ENGINE.runs[NAME].full_reason()
    return made


@pytest.fixture(scope="module")
def whole(applied: None) -> Any:
    return serve(WHOLE)


@pytest.fixture(scope="module")
def cut(applied: None, whole: Any) -> Any:
    """Comes last: the graphs of ``whole`` end where other patches are put in."""
    return serve(CUT)


Steps = list[dict[int, Prompt]]

INTERLEAVED: Steps = [{2: Prompt(11, pictures=((2, 4), (6, 8)))}]
ONLY_PICTURES: Steps = [{0: Prompt(8, pictures=((0, 3), (4, 7)))}]
SHORT: Steps = [{3: Prompt(5, pictures=((1, 2),))}]
SHORTER_THAN_STOCK_PADS: Steps = [{3: Prompt(3, pictures=((1, 1),))}]
# The chunk ends inside the second picture; the next one begins there.
CHUNKS: Steps = [
    {4: Prompt(8, pictures=((1, 2), (5, 10)))},
    {4: Prompt(6, prefix=8, pictures=((1, 2), (5, 10)))},
]
MIXED: Steps = [
    {1: Prompt(9)},
    {
        0: Prompt(4, placeholders=(0, 1, 3)),
        1: Prompt(3, prefix=9),
        2: Prompt(6, pictures=((1, 4),)),
        5: Prompt(2),
    },
]
TEXT_AFTER_PICTURES: Steps = [
    {2: Prompt(16, pictures=((3, 9),))},
    {1: Prompt(10, placeholders=(4, 2, 0))},
]


def run(server: Any, steps: Steps, how: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states of each step's rows, and the KV pools at the end."""
    server.memory.fill()
    found = []
    for prompts in steps:
        rows = sum(prompt.tokens for prompt in prompts.values())
        found.append(how(server.batch(prompts))[:rows])
    # Slot 0 is nobody's.
    return found, [buffer[1:].clone() for buffer in server.memory.buffers()]


def assert_same(server: Any, steps: Steps) -> None:
    """A replay of each step gives what stock computes without a graph, to the bit."""
    expected, pools = run(server, steps, server.eager)
    found, ours = run(server, steps, server.replay)
    for seen, stocks in zip(found, expected, strict=True):
        assert stocks.isfinite().all()
        assert torch.equal(seen, stocks)
    assert all(map(torch.equal, ours, pools))


@pytest.mark.parametrize(
    ("steps", "graphed"),
    [
        (INTERLEAVED, True),
        (ONLY_PICTURES, True),  # no padding
        (SHORT, True),  # shorter than the smallest graph
        (
            SHORTER_THAN_STOCK_PADS,
            False,
        ),  # than half of it: stock takes none, though it would be right
        (CHUNKS, True),
        (MIXED, True),
        (TEXT_AFTER_PICTURES, True),
    ],
    ids=["interleaved", "only pictures", "short", "shorter", "chunks", "mixed", "text after"],
)
def test_a_replay_is_stocks_eager_prefill(whole: Any, steps: Steps, graphed: bool):
    stocks = type(whole.model.language_model).forward.__code__.co_filename
    assert stocks.endswith("gemma4_causal.py")
    assert all(whole.runs(whole.batch(prompts)) is graphed for prompts in steps)
    assert_same(whole, steps)


def test_what_lies_in_the_buffers_is_in_no_row(whole: Any):
    """Also not in those of the padding: every row that a graph reads is written before."""
    for size in pictures.SIZES:
        steps = [{2: Prompt(size - 3, pictures=((1, 3),))}]
        expected, _ = run(whole, steps, whole.eager)
        inputs = whole.graphs._fill_input_embeds_slot.args[0]
        inputs.per_layer.fill_(float("nan"))
        for name, poison in (
            ("input_embeds", float("nan")),
            ("input_ids", 10**6),
            ("positions", 50),
        ):
            whole.graphs.buffer_registry.get_slot(name).buffer.fill_(poison)
        whole.memory.fill()
        found = whole.replay(whole.batch(steps[0]))
        assert len(found) == size
        assert found.isfinite().all()
        assert torch.equal(found[: size - 3], expected[0])
    assert not inputs.per_layer[: pictures.SIZES[-1]].isnan().any()


def test_rows_that_sglang_leaves_out_are_zero(whole: Any):
    """Should a later SGLang look up the prompt's rows alone."""
    inputs = whole.graphs._fill_input_embeds_slot.args[0]
    inputs.per_layer.fill_(float("nan"))
    live = torch.ones(3, *inputs.per_layer.shape[1:])
    inputs.fill({"per_layer_inputs": live}, 8)
    assert (inputs.per_layer[:3] == 1).all()
    assert (inputs.per_layer[3:8] == 0).all()
    assert inputs.per_layer[8:].isnan().all()


def test_per_layer_inputs_are_what_the_comparison_sees(whole: Any, monkeypatch: pytest.MonkeyPatch):
    """Stock's graphs go without them."""
    inputs = whole.graphs._fill_input_embeds_slot.args[0]
    monkeypatch.setattr(type(inputs), "fill", lambda self, given, tokens: self.per_layer.zero_())
    with pytest.raises(AssertionError):
        assert_same(whole, INTERLEAVED)


# -- weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "embed_tokens_per_layer.weight",
        "per_layer_model_projection.weight",
        "per_layer_projection_norm.weight",
        "layers.0.per_layer_input_gate.weight",
        "norm.weight",
    ],
)
def test_weights_written_over_are_read(whole: Any, name: str):
    """As SGLang's update of weights does it."""
    weight = whole.model.language_model.get_parameter(name)
    kept = weight.clone()
    before, _ = run(whole, INTERLEAVED, whole.replay)
    weight.mul_(-0.5)
    try:
        assert whole.runs(whole.batch(INTERLEAVED[0]))
        assert_same(whole, INTERLEAVED)
        after, _ = run(whole, INTERLEAVED, whole.replay)
        assert not torch.equal(before[0], after[0])
    finally:
        weight.copy_(kept)


@contextlib.contextmanager
def replaced(model: Any, name: str) -> Iterator[None]:
    """Another parameter, of other values, in a weight's place."""
    module, _, kind = name.rpartition(".")
    owner = model.get_submodule(module)
    kept = getattr(owner, kind)
    setattr(owner, kind, torch.nn.Parameter(kept * -0.5, requires_grad=False))
    try:
        yield
    finally:
        setattr(owner, kind, kept)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "embed_tokens_per_layer.weight"])
def test_tables_put_in_the_place_of_others_are_read(whole: Any, name: str):
    """They are looked up before the graphs."""
    with replaced(whole.model.language_model, name):
        assert whole.runs(whole.batch(INTERLEAVED[0]))
        assert_same(whole, INTERLEAVED)


@pytest.mark.parametrize(
    "name",
    [
        "per_layer_model_projection.weight",
        "per_layer_projection_norm.weight",
        "norm.weight",
        "layers.4.self_attn.q_norm.weight",
    ],
)
def test_weights_put_in_the_place_of_others_are_missed(whole: Any, name: str):
    """A graph would go on with those that are gone."""
    model = whole.model.language_model
    with replaced(model, name):
        assert common.recorded[model].watched.moved()
    assert not common.recorded[model].watched.moved()


# -- what is recorded with what ------------------------------------------------------------------------


def test_the_layers_that_share_kv_are_in_the_graphs(whole: Any):
    """Each attention is a break. Nothing stays of the recording."""
    assert ENGINE.runs["optional_kv"].counters.engaged
    for graph in whole.graphs.backend.graphs.values():
        assert len(graph._break_fns) == len(shared_kv.TYPES)
    assert not common.recording


def test_the_cut_is_made_between_two_graphs(whole: Any, cut: Any):
    """As on a text-only model: rows that nobody reads are zeros, the last of each prompt is stock's."""
    for graph in cut.graphs.backend.graphs.values():
        assert len(graph._break_fns) == shared_kv.SHARED_FROM + 1
    run_of = ENGINE.runs["yoco_piecewise"]
    for steps in (INTERLEAVED, CHUNKS, MIXED, TEXT_AFTER_PICTURES):
        expected, pools = run(whole, steps, whole.eager)
        before = run_of.counters.engaged
        with pytest.MonkeyPatch.context() as patch:
            seen = shared_kv.rows_per_layer(cut.model.language_model, patch)
            found, ours = run(cut, steps, cut.replay)
        assert run_of.counters.engaged == before + len(steps)
        assert seen == [len(prompts) for prompts in steps for _ in range(3)]
        for prompts, rows, stocks in zip(steps, found, expected, strict=True):
            lengths = torch.tensor([prompt.tokens for prompt in prompts.values()])
            last = lengths.cumsum(0) - 1
            shared_kv.assert_near(rows[last], stocks[last])
            others = torch.ones(len(rows), dtype=torch.bool)
            others[last] = False
            assert not rows[others].any()
        assert all(map(torch.equal, ours, pools))


def test_a_forward_of_somebody_elses_is_no_cut(cut: Any):
    """While a graph is recorded the model's forward is the patch's; any other is not known."""
    from gemma4_turbo.ports.v0_5_23.prefill import yoco

    model = cut.model.language_model
    common.recording[model] = ours = lambda: None
    try:
        assert yoco._sets_forward(model, ours)
        assert not yoco._sets_forward(model, lambda: None)
    finally:
        del common.recording[model]
    assert not yoco._sets_forward(model, ours)


@pytest.mark.parametrize(
    ("broken", "why"),
    [("optional_kv", "with `optional_kv` only"), ("yoco_piecewise", "without `yoco_piecewise`")],
)
def test_where_they_are_recorded_it_is_looked_again(
    cut: Any, broken: str, why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ENGINE.runs[broken], "state", states.CONFLICT)
    monkeypatch.setattr(ENGINE.runs[NAME], "_decline_reason", "")
    assert pictures.Server().graphs == "eager"
    assert why in ENGINE.runs[NAME].full_reason()
    assert ENGINE.runs[NAME].state == states.ACTIVE


def test_a_replaced_weight_ends_the_graphs(cut: Any):
    batch = cut.batch(INTERLEAVED[0])
    assert cut.runs(batch)
    with replaced(cut.model.language_model, "per_layer_model_projection.weight"):
        assert not cut.runs(batch)
    assert cut.runner.prefill_cuda_graph_runner == "eager"
    assert cut.graphs.backend.cleaned
    assert not cut.runs(batch)
    assert common.MOVED in ENGINE.runs[NAME].full_reason()


def test_a_recording_that_breaks_off_leaves_no_mark(cut: Any, monkeypatch: pytest.MonkeyPatch):
    """The server goes on without graphs; nobody takes the model for one that is recorded."""

    def capture_one(*given: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(pictures.Backend, "capture_one", capture_one)
    server = pictures.Server()
    assert server.graphs == "eager"
    assert ENGINE.runs[NAME].state == states.FAILED
    assert not common.recording
    assert "forward" not in vars(server.model.language_model)
