"""Piecewise graphs for a model that takes pictures: who gets them, and what a graph would read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo import catalogue
from gemma4_turbo.engine import states, switches
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.prefill import mm_prefill_graph as common
from gemma4_turbo.ports.v0_5_12.prefill import mm_prefill_graph as patch
from tests.cpu import vision
from tests.cpu.conftest import REPOSITORY, only_patch, patched_sglang
from tests.cpu.ports.counted import counted

NAME = "mm_prefill_graph"
ALIAS = "SGLANG_ENABLE_PIECEWISE_CUDA_GRAPH_FOR_MM"
TOKENS, PADDED, MOST = 7, 12, 32
LAYERS, PER_LAYER = 3, 4


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        import sglang.srt.managers.mm_utils  # noqa: F401

        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME):
        yield


# -- the decision ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return vision.folders(tmp_path_factory.mktemp("models"))


def disabled(model: Path, **given: Any) -> bool:
    """Whether SGLang's own arguments, read for this model, leave piecewise graphs out."""
    from sglang.srt.server_args import ServerArgs

    # On a CPU SGLang would choose another attention backend before it comes to the graphs.
    given = {"attention_backend": "triton", **given}
    arguments = ServerArgs(model_path=str(model), device="cpu", load_format="dummy", **given)
    assert arguments.get_model_config().is_multimodal == (model.name != "text")
    return bool(arguments.disable_piecewise_cuda_graph)


def test_stock_leaves_them_out_of_every_multimodal_model(models: dict[str, Path]):
    ENGINE.revert()
    assert all(disabled(folder) for name, folder in models.items() if name != "text")
    assert not disabled(models["text"])


@pytest.mark.parametrize("name", ["26b-a4b", "31b"])
def test_models_without_shared_kv_get_them(models: dict[str, Path], name: str):
    before = ENGINE.runs[NAME].counters.engaged
    assert not disabled(models[name])
    assert ENGINE.runs[NAME].counters.engaged == before  # none is recorded yet


CUT = ("yoco", "optional_kv", "yoco_piecewise")


@pytest.mark.parametrize("name", ["e2b", "e4b"])
@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ((), "with `optional_kv` only"),
        (("yoco",), "with `optional_kv` only"),
        (("optional_kv",), None),
        (CUT[:2], "without `yoco_piecewise`"),
        (CUT, None),
    ],
)
def test_models_that_share_kv_get_them_with_what_they_need(
    models: dict[str, Path], name: str, others: tuple[str, ...], reason: str | None
):
    ENGINE.apply(only=[NAME, *others])
    assert disabled(models[name]) == (reason is not None)
    if reason is not None:
        assert reason in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize("broken", ["optional_kv", "yoco_piecewise"])
def test_a_patch_that_does_not_fit_is_not_counted_on(
    models: dict[str, Path], broken: str, monkeypatch: pytest.MonkeyPatch
):
    ENGINE.apply(only=[NAME, *CUT])
    monkeypatch.setattr(ENGINE.runs[broken], "state", states.CONFLICT)
    assert disabled(models["e2b"])
    assert broken in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("26b-a4b", {"disable_piecewise_cuda_graph": True}, "on the command line"),
        ("26b-a4b", {"enable_mixed_chunk": True}, "mixed chunks"),
        ("26b-a4b", {"enable_breakable_cuda_graph": True}, "breakable"),
        ("26b-a4b", {"attention_backend": "torch_native"}, "attention backend torch_native"),
        ("26b-a4b", {"tp_size": 2}, "tensor parallelism"),
        ("26b-a4b", {"disable_cuda_graph": True}, "CUDA graphs are switched off"),
        ("26b-a4b", {"enable_return_hidden_states": True}, "hidden states are returned"),
        ("26b-a4b", {"rl_on_policy_target": "fsdp"}, "deterministic inference"),
        ("26b-a4b", {"enable_deterministic_inference": True}, "deterministic inference"),
        ("26b-a4b", {"forward_hooks": [{"name": "x"}]}, "hooks"),
        ("26b-a4b", {"debug_tensor_dump_output_folder": "/tmp/x"}, "tensors are dumped"),
        ("26b-a4b", {"enable_layerwise_nvtx_marker": True}, "markers of every layer"),
        ("26b-a4b", {"model_impl": "transformers"}, "another implementation"),
        ("26b-a4b", {"enable_lora": True}, "another of SGLang's rules"),
        ("26b-a4b", {"debug_cuda_graph": True}, "another of SGLang's rules"),
    ],
)
def test_stocks_rule_stays(models: dict[str, Path], name: str, given: dict[str, Any], reason: str):
    before = ENGINE.runs[NAME].counters.engaged
    assert disabled(models[name], **given)
    assert reason in ENGINE.runs[NAME].full_reason()
    assert ENGINE.runs[NAME].counters.engaged == before


