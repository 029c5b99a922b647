"""Assistants of `bench.train_assistant` through stock's real loader: their drafts are those of training.

Where a weight is not loaded, or the hidden state, the embedding or the position is another one than in
training, a trained assistant is right by chance, and nothing says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from bench import train_assistant
from bench.models import small_models
from tests.cpu import forward_batch
from tests.cpu.ports.any import test_small_checkpoints as small

pytest.importorskip("transformers.models.gemma4_assistant")


class Pair(NamedTuple):
    """A target in transformers, and its assistant in both."""

    target: Any
    theirs: Any
    stock: Any
    named: set[str]  # what `load_weights` says that it loaded


def stock_assistant(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Any, set[str]]:
    """By SGLang's own loader from the files."""
    from sglang.srt.models.gemma4_mtp import Gemma4AssistantForCausalLM

    return small.by_stock(Gemma4AssistantForCausalLM, folder, patch, is_draft_model=True)


@pytest.fixture(scope="module", params=small.SIZES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Random weights; the assistant as the program writes it."""
    target = small_models.build(small_models.published(small.SIZES[request.param]), "eager")
    small_models.initialise(target, 1)
    small.random_weights(target)
    fields = train_assistant.config(
        small_models.renamed(small_models.published(small.SIZES[request.param]))
    )
    theirs = train_assistant.build(fields)
    small_models.initialise(theirs, 2)
    small.random_weights(theirs)
    small_models.as_saved(theirs)
    folder = tmp_path_factory.mktemp("assistant")
    small_models.write(folder, theirs, {"config.json": fields})
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        stock, named = stock_assistant(folder, patch)
        yield Pair(target.eval(), theirs.eval(), stock, named)


class Frozen(torch.nn.Module):
    """Attention to the target's KV up to each query's own position."""

    def __init__(self, kv: tuple[torch.Tensor, torch.Tensor], window: int | None) -> None:
        super().__init__()
        self.kv, self.window = kv, window

    def forward(
        self, q: Any, k: Any, v: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        assert k is None
        assert v is None
        group = q.shape[1] // self.kv[0].shape[1]
        keys, values = (part[0].repeat_interleave(group, 0) for part in self.kv)
        scores = torch.einsum("qhd,hkd->hqk", q, keys)
        at = torch.arange(len(q))
        behind = at[:, None] - at
        seen = (behind >= 0) & (behind < (self.window or len(q)))
        scores = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,hkd->qhd", scores, values).flatten(1)


def test_every_weight_of_stock_is_in_the_folder(pair: Pair):
    missing = {name for name, _ in pair.stock.named_parameters()} - pair.named
    # Stock's layers have norms of K and V that nobody calls: K and V are the target's.
    assert {name for name in missing if "k_norm" not in name and "v_norm" not in name} == set()


def test_drafts_are_those_of_training(pair: Pair):
    ids = small.IDS[None]
    length = ids.shape[1]
    hidden, _, kv = train_assistant.target_states(pair.target, ids)
    theirs = train_assistant.drafts(pair.theirs, pair.target, ids, hidden, kv)
    window = pair.target.config.sliding_window
    for layer, kind in zip(pair.stock.model.layers, train_assistant.LAYERS, strict=True):
        # As `bind_frozen_kv_context` does.
        layer.self_attn.is_kv_shared_layer, layer.self_attn.kv_shared_layer_index = True, 0
        slides = kind == "s"
        name = "sliding_attention" if slides else "full_attention"
        layer.self_attn.attn = Frozen(kv[name], window if slides else None)
    pair.stock.logits_processor.forward = (
        lambda ids, hidden, head, batch, hidden_states_before_norm: (
            hidden @ head.weight.T,
            hidden_states_before_norm,
        )
    )
    pair.stock.set_embed_and_head(pair.target.model.embed_tokens.weight, None)
    state = hidden[0]
    for step, wanted in enumerate(theirs, 1):
        tokens = torch.nn.functional.pad(ids[0, step:], (0, step))
        batch = forward_batch.prefill(spec_info=SimpleNamespace(hidden_states=state))
        logits, state = pair.stock(tokens, torch.arange(length), batch)
        ours, right = logits[: length - step], wanted[0, : length - step]
        assert right.std() > 0.1
        torch.testing.assert_close(ours, right, atol=1e-3 * right.std().item(), rtol=1e-3)
