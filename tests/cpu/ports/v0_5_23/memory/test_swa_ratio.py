"""The default of swa_full_tokens_ratio, as SGLang's own code decides what a model wants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo.instance import ENGINE
from gemma4_turbo.models import geometry_mm
from gemma4_turbo.ports.v0_5_23.memory import swa_ratio as patch
from tests.cpu.conftest import standing

NAME = "swa_ratio"


@pytest.fixture(autouse=True)
def patched(patch_imported: None) -> Iterator[None]:
    from sglang.srt.arg_groups import overrides

    with standing(NAME, overrides.collect_model_override_declarations):
        yield


def ratio(folder: Path, name: str = "26b-a4b", architecture: str = "", **given: Any) -> float:
    """What SGLang resolves for a model of this geometry."""
    from sglang.srt.arg_groups import model_hook, overrides
    from sglang.srt.server_args import ServerArgs

    (folder / "config.json").write_text(json.dumps(geometry_mm.config(name)))
    made = ServerArgs(model_path=str(folder), device="cpu", load_format="dummy", **given)
    config = overrides.model_config_of(made)
    architecture = architecture or config.hf_config.architectures[0]
    # As `model_hook` does, under its name for the function.
    found = model_hook.collect_model_override_declarations(architecture, made, config.hf_config)
    overrides.validate_declarations(made, found)
    made._resolved_overrides = [*(getattr(made, "_resolved_overrides", None) or ()), *found]
    resolved: float = overrides.resolution_result(made, patch.FIELD)
    return resolved


def test_moe_models_get_the_other_default(tmp_path: Path):
    before = ENGINE.runs[NAME].counters.engaged
    assert ratio(tmp_path) == patch.RATIO == 0.15
    assert ENGINE.runs[NAME].counters.engaged == before + 1
    ENGINE.revert()
    assert ratio(tmp_path) == 0.8


@pytest.mark.parametrize(
    ("given", "found", "reason"),
    [
        ({"swa_full_tokens_ratio": 0.8}, 0.8, "0.8 was given"),  # the default itself, too
        ({"swa_full_tokens_ratio": 0.3}, 0.3, "0.3 was given"),
        ({"name": "31b"}, 0.8, "dense"),
        ({"architecture": "DiffusionGemmaForBlockDiffusion"}, 0.8, "DiffusionGemma"),
        ({"enable_hierarchical_cache": True}, 0.8, "hierarchical cache"),
        ({"disaggregation_mode": "decode"}, 0.8, "disaggregation"),
        ({"chunked_prefill_size": -1}, 0.8, "not cut into chunks"),
        ({"disable_radix_cache": True}, 0.8, "prefix cache"),
        ({"max_total_tokens": 4096}, 0.8, "--max-total-tokens 4096"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_others_keep_stocks(given: dict[str, Any], found: float, reason: str, tmp_path: Path):
    assert ratio(tmp_path, **given) == found
    assert reason in ENGINE.runs[NAME].full_reason()


def test_a_ratio_of_sglangs_own_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.arg_groups import model_override_base as base

    theirs = lambda server_args, hf_config: {patch.FIELD: 0.5}  # noqa: E731
    name = "Gemma4ForConditionalGeneration"
    monkeypatch.setitem(base._MODEL_OVERRIDE_FNS, name, [*base._MODEL_OVERRIDE_FNS[name], theirs])
    assert ratio(tmp_path) == 0.5
    assert "SGLang has a ratio" in ENGINE.runs[NAME].full_reason()


def test_a_look_that_fails_keeps_stocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patch, "unfit", lambda *given: 1 / 0)
    assert ratio(tmp_path) == 0.8
    assert "ZeroDivisionError" in ENGINE.runs[NAME].full_reason()


def test_a_whole_resolution_takes_it(tmp_path: Path):
    """Through the function that SGLang's pipeline calls, whatever it imports first."""
    from sglang.srt.arg_groups import model_hook, overrides

    assert model_hook.collect_model_override_declarations is (
        overrides.collect_model_override_declarations
    )