def test_prompts_that_are_not_cut_have_no_largest_graph(models: dict[str, Path]):
    """SGLang itself would record nothing, and say nothing."""
    before = ENGINE.runs[NAME].counters.engaged
    assert disabled(models["26b-a4b"], chunked_prefill_size=-1)
    assert "not cut into chunks" in ENGINE.runs[NAME].full_reason()
    assert ENGINE.runs[NAME].counters.engaged == before
    for size in ({"piecewise_cuda_graph_max_tokens": 512}, {"piecewise_cuda_graph_tokens": [8]}):
        assert not disabled(models["26b-a4b"], chunked_prefill_size=-1, **size)


def test_inference_mode_is_not_what_sglang_traces_in(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    from sglang.srt.utils import common

    monkeypatch.setattr(common, "_ENABLE_TORCH_INFERENCE_MODE", True)
    assert disabled(models["26b-a4b"])
    assert "inference_mode" in ENGINE.runs[NAME].full_reason()


def test_other_models_are_stocks(models: dict[str, Path]):
    assert not disabled(models["text"])
    assert "the model is Gemma4ForCausalLM" in ENGINE.runs[NAME].full_reason()


def test_stocks_own_flag_still_forces_them(models: dict[str, Path]):
    assert not disabled(models["e2b"], enforce_piecewise_cuda_graph=True)


def test_speculative_decoding_is_refused(models: dict[str, Path]):
    arguments = SimpleNamespace(
        get_model_config=lambda: SimpleNamespace(
            hf_config=SimpleNamespace(architectures=[patch.ARCHITECTURE]), is_multimodal=True
        ),
        model_impl="auto",
        chunked_prefill_size=None,
        piecewise_cuda_graph_max_tokens=None,
        piecewise_cuda_graph_tokens=None,
        **dict.fromkeys(patch.OFF) | {"speculative_algorithm": "FROZEN_KV_MTP"},
    )
    assert "speculative" in str(patch.unfit(arguments))


def test_a_failure_leaves_the_decision_to_stock(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(patch, "unfit", lambda arguments: 1 / 0)
    assert disabled(models["26b-a4b"])
    assert "ZeroDivisionError" in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("0", False), (None, True)])
def test_it_is_asked_for_by_its_forerunners_variable(value: str | None, on: bool):
    environ = {} if value is None else {ALIAS: value}
    assert switches.read(environ).decisions[NAME].on is on
    assert catalogue.by_name(NAME).default


# -- where they are recorded -----------------------------------------------------------------------


class Recording:
    """In place of SGLang's runner, which needs a GPU: as far as its first capture, then ``error``."""

    def __init__(self, runner: Any, error: Exception | None) -> None:
        from sglang.srt.compilation import piecewise_context_manager as context
        from sglang.srt.compilation.compile import install_torch_compiled

        with context.enable_piecewise_cuda_graph():
            install_torch_compiled(runner.model.language_model, backend_factory=lambda *given: None)
            with context.enable_piecewise_cuda_graph_compile(), context.set_pcg_capture_stream("s"):  # type: ignore[arg-type]
                if error is not None:
                    raise error

    def can_run(self, batch: Any) -> bool:
        return True


