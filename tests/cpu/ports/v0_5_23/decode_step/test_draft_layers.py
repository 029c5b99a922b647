"""The fusions in the layers of an MTP assistant: SGLang's text model, bound to a target's KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from tests.cpu import forward_batch, small_mtp
from tests.cpu.ports.v0_5_23 import models
from tests.cpu.ports.v0_5_23.decode_step.test_forwards import ON, counted, engaged_since, near


@pytest.fixture(autouse=True)
def stock(tmp_path: Any) -> Iterator[None]:
    """Stock at first; reverted at the end."""
    with models.stock(tmp_path):
        yield


def bound() -> Any:
    """A text model whose layers read layers 4 and 5 of a target, as the assistant binds its own."""
    from sglang.srt.models.gemma4_mtp import Gemma4AssistantForCausalLM
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPContext

    model = models.build("dense")
    context = FrozenKVMTPContext(None, {0: 4, 1: 5})
    Gemma4AssistantForCausalLM.bind_frozen_kv_context(SimpleNamespace(model=model), context)
    return model


def step(model: Any) -> torch.Tensor:
    """A decode step as the assistant's forward calls its model: embeddings, and nothing per layer."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    for layer in model.layers:
        layer.self_attn.attn.seen.clear()
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 256, generator=generator).bfloat16()
    batch = forward_batch.prefill(forward_mode=ForwardMode.DECODE, batch_size=2)
    found: torch.Tensor = model(
        input_ids=None,
        positions=torch.tensor([3, 9]),
        forward_batch=batch,
        input_embeds=embeds,
        per_layer_inputs=None,
    )
    return found


def test_an_assistant_has_the_layers_of_a_text_model() -> None:
    """So that whatever replaces their forwards is in the draft too."""
    from sglang.srt.models.gemma4_causal import Gemma4DecoderLayer, Gemma4TextModel

    assistant = small_mtp.assistant()
    assert type(assistant.model) is Gemma4TextModel
    assert {type(layer) for layer in assistant.model.layers} == {Gemma4DecoderLayer}


def test_what_engages_in_a_draft() -> None:
    """Norms, rotation, and the products; of the QKV projection Q's rows alone.

    Nothing is stored, and what such layers do not have, experts and per-layer inputs, is not counted.
    """
    model = bound()
    expected = step(model)
    ENGINE.apply(only=ON)
    before = counted()
    found = step(model)
    assert engaged_since(before) == {
        "layer_norms": 2,
        "input_norm": 2,
        "rope_store": 2,
        "qkv_proj": 2,
        "skinny_gemm": 6,  # output projection, gate and up with the activation, down
    }
    near(found, expected)
    for layer in model.layers:
        ((k, v, keep),) = layer.self_attn.attn.seen
        assert k is v is None
        assert not keep
