"""Defects looked for: absent from this release, mended on SGLang's own classes where they are there."""

from __future__ import annotations

import ast
import contextlib
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.catalogue import DEFECTS
from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.run import PatchRun, code_of
from gemma4_turbo.engine.swap import Swap
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.launch import late_arguments
from gemma4_turbo.ports.v0_5_12.speculation import defects
from gemma4_turbo.ports.v0_5_12.speculation.defects import Defect
from tests.cpu import small_mtp
from tests.cpu.conftest import patched_sglang
from tests.runs import unpublished

NAMES = [patch.name for patch in DEFECTS]


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=NAMES):
        yield


def run_of(name: str) -> PatchRun:
    run = unpublished(name)
    run._counters = type(ENGINE.runs[name].counters)([0] * 400, 0)
    return run


def found(row: Defect, *what: str) -> Defect:
    """The row on a source that has this."""
    return row._replace(look=lambda definitions: list(what))


def test_every_defect_has_a_row() -> None:
    """Of its name, and its port says that it looks by itself."""
    for name in NAMES:
        ports = [port for port in ENGINE.runs[name].ports if not port.tells_only]
        assert all(port.finds_defect for port in ENGINE.runs[name].ports)
        (port,) = ports  # another line's tells that the defect is gone
        assert code_of(port) is getattr(defects, name)


# -- the sliding-window state of the draft's backend -----------------------------------------------

VIEWS = "frozen_kv_views"
TARGETS = ENGINE.runs[VIEWS].targets
SLIDING, FULL = 0, 1  # layers
patch = defects.frozen_kv_views


@pytest.fixture
def pool() -> Any:
    """A stock ``SWAKVPool`` of one sliding and one full layer; slot n of full is 100 + n there."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    made = SWAKVPool(
        size=64,
        size_swa=256,
        page_size=1,
        dtype=torch.bfloat16,
        head_num=1,
        head_dim=8,
        swa_attention_layer_ids=[SLIDING],
        full_attention_layer_ids=[FULL],
        enable_kvcache_transpose=False,
        device="cpu",
    )
    made.register_mapping(torch.arange(100, 165))
    return made


def backend(pool: Any) -> Any:
    """A stock TRT-LLM backend with what its metadata needs; ``pool`` None: the draft's own pool."""
    from sglang.srt.layers.attention.trtllm_mha_backend import TRTLLMHAAttnBackend

    made = object.__new__(TRTLLMHAAttnBackend)
    made.page_size, made.device, made.speculative_step_id = 1, "cpu", 0
    made.use_sliding_window_kv_pool, made._swa_kv_pool = pool is not None, pool
    return made


def batch(draft_backend: Any) -> Any:
    """What a view and the backend's metadata read of a stock ``ForwardBatch``."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        spec_info="draft input",
        token_to_kv_pool="the draft's pool",
        attn_backend=draft_backend,
        forward_mode=ForwardMode.DECODE,
        batch_size=1,
        seq_lens=torch.tensor([3]),
        seq_lens_cpu=torch.tensor([3]),
        req_pool_indices=torch.tensor([0]),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.tensor([[5, 6, 7, 0]])),
    )


def context(pool: Any) -> Any:
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPContext

    return FrozenKVMTPContext(pool, {0: SLIDING})


def stock() -> dict[str, Any]:
    return {target: Swap(target).function for target in TARGETS}


def table_of(draft_backend: Any) -> Any:
    """The page numbers that a sliding layer of the draft would read with."""
    layer = SimpleNamespace(layer_id=SLIDING)
    return draft_backend._get_layer_page_table(layer, None).tolist()


VIEW = pytest.mark.parametrize("target", TARGETS[:2], ids=lambda t: t.partition(":")[2])


def test_this_release_is_not_stale_and_stays_untouched() -> None:
    """Said with the reason; each target is stock's very object, so nothing is paid."""
    run = ENGINE.runs[VIEWS]
    assert run.state == states.UPSTREAMED
    assert "does not have the defect" in run.reason
    assert "token_to_kv_pool_allocator" in run.reason
    assert run.swaps == []
    for target in TARGETS:
        assert "gemma4_turbo" not in Swap(target).function.__code__.co_filename
        inner = getattr(Swap(target).function, "__wrapped__", Swap(target).function)
        assert inner.__module__ == target.partition(":")[0]


