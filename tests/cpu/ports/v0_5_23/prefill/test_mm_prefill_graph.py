"""Breakable graphs for a model that takes pictures: who gets them, and what a graph would read."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.models import geometry
from gemma4_turbo.ports.any.launch import advice
from gemma4_turbo.ports.v0_5_23.prefill import mm_prefill_graph as patch
from tests.cpu import forward_batch, vision
from tests.cpu.conftest import standing
from tests.cpu.ports.counted import counted
from tests.cpu.ports.v0_5_23 import models

NAME = "mm_prefill_graph"
MOST, SIZES, TOKENS = 16, (8, 16), 11  # tokens of the largest graph, of all, of a prompt
IMAGE, PAD = 60, 0  # ids


@pytest.fixture(scope="module", autouse=True)
def applied(patch_imported: None) -> None:
    sglang_process.prepare_sglang()
    import sglang.srt.arg_groups.cuda_graph_hook
    import sglang.srt.model_executor.model_runner
    import sglang.srt.models.gemma4_unified  # noqa: F401


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    from sglang.srt.arg_groups import cuda_graph_hook

    decide = cuda_graph_hook.disable_breakable_cudagraph_if_incompatible
    with standing(NAME, decide), torch.no_grad():
        yield


# -- the decision ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return vision.folders(tmp_path_factory.mktemp("models"))


def arguments(model: Path, **given: Any) -> Any:
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(model_path=str(model), device="cpu", load_format="dummy", **given)


def backend(made: Any) -> str:
    """What SGLang makes of prefill's graphs, as on a GPU."""
    from sglang.srt.arg_groups import cuda_graph_hook, overrides
    from sglang.srt.model_executor import cuda_graph_config

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cuda_graph_config, "default_prefill_backend", lambda: "breakable")
        cuda_graph_hook.handle_cuda_graph_config(made)
    found: str = overrides.resolving_view(made).cuda_graph_config.prefill.backend
    return found


def reason() -> str:
    return ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize("name", ["26b-a4b", "31b"])
def test_models_that_take_pictures_get_them(folders: dict[str, Path], name: str):
    before = ENGINE.runs[NAME].counters.engaged
    assert backend(arguments(folders[name])) == "breakable"
    assert ENGINE.runs[NAME].counters.engaged == before  # none is recorded yet
    ENGINE.revert()
    assert backend(arguments(folders[name])) == "disabled"


def test_the_model_without_an_encoder_gets_them(folders: dict[str, Path]):
    """12B: the same language model below another class."""
    from sglang.srt.arg_groups import overrides

    made = arguments(folders["31b"])
    config = overrides.model_config_of(made)
    config.hf_config.architectures = ["Gemma4UnifiedForConditionalGeneration"]
    assert backend(made) == "breakable"
    assert not config.is_multimodal_breakable_cuda_graph_supported  # as stock has it


def test_text_models_are_stocks(folders: dict[str, Path]):
    assert backend(arguments(folders["text"])) == "breakable"
    assert "the model is Gemma4ForCausalLM" in reason()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tp_size": 2}, "several GPUs"),
        ({"attention_backend": "fa4"}, "attention backend fa4"),
        ({"prefill_attention_backend": "trtllm_mha"}, "attention backend trtllm_mha"),
        ({"model_impl": "transformers"}, "another implementation"),
        ({"disaggregation_mode": "prefill"}, "disaggregation"),
        ({"chunked_prefill_size": -1}, "not cut into chunks"),
        ({"dcp_size": 2}, "another of SGLang's rules"),
        *(({name: True}, why) for name, why in patch.OFF.items()),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_stocks_rule_stays(folders: dict[str, Path], given: dict[str, Any], why: str):
    assert backend(arguments(folders["26b-a4b"], **given)) == "disabled"
    assert why in reason()


def test_a_model_that_is_served_without_its_encoders_is_stocks(folders: dict[str, Path]):
    assert backend(arguments(folders["26b-a4b"], enable_multimodal=False)) == "breakable"
    assert "without its encoders" in reason()


