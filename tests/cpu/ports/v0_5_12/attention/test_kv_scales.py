"""The scales of attention that reads another layer's cache, on SGLang's real models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.attention import kv_scales as common
from gemma4_turbo.ports.v0_5_12.attention import kv_scales as patch
from tests.cpu import scaled_kv, small_mtp
from tests.cpu.conftest import turn_on
from tests.cpu.scaled_kv import (
    FP8,
    FULL_OWNER,
    FULL_READER,
    NAME,
    READERS,
    SCALES,
    SLIDING_OWNER,
    SLIDING_READER,
    TRUE,
    draft_of,
    engaged,
)

pytestmark = pytest.mark.usefixtures("stock_first")


def configured(model: Any, cache: str = "fp8_e4m3") -> Any:
    """What a stock ``ModelRunner`` does after it has loaded ``model``."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    runner = object.__new__(ModelRunner)
    runner.server_args = SimpleNamespace(kv_cache_dtype=cache)
    runner.dtype, runner.model = torch.bfloat16, model
    runner.configure_kv_cache_dtype()
    return model


def loaded(scales: dict[int, tuple[float, float]] | None = None, cache: str = "fp8_e4m3") -> Any:
    model = small_mtp.target(small_mtp.quantised_kv())
    small_mtp.load_scales(model, SCALES if scales is None else scales)
    return configured(model, cache)


def scales_of(model: Any) -> list[tuple[float, float]]:
    """As the Triton backend's decode hands them to its kernel, by layer."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    found = []
    backend = object.__new__(TritonAttnBackend)
    backend.use_mla = backend.use_pdl = False
    backend.max_kv_splits, backend.swa_v_head_dim = 8, 16
    names = ["window_kv_indptr", "window_kv_indices", "kv_indptr", "kv_indices", "attn_logits"]
    names += ["swa_attn_logits", "attn_lse", "num_kv_splits"]
    backend.forward_metadata = SimpleNamespace(**dict.fromkeys(names))
    # q, keys, values, output, two indices, logits, lse, splits twice, scaling, then the two
    backend.decode_attention_fwd = lambda *args, **kwargs: found.append(args[11:13])
    pool = SimpleNamespace(get_key_buffer=lambda i: None, get_value_buffer=lambda i: None)
    for attention in small_mtp.attentions(model):
        q = torch.zeros(1, attention.tp_q_head_num * attention.head_dim)
        batch = SimpleNamespace(token_to_kv_pool=pool)
        backend.forward_decode(q, None, None, attention, batch, save_kv_cache=False)
    return found


def test_a_later_loading_of_weights_is_followed() -> None:
    """Target and draft, whichever of the two is loaded again."""
    turn_on(NAME)
    model = loaded()
    draft = draft_of(model, True)
    small_mtp.load_scales(model, {SLIDING_OWNER: (4.0, 3.0), FULL_OWNER: (1.0, 1.0)})
    assert scales_of(model)[4:] == [(4.0, 3.0), (1.0, 1.0)]
    assert scales_of(draft) == [(4.0, 3.0), (1.0, 1.0)]
    small_mtp.load_scales(draft, {})
    assert scales_of(draft) == [(4.0, 3.0), (1.0, 1.0)]


@pytest.mark.parametrize("cache", ["bf16", "auto"])
def test_a_cache_that_is_not_scaled_is_left_alone(cache: str) -> None:
    """Stock divides by the scales only when it stores in fewer bits."""
    turn_on(NAME)
    ENGINE.runs[NAME]._decline_reason = ""
    before = engaged()
    model = loaded(cache=cache)
    assert scales_of(model)[SLIDING_READER] == (8.0, 8.0)
    assert scales_of(draft_of(model, False, torch.bfloat16)) == [(1.0, 1.0)] * 2
    assert engaged() == before
    assert "is not divided by scales" in ENGINE.runs[NAME].full_reason()


def test_scales_of_one_are_left_alone() -> None:
    """No tensor is written, nothing is counted, nothing is multiplied in an extend step."""
    turn_on(NAME)
    before = engaged()
    model = loaded({})
    draft = draft_of(model, False)
    assert [a.k_scale for a in small_mtp.attentions(draft)] == [None, None]
    assert engaged() == before
    assert not common._scaled


def test_revert_gives_live_models_stocks_scales_back() -> None:
    turn_on(NAME)
    model = loaded()
    draft = draft_of(model, False)
    ENGINE.revert()
    assert scales_of(model)[4:] == [(8.0, 8.0), (1.0, 1.0)]
    assert float(small_mtp.attentions(model)[SLIDING_READER].k_scale) == 8.0
    assert [a.k_scale for a in small_mtp.attentions(draft)] == [None, None]
    small_mtp.load_scales(model, SCALES)
    assert scales_of(model)[4:] == [(8.0, 8.0), (1.0, 1.0)]


def extend_step(model: Any, index: int, piecewise: bool = False) -> torch.Tensor:
    """K that the Triton backend hands to its kernel for the tokens of an extend step.

    The owner's K is 1, 2, 3, ... and is written as stock writes it, by stock's own pool.

    Args:
        model: of SGLang's.
        index: of the layer that reads.
        piecewise: through the layer itself in a piecewise graph, of padded tokens.
    """
    from sglang.srt.compilation.piecewise_context_manager import set_forward_context
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    pool = SWAKVPool(
        size=16,
        size_swa=16,
        page_size=1,
        dtype=FP8,
        head_num=1,
        head_dim=16,
        swa_attention_layer_ids=[0, 2],
        full_attention_layer_ids=[1, 3],
        enable_kvcache_transpose=False,
        device="cpu",
    )
    pool.register_mapping(torch.arange(17).flip(0))
    owner = small_mtp.attentions(model)[index - 2]
    reader = small_mtp.attentions(model)[index]
    written = torch.arange(1.0, 5).view(4, 1, 1).expand(4, 1, 16).bfloat16()
    slots = torch.tensor([3, 4, 5, 6])
    pool.set_kv_buffer(owner, slots, written.clone(), written.clone(), owner.k_scale, owner.v_scale)
    handed = []
    backend = object.__new__(TritonAttnBackend)
    backend.enable_deterministic = False
    backend.allow_bidirectional_attention_in_extend = False
    names = ("window_kv_indptr", "window_kv_indices", "window_kv_offsets", "kv_indptr")
    names += ("kv_indices", "qo_indptr", "custom_mask", "mask_indptr", "max_extend_len")
    backend.forward_metadata = SimpleNamespace(**dict.fromkeys(names))
    backend.extend_attention_fwd = lambda *args, **kwargs: handed.append(args[1:3])
    batch = SimpleNamespace(token_to_kv_pool=pool, out_cache_loc=slots)
    q = torch.zeros(4, 32).bfloat16()
    cached = [cache.float() for cache in pool.get_kv_buffer(owner.layer_id)]
    if piecewise:
        batch.forward_mode = ForwardMode.EXTEND
        batch.num_token_non_padded_cpu = 4
        batch.out_cache_loc = torch.cat([slots, torch.zeros(2, dtype=torch.int64)])
        batch.out_cache_loc_swa = pool.translate_loc_from_full_to_swa(batch.out_cache_loc)
        batch.attn_backend = backend
        padded = torch.cat([q, q[:2]])
        with set_forward_context(batch, small_mtp.attentions(model), None, [], []):
            reader(padded, None, None, batch, save_kv_cache=False)
    else:
        backend.forward_extend(q, None, None, reader, batch, save_kv_cache=False)
    ((k, v),) = handed
    after = [cache.float() for cache in pool.get_kv_buffer(owner.layer_id)]
    assert all(map(torch.equal, cached, after))  # a reader writes nothing
    return torch.stack([k.float()[:, 0, 0], v.float()[:, 0, 0]])


@READERS
def test_an_extend_step_sees_unscaled_keys_and_values(reader: int) -> None:
    """Stock hands the 8-bit numbers over as they are; patched, they are what the owner computed."""
    k_scale, v_scale = SCALES[reader - 2]
    stock = extend_step(loaded(), reader)
    assert torch.equal(stock, TRUE / torch.tensor([[k_scale], [v_scale]]))
    turn_on(NAME)
    assert torch.equal(extend_step(loaded(), reader), TRUE)


def test_extend_steps_of_other_layers_are_stocks() -> None:
    """Scales of 1: the very tensor of the cache's dtype, as in stock."""
    turn_on(NAME)
    layer = SimpleNamespace()
    passed = []

    def extend(self: Any, *args: Any) -> None:
        passed.append(args)

    forward = patch._extend(ENGINE.runs[NAME], extend)
    attention = small_mtp.attentions(loaded({}))[FULL_READER]
    forward(layer, "q", None, None, attention, "batch", True, "sinks")
    assert passed == [("q", None, None, attention, "batch", True, "sinks")]