def test_a_tree_whose_backend_asks_its_own_pool_is_taken() -> None:
    """The same sources but for where the backend takes its pool from: no release number decides."""

    def source(module: str) -> str | None:
        text = fingerprints.installed_source(module)
        return text and text.replace("token_to_kv_pool_allocator", "token_to_kv_pool")

    ports = ENGINE.runs[VIEWS].ports
    there, absent = fingerprints.Definitions(source), fingerprints.Definitions(lambda module: None)
    assert fingerprints.judge(ports, "0.5.13.dev1", there).state == states.ACTIVE
    assert fingerprints.judge(ports, None, absent).state == states.UNSUPPORTED


@VIEW
def test_stock_reads_the_wrong_slots_and_the_patch_the_right_ones(pool: Any, target: str) -> None:
    """A stale backend: full-pool page numbers for a sliding layer, translated ones when patched."""
    tables = []
    run = run_of(VIEWS)
    for view in (stock()[target], patch.build(run, stock())[target]):
        draft = backend(None)
        forward_batch = batch(draft)
        with view(forward_batch, context(pool)):
            assert forward_batch.token_to_kv_pool is pool
            if target == TARGETS[1]:
                forward_batch.spec_info = None  # metadata is built in the other view only
            draft.init_forward_metadata(forward_batch)
            tables.append(table_of(draft))
        assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (False, None)
        assert forward_batch.token_to_kv_pool == "the draft's pool"
    assert tables == [[[5, 6, 7]], [[105, 106, 107]]]
    assert run.counters.engaged == 1


@VIEW
def test_restored_after_an_exception(pool: Any, target: str) -> None:
    view = patch.build(run_of(VIEWS), stock())[target]
    draft = backend(None)
    forward_batch = batch(draft)
    seen = []

    def fails() -> None:
        with view(forward_batch, context(pool)):
            seen.append(draft._swa_kv_pool)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == [pool]
    assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (False, None)
    assert forward_batch.token_to_kv_pool == "the draft's pool"
    assert forward_batch.spec_info == "draft input"


@VIEW
def test_an_unbound_model_fails_as_in_stock(target: str) -> None:
    draft = backend(None)
    with (
        pytest.raises(RuntimeError, match="before the model was bound"),
        patch.build(run_of(VIEWS), stock())[target](batch(draft), None),
    ):
        pass
    assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (False, None)


def test_a_plain_target_pool_clears_a_sliding_state(pool: Any) -> None:
    """The other way round: the draft has a window pool, the target has none."""
    draft = backend(pool)
    view = patch.build(run_of(VIEWS), stock())[TARGETS[0]]
    with view(batch(draft), context(SimpleNamespace())):
        assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (False, None)
    assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (True, pool)


@contextlib.contextmanager
def later_view(forward_batch: Any, kv_context: Any, draft_attn_backend: Any) -> Iterator[None]:
    """With the signature of later sources, which swap the backend's pool instead of the batch's."""
    kept = draft_attn_backend.token_to_kv_pool
    draft_attn_backend.token_to_kv_pool = kv_context.target_token_to_kv_pool
    try:
        yield
    finally:
        draft_attn_backend.token_to_kv_pool = kept


@pytest.mark.parametrize("by_name", [False, True], ids=["by place", "by name"])
def test_the_signature_with_the_backend(pool: Any, by_name: bool) -> None:
    """The backend that is passed counts, not the one that the batch carries."""
    run = run_of(VIEWS)
    view = patch.build(run, dict.fromkeys(TARGETS, later_view))[TARGETS[0]]
    draft, other = backend(None), backend(None)
    draft.token_to_kv_pool = "own"
    passed = {"draft_attn_backend": draft} if by_name else {}
    with view(batch(other), context(pool), *(() if by_name else (draft,)), **passed):
        assert draft.token_to_kv_pool is pool
        assert draft._swa_kv_pool is pool
        assert other._swa_kv_pool is None
    assert (draft.token_to_kv_pool, draft._swa_kv_pool) == ("own", None)
    assert run.counters.engaged == 1


