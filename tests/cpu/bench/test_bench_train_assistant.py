"""bench/train_assistant.py on a tiny target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import train_assistant, train_small
from bench.models import small_models

pytest.importorskip("transformers.models.gemma4_assistant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with random weights."""
    out = tmp_path_factory.mktemp("target") / "ple"
    size = train_small.TINY_SIZES["ple"]._replace(window=8)
    model = small_models.build(small_models.published(size), "eager")
    small_models.initialise(model, 0)
    notes = {"model": "ple", "length": 48}
    small_models.save(out, model, small_models.published(size), notes)
    (out / train_small.HELD_OUT).write_bytes(b"def f(x):\n    return x + 1\n" * 40)
    return out


def pair(folder: Path) -> tuple[Any, Any]:
    target = small_models.load(folder, torch.float32, "cpu", "eager")
    written = json.loads((folder / "config.json").read_text())
    assistant = train_assistant.build(train_assistant.config(written))
    small_models.initialise(assistant, 1)
    return target, assistant


def one_by_one(assistant: Any, target: Any, ids: torch.Tensor, at: int) -> list[torch.Tensor]:
    """Drafts at one position by the assistant's own forward, from KV up to that position alone."""
    hidden, _, kv = train_assistant.target_states(target, ids[:, : at + 1])
    last, found = hidden[:, -1:], []
    for step in range(train_assistant.DRAFTS):
        token = ids[:, at + 1 + step : at + 2 + step]
        said = assistant(
            inputs_embeds=torch.cat([target.model.embed_tokens(token), last], dim=-1),
            position_ids=torch.tensor([[at]]),
            shared_kv_states={
                kind: tuple(
                    part[:, :, -8:] if kind == "sliding_attention" else part for part in parts
                )
                for kind, parts in kv.items()
            },
        )
        last = said.last_hidden_state
        found.append(said.logits[:, 0])
    return found


@torch.no_grad()
def test_drafts_of_all_positions_are_those_of_one(folder: Path):
    """Training's drafts at once against the assistant's forward as generation calls it."""
    target, assistant = pair(folder)
    ids = torch.randint(4, 260, (1, 30), generator=torch.Generator().manual_seed(0))
    hidden, _, kv = train_assistant.target_states(target, ids)
    at_once = train_assistant.drafts(assistant, target, ids, hidden, kv)
    for at in (3, 20):
        for ours, alone in zip(at_once, one_by_one(assistant, target, ids, at), strict=True):
            torch.testing.assert_close(ours[:, at], alone, atol=1e-3, rtol=1e-3)


def test_distillation_is_least_where_drafts_have_the_targets_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 12, 7, generator=generator)
    counted = torch.ones(1, 12, dtype=torch.bool)
    right = [logits.roll(-step, 1) for step in range(1, train_assistant.DRAFTS + 1)]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)[0]
    for step, loss in enumerate(train_assistant.distillation(right, logits, counted), 1):
        torch.testing.assert_close(loss, entropy[step:-1].mean())
    tokens, share = train_assistant.accepted(right, logits, counted)
    assert tokens == 1 + train_assistant.DRAFTS
    assert share == [1.0] * train_assistant.DRAFTS
    wrong = [right[0], -right[1], right[2]]
    tokens, share = train_assistant.accepted(wrong, logits, counted)
    assert tokens == 2.0  # the third is right, after a wrong one
    assert share == [1.0, 0.0, 1.0]


def test_whole(folder: Path):
    train_assistant.main(
        folder, steps=3, seed=1, batch=4, rows=64, most_text=1_500_000, rate=1e-3, minutes=0
    )
    out = folder.with_name("ple-assistant")
    notes = json.loads((out / "training.json").read_text())
    assert notes["steps"] == 3
    assert notes["tokens a verify step on held-out text"] >= 1
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Gemma4AssistantForCausalLM"]
    assert config["text_config"]["head_dim"] == 256
    assert config["text_config"]["global_head_dim"] == 512
