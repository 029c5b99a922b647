"""KV pools without the KV-shared layers: SGLang's own configurator and pools."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_23.memory import shared_kv_pool as patch
from tests.cpu import shared_kv
from tests.cpu.conftest import standing

NAME = "shared_kv_pool"


@pytest.fixture(scope="module", autouse=True)
def applied(patch_imported: None) -> None:
    sglang_process.prepare_sglang()


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    with standing(NAME, KVCacheConfigurator.config_from_budget):
        yield


def configurator(folder: Path, model: str = "e4b", **changes: Any) -> Any:
    """SGLang's, with its own ModelConfig and layers."""
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_executor.model_runner_components.layer_setup import (
        resolve_layer_indices,
    )
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    fields = {"num_kv_shared_layers": changes.pop("shared")} if "shared" in changes else {}
    config = shared_kv.model_config(folder, model, sliding_window=512, **fields)
    if "architecture" in changes:
        config.hf_config.architectures = [changes.pop("architecture")]
    if "algorithm" in changes:
        changes["spec_algorithm"] = SpeculativeAlgorithm.from_string(changes.pop("algorithm"))
    given = {
        **dict.fromkeys(KVCacheConfigurator.__dataclass_fields__),
        "device": "cpu",
        "gpu_id": 0,
        "attn_dp_size": 1,
        "pp_size": 1,
        "model": changes.pop("built", None) or text_model(config),
        "model_config": config,
        "kv_cache_dtype": torch.bfloat16,
        "kv_cache_dtype_str": "auto",
        "model_dtype": torch.bfloat16,
        "page_size": 1,
        "sliding_window_size": 511,
        "spec_algorithm": SpeculativeAlgorithm.from_string(None),
        "is_draft_worker": False,
        "post_capture_kv_active": False,
        "spec_aux_config": SimpleNamespace(draft_model_config=None, eagle_draft_num_layers=None),
        "is_hybrid_swa": config.is_hybrid_swa,
        "is_hybrid_swa_compress": True,
        "use_mla_backend": False,
        "layer_info": resolve_layer_indices(
            model=SimpleNamespace(), model_config=config, is_draft_worker=False
        ),
        "extra_mamba_cache_bytes_per_req": 0,
    }
    kept = {n: f for n, f in KVCacheConfigurator.__dataclass_fields__.items() if f.init}
    return KVCacheConfigurator(**{n: v for n, v in (given | changes).items() if n in kept})


def text_model(config: Any) -> Any:
    """SGLang's, as far as its layers tell whose KV they read."""
    from sglang.srt.models.gemma4_causal import Gemma4TextModel

    model: Any = Gemma4TextModel.__new__(Gemma4TextModel)
    torch.nn.Module.__init__(model)
    kinds = config.hf_text_config.layer_types
    first = len(kinds) - int(config.hf_text_config.num_kv_shared_layers or 0)
    reads = [
        index if index < first else max((i for i in range(first) if kinds[i] == kind), default=0)
        for index, kind in enumerate(kinds)
    ]
    vars(model)["layers"] = [
        SimpleNamespace(self_attn=SimpleNamespace(attn=SimpleNamespace(layer_id=layer)))
        for layer in reads
    ]
    return SimpleNamespace(language_model=model)


def sizes(kvc: Any, available: int = 20 << 30) -> tuple[int, int]:
    from sglang.srt.runtime_context import get_schedule

    with get_schedule().override(page_size=1):
        found = kvc.config_from_budget(available)
    return found.full_max_total_num_tokens, found.swa_max_total_num_tokens


def owned(kvc: Any) -> tuple[list[int], list[int]]:
    return kvc.layer_info.full_attention_layer_ids, kvc.layer_info.swa_attention_layer_ids