def test_views_inside_views_restore_each_its_own(pool: Any) -> None:
    """The inner one finds all in step; that is no reason to stand aside."""
    run = run_of(VIEWS)
    built = patch.build(run, stock())
    draft = backend(None)
    forward_batch = batch(draft)
    with built[TARGETS[0]](forward_batch, context(pool)):
        with built[TARGETS[1]](forward_batch, context(pool)):
            assert draft._swa_kv_pool is pool
        assert draft._swa_kv_pool is pool
    assert draft._swa_kv_pool is None
    assert run.counters.engaged == 1
    assert run.state != states.UPSTREAMED


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("what", [defects.MAKE, defects.CAPTURE])
def test_capture_of_the_drafts_graphs(pool: Any, what: str, fails: bool) -> None:
    """Page tables are allocated and graphs captured in step; put back when capture fails, too."""
    seen = []
    draft = backend(None)
    worker = SimpleNamespace(draft_attn_backend=draft, kv_context=context(pool))
    runner = SimpleNamespace(frozen_kv_mtp_worker=worker)

    def captures(self: Any, *args: Any) -> str:
        assert args == ((worker,) if what == defects.MAKE else (4, "forward"))
        seen.append(draft._alloc_swa_page_table(2, 3))
        if fails:
            raise ZeroDivisionError
        return "graph"

    replacement = patch.build(run_of(VIEWS), {**stock(), what: captures})[what]
    arguments = (worker,) if what == defects.MAKE else (4, "forward")
    expectation = pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext()
    with expectation:
        assert replacement(runner, *arguments) == (None if what == defects.MAKE else "graph")
    assert seen[0].shape == (2, 3)  # stock returns None for a stale backend
    assert draft._alloc_swa_page_table(2, 3) is None


