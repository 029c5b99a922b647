"""The default of swa_full_tokens_ratio on SGLang's own ServerArgs, from keywords and command line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_12.memory import swa_ratio as patch
from tests.cpu.conftest import REPOSITORY, only_patch, patched_sglang

NAME = "swa_ratio"


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME):
        yield


def folder(tmp_path: Path, experts: int = 128, multimodal: bool = False) -> str:
    """A model folder of one config.json."""
    text = {
        "model_type": "gemma4_text",
        "num_experts": experts or None,
        "enable_moe_block": experts > 0,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 64,
        "vocab_size": 64,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    }
    if multimodal:
        config: dict[str, Any] = {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            "text_config": text,
        }
    else:
        renamed = {"v_head_dim": 64, "swa_head_dim": 64, "swa_v_head_dim": 64}
        config = {
            "architectures": ["Gemma4ForCausalLM"],
            "swa_num_key_value_heads": 1,
            **text,
            **renamed,
        }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def from_keywords(model: str, **given: Any) -> Any:
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(model_path=model, device="cpu", load_format="dummy", **given)


def from_command_line(model: str, *given: str) -> Any:
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(["--model-path", model, "--device", "cpu", *given])


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("make", [from_keywords, from_command_line])
def test_moe_models_get_the_other_default(make: Any, multimodal: bool, tmp_path: Path):
    """A plain number, so that it is pickled for the schedulers as any other."""
    before = ENGINE.runs[NAME].counters.engaged
    arguments = make(folder(tmp_path, multimodal=multimodal))
    assert arguments.swa_full_tokens_ratio == patch.RATIO == 0.15
    assert type(arguments.swa_full_tokens_ratio) is float
    assert ENGINE.runs[NAME].counters.engaged == before + 1
    ENGINE.revert()
    assert make(folder(tmp_path, multimodal=multimodal)).swa_full_tokens_ratio == 0.8


@pytest.mark.parametrize("value", [0.8, 0.3, 1.0])
def test_a_given_value_stays_also_if_it_is_the_default(value: float, tmp_path: Path):
    model = folder(tmp_path)
    arguments = from_keywords(model, swa_full_tokens_ratio=value)
    assert arguments.swa_full_tokens_ratio == value
    arguments = from_command_line(model, "--swa-full-tokens-ratio", str(value))
    assert arguments.swa_full_tokens_ratio == value
    assert "was given" in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize("make", [from_keywords, from_command_line])
def test_dense_models_keep_stocks_default(make: Any, tmp_path: Path):
    arguments = make(folder(tmp_path, experts=0))
    assert arguments.swa_full_tokens_ratio == 0.8
    assert type(arguments.swa_full_tokens_ratio) is float
    assert "dense" in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("enable_hierarchical_cache", True, "hierarchical cache"),
        ("disaggregation_mode", "decode", "disaggregation"),
    ],
)
def test_what_moves_kv_about_keeps_stocks_default(
    name: str, value: Any, reason: str, tmp_path: Path
):
    arguments = from_keywords(folder(tmp_path))
    assert patch.unfit(arguments) is None
    setattr(arguments, name, value)
    assert patch.unfit(arguments) == reason


def test_a_config_that_cannot_be_read_keeps_stocks_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An error of ours never stops a server."""
    model = folder(tmp_path)
    monkeypatch.setattr(patch, "unfit", lambda arguments: 1 / 0)
    assert from_keywords(model).swa_full_tokens_ratio == 0.8
    assert "ZeroDivisionError" in ENGINE.runs[NAME].full_reason()


def test_a_mark_that_was_pickled_is_a_plain_number():
    found = pickle.loads(pickle.dumps(patch.Unset(0.8)))
    assert type(found) is float
    assert found == 0.8


def test_revert_leaves_a_plain_default():
    from sglang.srt.server_args import ServerArgs

    assert isinstance(ServerArgs.swa_full_tokens_ratio, patch.Unset)
    ENGINE.revert()
    assert type(ServerArgs.swa_full_tokens_ratio) is float
    assert not any(isinstance(value, patch.Unset) for value in ServerArgs.__init__.__defaults__)
    assert ServerArgs(model_path="dummy").swa_full_tokens_ratio == 0.8


def test_pools_of_the_default(tmp_path: Path):
    """SGLang's configurator: sliding layers get 0.15 of the tokens, full layers more than before."""
    from types import SimpleNamespace

    import torch
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.pool_configurator import HybridSWAPoolConfigurator

    from gemma4_turbo.cli import sglang_process

    sglang_process.prepare_sglang()
    model = folder(tmp_path)
    found = []
    for apply in (True, False):
        if not apply:
            ENGINE.revert()
        runner = SimpleNamespace(
            model_config=ModelConfig(model),
            kv_cache_dtype=torch.bfloat16,
            server_args=from_keywords(model),
        )
        made = HybridSWAPoolConfigurator(runner).calculate_pool_sizes(1 << 30, 1)
        found.append((made.full_max_total_num_tokens, made.swa_max_total_num_tokens))
    (full, sliding), (stock_full, stock_sliding) = found
    assert sliding == int(full * 0.15)
    assert stock_sliding == int(stock_full * 0.8)
    assert full > 2.5 * stock_full


def test_it_is_in_before_the_servers_command_line_is_read(python: Any, tmp_path: Path):
    """``launch_server`` imports the arguments first and everything else later."""
    done = python(
        "import gemma4_turbo\n"
        f"gemma4_turbo.apply(only=['{NAME}'])\n"
        "from sglang.srt.server_args import prepare_server_args\n"
        f"model = {folder(tmp_path)!r}\n"
        "arguments = prepare_server_args(['--model-path', model, '--device', 'cpu'])\n"
        "print(arguments.swa_full_tokens_ratio)\n",
        PYTHONPATH=str(REPOSITORY),
    )
    assert done.stdout.split()[-1:] == [str(patch.RATIO)], done.stdout + done.stderr