class ModelRunner(SimpleNamespace):
    """As much of SGLang's as is asked for its graphs."""


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's model runner as far as it is asked for its graphs, with the class that takes pictures."""
    from sglang.srt.compilation import piecewise_context_manager as context
    from sglang.srt.model_executor import model_runner
    from sglang.srt.utils import common

    for mark, none in (("_in_pcg_torch_compile", False), ("_pcg_capture_stream", None)):
        monkeypatch.setattr(context, mark, none)  # and so again after a failure that is stock's
    run = ENGINE.runs[NAME]
    monkeypatch.setattr(run, "state", run.state)
    monkeypatch.setattr(run, "reason", run.reason)
    monkeypatch.setattr(model_runner, "get_available_gpu_memory", lambda *args: 1.0)
    monkeypatch.setattr(common, "get_available_gpu_memory", lambda *args: made.left)
    model = vision.model("sdpa")
    arguments = SimpleNamespace(
        disable_piecewise_cuda_graph=False,
        enforce_piecewise_cuda_graph=False,
        piecewise_cuda_graph_tokens=[4],
        **dict.fromkeys(patch.OFF),
    )
    made = ModelRunner(
        model=model,
        server_args=arguments,
        is_draft_worker=False,
        is_multimodal=True,
        device="cpu",
        gpu_id=0,
        model_config=SimpleNamespace(num_hidden_layers=2),
        left=patch.LEFT_GB,
    )

    def record(error: Exception | None = None) -> Any:
        monkeypatch.setattr(
            model_runner, "PiecewiseCudaGraphRunner", lambda runner: Recording(runner, error)
        )
        model_runner.ModelRunner.init_piecewise_cuda_graphs(made)  # type: ignore[arg-type]
        return made.piecewise_cuda_graph_runner

    made.record = record
    yield made
    vars(model.language_model).pop("forward", None)


def test_the_graphs_are_recorded_as_stock_records_them(recorder: Any):
    before = ENGINE.runs[NAME].counters.engaged
    assert isinstance(recorder.record(), Recording)
    assert ENGINE.runs[NAME].counters.engaged == before + 1
    assert not recorder.server_args.disable_piecewise_cuda_graph
    assert ENGINE.runs[NAME].state == states.ACTIVE


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda made: setattr(made, "is_multimodal", False), "without its encoders"),
        (
            lambda made: setattr(made.server_args, "disable_piecewise_cuda_graph", True),
            "piecewise CUDA graphs are switched off",
        ),
        (
            lambda made: setattr(made.server_args, "piecewise_cuda_graph_tokens", []),
            "SGLang records no graphs",
        ),
    ],
)
def test_what_keeps_graphs_away_is_said_where_they_are_recorded(
    recorder: Any, change: Any, why: str
):
    change(recorder)
    before = counted(NAME)
    if recorder.is_multimodal:
        assert recorder.record() is None
    else:
        recorder.record()  # as stock does
    assert counted(NAME) == before.and_(declined=1)
    assert why in ENGINE.runs[NAME].full_reason()


def test_a_draft_model_is_stocks(recorder: Any):
    before = counted(NAME)
    recorder.is_draft_worker = True
    assert recorder.record() is None
    assert counted(NAME) == before


def test_a_prefill_without_a_graph_is_said(recorder: Any):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Recording, "can_run", lambda self, batch: False)
        graphs = recorder.record()
        before = counted(NAME)
        assert not graphs.can_run(None)
    assert counted(NAME) == before.and_(declined=1)
    assert "runs this prefill without a graph" in ENGINE.runs[NAME].full_reason()


def test_a_server_whose_graphs_cannot_be_recorded_runs_without(recorder: Any):
    """Nothing is left of them: SGLang's marks of a capture, and what holds the memory."""
    from sglang.srt.compilation import piecewise_context_manager as context

    assert recorder.record(torch.OutOfMemoryError("no memory left")) is None
    assert recorder.server_args.disable_piecewise_cuda_graph
    assert not context.is_in_pcg_torch_compile()
    assert context.get_pcg_capture_stream() is None
    assert not context.is_in_piecewise_cuda_graph()
    assert "forward" not in vars(recorder.model.language_model)
    run = ENGINE.runs[NAME]
    assert run.state == states.FAILED
    assert "OutOfMemoryError: no memory left" in run.reason


def test_nothing_is_kept_of_a_recording_that_failed(recorder: Any):
    patch._inputs[recorder.model.language_model] = patch.Inputs()
    assert recorder.record(torch.OutOfMemoryError("no memory left")) is None
    assert recorder.model.language_model not in patch._inputs


def test_memory_for_pictures_is_left(recorder: Any):
    recorder.left = patch.LEFT_GB - 0.1
    assert recorder.record() is None
    assert recorder.server_args.disable_piecewise_cuda_graph
    assert "forward" not in vars(recorder.model.language_model)
    assert "1.9 GB of memory would be left" in ENGINE.runs[NAME].full_reason()
    assert ENGINE.runs[NAME].state == states.ACTIVE