@pytest.fixture
def suspected(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Stock on a tree that has to be taken on suspicion, nothing applied."""
    with monkeypatch.context() as patching:
        patching.setattr(fingerprints.Definitions, "uses", lambda *args: False)
        ENGINE.revert()
        yield stock()
    ENGINE.revert()
    ENGINE.apply(only=NAMES)


@pytest.mark.parametrize("kind", ["in step", "stateless"])
def test_stands_aside_when_the_first_backend_is_not_stale(
    pool: Any, kind: str, suspected: dict[str, Any]
) -> None:
    """On a tree that had to be taken on suspicion: stock is back after the first look."""
    ENGINE.apply(only=[VIEWS])
    run = ENGINE.runs[VIEWS]
    assert run.state == states.ACTIVE
    from sglang.srt.speculative import frozen_kv_mtp_utils

    draft = backend(pool) if kind == "in step" else SimpleNamespace()
    with frozen_kv_mtp_utils.frozen_kv_target_view(batch(draft), context(pool)):
        assert run.state == states.UPSTREAMED
        assert "nothing is stale" in run.reason
        assert type(draft).__name__ in run.reason
    assert stock() == suspected
    assert run.counters.engaged == 0


def test_a_defect_is_mended_before_its_function_is_made_faster(suspected: dict[str, Any]) -> None:
    """`mtp_chain` replaces the same constructor, and comes before it in the catalogue."""
    ENGINE.apply(only=["mtp_chain", VIEWS])
    assert ENGINE.runs[VIEWS].state == states.ACTIVE
    chain = ENGINE.runs["mtp_chain"]
    assert chain.state == states.CONFLICT
    assert "before us by another patch" in chain.reason


# -- what keeps an assistant from being loaded -----------------------------------------------------


@pytest.mark.parametrize("name", ["mtp_launch", "mtp_moe_runner"])
def test_this_release_has_none_of_them(name: str) -> None:
    """Said so, and every target is stock's own."""
    run = ENGINE.runs[name]
    assert run.state == states.UPSTREAMED
    assert "this source" in run.reason
    for target in run.targets:
        assert "gemma4_turbo" not in Swap(target).function.__code__.co_filename


def sources(**modules: str) -> fingerprints.Definitions:
    """Definitions of a tree with these modules."""
    texts = {f"sglang.srt.{name}": textwrap.dedent(text) for name, text in modules.items()}
    return fingerprints.Definitions(
        lambda module: texts.get(module.replace("sglang.srt.models.", "sglang.srt."))
    )


BASE = """
class Gemma4ForCausalLM:
    def tie_weights(self):
        return {reads}
    def load_weights(self, weights):
        num_experts = {experts}
        return {mapping}
"""
ASSISTANT = """
class Gemma4AssistantForCausalLM(Gemma4ForCausalLM):
    def __init__(self, config):
        {sets}
"""


@pytest.mark.parametrize(
    ("reads", "sets", "there"),
    [
        ("self.pp_group.world_size", "self.config = config", True),
        ("self.pp_group.world_size", "self.pp_group = get_pp_group()", False),
        ("self.config", "self.config = config", False),
    ],
)
def test_a_missing_pipeline_group_is_seen(reads: str, sets: str, there: bool) -> None:
    tree = sources(
        gemma4_causal=BASE.format(reads=reads, experts="0", mapping="None"),
        gemma4_mtp=ASSISTANT.format(sets=sets),
    )
    assert (defects.NO_PP_GROUP in defects.launch_defects(tree)) is there


@pytest.mark.parametrize(
    ("experts", "mapping", "there"),
    [
        ("self.config.num_experts", "FusedMoE.make_expert_params_mapping(num_experts)", True),
        ("getattr(self.config, 'num_experts', None)", "make_expert_params_mapping(0)", True),
        ("getattr(self.config, 'num_experts', 0) or 0", "make_expert_params_mapping(0)", False),
        ("self.config.num_experts", "range(num_experts)", False),
    ],
)
def test_a_missing_number_of_experts_is_seen(experts: str, mapping: str, there: bool) -> None:
    tree = sources(
        gemma4_causal=BASE.format(reads="None", experts=experts, mapping=mapping),
        gemma4_mtp=ASSISTANT.format(sets="pass"),
    )
    assert (defects.NO_EXPERTS in defects.launch_defects(tree)) is there


def defective(monkeypatch: pytest.MonkeyPatch, *what: str) -> PatchRun:
    """A run of the patch on a tree with these defects, its replacements in place."""
    from sglang.srt.models import gemma4_mtp

    run = run_of("mtp_launch")
    stock = {target: Swap(target).function for target in run.targets}
    replacements = found(defects.mtp_launch, *what).build(run, stock)
    assistant = gemma4_mtp.Gemma4AssistantForCausalLM
    monkeypatch.setattr(assistant, "__init__", replacements[defects.CONSTRUCT])
    monkeypatch.setattr(assistant, "load_weights", replacements[defects.LOAD])
    return run


def test_the_real_assistant_under_a_base_that_reads_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The failure is that of the report; mended, the assistant is built and has the group."""
    from sglang.srt.distributed import get_pp_group
    from sglang.srt.models.gemma4_causal import Gemma4ForCausalLM

    tie = Gemma4ForCausalLM.tie_weights

    def tie_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.pp_group.world_size == 1
        return tie(self, *args, **kwargs)

    monkeypatch.setattr(Gemma4ForCausalLM, "tie_weights", tie_weights)
    with pytest.raises(AttributeError, match="pp_group"):
        small_mtp.assistant()
    run = defective(monkeypatch, defects.NO_PP_GROUP)
    assert small_mtp.assistant().pp_group is get_pp_group()
    assert run.counters.engaged == 1


@pytest.mark.parametrize("absent", [False, True], ids=["None", "absent"])
def test_the_real_assistant_under_a_base_that_counts_experts(
    monkeypatch: pytest.MonkeyPatch, absent: bool
) -> None:
    """SGLang's own mapping counts to None; mended, to 0, and the configuration is as before."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.models.gemma4_causal import Gemma4ForCausalLM

    def load_weights(self: Any, weights: Any) -> Any:
        return FusedMoE.make_expert_params_mapping(
            "gate", "down", "up", num_experts=getattr(self.config, "num_experts", None)
        )

    monkeypatch.setattr(Gemma4ForCausalLM, "load_weights", load_weights)
    assistant = small_mtp.assistant()
    if absent:
        assistant.config = SimpleNamespace()
    else:
        assistant.config.num_experts = None
    with pytest.raises(TypeError, match="NoneType"):
        assistant.load_weights([])
    run = defective(monkeypatch, defects.NO_EXPERTS)
    assert assistant.load_weights([]) == []
    assert getattr(assistant.config, "num_experts", "absent") == ("absent" if absent else None)
    assert run.counters.engaged == 1
    assistant.config.num_experts = 2  # a number is left alone
    assert len(assistant.load_weights([])) == 6
    assert run.counters.engaged == 1


def test_only_the_defect_that_is_there_is_mended() -> None:
    run = run_of("mtp_launch")
    stock = {target: Swap(target).function for target in run.targets}
    built = found(defects.mtp_launch, defects.NO_EXPERTS).build(run, stock)
    assert built[defects.CONSTRUCT] is stock[defects.CONSTRUCT]
    assert built[defects.LOAD] is not stock[defects.LOAD]


# -- the automatic choice of a MoE runner -----------------------------------------------------------

BLIND = """
def _handle_model_specific_adjustments(self):
    if model_arch == "Other":
        self.moe_runner_backend = "flashinfer_trtllm"
    elif model_arch in ("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"):
        if is_sm100_supported() and self.moe_runner_backend == "auto":
            {choice}
"""


@pytest.mark.parametrize(
    ("choice", "there"),
    [
        ("self.moe_runner_backend = 'flashinfer_trtllm'", True),
        ("if self.quantization: self.moe_runner_backend = 'flashinfer_trtllm'", False),
        ("if is_gemma4_modelopt_fp4: self.moe_runner_backend = 'flashinfer_trtllm'", False),
        ("self.moe_runner_backend = 'triton'", False),
    ],
)
def test_a_blind_choice_is_seen(choice: str, there: bool) -> None:
    node = ast.parse(BLIND.format(choice=choice)).body[0]
    assert defects.chooses_blindly(node) is there
    text = BLIND.format(choice=choice)
    tree = fingerprints.Definitions(
        lambda module: f"class ServerArgs:\n{textwrap.indent(text, '    ')}"
    )
    assert defects.runner_defects(tree) == ([defects.BLIND] if there else [])


@pytest.mark.parametrize(
    ("asked", "architecture", "quantization", "result"),
    [
        ("auto", "Gemma4ForConditionalGeneration", None, "auto"),
        ("auto", "Gemma4ForCausalLM", "modelopt_fp4", "flashinfer_trtllm"),
        ("auto", "Qwen3MoeForCausalLM", None, "flashinfer_trtllm"),
        ("flashinfer_cutlass", "Gemma4ForCausalLM", None, "flashinfer_cutlass"),
    ],
)
def test_a_blind_choice_is_taken_back(
    asked: str, architecture: str, quantization: str | None, result: str
) -> None:
    """On stock's ``ServerArgs``, with a method that chooses as the defective tree did."""
    from sglang.srt.server_args import ServerArgs

    arguments = object.__new__(ServerArgs)
    arguments.moe_runner_backend, arguments.quantization = asked, None
    arguments.model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[architecture]), quantization=quantization
    )

    def adjust(self: Any) -> None:
        if self.moe_runner_backend == "auto":
            self.moe_runner_backend = "flashinfer_trtllm"

    run = run_of("mtp_moe_runner")
    blind = found(defects.mtp_moe_runner, defects.BLIND)
    blind.build(run, {defects.ADJUST: adjust})[defects.ADJUST](arguments)
    assert arguments.moe_runner_backend == result
    assert run.counters.engaged == (result == "auto")


