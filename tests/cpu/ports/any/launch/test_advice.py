"""What the package tells about an installation and about a launch."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from gemma4_turbo.__main__ import app
from gemma4_turbo.cli import doctor
from gemma4_turbo.engine import fingerprints, run
from gemma4_turbo.ports.any.launch import advice, launch_gates, routes


def arguments(drafted: int | None, **backends: str) -> SimpleNamespace:
    return SimpleNamespace(
        **{"attention_backend": None, **backends}, speculative_num_draft_tokens=drafted
    )


@pytest.mark.parametrize(
    ("flashinfer", "drafted", "backends", "told"),
    [
        ("0.6.11.post1", 5, {"attention_backend": "trtllm_mha"}, True),
        ("0.6.11.post1", 8, {"decode_attention_backend": "trtllm_mha"}, True),
        ("0.6.13", 5, {"speculative_draft_attention_backend": "trtllm_mha"}, True),
        ("0.6.11.post1", 4, {"attention_backend": "trtllm_mha"}, False),
        ("0.6.11.post1", None, {"attention_backend": "trtllm_mha"}, False),
        ("0.6.11.post1", 8, {"attention_backend": "triton"}, False),
        ("0.6.14", 8, {"attention_backend": "trtllm_mha"}, False),
        ("0.10.0", 8, {"attention_backend": "trtllm_mha"}, False),
        (None, 8, {"attention_backend": "trtllm_mha"}, False),
    ],
)
def test_too_many_draft_tokens_for_flashinfer(monkeypatch, flashinfer, drafted, backends, told):
    monkeypatch.setattr(advice, "installed", {"flashinfer-python": flashinfer}.get)
    found = advice.on_launch(arguments(drafted, **backends))
    assert bool(found) is told
    if told:
        assert f"--speculative-num-draft-tokens {drafted}" in found[0]
        assert f"FlashInfer {flashinfer}" in found[0]
        assert "0.6.14" in found[0]


def test_what_is_no_server_args_has_nothing_to_say():
    assert advice.on_launch(None) == advice.on_launch("x") == []


@pytest.mark.parametrize(
    ("workers", "runs", "ways", "pictures", "told"),
    [
        (4, True, ["entry point"], True, True),
        (4, True, ["entry point", "sitecustomize"], True, False),
        (1, True, ["entry point"], True, False),
        (None, True, ["entry point"], True, False),
        (4, False, ["entry point"], True, False),
        (4, True, ["entry point"], False, False),
        (4, True, ["entry point"], None, False),
    ],
    ids=["stock", "reached", "one", "no such argument", "not patched", "text", "no model"],
)
def test_tokenizer_workers_that_would_be_stock(monkeypatch, workers, runs, ways, pictures, told):
    """They run the image processor, and SGLang loads no plugins in them."""
    monkeypatch.setattr(run.RUNS["picture_memory"], "will_run", lambda: runs)
    monkeypatch.setattr(routes, "bootstrap_routes", lambda: ways)
    takes = (lambda asked: 1 / 0) if pictures is None else (lambda asked: pictures)
    monkeypatch.setattr(advice, "_takes_pictures", takes)
    found = advice.on_launch(SimpleNamespace(tokenizer_worker_num=workers))
    assert bool(found) is told
    if told:
        assert "--tokenizer-worker-num 4: the workers would be stock" in found[0]


@pytest.mark.parametrize("by_name", [False, True])
def test_the_launch_says_it_and_goes_on(monkeypatch, caplog, by_name):
    """In the server's log, strict mode or not; nothing is refused for it."""
    monkeypatch.setattr(advice, "installed", {"flashinfer-python": "0.6.11.post1"}.get)
    engine = SimpleNamespace(switches=lambda: SimpleNamespace(strict=False))
    launch = launch_gates._before_launch(engine)
    asked = arguments(6, attention_backend="trtllm_mha")
    args, kwargs = ((), {"server_args": asked}) if by_name else ((asked,), {})
    with caplog.at_level(logging.WARNING, "gemma4_turbo"):
        assert launch(lambda *a, **k: (a, k), None, args, kwargs) == (args, kwargs)
    assert sum("--speculative-num-draft-tokens 6" in line for line in caplog.messages) == 1


def transformers_in(monkeypatch, folder: Path, *models: str) -> None:
    """A transformers package with these models."""
    for model in models:
        (folder / "models" / model).mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(advice, "installed", {"transformers": "5.6.0"}.get)


@pytest.mark.parametrize(
    ("models", "mtp", "told"),
    [
        (("gemma4",), True, True),
        (("gemma4", "gemma4_assistant"), True, False),
        (("gemma4",), False, False),
    ],
    ids=["too old", "new enough", "an SGLang without MTP"],
)
def test_transformers_that_cannot_read_an_assistant(monkeypatch, tmp_path, models, mtp, told):
    transformers_in(monkeypatch, tmp_path, *models)
    monkeypatch.setattr(fingerprints, "installed_source", lambda module: "x" if mtp else None)
    found = advice.on_installation()
    assert bool(found) is told
    if told:
        assert "transformers 5.6.0 cannot read" in found[0]
        assert "needs transformers 5.8.1" in found[0]


def test_the_installed_transformers_is_judged_rightly():
    """Against what it can really load."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    told = any("gemma4_assistant" in note for note in advice.on_installation())
    assert told is ("gemma4_assistant" not in CONFIG_MAPPING_NAMES)


def test_doctor_shows_the_note(monkeypatch):
    """In the table and as JSON; it is no error."""
    found = {
        "versions": {},
        "device": None,
        "patches": [],
        "problems": [],
        "notes": ["transformers 5.6.0 cannot read"],
        "bootstrap": [],
        "state_folder": None,
        "servers": [],
    }
    monkeypatch.setattr(doctor, "examine", lambda imported: iter(found.items()))
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 0
    assert "note: transformers 5.6.0 cannot read" in told.output
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(as_json.output)["notes"] == found["notes"]
