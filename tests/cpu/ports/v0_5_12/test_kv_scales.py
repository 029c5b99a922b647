"""The scales of attention that reads another layer's cache, on SGLang's real models."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any import kv_scales as common
from gemma4_turbo.ports.v0_5_12 import kv_scales as patch
from tests.cpu import small_mtp
from tests.cpu.conftest import turn_on

pytestmark = pytest.mark.usefixtures("stock_first")

NAME = "kv_scales"
FP8 = torch.float8_e4m3fn
SLIDING_OWNER, FULL_OWNER, SLIDING_READER, FULL_READER = 2, 3, 4, 5
SCALES = {SLIDING_OWNER: (0.5, 0.25), FULL_OWNER: (2.0, 1.0), SLIDING_READER: (8.0, 8.0)}


def engaged() -> int:
    return ENGINE.runs[NAME].counters.engaged


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


def draft_of(model: Any, quantised: bool, dtype: torch.dtype = FP8) -> Any:
    """An assistant bound to ``model`` as the worker does it."""
    draft = small_mtp.assistant(small_mtp.quantised_kv() if quantised else None)
    if quantised:
        small_mtp.load_scales(draft, {})
    pool = SimpleNamespace(dtype=dtype)
    draft.bind_frozen_kv_context(draft.build_frozen_kv_mtp_context(model, pool))
    return draft


def test_shared_layers_of_stock_have_scales_of_their_own() -> None:
    """1, or what a checkpoint gives them, though they read what others wrote; patched: theirs."""
    stock = scales_of(loaded())
    assert stock[SLIDING_OWNER] == (0.5, 0.25)
    assert stock[SLIDING_READER] == (8.0, 8.0)
    assert stock[FULL_READER] == (1.0, 1.0)
    turn_on(NAME)
    before = engaged()
    model = loaded()
    patched = scales_of(model)
    assert patched[:4] == stock[:4]
    assert patched[SLIDING_READER] == patched[SLIDING_OWNER] == (0.5, 0.25)
    assert patched[FULL_READER] == patched[FULL_OWNER] == (2.0, 1.0)
    assert engaged() == before + 2
    for attention in small_mtp.attentions(model)[4:]:  # the tensors agree with the floats
        assert (float(attention.k_scale), float(attention.v_scale)) == (
            attention.k_scale_float,
            attention.v_scale_float,
        )
        assert isinstance(attention.k_scale, torch.nn.Parameter)


@pytest.mark.parametrize("quantised", [False, True], ids=["plain draft", "quantised draft"])
def test_the_draft_has_the_scales_of_the_layers_that_it_reads(quantised: bool) -> None:
    """Also a draft without any quantisation, whose attention has no scales at all."""
    assert scales_of(draft_of(loaded(), quantised)) == [(1.0, 1.0), (1.0, 1.0)]
    turn_on(NAME)
    draft = draft_of(loaded(), quantised)
    assert scales_of(draft) == [(0.5, 0.25), (2.0, 1.0)]
    names = {name for name, _ in draft.named_parameters()}
    assert any("k_scale" in name for name in names) == quantised  # nothing new to load


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
    before = engaged()
    model = loaded(cache=cache)
    assert scales_of(model)[SLIDING_READER] == (8.0, 8.0)
    assert scales_of(draft_of(model, False, torch.bfloat16)) == [(1.0, 1.0)] * 2
    assert engaged() == before


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


def test_a_model_that_is_gone_is_forgotten() -> None:
    turn_on(NAME)
    model = loaded()
    assert len(common._links) == 2
    del model
    gc.collect()
    assert len(common._links) == 0


def test_a_model_of_another_kind_is_served_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of ours: stock's path, and the report says so."""
    turn_on(NAME)
    monkeypatch.setattr(common, "link", lambda *args: 1 / 0)
    model = loaded()
    assert scales_of(model)[FULL_READER] == (1.0, 1.0)
    run = ENGINE.runs[NAME]
    assert run.state == states.FAILED
    assert "ZeroDivisionError" in run.reason


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


@pytest.mark.parametrize("reader", [SLIDING_READER, FULL_READER], ids=["sliding", "full"])
def test_an_extend_step_sees_unscaled_keys_and_values(reader: int) -> None:
    """Stock hands the 8-bit numbers over as they are; patched, they are what the owner computed."""
    true = torch.tensor([[1.0, 2, 3, 4]] * 2)
    k_scale, v_scale = SCALES[reader - 2]
    stock = extend_step(loaded(), reader)
    assert torch.equal(stock, true / torch.tensor([[k_scale], [v_scale]]))
    turn_on(NAME)
    assert torch.equal(extend_step(loaded(), reader), true)


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
    assert torch.equal(
        extend_step(loaded(same), SLIDING_READER), torch.tensor([[1.0, 2, 3, 4]] * 2)
    )
    assert engaged() == before + 2  # the other reader's scales, and the multiplication


def test_what_somebody_gave_the_owner_since_is_taken_over() -> None:
    """In an extend step, without a loading of weights."""
    turn_on(NAME)
    model = loaded()
    owner = small_mtp.attentions(model)[FULL_OWNER]
    owner.k_scale.data.fill_(4.0)
    owner.k_scale_float = 4.0
    assert torch.equal(extend_step(model, FULL_READER), torch.tensor([[1.0, 2, 3, 4]] * 2))


def test_a_multiplication_that_raises_is_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    turn_on(NAME)
    tries = []

    def fails(*given: Any) -> Any:
        tries.append(given)
        raise RuntimeError("no memory")

    monkeypatch.setattr(patch, "new_keys_and_values", fails)
    k_scale, v_scale = SCALES[SLIDING_OWNER]
    stock = torch.tensor([[1.0, 2, 3, 4]] * 2) / torch.tensor([[k_scale], [v_scale]])
    model = loaded()
    for _ in range(2):
        assert torch.equal(extend_step(model, SLIDING_READER), stock)
    assert len(tries) == 1
    assert ENGINE.runs[NAME].state == states.FAILED


@pytest.mark.parametrize("reader", [SLIDING_READER, FULL_READER], ids=["sliding", "full"])
@pytest.mark.parametrize("equal", [False, True], ids=["other scales", "the owner's scales"])
def test_an_extend_step_in_a_piecewise_graph(reader: int, equal: bool) -> None:
    """There the backend is handed the owner, whose number the reader has, and no K and V."""
    turn_on(NAME)
    ENGINE.apply(only=[NAME, "optional_kv"])
    assert ENGINE.runs["optional_kv"].state == states.ACTIVE
    scales = {**SCALES, reader: SCALES[reader - 2]} if equal else SCALES
    before = engaged()
    found = extend_step(loaded(scales), reader, piecewise=True)
    assert torch.equal(found, torch.tensor([[1.0, 2, 3, 4]] * 2))
    assert engaged() > before