@pytest.mark.parametrize("name", sorted(patch.OFF))
def test_arguments_that_sglang_sets_later_are_looked_at_again(recorder: Any, name: str):
    setattr(recorder.server_args, name, True)
    assert recorder.record() is None
    assert patch.OFF[name] in ENGINE.runs[NAME].full_reason()


def test_hooks_on_layers_are_no_part_of_graphs(recorder: Any):
    handle = recorder.model.language_model.layers[0].register_forward_hook(lambda *args: None)
    try:
        assert recorder.record() is None
    finally:
        handle.remove()
    assert "forward hooks" in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize("where", ["model", "layer", "inside", "all"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_hook_that_comes_later_ends_the_graphs(recorder: Any, where: str, padded: bool):
    """Before SGLang pads the batch for a graph; should it have done so, the prefill is eager too."""
    from sglang.srt.compilation import piecewise_context_manager as context
    from sglang.srt.managers import mm_utils
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    graphs = recorder.record()
    model = recorder.model.language_model
    assert graphs.can_run(None)
    run = ENGINE.runs[NAME]
    if where == "all":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    else:
        part = {"model": model, "layer": model.layers[-1], "inside": model.layers[0].mlp.act_fn}
        handle = part[where].register_forward_hook(lambda *given: None)
    called = []
    try:
        if padded:
            batch = SimpleNamespace(
                forward_mode=ForwardMode.EXTEND, contains_mm_inputs=lambda: False, input_embeds=None
            )
            with pytest.MonkeyPatch.context() as monkeypatch, context.enable_piecewise_cuda_graph():
                monkeypatch.setattr(
                    type(model), "forward", lambda self, **given: called.append(given)
                )
                given = {"language_model": model, "positions": torch.arange(3) + 1}
                mm_utils.general_mm_embed_routine(torch.arange(3), batch, **given)
            assert len(called) == 1
        else:
            assert not graphs.can_run(None)
    finally:
        handle.remove()
    assert recorder.piecewise_cuda_graph_runner is None
    assert "forward" not in vars(model)
    assert "the language model has forward hooks" in run.full_reason()


def test_a_copy_that_fails_ends_the_graphs(recorder: Any, monkeypatch: pytest.MonkeyPatch):
    """The prefill is stock's, with the very positions that the model was given."""
    from sglang.srt.compilation import piecewise_context_manager as context
    from sglang.srt.managers import mm_utils
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    recorder.record()
    model, run = recorder.model.language_model, ENGINE.runs[NAME]
    called: list[Any] = []
    monkeypatch.setattr(type(model), "forward", lambda self, **given: called.append(given))
    monkeypatch.setattr(patch, "most_tokens", lambda: 2)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, contains_mm_inputs=lambda: False, input_embeds=None
    )
    positions = torch.arange(3) + 1
    with context.enable_piecewise_cuda_graph():
        mm_utils.general_mm_embed_routine(
            torch.arange(3), batch, language_model=model, positions=positions
        )
    assert called[0]["positions"] is positions
    assert positions.tolist() == [1, 2, 3]
    assert recorder.piecewise_cuda_graph_runner is None
    assert run.state == states.FAILED


def test_a_look_that_fails_is_no_end(recorder: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patch, "process_unfit", lambda runner: 1 / 0)
    assert recorder.record() is None
    assert recorder.server_args.disable_piecewise_cuda_graph
    assert ENGINE.runs[NAME].state == states.FAILED


def test_a_model_of_the_same_name_is_stocks(recorder: Any, monkeypatch: pytest.MonkeyPatch):
    kind = type(recorder.model)
    monkeypatch.setattr(recorder.model, "__class__", type(kind.__name__, (kind,), {}))
    before = ENGINE.runs[NAME].counters.engaged
    recorder.record()
    assert recorder.model.language_model not in common.recorded
    assert ENGINE.runs[NAME].counters.engaged == before


@pytest.mark.parametrize("enforced", [False, True])
def test_without_the_patch_prefill_is_eager_again(recorder: Any, enforced: bool):
    """The graphs read positions that stock does not fill."""
    recorder.server_args.enforce_piecewise_cuda_graph = enforced
    assert recorder.record() is not None
    ENGINE.revert()
    assert recorder.piecewise_cuda_graph_runner is None
    assert "forward" not in vars(recorder.model.language_model)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_weight_update_reaches_the_next_prefill(
    recorder: Any, replaced: bool, monkeypatch: pytest.MonkeyPatch
):
    """A graph reads where the weights were: new ones elsewhere end it."""
    from sglang.srt.compilation import piecewise_context_manager as context
    from sglang.srt.managers import mm_utils
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.server_args import get_global_server_args

    monkeypatch.setattr(get_global_server_args(), "piecewise_cuda_graph_tokens", [4])
    assert recorder.record() is not None
    model = recorder.model.language_model
    vars(model)["forward"] = lambda **given: "graph"
    monkeypatch.setattr(type(model), "forward", lambda self, **given: "eager")
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, contains_mm_inputs=lambda: False, input_embeds=None
    )
    given = {"language_model": model, "positions": torch.arange(3) + 1}

    def prefill() -> Any:
        with context.enable_piecewise_cuda_graph():
            return mm_utils.general_mm_embed_routine(torch.arange(3), batch, **given)

    assert prefill() == "graph"
    weights = model.layers[-1].self_attn.qkv_proj
    (name, old), *_ = weights.named_parameters()
    if replaced:
        new = torch.nn.Parameter(old.detach().clone(), requires_grad=False)
        monkeypatch.setitem(weights._parameters, name, new)
    else:
        old.data.copy_(old.data.clone())
    assert prefill() == ("eager" if replaced else "graph")
    assert (recorder.piecewise_cuda_graph_runner is None) == replaced
    assert ("weight update" in ENGINE.runs[NAME].full_reason()) == replaced


