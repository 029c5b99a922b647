"""KV pools without the KV-shared layers: SGLang's configurator, pools and model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.instance import ENGINE
from tests.cpu import shared_kv
from tests.cpu.conftest import only_patch

NAME = "shared_kv_pool"


@pytest.fixture(scope="module", autouse=True)
def applied(patch_imported: None) -> None:
    sglang_process.prepare_sglang()


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME):
        yield


def runner(folder: Path, model: str = "e4b", **changes: Any) -> Any:
    """What the configurator reads of a model runner, with SGLang's own ModelConfig."""
    from sglang.srt.model_executor.model_runner_kv_cache_mixin import ModelRunnerKVCacheMixin

    config = shared_kv.model_config(folder, model)
    arguments = {
        "swa_full_tokens_ratio": 0.8,
        "enable_hierarchical_cache": False,
        "enable_lmcache": False,
        "disaggregation_mode": "null",
        "speculative_algorithm": None,
        "pp_size": 1,
        "max_running_requests": None,
    }
    made = {"model_config": config, "kv_cache_dtype": torch.bfloat16, "enable_hisparse": False}
    arguments |= {n: v for n, v in changes.items() if n in arguments}
    made |= {n: v for n, v in changes.items() if n not in arguments}
    mr = SimpleNamespace(
        **made, server_args=SimpleNamespace(**arguments), dp_size=1, mambaish_config=None
    )
    mr._resolve_max_num_reqs = partial(ModelRunnerKVCacheMixin._resolve_max_num_reqs, mr)
    return mr


def sizes(mr: Any, available: int = 20 << 30) -> tuple[int, int]:
    from sglang.srt.model_executor.pool_configurator import HybridSWAPoolConfigurator

    config = HybridSWAPoolConfigurator(mr).calculate_pool_sizes(available, page_size=1)
    return config.full_max_total_num_tokens, config.swa_max_total_num_tokens