def test_a_graphs_size_may_be_given_where_prompts_are_not_cut(folders: dict[str, Path]):
    made = arguments(folders["31b"], chunked_prefill_size=-1, cuda_graph_max_bs_prefill=512)
    assert backend(made) == "breakable"


def test_positions_made_anew_are_not_where_a_graph_reads_them(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION", "1")
    assert backend(arguments(folders["26b-a4b"])) == "disabled"
    assert "positions one too low" in reason()


CUT = ("yoco", "optional_kv", "yoco_piecewise")


@pytest.fixture
def others_off() -> Iterator[None]:
    """What a test switches on beside the patch goes out behind it."""
    yield
    ENGINE.revert()


@pytest.mark.usefixtures("others_off")
@pytest.mark.parametrize("name", ["e2b", "e4b"])
@pytest.mark.parametrize(
    ("others", "why"),
    [
        ((), "with `optional_kv` only"),
        (("yoco",), "with `optional_kv` only"),
        (("optional_kv",), None),
        (CUT[:2], "without `yoco_piecewise`"),
        (CUT, None),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_models_that_share_kv_get_them_with_what_they_need(
    folders: dict[str, Path], name: str, others: tuple[str, ...], why: str | None
):
    ENGINE.apply(only=[NAME, *others])
    assert backend(arguments(folders[name])) == ("disabled" if why else "breakable")
    assert (why or "") in reason()


@pytest.mark.usefixtures("others_off")
@pytest.mark.parametrize("broken", ["optional_kv", "yoco_piecewise"])
def test_a_patch_that_does_not_fit_is_not_counted_on(
    folders: dict[str, Path], broken: str, monkeypatch: pytest.MonkeyPatch
):
    ENGINE.apply(only=[NAME, *CUT])
    monkeypatch.setattr(ENGINE.runs[broken], "state", states.CONFLICT)
    assert backend(arguments(folders["e2b"])) == "disabled"
    assert broken in reason()


def test_a_failure_leaves_the_decision_to_stock(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(patch, "unfit", lambda arguments: 1 / 0)
    assert backend(arguments(folders["26b-a4b"])) == "disabled"
    assert "ZeroDivisionError" in reason()


@pytest.mark.parametrize("given", ["breakable", "disabled"])
def test_what_the_user_chose_stays(folders: dict[str, Path], given: str):
    made = arguments(folders["e4b"], cuda_graph_backend_prefill=given, enable_mixed_chunk=True)
    assert backend(made) == given
    assert patch.forced(made)
    assert not patch.forced(arguments(folders["e4b"]))


# -- what is said of the choice ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cuda_graph_backend_prefill": "breakable"}, False),
        ({"cuda_graph_backend_prefill": "full"}, True),
        ({"cuda_graph_config": {"prefill": {"backend": "full"}}}, True),
        ({"cuda_graph_backend_prefill": "disabled"}, False),
        ({"cuda_graph_backend_prefill": "full", "enable_multimodal": False}, False),
        ({}, False),
    ],
    ids=str,
)
def test_the_launch_says_what_does_not_start(
    folders: dict[str, Path], given: dict[str, Any], told: bool
):
    found = advice.on_launch(arguments(folders["31b"], **given))
    assert bool(found) is told
    if told:
        assert "--cuda-graph-backend-prefill full" in found[0]
        assert "input_ids" in found[0]
    assert advice.on_launch(arguments(folders["text"], **given)) == []
    ENGINE.apply(only=["vision_masks"])  # nobody lends a hand
    stock = advice.on_launch(arguments(folders["31b"], **given))
    assert bool(stock) is (told or given.get("cuda_graph_backend_prefill") == "breakable")


@pytest.mark.parametrize("chosen", ["breakable", "full", "disabled"])
def test_the_launch_says_it_of_layers_that_share_kv(folders: dict[str, Path], chosen: str):
    """Stock's table of them ends the server, whatever is recorded; `optional_kv` lets it start."""
    made = arguments(folders["e2b"], cuda_graph_backend_prefill=chosen)
    found = advice.on_launch(made)
    assert bool(found) is (chosen != "disabled")
    assert all("layer_id" in each and f"-prefill {chosen}" in each for each in found)
    ENGINE.apply(only=["optional_kv"])
    assert advice.on_launch(made) == []


@pytest.fixture(scope="module")
def shared_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only E2B."""
    return geometry.write_model(tmp_path_factory.mktemp("shared") / "text", "e2b")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "breakable"),  # SGLang's default
        ({"cuda_graph_backend_prefill": "full"}, "full"),
        ({"cuda_graph_backend_prefill": "disabled"}, None),
        ({"disable_prefill_cuda_graph": True}, None),
        ({"disable_cuda_graph": True}, None),
        ({"pp_size": 2}, None),
        ({"dcp_size": 2}, None),  # another of SGLang's rules
    ],
    ids=str,
)
@pytest.mark.parametrize("resolved", [False, True])
def test_the_launch_says_it_of_text_whose_layers_share_kv(
    shared_text: Path,
    folders: dict[str, Path],
    given: dict[str, Any],
    told: str | None,
    resolved: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    """As with ``GEMMA4_TURBO_PROFILE=exact``. Nothing is left on the arguments."""
    from sglang.srt.model_executor import cuda_graph_config

    monkeypatch.setattr(cuda_graph_config, "default_prefill_backend", lambda: "breakable")
    made = arguments(shared_text, **given)
    if resolved:
        backend(made)
    before = copy.deepcopy(vars(made)) if not resolved else None
    found = advice.on_launch(made)
    assert before is None or vars(made) == before
    assert [told in each for each in found if told] == ([True] if told else [])
    assert bool(found) is (told is not None)
    for each in found:
        assert "GEMMA4_TURBO_OPTIONAL_KV=1" in each
        assert "--disable-prefill-cuda-graph" in each
    assert advice.on_launch(arguments(folders["text"], **given)) == []  # no layers that share
    ENGINE.apply(only=["optional_kv"])
    assert advice.on_launch(made) == []


def test_the_installation_says_it_where_the_patch_does_not_run():
    assert advice.on_installation() == []
    ENGINE.apply(only=["vision_masks"])
    (found,) = advice.on_installation()
    assert "--cuda-graph-backend-prefill" in found


# -- recording and replaying -----------------------------------------------------------------------


def multimodal(kind: str) -> Any:
    """SGLang's model that takes pictures; of kind ``ple`` with a language model of per-layer inputs."""
    model = vision.model("sdpa")
    if kind == "dense":
        for layer in model.language_model.layers:
            if not isinstance(layer.self_attn.attn, models.Uniform):
                layer.self_attn.attn = models.Uniform()
                rope = layer.self_attn.rotary_emb
                rope.cos_sin_cache = rope.cos_sin_cache.float()
        return model
    made = object.__new__(type(model))
    vars(made).update({**vars(model), "_modules": {**model._modules}})
    made._modules["language_model"] = models.build("ple")
    return made


SEEN: list[Any] = []  # what the language model was given, call by call


def watched(theirs: Any) -> Any:
    """A language model's forward that notes what it is given."""

    @functools.wraps(theirs)  # its parameters are asked for by name
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        SEEN.append((args, kwargs))
        return theirs(model, *args, **kwargs)

    return forward


class Backend:
    """In place of SGLang's, which needs a GPU: a graph runs again on the very tensors it was given."""

    def __init__(self, model: Any) -> None:
        self.model, self.graphs, self.cleaned = model, {}, False

    def capture_one(self, size: int, forward_fn: Any) -> None:
        for _ in range(3):  # two of them to warm up
            forward_fn()
        self.graphs[size] = SEEN[-1]

    def replay(self, shape_key: Any, static_forward_batch: Any) -> Any:
        (ids, positions, _), given = self.graphs[shape_key.size]
        return type(self.model).forward(self.model, ids, positions, static_forward_batch, **given)

    def cleanup(self) -> None:
        self.cleaned = True


def recorder(model_runner: Any, error: Exception | None = None) -> Any:
    """SGLang's runner on the CPU, without what of it needs a GPU."""
    from sglang.srt.model_executor.cuda_graph_buffer_registry import build_prefill_registry
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

    text = model_runner.model.language_model
    runner = object.__new__(PrefillCudaGraphRunner)
    runner.model_runner = model_runner
    runner.layer_model = text
    runner.backend = Backend(text)
    runner.prefill_backend_name = "breakable"
    runner._is_full_backend = runner._qwen_bcg_hc_sidechannel = False
    runner.is_dsv41_model = runner._use_draft_input_embeds = runner.enable_cp_bcg_capture = False
    runner._input_embeds_arg_idx = 3
    runner.buffers = SimpleNamespace(pp_proxy_tensors=None)
    runner.attention_layers = runner.moe_layers = runner.moe_fusions = []
    runner.mha_companion_layers, runner.quant_config, runner.dsa_indexers = [], None, None
    runner.buffer_registry = build_prefill_registry(
        device=torch.device("cpu"),
        max_bs=2,
        max_num_token=MOST,
        cache_loc_dtype=torch.int64,
        is_multimodal=True,
        hidden_size=text.config.hidden_size,
        embed_dtype=text.dtype(),
        share_pool=False,
    )
    for size in reversed(SIZES):
        if error is not None and size == SIZES[0]:
            raise error
        batch = slots(runner, size)
        runner.backend.capture_one(size, lambda b=batch, n=size: runner._run_forward(b, n))
    return runner


def slots(runner: Any, size: int, **fields: Any) -> Any:
    """A batch of the runner's buffers."""
    from sglang.srt.layers.dp_attention import DpPaddingMode

    given = {
        name: runner.buffer_registry.get_slot(name).slice_for(1, size)
        for name in ("input_ids", "positions", "out_cache_loc", "input_embeds", "mrope_positions")
    }
    return forward_batch.prefill(dp_padding_mode=DpPaddingMode.SUM_LEN, **given | fields)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a model runner of a kind of model, and records as SGLang does."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup, layer_setup
    from sglang.srt.runtime_context import get_exec
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import common

    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that SGLang is takes seconds
    monkeypatch.setattr(cuda_graph_setup, "get_available_gpu_memory", lambda *args: 1.0)
    monkeypatch.setattr(
        LogitsProcessor, "forward", lambda self, ids, hidden, *others: hidden.clone()
    )
    config = CudaGraphConfig()
    made_for: list[Any] = []

    def make(
        kind: str = "dense",
        error: Exception | None = None,
        backend: str = "breakable",
        sizes: tuple[int, ...] = SIZES,
        **fields: Any,
    ) -> Any:
        config.prefill.backend, config.prefill.bs = backend, list(sizes)
        model = multimodal(kind)
        vars(model.language_model).pop("forward", None)
        attention = object.__new__(TritonAttnBackend)
        attention.forward_metadata = SimpleNamespace(custom_mask=None, mask_indptr=None)
        given = {
            "model": model,
            "server_args": ServerArgs(model_path="dummy", device="cpu"),
            "model_config": SimpleNamespace(is_multimodal=True, context_len=128),
            "is_draft_worker": False,
            "spec_algorithm": SimpleNamespace(is_eagle=lambda: False),
            "lora_manager": None,
            "req_to_token_pool": SimpleNamespace(size=4),
            "layer_info": SimpleNamespace(start_layer=0, end_layer=2),
            "get_cuda_graph_layers": layer_setup.compute_attention_and_moe_layers,
            "attn_backend": attention,
            "pp_group": model.pp_group,
            "device": "cpu",
            "gpu_id": 0,
            "eager_runner": "eager",
            "left": patch.LEFT_GB,
        }
        made = Runner(**given | fields)
        monkeypatch.setattr(common, "get_available_gpu_memory", lambda *args: made.left)
        monkeypatch.setattr(
            cuda_graph_setup, "PrefillCudaGraphRunner", lambda runner: recorder(runner, error)
        )
        text = type(model.language_model)
        with (
            get_exec().graph.override(cuda_graph_config=config),
            pytest.MonkeyPatch.context() as while_recording,
        ):
            while_recording.setattr(text, "forward", watched(text.forward))
            found = cuda_graph_setup.capture_prefill_graph(
                model_runner=made,  # type: ignore[arg-type]
                eager_runner=made.eager_runner,
            )
        made.prefill_cuda_graph_runner = found.runner
        made_for.append(model)
        return made

    yield make
    for model in made_for:
        vars(model.language_model).pop("forward", None)


class Runner(SimpleNamespace):
    """As much of SGLang's model runner as is asked for its graphs."""


def ids_of(kind: str, first: int = 3) -> torch.Tensor:
    """A prompt; with per-layer inputs, placeholders in it, which have those of the padding."""
    found = torch.arange(first, first + TOKENS)
    if kind == "ple":
        found[2], found[5] = IMAGE, 61
    return found


@pytest.fixture
def placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    config = vision.model("sdpa").config
    for name, value in (("image", IMAGE), ("video", 61), ("audio", 62)):
        monkeypatch.setattr(config, f"{name}_token_id", value)
    monkeypatch.setattr(config.text_config, "pad_token_id", PAD)


def replayed(runner: Any, ids: torch.Tensor, size: int, first: int, **fields: Any) -> torch.Tensor:
    """A prefill through SGLang's replay: rows of the prompt."""
    from sglang.srt.model_executor.runner.shape_key import ShapeKey

    graphs = runner.prefill_cuda_graph_runner
    live = forward_batch.prefill(input_ids=ids, positions=torch.arange(len(ids)) + first, **fields)
    live.out_cache_loc = torch.zeros(len(ids), dtype=torch.int64)
    graphs.buffer_registry.fill_from(
        live, raw_bs=1, padded_bs=1, raw_num_tokens=len(ids), padded_num_tokens=size
    )
    static = slots(graphs, size, **fields)
    found: torch.Tensor = graphs._execute_body_capture(
        live, static, size, len(ids), ShapeKey(size=size)
    )
    return found[: len(ids)]


def eager(runner: Any, ids: torch.Tensor, size: int, first: int, **fields: Any) -> torch.Tensor:
    """The same by stock, over as many rows: a GEMM may round otherwise over fewer."""
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    padded = torch.cat([ids, torch.zeros(size - len(ids), dtype=torch.int64)])
    positions = torch.cat([torch.arange(len(ids)) + first, padded[len(ids) :]])
    batch = forward_batch.prefill(input_ids=padded, positions=positions, **fields)
    with forward_context(ForwardContext(attn_backend=runner.attn_backend)):
        found: torch.Tensor = runner.model(padded, positions, batch)
    return found[: len(ids)]


def test_stock_cannot_record_what_it_hands_over(served: Any):
    ENGINE.revert()
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        served()


@pytest.mark.usefixtures("placeholders")
@pytest.mark.parametrize("kind", ["dense", "ple"])
def test_a_replay_computes_what_stock_computes(served: Any, kind: str):
    """Two chunks of a prompt and one shorter: other ids, positions and graphs each time."""
    runner = served(kind)
    text, run = runner.model.language_model, ENGINE.runs[NAME]
    assert "forward" not in vars(text)
    assert run.counters.engaged
    steps = [(ids_of(kind), MOST, 0), (ids_of(kind, 20), MOST, TOKENS), (ids_of(kind)[:6], 8, 3)]
    found = [replayed(runner, *step) for step in steps]
    assert isinstance(text.layers[0].self_attn.attn, models.Uniform)
    ENGINE.revert()
    assert vars(text).get("forward") is None
    for step, ours in zip(steps, found, strict=True):
        assert torch.equal(ours, eager(runner, *step))


@pytest.mark.usefixtures("placeholders")
def test_the_live_per_layer_inputs_are_what_a_graph_reads(
    served: Any, monkeypatch: pytest.MonkeyPatch
):
    """Without the copy it would go on with those of the step before."""
    runner = served("ple")
    step = ids_of("ple"), MOST, 0
    replayed(runner, ids_of("ple", 20), MOST, 0)
    with monkeypatch.context() as context:
        context.setattr(patch.Inputs, "fill", lambda self, given, tokens: None)
        stale = replayed(runner, *step)
    found = replayed(runner, *step)
    assert found.isfinite().all()
    assert not torch.equal(stale, found)


def test_images_are_encoded_and_masked_as_stock_does(
    served: Any, placeholders: None, monkeypatch: pytest.MonkeyPatch
):
    """The vision encoder and the masks run outside what is recorded, on the padded batch."""
    from sglang.srt.managers import mm_schedule
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs
    from sglang.srt.utils import common

    monkeypatch.setattr(common, "is_pin_memory_available", lambda *args: False)
    runner = served()
    feature, places = vision.pixels(4, 4, seed=3)
    tokens, prefix = len(places) // vision.POOL**2, 5
    marker = 50
    ids = torch.tensor([3, 4, *[marker] * tokens, 5])

    def images() -> Any:
        item = MultimodalDataItem(
            modality=Modality.IMAGE,
            feature=feature.clone(),
            offsets=[(prefix + 2, prefix + 1 + tokens)],
        )
        item.image_position_ids = places
        item.set_pad_value()
        item.pad_value, item.pad_values = marker, (marker,)
        return MultimodalInputs(mm_items=[item])

    def extent() -> dict[str, Any]:
        return {
            "mm_inputs": [images()],
            "extend_seq_lens": torch.tensor([len(ids)]),
            "extend_prefix_lens": torch.tensor([prefix]),
            "extend_seq_lens_cpu": [len(ids)],
            "extend_prefix_lens_cpu": [prefix],
        }

    def with_images(way: Any) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(mm_schedule, "embedding_cache", None)
        mm_schedule.init_mm_embedding_cache(1 << 20)
        metadata = runner.attn_backend.forward_metadata
        metadata.custom_mask = None
        return way(runner, ids, 8, prefix, **extent()), metadata.custom_mask

    found, mask = with_images(replayed)
    ENGINE.revert()
    expected, stocks_mask = with_images(eager)
    assert torch.equal(found, expected)
    assert torch.equal(mask, stocks_mask)
    rows = mask.view(len(ids), prefix + len(ids))
    assert rows[2, prefix + 1 + tokens]  # the first of an image sees its last


def test_hooks_on_layers_are_no_part_of_graphs(served: Any):
    handle = multimodal("dense").language_model.layers[0].register_forward_hook(lambda *args: None)
    try:
        assert served().prefill_cuda_graph_runner == "eager"
    finally:
        handle.remove()
    assert "forward hooks" in reason()


@pytest.mark.parametrize("where", ["layer", "inside", "all", "positions"])
def test_what_comes_later_ends_the_graphs(served: Any, where: str, monkeypatch: pytest.MonkeyPatch):
    runner = served()
    graphs, model = runner.prefill_cuda_graph_runner, runner.model.language_model
    fitting = functools.partial(
        patch._can_run,
        ENGINE.runs[NAME],
        weakref.ref(model),
        lambda batch: batch == "short",
    )
    assert fitting("short")
    assert not fitting("long")
    assert "without a graph" in reason()
    monkeypatch.setattr(ENGINE.runs[NAME], "_decline_reason", "")  # the first one stays
    if where == "positions":
        monkeypatch.setenv("SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION", "1")
    elif where == "all":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    else:
        part = {"layer": model.layers[-1], "inside": model.layers[0].mlp.act_fn}[where]
        handle = part.register_forward_hook(lambda *given: None)
    try:
        assert not fitting("short")
    finally:
        if where != "positions":
            handle.remove()
    assert runner.prefill_cuda_graph_runner == "eager"
    assert graphs.backend.cleaned
    assert ("OUT_OF_PLACE" if where == "positions" else "forward hooks") in reason()
    assert not fitting("short")  # nor any more


def test_the_graphs_are_asked_for_by_stocks_runner(served: Any):
    graphs = served().prefill_cuda_graph_runner
    assert graphs.can_run_graph.func is patch._can_run
    assert graphs.can_run_graph.args[2].__func__ is type(graphs).can_run_graph


def test_weights_put_in_the_place_of_others_end_the_graphs(served: Any):
    runner = served()
    model, run = runner.model.language_model, ENGINE.runs[NAME]
    norm = model.layers[-1].input_layernorm
    before = norm.weight
    norm.weight = torch.nn.Parameter(before.clone())
    try:
        assert patch._dropped(run, model)
    finally:
        norm.weight = before
    assert "weight update" in reason()


def test_reverting_ends_the_graphs(served: Any):
    runner = served()
    graphs = runner.prefill_cuda_graph_runner
    replayed(runner, ids_of("dense"), MOST, 0)
    assert "forward" in vars(runner.model.language_model)  # as stock leaves it
    ENGINE.revert()
    assert runner.prefill_cuda_graph_runner == "eager"
    assert graphs.backend.cleaned
    assert "forward" not in vars(runner.model.language_model)


def test_a_server_whose_graphs_cannot_be_recorded_runs_without(served: Any):
    runner = served(error=torch.OutOfMemoryError("no memory left"))
    assert runner.prefill_cuda_graph_runner == "eager"
    assert "forward" not in vars(runner.model.language_model)
    run = ENGINE.runs[NAME]
    assert run.state == states.FAILED
    assert "OutOfMemoryError: no memory left" in run.reason


def test_what_stock_makes_of_no_graphs_is_stocks(served: Any, monkeypatch: pytest.MonkeyPatch):
    """Whatever a later release's result wants to be made with: SGLang makes it."""
    import msgspec
    from sglang.srt.model_executor import cuda_graph_config
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup

    class More(cuda_graph_setup.GraphCapture, frozen=True, kw_only=True):
        more: int

    def stock(*, model_runner: Any, eager_runner: Any, force_for_draft_worker: bool) -> Any:
        phase, disabled = cuda_graph_config.Phase.PREFILL, cuda_graph_config.Backend.DISABLED
        if not cuda_graph_config.check_cuda_graph_backend(phase, disabled):
            raise torch.OutOfMemoryError("no memory left")
        return More(
            runner=eager_runner, memory_phase="prefill", memory_usage_gb=0, capture_time=0, more=1
        )

    monkeypatch.setattr(cuda_graph_setup, "GraphCapture", More)
    found: list[Any] = []

    def recording(**given: Any) -> Any:
        found.append(patch.record(ENGINE.runs[NAME], stock)(**given))
        return found[-1]

    monkeypatch.setattr(cuda_graph_setup, "capture_prefill_graph", recording)
    assert served().prefill_cuda_graph_runner == "eager"
    assert msgspec.structs.asdict(found[0])["more"] == 1
    assert "OutOfMemoryError: no memory left" in ENGINE.runs[NAME].reason


def test_memory_for_pictures_is_left(served: Any):
    assert served(left=patch.LEFT_GB - 0.1).prefill_cuda_graph_runner == "eager"
    assert "2.9 GB of memory would be left" in reason()
    assert ENGINE.runs[NAME].state == states.ACTIVE


@pytest.mark.parametrize("name", sorted(patch.OFF))
def test_arguments_that_sglang_sets_later_are_looked_at_again(served: Any, name: str):
    from sglang.srt.server_args import ServerArgs

    made = ServerArgs(model_path="dummy", device="cpu", **{name: True})
    assert served(server_args=made).prefill_cuda_graph_runner == "eager"
    assert patch.OFF[name] in reason()


def test_another_attention_backend_has_none(served: Any):
    assert served(attn_backend=SimpleNamespace()).prefill_cuda_graph_runner == "eager"
    assert "attention backend SimpleNamespace" in reason()


def test_a_draft_model_is_stocks(served: Any):
    """It has no graphs here, and the patch has nothing to say of it."""
    before = counted(NAME)
    assert served(is_draft_worker=True).prefill_cuda_graph_runner is None
    assert counted(NAME) == before
    assert reason() == "installed"


def test_a_model_without_encoders_is_stocks(served: Any):
    """It is given no embeddings; this stand-in for SGLang's runner has a slot for them."""
    before = counted(NAME)
    with pytest.raises(ValueError, match="exactly one"):
        served(model_config=SimpleNamespace(is_multimodal=False, context_len=128))
    assert counted(NAME) == before.and_(declined=1)
    assert "without its encoders" in reason()


@pytest.mark.parametrize("kind", ["disabled", "full"])
def test_what_nobody_asked_the_decision_about_is_said_where_graphs_are_recorded(
    folders: dict[str, Path], served: Any, kind: str
):
    """A choice of the user's, and pipeline parallelism: SGLang returns before it asks its rules."""
    given: dict[str, Any] = {"cuda_graph_backend_prefill": kind}
    if kind == "disabled":
        assert backend(arguments(folders["26b-a4b"], pp_size=2)) == kind
    before = counted(NAME)
    assert backend(arguments(folders["26b-a4b"], **given)) == kind
    assert counted(NAME) == before  # not asked
    served(backend=kind, sizes=())  # so that stock, too, records nothing
    assert counted(NAME) == before.and_(declined=1)
    assert f"CUDA graphs of prefill are {kind}" in reason()


def chosen(**fields: Any) -> Any:
    from sglang.srt.server_args import ServerArgs

    made = ServerArgs(model_path="dummy", device="cpu", **fields)
    made._cuda_graph_config_locked = {("prefill", "backend")}
    return made


def test_a_choice_of_the_users_is_served(served: Any):
    """Whatever else the server does: stock would end here."""
    runner = served("ple", server_args=chosen(enable_mixed_chunk=True), left=0.1)
    assert patch.Inputs is type(runner.prefill_cuda_graph_runner._fill_input_embeds_slot.args[0])


def test_a_choice_that_cannot_be_served_rightly_ends_as_stock(
    served: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION", "1")
    with pytest.raises(ValueError, match="exactly one"):
        served(server_args=chosen())
    assert "positions one too low" in reason()


def test_a_choice_that_fails_ends_as_stock(served: Any):
    with pytest.raises(torch.OutOfMemoryError):
        served(server_args=chosen(), error=torch.OutOfMemoryError("no memory left"))


def test_more_tokens_than_the_largest_graph_has_are_an_error():
    text = models.build("ple")
    inputs = patch.Inputs(text)
    assert len(inputs.rows(torch.arange(4))) == 4  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 tokens do not fit"):
        inputs.rows(torch.arange(5))


# -- the late replacement --------------------------------------------------------------------------


def test_it_is_where_sglang_looks_and_out_again():
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup

    ours = cuda_graph_setup.capture_prefill_graph
    assert ours.__module__ == patch.__name__
    assert model_runner.capture_prefill_graph is ours
    ENGINE.revert()
    stock = cuda_graph_setup.capture_prefill_graph
    assert stock.__code__.co_filename == cuda_graph_setup.__file__
    assert model_runner.capture_prefill_graph is stock


def test_somebody_elses_recording_is_a_conflict(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup

    ENGINE.revert()
    monkeypatch.setattr(cuda_graph_setup, "capture_prefill_graph", lambda **given: None)
    ENGINE.apply(only=[NAME])
    assert ENGINE.runs[NAME].state == states.CONFLICT
    assert "capture_prefill_graph" in ENGINE.runs[NAME].reason
    ENGINE.revert()


def test_it_waits_for_what_reads_the_arguments_alone():
    """What records is imported long after: no part of it may be waited for."""
    port = ENGINE.runs[NAME].port
    assert port is not None
    assert port.modules == (patch.TARGET.partition(":")[0],)
