"""What keeps an assistant from being loaded: absent from this release, mended where it is there."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.engine.swap import Swap
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_12.mtp import mtp_launch, mtp_moe_runner
from tests.cpu import small_mtp
from tests.cpu.conftest import patched_sglang
from tests.runs import unpublished

NAMES = ["mtp_launch", "mtp_moe_runner"]


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=NAMES):
        yield


def run_of(name: str) -> PatchRun:
    run = unpublished(name)
    run._counters = type(ENGINE.runs[name].counters)([0] * 8, 0)
    return run


@pytest.mark.parametrize("name", NAMES)
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
    ("reads", "sets", "found"),
    [
        ("self.pp_group.world_size", "self.config = config", True),
        ("self.pp_group.world_size", "self.pp_group = get_pp_group()", False),
        ("self.config", "self.config = config", False),
    ],
)
def test_a_missing_pipeline_group_is_seen(reads: str, sets: str, found: bool) -> None:
    tree = sources(
        gemma4_causal=BASE.format(reads=reads, experts="0", mapping="None"),
        gemma4_mtp=ASSISTANT.format(sets=sets),
    )
    assert (mtp_launch.NO_PP_GROUP in mtp_launch.defects(tree)) is found


@pytest.mark.parametrize(
    ("experts", "mapping", "found"),
    [
        ("self.config.num_experts", "FusedMoE.make_expert_params_mapping(num_experts)", True),
        ("getattr(self.config, 'num_experts', None)", "make_expert_params_mapping(0)", True),
        ("getattr(self.config, 'num_experts', 0) or 0", "make_expert_params_mapping(0)", False),
        ("self.config.num_experts", "range(num_experts)", False),
    ],
)
def test_a_missing_number_of_experts_is_seen(experts: str, mapping: str, found: bool) -> None:
    tree = sources(
        gemma4_causal=BASE.format(reads="None", experts=experts, mapping=mapping),
        gemma4_mtp=ASSISTANT.format(sets="pass"),
    )
    assert (mtp_launch.NO_EXPERTS in mtp_launch.defects(tree)) is found


def defective(monkeypatch: pytest.MonkeyPatch, defects: list[str]) -> PatchRun:
    """A run of the patch on a tree with these defects, its replacements in place."""
    from sglang.srt.models import gemma4_mtp

    run = run_of("mtp_launch")
    monkeypatch.setattr(mtp_launch, "defects", lambda definitions: defects)
    stock = {target: Swap(target).function for target in run.targets}
    replacements = mtp_launch.build(run, stock)
    assistant = gemma4_mtp.Gemma4AssistantForCausalLM
    monkeypatch.setattr(assistant, "__init__", replacements[mtp_launch.CONSTRUCT])
    monkeypatch.setattr(assistant, "load_weights", replacements[mtp_launch.LOAD])
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
    run = defective(monkeypatch, [mtp_launch.NO_PP_GROUP])
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
    run = defective(monkeypatch, [mtp_launch.NO_EXPERTS])
    assert assistant.load_weights([]) == []
    assert getattr(assistant.config, "num_experts", "absent") == ("absent" if absent else None)
    assert run.counters.engaged == 1
    assistant.config.num_experts = 2  # a number is left alone
    assert len(assistant.load_weights([])) == 6
    assert run.counters.engaged == 1


def test_only_the_defect_that_is_there_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("mtp_launch")
    stock = {target: Swap(target).function for target in run.targets}
    monkeypatch.setattr(mtp_launch, "defects", lambda definitions: [mtp_launch.NO_EXPERTS])
    built = mtp_launch.build(run, stock)
    assert built[mtp_launch.CONSTRUCT] is stock[mtp_launch.CONSTRUCT]
    assert built[mtp_launch.LOAD] is not stock[mtp_launch.LOAD]


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
    ("choice", "found"),
    [
        ("self.moe_runner_backend = 'flashinfer_trtllm'", True),
        ("if self.quantization: self.moe_runner_backend = 'flashinfer_trtllm'", False),
        ("if is_gemma4_modelopt_fp4: self.moe_runner_backend = 'flashinfer_trtllm'", False),
        ("self.moe_runner_backend = 'triton'", False),
    ],
)
def test_a_blind_choice_is_seen(choice: str, found: bool) -> None:
    node = ast.parse(BLIND.format(choice=choice)).body[0]
    assert mtp_moe_runner.chooses_blindly(node) is found


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
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    architecture: str,
    quantization: str | None,
    result: str,
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

    monkeypatch.setattr(mtp_moe_runner, "chooses_blindly", lambda node: True)
    run = run_of("mtp_moe_runner")
    mtp_moe_runner.build(run, {mtp_moe_runner.TARGET: adjust})[mtp_moe_runner.TARGET](arguments)
    assert arguments.moe_runner_backend == result
    assert run.counters.engaged == (result == "auto")


def test_arguments_that_cannot_be_read_are_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model config: stock's choice stands, and the report says why."""

    def adjust(self: Any) -> None:
        self.moe_runner_backend = "flashinfer_trtllm"

    monkeypatch.setattr(mtp_moe_runner, "chooses_blindly", lambda node: True)
    run = run_of("mtp_moe_runner")
    arguments = SimpleNamespace(moe_runner_backend="auto")
    mtp_moe_runner.build(run, {mtp_moe_runner.TARGET: adjust})[mtp_moe_runner.TARGET](arguments)
    assert arguments.moe_runner_backend == "flashinfer_trtllm"
    assert "get_model_config" in run.full_reason()