def test_stock_leaves_its_marks_and_the_server_dies(recorder: Any):
    """What would be left of a recording that failed."""
    from sglang.srt.compilation import piecewise_context_manager as context

    ENGINE.revert()
    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(torch.OutOfMemoryError("no memory left"))
    assert context.is_in_pcg_torch_compile()
    assert context.get_pcg_capture_stream() == "s"
    assert "forward" in vars(recorder.model.language_model)


def test_strict_mode_wants_no_server_without(recorder: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(switches.STRICT, "1")
    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(torch.OutOfMemoryError("no memory left"))


def test_graphs_that_would_read_wrong_positions_are_not_recorded(
    recorder: Any, monkeypatch: pytest.MonkeyPatch
):
    from sglang.srt.managers import mm_utils

    monkeypatch.setattr(mm_utils, "general_mm_embed_routine", lambda *args, **kwargs: None)
    assert recorder.record() is None
    assert recorder.server_args.disable_piecewise_cuda_graph
    assert "general_mm_embed_routine is not ours" in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize("others", [(), ("optional_kv",)])
def test_shared_kv_needs_its_patch_where_the_graphs_are_recorded(
    recorder: Any, others: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    ENGINE.apply(only=[NAME, *others])
    monkeypatch.setattr(recorder.model.config.text_config, "num_kv_shared_layers", 1)
    assert (recorder.record() is not None) == bool(others)
    assert recorder.server_args.disable_piecewise_cuda_graph != bool(others)
    if not others:
        assert "`optional_kv` is off" in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize(
    "asked", ["disable_piecewise_cuda_graph", "enforce_piecewise_cuda_graph", "draft", "text"]
)
def test_what_is_not_of_our_making_is_stocks(recorder: Any, asked: str):
    if asked == "draft":
        recorder.is_draft_worker = True
    elif asked == "text":
        recorder.is_multimodal = False
    else:
        setattr(recorder.server_args, asked, True)
    if asked in ("enforce_piecewise_cuda_graph", "text"):
        with pytest.raises(torch.OutOfMemoryError):
            recorder.record(torch.OutOfMemoryError("no memory left"))
    else:
        assert recorder.record() is None
    assert ENGINE.runs[NAME].state == states.ACTIVE


# -- what a graph reads ----------------------------------------------------------------------------


class Runner:
    """The buffers of SGLang's runner, filled for a step as its ``replay_prepare`` fills them."""

    def __init__(self, width: int) -> None:
        self.input_ids = torch.zeros(MOST, dtype=torch.int64)
        self.positions = torch.zeros(MOST, dtype=torch.int64)
        self.input_embeds = torch.zeros(MOST, width, dtype=torch.bfloat16)

    def batch(self, padded: int, ids: torch.Tensor, first: int, images: Any = None) -> Any:
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        for buffer in (self.input_ids, self.positions, self.input_embeds):
            buffer[:padded].zero_()
        tokens = len(ids)
        self.input_ids[:tokens] = ids
        self.positions[:tokens] = torch.arange(first, first + tokens)
        return ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=1,
            input_ids=self.input_ids[:padded],
            positions=self.positions[:padded],
            input_embeds=self.input_embeds[:padded],
            req_pool_indices=torch.zeros(1, dtype=torch.int64),
            seq_lens=torch.tensor([first + tokens]),
            out_cache_loc=torch.zeros(padded, dtype=torch.int64),
            seq_lens_sum=first + tokens,
            extend_seq_lens=torch.tensor([tokens]),
            extend_prefix_lens=torch.tensor([first]),
            extend_seq_lens_cpu=[tokens],
            extend_prefix_lens_cpu=[first],
            mm_inputs=[images],
            attn_backend=SimpleNamespace(),
        )


class Step:
    """What the language model was called with, as a graph would read it: by address."""

    def __init__(self, language_model: Any) -> None:
        self.seen: list[dict[str, tuple[int, torch.Tensor]]] = []
        self.language_model = language_model

    def forward(self, input_ids: Any, forward_batch: Any, input_embeds: Any, **inputs: Any) -> Any:
        assert input_ids is None
        inputs["input_embeds"] = input_embeds
        self.seen.append(
            {
                name: (value.data_ptr(), value.clone())
                for name, value in inputs.items()
                if value is not None
            }
        )
        return input_embeds


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's multimodal class; its language model only keeps what it is given."""
    from sglang.srt import server_args

    model = vision.model("sdpa")
    step = Step(model.language_model)
    monkeypatch.setattr(model.language_model, "forward", step.forward)
    # Per-layer inputs as E2B's: new memory at every step.
    monkeypatch.setattr(
        model.language_model,
        "get_per_layer_inputs",
        lambda ids: ids[:, None, None].expand(-1, LAYERS, PER_LAYER).bfloat16(),
    )
    monkeypatch.setattr(model.logits_processor, "forward", lambda ids, hidden, *rest: hidden)
    monkeypatch.setattr(
        server_args.get_global_server_args(), "piecewise_cuda_graph_tokens", [4, PADDED, MOST]
    )
    monkeypatch.setattr(patch, "_inputs", type(patch._inputs)())
    return SimpleNamespace(model=model, step=step, runner=Runner(vision.WIDTH))


def run(stage: Any, batch: Any, graphs: bool = True) -> torch.Tensor:
    from sglang.srt.compilation.piecewise_context_manager import enable_piecewise_cuda_graph

    if not graphs:
        return stage.model.forward(batch.input_ids, batch.positions, batch)
    with enable_piecewise_cuda_graph():
        return stage.model.forward(batch.input_ids, batch.positions, batch)


def test_stock_changes_the_runners_positions(stage: Any):
    """The defect: each pass over the runner's buffer leaves it one higher."""
    ENGINE.revert()
    batch = stage.runner.batch(PADDED, torch.arange(TOKENS), 5)
    for _ in range(3):
        run(stage, batch)
    assert stage.runner.positions[:TOKENS].tolist() == list(range(8, 8 + TOKENS))


def test_the_graph_reads_one_place_and_the_runners_buffer_stays(stage: Any):
    """Warm-up, capture and replays of several sizes: one address each, positions from one."""
    before = ENGINE.runs[NAME].counters.engaged
    steps = [(4, 4, 0), (MOST, MOST, 0), (PADDED, TOKENS, 5), (PADDED, PADDED, 0), (4, 2, 9)]
    for padded, tokens, first in steps:
        batch = stage.runner.batch(padded, torch.arange(tokens) + first, first)
        for _ in range(2):
            kept = stage.runner.positions.clone()
            run(stage, batch)
            assert torch.equal(stage.runner.positions, kept)
            expected = torch.zeros(padded, dtype=torch.int64)
            expected[:tokens] = torch.arange(first, first + tokens)
            seen = stage.step.seen[-1]
            assert torch.equal(seen["positions"][1], expected + 1)
            assert torch.equal(seen["per_layer_inputs"][1][:, 0, 0].long(), batch.input_ids)
    for name in ("positions", "per_layer_inputs", "input_embeds"):
        assert len({seen[name][0] for seen in stage.step.seen}) == 1, name
    assert stage.step.seen[0]["positions"][0] != stage.runner.positions.data_ptr()
    assert ENGINE.runs[NAME].counters.engaged == before + 2 * len(steps)


def test_outside_a_graph_stock_runs(stage: Any):
    before = ENGINE.runs[NAME].counters.engaged
    batch = stage.runner.batch(PADDED, torch.arange(TOKENS), 5)
    run(stage, batch, graphs=False)
    assert stage.step.seen[0]["positions"][0] == stage.runner.positions.data_ptr()
    assert ENGINE.runs[NAME].counters.engaged == before


def test_images_are_encoded_eagerly_into_the_runners_buffer(
    stage: Any, monkeypatch: pytest.MonkeyPatch
):
    """The vision encoder itself runs, outside what would be recorded; the values are stock's."""
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs
    from sglang.srt.utils import common

    monkeypatch.setattr(common, "is_pin_memory_available", lambda *args: False)
    model = stage.model
    feature, places = vision.pixels(4, 4, seed=3)
    tokens = len(places) // vision.POOL**2
    marker = 50

    def images() -> Any:
        item = MultimodalDataItem(
            modality=Modality.IMAGE, feature=feature.clone(), offsets=[(2, 1 + tokens)]
        )
        item.image_position_ids = places
        item.set_pad_value()
        item.pad_value = marker
        return MultimodalInputs(mm_items=[item])

    ids = torch.tensor([3, 4, *[marker] * tokens, 5])
    calls: list[int] = []
    encode = type(model).get_image_feature

    def counted(self: Any, items: Any) -> torch.Tensor:
        calls.append(len(items))
        return encode(self, items)

    monkeypatch.setattr(type(model), "get_image_feature", counted)
    from sglang.srt.managers import mm_utils

    def embedded(graphs: bool) -> torch.Tensor:
        monkeypatch.setattr(mm_utils, "embedding_cache", None)
        mm_utils.init_mm_embedding_cache(1 << 20)
        batch = stage.runner.batch(PADDED, ids, 0, images())
        run(stage, batch, graphs)
        return stage.step.seen[-1]["input_embeds"][1]

    graphed = embedded(True)
    assert stage.step.seen[-1]["input_embeds"][0] == stage.runner.input_embeds.data_ptr()
    ENGINE.revert()
    stock = embedded(False)
    assert calls == [1, 1]
    assert torch.equal(graphed, stock)
    features = encode(model, images().mm_items)
    assert torch.equal(stock[2 : 2 + tokens], features.to(stock.dtype))


def test_more_tokens_than_a_graph_has_are_an_error():
    inputs = patch.Inputs()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patch, "most_tokens", lambda: 4)
        inputs.keep("positions", torch.arange(4))
        with pytest.raises(ValueError, match="5 tokens do not fit"):
            inputs.keep("positions", torch.arange(5))