def test_a_reader_whose_own_scales_are_its_owners() -> None:
    """Nothing is taken over, and the numbers in the cache are divided all the same."""
    turn_on(NAME)
    same = {**SCALES, SLIDING_READER: SCALES[SLIDING_OWNER]}
    before = engaged()
    assert torch.equal(extend_step(loaded(same), SLIDING_READER), TRUE)
    assert engaged() == before + 2  # the other reader's scales, and the multiplication


def test_what_somebody_gave_the_owner_since_is_taken_over() -> None:
    """In an extend step, without a loading of weights."""
    turn_on(NAME)
    model = loaded()
    owner = small_mtp.attentions(model)[FULL_OWNER]
    owner.k_scale.data.fill_(4.0)
    owner.k_scale_float = 4.0
    assert torch.equal(extend_step(model, FULL_READER), TRUE)


@READERS
@pytest.mark.parametrize("equal", [False, True], ids=["other scales", "the owner's scales"])
def test_an_extend_step_in_a_piecewise_graph(reader: int, equal: bool) -> None:
    """There the backend is handed the owner, whose number the reader has, and no K and V."""
    turn_on(NAME)
    ENGINE.apply(only=[NAME, "optional_kv"])
    assert ENGINE.runs["optional_kv"].state == states.ACTIVE
    scales = {**SCALES, reader: SCALES[reader - 2]} if equal else SCALES
    before = engaged()
    found = extend_step(loaded(scales), reader, piecewise=True)
    assert torch.equal(found, TRUE)
    assert engaged() > before


class TestInEveryLine(scaled_kv.Scales):
    """`scaled_kv`'s tests, here."""

    patch = patch
    loaded = staticmethod(loaded)
    scales_of = staticmethod(scales_of)
    extend_step = staticmethod(extend_step)
