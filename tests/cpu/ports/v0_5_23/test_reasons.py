"""No patch is silently inactive: what a model or a server gives it nothing to do for is in its row."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.decode_step import attention, layer_steps
from tests.cpu import interpreted, shared_kv
from tests.cpu.ports import reasons
from tests.cpu.ports.counted import counted
from tests.cpu.ports.v0_5_23 import models, sharing

pytestmark = interpreted.MARKS
CUT = ("yoco", "yoco_graph", "optional_kv", "yoco_piecewise")
# `qkv_norm` is upstreamed here, and `router_norm` has no port.
OF_LAYERS = reasons.OF_LAYERS - {"router_norm"}


@pytest.fixture(autouse=True)
def stock(tmp_path: Any) -> Iterator[None]:
    """Stock at first; reverted at the end."""
    with models.stock(tmp_path):
        yield


def eager_server() -> Any:
    """SGLang's arguments without CUDA graphs of prefill."""
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
    from sglang.srt.runtime_context import get_exec

    config = CudaGraphConfig()
    config.prefill.backend = "disabled"
    return get_exec().graph.override(cuda_graph_config=config)


# A dense layer lacks experts and per-layer embeddings, one with experts the latter, "ple" experts.
@pytest.mark.parametrize("kind", ["moe", "ple", "dense"])
def test_every_patch_of_a_layer_has_run_or_says_why_not(kind: str):
    model = models.build(kind)
    with eager_server():
        rows = reasons.silent(lambda: models.run(model, 2), OF_LAYERS | {"yoco_piecewise"})
    assert rows == []
    reasons.check_absent(kind)


def test_a_patch_that_is_given_later_says_it_too():
    """The layers were looked at before."""
    model = models.build("dense")
    ENGINE.apply(only=["layer_norms"])
    models.run(model, 2)
    assert reasons.silent(lambda: models.run(model, 2), {"experts_sum", "ple_tail"}) == []


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_what_is_done_at_once_is_said_where_it_would_have_been_done(kind: str):
    """By the patches, on tensors that tell of a change in place; and of a layer without experts."""
    model = models.build(kind)
    names = {"layer_norms", "feed_forward_few", "experts_sum", "mlp_stream", "router_few"}
    assert reasons.silent(lambda: models.run(model, 2), names) == []
    said = layer_steps.COVERED if kind == "moe" else layer_steps.NO_EXPERTS
    for name in ("experts_sum", "mlp_stream", "router_few"):
        assert reasons.of(name).endswith(said)


def test_where_the_norms_are_stocks_the_router_is_not_asked():
    model = models.build("moe")
    for layer in model.layers:
        layer.pre_feedforward_layernorm_2.register_forward_hook(lambda *_: None)
    ENGINE.apply(only=["layer_norms", "router_few"])
    models.run(model, 2)
    assert "layer_norms did not make" in reasons.of("router_few")


# Both orders; the reason that graphs have is shown, whatever an eager step said.
@pytest.mark.parametrize("captures", [(False, True), (True, False)])
def test_what_is_for_graphs_alone_says_what_holds_there(
    monkeypatch: pytest.MonkeyPatch, captures: tuple[bool, ...]
):
    model = models.build("moe")
    ENGINE.apply(only=["mlp_stream"])
    before = counted("mlp_stream").declined
    for capturing in captures:
        monkeypatch.setattr(layer_steps, "capturing", lambda found=capturing: found)
        models.run(model, layer_steps.MLP_STREAM_ROWS + 1)
    assert counted("mlp_stream").declined == before + 2 * len(model.layers)
    assert reasons.of("mlp_stream").endswith("more than 64 tokens")


@pytest.mark.parametrize("names", [["pdl"], ["layer_norms", "feed_forward_few"]])
def test_a_step_that_is_out_is_not_asked(monkeypatch: pytest.MonkeyPatch, names: list[str]):
    """Of a layer with experts, in an eager decode step: without `layer_norms`, and all done at once."""
    from gemma4_turbo.fusions.fusion import Fusion, Step

    model = models.build("moe")
    ENGINE.apply(only=names)
    models.run(model, 2)  # what a layer does not have is said once
    asked: list[str] = []

    def noting(name: str, theirs: Any) -> Any:
        def call(self: Any, *args: Any) -> Any:
            if self.run is None:
                asked.append(f"{type(self).__name__}.{name}")
            return theirs(self, *args)

        return call

    for kind, name in ((Step, "declined"), (Fusion, "settled"), (Fusion, "__call__")):
        monkeypatch.setattr(kind, name, noting(name, getattr(kind, name)))
    models.run(model, 2)
    assert asked == []


def test_what_is_between_two_layers_is_stocks():
    reasons.check_between(models.build("ple"), models.run)


def test_norms_that_are_not_the_usual_ones_are_said():
    model = models.build("dense")
    ENGINE.apply(only=["qkv_norm", "rope_store"])
    for layer in model.layers:
        layer.self_attn.q_norm.scale_shift = 1.0
    models.run(model, 2)
    assert "not Gemma 4's usual ones" in reasons.of("rope_store")
    assert attention.ROPE_STORE.run is not None


def test_a_model_over_pipeline_ranks_says_it_for_each_part_of_the_cut():
    ENGINE.apply(only=CUT)
    model = sharing.build()
    memory = sharing.Memory().fill()
    batch = memory.prefill({1: 3}, {1: 2})
    group = model.pp_group
    model.pp_group = SimpleNamespace(
        world_size=2, is_first_rank=group.is_first_rank, is_last_rank=group.is_last_rank
    )
    found = memory.run(model, batch)
    for name in ("yoco", "yoco_graph", "yoco_piecewise"):
        assert "pipeline parallelism" in reasons.of(name)
    ENGINE.revert()
    memory = sharing.Memory().fill()
    assert torch.equal(found, memory.run(model, memory.prefill({1: 3}, {1: 2})))


def test_a_prefill_whose_rows_are_all_wanted_leaves_the_tails_graphs_idle():
    ENGINE.apply(only=CUT)
    model = sharing.build()
    memory = sharing.Memory().fill()
    batch = memory.prefill({1: 3}, {1: 2}, lora_ids=["a"])
    with eager_server():
        memory.run(model, batch)
    assert reasons.of("yoco").endswith("LoRA")
    assert reasons.of("yoco_graph").endswith("no rows are cut: LoRA")
    assert len(model.layers) == len(shared_kv.TYPES)