def test_the_buffers_serve_inference_mode_and_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patch, "most_tokens", lambda: 4)
    inputs = patch.Inputs()
    with torch.inference_mode():
        first = inputs.keep("positions", torch.arange(3))
    second = inputs.keep("positions", torch.arange(1, 4))
    assert first.data_ptr() == second.data_ptr()
    assert second.tolist() == [1, 2, 3]


def test_other_language_models_are_stocks(stage: Any):
    """Their forward has changed nothing that would have to be put back."""
    from sglang.srt.managers import mm_utils

    positions = torch.arange(3)
    given: dict[str, Any] = {}

    class Other:
        def get_input_embeddings(self) -> Any:
            return torch.nn.Embedding(8, 4)

        def __call__(self, **inputs: Any) -> None:
            given.update(inputs)

    batch = stage.runner.batch(4, torch.arange(3), 0)
    batch.input_embeds = None
    from sglang.srt.compilation.piecewise_context_manager import enable_piecewise_cuda_graph

    with enable_piecewise_cuda_graph():
        mm_utils.general_mm_embed_routine(
            input_ids=torch.arange(3),
            forward_batch=batch,
            language_model=Other(),
            positions=positions,
        )
    assert given["positions"] is positions
    assert positions.tolist() == [0, 1, 2]