@pytest.mark.parametrize(("model", "owning"), [("e4b", (4, 20)), ("e2b", (3, 12))])
def test_more_tokens_fit(model: str, owning: tuple[int, int], tmp_path: Path):
    """By the memory of the layers that own KV; the pools are made from the same lists."""
    mr = runner(tmp_path, model, max_running_requests=64)
    before = ENGINE.runs[NAME].counters.engaged
    found = sizes(mr)
    assert ENGINE.runs[NAME].counters.engaged == before + 1
    lists = mr.model_config.full_attention_layer_ids, mr.model_config.swa_attention_layer_ids
    layers, _, shared, heads = shared_kv.GEOMETRY[model]
    assert tuple(map(len, lists)) == owning
    assert sorted([*lists[0], *lists[1]]) == list(range(layers - shared))
    ENGINE.revert()
    mr = runner(tmp_path, model)
    stock = sizes(mr)
    config = mr.model_config
    assert len(config.full_attention_layer_ids) + len(config.swa_attention_layer_ids) == layers
    full, sliding = 2 * 512 * heads * 2, 2 * 256 * heads * 2  # bytes of a token in one layer

    def cost(f: int, s: int) -> float:
        return full * f + 0.8 * sliding * s

    counts = len(config.full_attention_layer_ids), len(config.swa_attention_layer_ids)
    assert found[0] == int((20 << 30) // cost(*owning))
    assert stock[0] == int((20 << 30) // cost(*counts))
    # The bytes that the pools take stay inside what was there.
    assert full * owning[0] * found[0] + sliding * owning[1] * found[1] <= 20 << 30
    assert found[0] > 1.7 * stock[0]


def memory(mr: Any, available: int) -> tuple[int, int]:
    """Tokens of the full layers, and bytes of the pools and of stock's table of requests."""
    tokens, sliding = sizes(mr, available)
    config = mr.model_config
    per_layer = 2 * config.get_num_kv_heads(1) * 2
    pools = per_layer * 512 * len(config.full_attention_layer_ids) * tokens
    pools += per_layer * 256 * len(config.swa_attention_layer_ids) * sliding
    requests = mr._resolve_max_num_reqs(tokens)
    return tokens, pools + requests * (config.context_len + 4) * 4


@pytest.mark.parametrize("asked", [None, 64, 3000])
@pytest.mark.parametrize("model", ["e2b", "e4b"])
def test_no_more_memory_than_stock(model: str, asked: int | None, tmp_path: Path):
    """More tokens let stock have more requests, whose table it takes from what is to stay free."""
    given = (0.1, 0.3, 1, 6, 12, 17, 24, 34, 50, 120)
    found = []
    for _ in range(2):
        runners = [runner(tmp_path, model, max_running_requests=asked) for _ in given]
        found.append([memory(r, int(g * 2**30)) for r, g in zip(runners, given, strict=True)])
        ENGINE.revert()
    for gib, (tokens, taken), (before, stock) in zip(given, *found, strict=True):
        assert tokens >= before
        if gib >= 1:
            assert taken <= stock + 2**17  # a token's bytes: what rounding down leaves
            assert tokens > 1.6 * before


def test_a_table_that_cannot_be_counted_costs_no_server(tmp_path: Path, caplog: Any):
    mr = runner(tmp_path, "e2b")

    def unknown(tokens: int) -> int:
        raise AttributeError("no such field")

    mr._resolve_max_num_reqs = unknown
    with caplog.at_level("WARNING", logger="gemma4_turbo"):
        found = sizes(mr)
    assert "no such field" in caplog.text
    ENGINE.revert()
    assert found[0] > 2 * sizes(runner(tmp_path, "e2b"))[0]


def test_without_memory_it_fails_as_stock(tmp_path: Path):
    for available in (-(2**30), 0):
        with pytest.raises(RuntimeError, match="Not enough memory"):
            sizes(runner(tmp_path), available)


REFUSALS = [
    ("KV-shared layers", "26b-a4b", {}),
    ("hierarchical cache", "e4b", {"enable_hierarchical_cache": True}),
    ("hierarchical cache", "e4b", {"enable_lmcache": True}),
    ("disaggregation", "e4b", {"disaggregation_mode": "prefill"}),
    ("draft model", "e4b", {"speculative_algorithm": "FROZEN_KV_MTP"}),
    ("pipeline", "e4b", {"pp_size": 2}),
    ("sparse", "e4b", {"enable_hisparse": True}),
]


@pytest.mark.parametrize(("reason", "model", "changes"), REFUSALS)
def test_refusals_leave_stocks_pools(
    reason: str, model: str, changes: dict[str, Any], tmp_path: Path
):
    mr = runner(tmp_path, model, **changes)
    whole = list(mr.model_config.full_attention_layer_ids)
    found = sizes(mr)
    assert reason in ENGINE.runs[NAME].full_reason()
    assert mr.model_config.full_attention_layer_ids == whole
    ENGINE.revert()
    assert found == sizes(mr)


def test_another_model_is_not_touched(tmp_path: Path):
    mr = runner(tmp_path)
    mr.model_config.hf_config.architectures = ["Gemma3nForCausalLM"]
    sizes(mr)
    assert "Gemma3nForCausalLM" in ENGINE.runs[NAME].full_reason()
    assert len(mr.model_config.full_attention_layer_ids) == 7


def test_no_owner_of_one_kind_leaves_stocks_pools(tmp_path: Path):
    mr = runner(tmp_path)
    mr.model_config.hf_text_config.num_kv_shared_layers = 38
    sizes(mr)
    assert "of one kind" in ENGINE.runs[NAME].full_reason()
    assert len(mr.model_config.full_attention_layer_ids) == 7


@torch.no_grad()
def test_the_model_never_asks_for_a_layer_without_memory():
    """Prefill and decode over pools of the owners alone: stock's hidden states, bit for bit."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from gemma4_turbo.ports.v0_5_12.memory.shared_kv_pool import owners

    model = shared_kv.build()
    types = list(enumerate(shared_kv.TYPES))
    config = SimpleNamespace(
        hf_text_config=model.config,
        full_attention_layer_ids=[i for i, t in types if t == "full_attention"],
        swa_attention_layer_ids=[i for i, t in types if t == "sliding_attention"],
    )
    found = []
    for lists in (None, owners(config)):
        memory = shared_kv.Memory(layers=lists)
        batch = memory.prefill({1: 9, 2: 12}, {})
        with torch._dynamo.config.patch(disable=True):
            hidden = [model(batch.input_ids, batch.positions, batch)]
            batch = memory.prefill({1: 1, 2: 1}, {1: 9, 2: 12})
            batch.forward_mode = ForwardMode.DECODE
            memory.backend.init_forward_metadata(batch)
            hidden.append(model(batch.input_ids, batch.positions, batch))
        found.append(torch.cat(hidden))
    assert torch.equal(*found)
    pool = memory.kv
    assert (pool.full_layer_nums, pool.swa_layer_nums) == (1, 2)
    assert len(pool.full_kv_pool.k_buffer) == 1
    assert len(pool.swa_kv_pool.k_buffer) == 2


@pytest.mark.parametrize("where", ["unfit", "owners"])
def test_a_look_that_fails_leaves_stocks_pools(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gemma4_turbo.engine import states
    from gemma4_turbo.ports.v0_5_12.memory import shared_kv_pool as patch

    run = ENGINE.runs["shared_kv_pool"]

    def fails(*given: Any) -> Any:
        raise AttributeError("no such field")

    with monkeypatch.context() as context:
        context.setattr(patch, where, fails)
        found = sizes(runner(tmp_path, "e2b"))
    assert run.state == states.FAILED
    assert "no such field" in run.reason
    ENGINE.revert()
    assert found == sizes(runner(tmp_path, "e2b"))