@pytest.mark.parametrize(
    ("runner", "architecture", "acts"),
    [
        ("flashinfer_trtllm", "Gemma4ForCausalLM", True),
        ("flashinfer_trtllm", "Qwen3MoeForCausalLM", False),
        ("triton", "Gemma4ForCausalLM", False),
    ],
)
def test_arguments_that_were_made_too_early(runner: str, architecture: str, acts: bool) -> None:
    """Whether the row would have taken the choice back, had it been in: for strict mode."""
    model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[architecture]), quantization=None
    )
    arguments = SimpleNamespace(
        moe_runner_backend=runner, quantization=None, get_model_config=lambda: model_config
    )
    asked = late_arguments._ACTS["mtp_moe_runner"]
    assert asked(defects.mtp_moe_runner, arguments) is acts


def test_arguments_that_cannot_be_read_are_stocks() -> None:
    """No model config: stock's choice stands, and the report says why."""

    def adjust(self: Any) -> None:
        self.moe_runner_backend = "flashinfer_trtllm"

    run = run_of("mtp_moe_runner")
    arguments = SimpleNamespace(moe_runner_backend="auto")
    blind = found(defects.mtp_moe_runner, defects.BLIND)
    blind.build(run, {defects.ADJUST: adjust})[defects.ADJUST](arguments)
    assert arguments.moe_runner_backend == "flashinfer_trtllm"
    assert "get_model_config" in run.full_reason()