@pytest.mark.parametrize(("model", "owning"), [("e4b", (4, 20)), ("e2b", (3, 12))])
def test_more_tokens_fit(model: str, owning: tuple[int, int], tmp_path: Path):
    """By the memory of the layers that own KV. The model's own lists stay whole."""
    from sglang.srt.runtime_context import get_schedule

    before = ENGINE.runs[NAME].counters.engaged
    with get_schedule().override(max_running_requests=64):
        kvc = configurator(tmp_path, model)
        found = sizes(kvc)
    assert ENGINE.runs[NAME].counters.engaged == before + 1
    layers, _, shared, heads = shared_kv.GEOMETRY[model]
    lists = owned(kvc)
    assert tuple(map(len, lists)) == owning
    assert sorted([*lists[0], *lists[1]]) == list(range(layers - shared))
    config = kvc.model_config
    counts = len(config.full_attention_layer_ids), len(config.swa_attention_layer_ids)
    assert sum(counts) == layers
    ENGINE.revert()
    stock = sizes(configurator(tmp_path, model))
    full, sliding = 2 * 512 * heads * 2, 2 * 256 * heads * 2  # bytes of a token in one layer

    def cost(f: int, s: int) -> float:
        return full * f + 0.8 * sliding * s

    assert found[0] == int((20 << 30) // cost(*owning))
    assert stock[0] == int((20 << 30) // cost(*counts))
    # The bytes that the pools take stay inside what was there.
    assert full * owning[0] * found[0] + sliding * owning[1] * found[1] <= 20 << 30
    assert found[0] > 1.7 * stock[0]


def test_the_pools_are_made_of_the_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A layer that shares finds its owner's memory by the owner's id, and has none of its own."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.runtime_context import get_schedule

    kvc = configurator(tmp_path, "e2b")
    with get_schedule().override(page_size=1):
        pool = kvc._build_hybrid_swa_kv_pool(
            full_max_total_num_tokens=4,
            swa_max_total_num_tokens=4,
            mha_pool_class=MHATokenToKVPool,
        )
    full, sliding = owned(kvc)
    assert (len(pool.full_kv_pool.k_buffer), len(pool.swa_kv_pool.k_buffer)) == (3, 12)
    assert sorted(pool.layers_mapping) == sorted([*full, *sliding]) == list(range(15))


def test_the_memory_that_stock_has_for_a_fixed_number_of_requests(tmp_path: Path):
    """Without a radix cache it sizes the sliding pool by the requests: fewer layers, more tokens."""
    from sglang.srt.runtime_context import get_memory, get_schedule

    given = {"max_running_requests": 8, "chunked_prefill_size": 2048}
    found = []
    with get_schedule().override(**given), get_memory().override(disable_radix_cache=True):
        found.append(sizes(configurator(tmp_path)))
        ENGINE.revert()
        found.append(sizes(configurator(tmp_path)))
    assert found[0][1] == found[1][1]
    assert found[0][0] > 1.7 * found[1][0]


def memory(kvc: Any, available: int) -> tuple[int, int]:
    """Tokens of the full layers, and bytes of the pools and of stock's table of requests."""
    tokens, sliding = sizes(kvc, available)
    full_layers, sliding_layers = owned(kvc)
    config = kvc.model_config
    per_layer = 2 * config.get_num_kv_heads(1) * 2
    pools = per_layer * 512 * len(full_layers) * tokens
    pools += per_layer * 256 * len(sliding_layers) * sliding
    requests = kvc.resolve_max_num_reqs(tokens)
    return tokens, pools + requests * (config.context_len + 4) * 4


@pytest.mark.parametrize("asked", [None, 64])
def test_no_more_memory_than_stock(asked: int | None, tmp_path: Path):
    """More tokens let stock have more requests, whose table it takes from what is to stay free."""
    from sglang.srt.runtime_context import get_schedule

    given = (0.3, 1, 6, 12, 24, 50, 120)  # GiB: below and above where the table grows
    found = []
    with get_schedule().override(max_running_requests=asked):
        for _ in range(2):
            made = [configurator(tmp_path, "e2b") for _ in given]
            found.append([memory(k, int(g * 2**30)) for k, g in zip(made, given, strict=True)])
            ENGINE.revert()
    for gib, (tokens, taken), (before, stock) in zip(given, *found, strict=True):
        assert tokens >= before
        if gib >= 1:
            assert taken <= stock + 2**17  # a token's bytes: what rounding down leaves
            assert tokens > 1.6 * before


def test_a_table_that_cannot_be_counted_costs_no_server(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
):
    def unknown(self: Any, tokens: int) -> int:
        raise AttributeError("no such field")

    kvc = configurator(tmp_path, "e2b")
    monkeypatch.setattr(type(kvc), "resolve_max_num_reqs", unknown)
    with caplog.at_level("WARNING", logger="gemma4_turbo"):
        found = sizes(kvc)
    assert "no such field" in caplog.text
    ENGINE.revert()
    assert found[0] > 2 * sizes(configurator(tmp_path, "e2b"))[0]


REFUSALS = [
    ("KV-shared layers", {"model": "26b-a4b"}),
    ("sized again", {"post_capture_kv_active": True}),
    ("draft model", {"algorithm": "FROZEN_KV_MTP"}),
    ("pipeline", {"pp_size": 2}),
    ("no pools of their own", {"is_hybrid_swa": False}),
    ("of one kind", {"shared": 38}),
    ("Gemma3nForCausalLM", {"architecture": "Gemma3nForCausalLM"}),
    *((why, {name: True}) for name, why in patch.MEMORY.items()),
    ("disaggregation", {"disaggregation_mode": "prefill"}),
]


@pytest.mark.parametrize(("reason", "changes"), REFUSALS)
def test_refusals_leave_stocks_pools(reason: str, changes: dict[str, Any], tmp_path: Path):
    from sglang.srt.runtime_context import get_disagg, get_memory

    changes = dict(changes)
    memory = {n: changes.pop(n) for n in list(changes) if n in patch.MEMORY}
    disagg = {n: changes.pop(n) for n in list(changes) if n == "disaggregation_mode"}
    with get_memory().override(**memory), get_disagg().override(**disagg):
        kvc = configurator(tmp_path, **changes)
    config = kvc.model_config
    assert owned(kvc) == (config.full_attention_layer_ids, config.swa_attention_layer_ids)
    assert reason in ENGINE.runs[NAME].full_reason()


def test_every_cache_that_stock_drains_as_a_hierarchical_one_is_named():
    """By its source: stock asks for them one by one."""
    from sglang.srt.managers.scheduler import Scheduler

    source = inspect.getsource(Scheduler._process_hicache_events)
    named = set(re.findall(r"\benable_\w+", source)) - {"enable_hicache_storage"}
    assert len(named) == 4
    assert named <= patch.MEMORY.keys()


def test_a_draft_models_pools_are_its_own(tmp_path: Path):
    before = ENGINE.runs[NAME].counters
    engaged = before.engaged
    kvc = configurator(tmp_path, is_draft_worker=True)
    assert len(owned(kvc)[0]) == 7
    assert ENGINE.runs[NAME].counters.engaged == engaged
    assert not ENGINE.runs[NAME]._decline_reason


@pytest.mark.parametrize("where", ["unfit", "_bytes_of_a_token"])
def test_a_look_that_fails_leaves_stocks_pools(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = ENGINE.runs[NAME]
    monkeypatch.setattr(patch, where, lambda *given: {}["no such field"])
    kvc = configurator(tmp_path, "e2b")
    assert run.state == states.FAILED
    assert "no such field" in run.reason
    config = kvc.model_config
    assert owned(kvc) == (config.full_attention_layer_ids, config.swa_attention_layer_ids)


def test_a_class_of_the_same_name_has_kv_for_every_layer(tmp_path: Path):
    """Put into SGLang's registry by its user."""
    for model, told in (
        (SimpleNamespace(language_model=torch.nn.Linear(1, 1)), "a Linear's"),
        (None, "no layer of its kind owns"),
    ):
        kvc = configurator(tmp_path, built=model)
        if model is None:
            kvc.model.language_model.layers[-1].self_attn.attn.layer_id = 41
        assert told in str(patch.unfit(kvc))
