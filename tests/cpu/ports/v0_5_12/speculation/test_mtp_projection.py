"""`qkv_proj` on the layers of SGLang's MTP assistant, which read the target's KV."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from gemma4_turbo.ports.any.decode_step import attention
from tests.cpu import small_mtp
from tests.cpu.conftest import only_patch, patched_sglang


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang with the patch; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=["qkv_proj"]):
        yield


def test_only_q_is_multiplied():
    """Stock has rows for K and V too, and nothing reads what they give."""
    target, assistant = small_mtp.target(), small_mtp.assistant()
    assistant.bind_frozen_kv_context(assistant.build_frozen_kv_mtp_context(target, None))
    for layer in assistant.model.layers:
        part = layer.self_attn
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, small_mtp.HIDDEN, generator=generator)
        weight = part.qkv_proj.weight
        weight.data.normal_(generator=generator)  # SGLang leaves it as the memory was
        assert weight.shape[0] == part.q_size + 2 * part.kv_size
        stock = (x @ weight.T)[:, : part.q_size]
        multiplied = mock.Mock(wraps=torch.nn.functional.linear)
        with only_patch("qkv_proj") as run, mock.patch("torch.nn.functional.linear", multiplied):
            before = run.engaged_count()
            q, k, v = attention._project(part, attention.AttentionSite(part), x)
            assert run.engaged_count() == before + 1
        (call,) = multiplied.call_args_list
        assert call.args[1].shape[0] == part.q_size
        assert k is v is None
        torch.testing.assert_close(q, stock)
