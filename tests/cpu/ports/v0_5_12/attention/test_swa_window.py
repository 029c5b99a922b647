"""The window of sliding layers, on SGLang's real layers and its real prefill kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.catalogue import by_name
from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from tests.cpu import small_mtp
from tests.cpu.conftest import turn_on

pytestmark = [
    pytest.mark.usefixtures("stock_first"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]

NAME = "swa_window"
TOKENS = 24


def windows(model: Any) -> list[int]:
    return [attention.sliding_window_size for attention in small_mtp.attentions(model)]


@pytest.mark.parametrize("build", [small_mtp.target, small_mtp.assistant])
def test_sliding_layers_have_the_window_of_the_metadata(build: Any) -> None:
    """Target and assistant: stock gives its layers one more; full layers have none."""
    stock = build()
    metadata = stock.get_attention_sliding_window_size()
    assert windows(stock)[:2] == [metadata + 1, -1]
    turn_on(NAME)
    before = ENGINE.runs[NAME].counters.engaged
    patched = build()
    assert windows(patched) == [metadata, -1] * (len(windows(patched)) // 2)
    assert [layer.self_attn.sliding_window for layer in patched.model.layers[:2]] == [
        metadata,
        None,
    ]
    assert ENGINE.runs[NAME].counters.engaged == before + len(windows(patched)) // 2


def attended(window: int) -> list[int]:
    """How many keys each token of one prefill attends to, in the kernel of stock's Triton backend.

    All scores are equal, and only a token's own value is 1: it comes out divided by the number.
    """
    from sglang.srt.layers.attention.triton_ops.extend_attention import extend_attention_fwd

    counts = []
    for token in (0, small_mtp.WINDOW - 1, small_mtp.WINDOW, TOKENS - 1):
        q = torch.zeros(TOKENS, 1, 16)
        v = torch.zeros(TOKENS, 1, 16)
        v[token] = 1
        output = torch.full_like(q, float("nan"))
        nothing = torch.zeros(2, dtype=torch.int32)
        extend_attention_fwd(
            q,
            q.clone(),
            v,
            output,
            torch.zeros(1, 1, 16),
            torch.zeros(1, 1, 16),
            torch.tensor([0, TOKENS], dtype=torch.int32),
            nothing,
            torch.zeros(1, dtype=torch.int64),
            None,
            True,
            None,
            TOKENS,
            1.0,
            1.0,
            1.0,
            sliding_window_size=window,
            window_kv_offsets=torch.zeros(1, dtype=torch.int32),
        )
        counts.append(round(1 / float(output[token, 0, 0])))
    return counts


def test_the_models_own_mask_is_the_patched_one() -> None:
    """transformers' sliding mask lets a token see ``sliding_window`` tokens, itself included."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    sees = sliding_window_causal_mask_function(small_mtp.WINDOW)
    places = [torch.tensor(i) for i in range(TOKENS)]
    model = [
        sum(bool(sees(0, 0, places[token], place)) for place in places)
        for token in (0, small_mtp.WINDOW - 1, small_mtp.WINDOW, TOKENS - 1)
    ]
    stock = attended(windows(small_mtp.target())[0])
    assert stock != model
    turn_on(NAME)
    assert attended(windows(small_mtp.target())[0]) == model == [1, 16, 16, 16]
    assert stock == [1, 16, 17, 17]


def test_revert_gives_live_layers_stocks_window_back() -> None:
    turn_on(NAME)
    model = small_mtp.target()
    ENGINE.revert()
    assert windows(model) == [small_mtp.WINDOW, -1] * 3
    assert model.model.layers[0].self_attn.sliding_window == small_mtp.WINDOW


def test_off_unless_asked_for() -> None:
    ENGINE.apply()
    try:
        assert ENGINE.runs[NAME].state == states.OFF
        assert not by_name(NAME).default
        assert windows(small_mtp.target())[0] == small_mtp.WINDOW
    finally:
        ENGINE.revert()


def test_a_layer_with_another_window_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else has already set it: not once more."""
    from gemma4_turbo.ports.v0_5_12.attention import swa_window as patch

    def construct(self: Any) -> None:
        self.config = SimpleNamespace(sliding_window=16)
        self.sliding_window = 15
        self.attn = SimpleNamespace(sliding_window_size=15)

    turn_on(NAME)
    run = ENGINE.runs[NAME]
    layer = SimpleNamespace()
    patch.build(run, {patch.TARGET: construct})[patch.TARGET](layer)
    assert layer.attn.sliding_window_size == layer.sliding_window == 15
    assert "has the window 15" in run.full_reason()


def test_a_layer_that_cannot_be_read_keeps_stocks_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma4_turbo.ports.v0_5_12.attention import swa_window as patch

    turn_on(NAME)
    monkeypatch.setattr(patch, "_set_window", lambda *given: 1 / 0)
    run = ENGINE.runs[NAME]
    before = run.counters.engaged
    model = small_mtp.target()
    assert windows(model)[:2] == [model.get_attention_sliding_window_size() + 1, -1]
    assert run.counters.engaged == before
    assert run.state == states.FAILED
    assert "ZeroDivisionError" in run.reason