# -- the late replacement --------------------------------------------------------------------------


def test_it_is_in_both_modules_and_out_again():
    from sglang.srt.managers import mm_utils
    from sglang.srt.model_executor import model_runner
    from sglang.srt.models import gemma4_mm

    start = model_runner.ModelRunner.init_piecewise_cuda_graphs
    assert start.__module__ == patch.__name__
    ours = mm_utils.general_mm_embed_routine
    assert gemma4_mm.general_mm_embed_routine is ours
    ENGINE.revert()
    stock = mm_utils.general_mm_embed_routine
    assert stock is not ours
    assert gemma4_mm.general_mm_embed_routine is stock
    assert stock.__code__.co_filename == mm_utils.__file__
    start = model_runner.ModelRunner.init_piecewise_cuda_graphs
    assert start.__code__.co_filename == model_runner.__file__
    ENGINE.apply(only=[NAME])
    assert mm_utils.general_mm_embed_routine is not stock


def test_somebody_elses_routine_is_a_conflict(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.managers import mm_utils

    ENGINE.revert()
    other = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setattr(mm_utils, "general_mm_embed_routine", other)
    ENGINE.apply(only=[NAME])
    assert ENGINE.runs[NAME].state == states.CONFLICT
    assert "general_mm_embed_routine" in ENGINE.runs[NAME].reason
    assert mm_utils.general_mm_embed_routine is other
    ENGINE.revert()


def test_it_is_in_before_the_command_line_is_read(warm_python: Any, models: dict[str, Path]):
    """As the server's main process starts: the arguments first, everything else later.

    What the patch needs of others is judged by its source then, as no model is imported.
    """
    done = warm_python(
        "import gemma4_turbo, sys\n"
        f"gemma4_turbo.apply(only={[NAME, *CUT]!r})\n"
        "from sglang.srt.server_args import ServerArgs\n"
        f"row = next(r for r in gemma4_turbo.status() if r.name == '{NAME}')\n"
        "print(row.state, 'sglang.srt.managers.mm_utils' in sys.modules)\n"
        "args = ServerArgs(model_path=sys.argv[1], device='cpu', load_format='dummy',"
        " attention_backend='triton')\n"
        "print(args.disable_piecewise_cuda_graph, 'sglang.srt.models.gemma4_causal' in sys.modules)\n"
        "import sglang.srt.managers.mm_utils as late\n"
        "print(late.general_mm_embed_routine.__module__)\n",
        str(models["e2b"]),
        PYTHONPATH=str(REPOSITORY),
    )
    told = ["active", "False", "False", "False", patch.__name__]
    assert done.stdout.split()[-5:] == told, done.stdout + done.stderr


def test_a_half_imported_module_is_not_missed(warm_python: Any):
    """Whoever imports the routine's module first imports the server's arguments through it."""
    done = warm_python(
        "import gemma4_turbo, sys\n"
        f"gemma4_turbo.apply(only=['{NAME}'])\n"
        "import sglang.srt.managers.mm_utils as late\n"
        "import sglang.srt.models.gemma4_mm as model\n"
        "from sglang.srt.model_executor.model_runner import ModelRunner\n"
        "print(late.general_mm_embed_routine.__module__)\n"
        "print(model.general_mm_embed_routine is late.general_mm_embed_routine)\n"
        "print(ModelRunner.init_piecewise_cuda_graphs.__module__)\n",
        PYTHONPATH=str(REPOSITORY),
    )
    assert done.stdout.split() == [patch.__name__, "True", patch.__name__], (
        done.stdout + done.stderr
    )


def test_the_model_runner_half_imported_is_not_missed(warm_python: Any):
    done = warm_python(
        "import gemma4_turbo, sys\n"
        f"gemma4_turbo.apply(only=['{NAME}'])\n"
        "import sglang.srt.model_executor.model_runner as first\n"
        "import sglang.srt.models.gemma4_mm as model\n"
        "print(first.ModelRunner.init_piecewise_cuda_graphs.__module__)\n"
        "print(model.general_mm_embed_routine.__module__)\n",
        PYTHONPATH=str(REPOSITORY),
    )
    assert done.stdout.split() == [patch.__name__] * 2, done.stdout + done.stderr
