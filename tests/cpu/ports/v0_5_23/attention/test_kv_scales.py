"""The scales of attention that reads another layer's cache, on SGLang's real models and backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.attention import kv_scales as common
from gemma4_turbo.ports.v0_5_23.attention import kv_scales as patch
from tests.cpu import interpreted, scaled_kv, small_mtp
from tests.cpu.conftest import turn_on
from tests.cpu.ports.v0_5_23.triton_world import World
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

pytestmark = [
    pytest.mark.usefixtures("stock_first"),
    *interpreted.MARKS,
]


def configured(model: Any, cache: str = "fp8_e4m3") -> Any:
    """What a stock ``ModelRunner`` does after it has loaded ``model``."""
    from sglang.srt.model_executor import model_runner

    runner = object.__new__(model_runner.ModelRunner)
    runner.dtype, runner.model, runner.draft_attention_backend = torch.bfloat16, model, None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model_runner, "get_model", lambda: SimpleNamespace(kv_cache_dtype=cache))
        runner.configure_kv_cache_dtype()
    return model


def loaded(scales: dict[int, tuple[float, float]] | None = None, cache: str = "fp8_e4m3") -> Any:
    with pytest.MonkeyPatch.context() as patched:
        from sglang.srt.models import gemma4_causal

        patched.setattr(gemma4_causal, "get_rope", lambda *args, **kwargs: None)
        model = small_mtp.target(small_mtp.quantised_kv())
    with torch.no_grad():  # as SGLang's loader
        small_mtp.load_scales(model, SCALES if scales is None else scales)
    return configured(model, cache)


def scales_of(model: Any) -> list[tuple[float, float]]:
    """As the Triton backend's decode hands them to its kernel, by layer."""
    found = []
    backend = World().backend
    names = ["window_kv_indptr", "window_kv_indices", "kv_indptr", "kv_indices", "attn_logits"]
    names += ["swa_attn_logits", "attn_lse", "num_kv_splits", "lean_Mp", "lean_Lp", "lean_Op"]
    names += ["lean_locks", "uneven_batch", "swa_out_cache_loc"]
    backend.forward_metadata = SimpleNamespace(**dict.fromkeys(names, torch.zeros(0)))
    # q, keys, values, output, two indices, logits, lse, splits twice, scaling, then the two
    backend.decode_attention_fwd = lambda *args, **kwargs: found.append(args[11:13])
    backend.token_to_kv_pool = SimpleNamespace(
        get_key_buffer=lambda i: None, get_value_buffer=lambda i: None
    )
    for attention in small_mtp.attentions(model):
        q = torch.zeros(1, attention.tp_q_head_num * attention.head_dim)
        batch = SimpleNamespace(_attn_output=None)
        backend.forward_decode(q, None, None, attention, batch, save_kv_cache=False)
    return found


def made_backend(world: World) -> Any:
    """The world's backend, as if its constructor, which wants a server, had run after the model's."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    fields = dict(vars(world.backend))
    construct = TritonAttnBackend.__init__
    backend = object.__new__(TritonAttnBackend)
    if hasattr(construct, "__wrapped__"):  # ours, round the fields
        run = ENGINE.runs[NAME]
        patch._make(run, lambda self: vars(self).update(fields))(backend)
    else:
        vars(backend).update(fields)
    return backend


def extend_step(
    model: Any, index: int, backend: Any = None, in_graph: bool = False
) -> torch.Tensor:
    """K and V that the Triton backend hands to its kernel for the tokens of an extend step.

    The owner's K is 1, 2, 3, ... and is written as stock writes it, by stock's own pool.

    Args:
        model: of SGLang's.
        index: of the layer that reads.
        backend: what `world_of` gave; a new one if None.
        in_graph: through the layer, in a breakable graph, of padded tokens.
    """
    world, backend = backend or world_of()
    pool = world.pool
    owner, reader = (small_mtp.attentions(model)[i] for i in (index - 2, index))
    batch = world.batch("EXTEND", [4], [3])
    backend.init_forward_metadata(batch)
    sliding = pool.layers_mapping[reader.layer_id][1]
    slots = backend.forward_metadata.swa_out_cache_loc if sliding else batch.out_cache_loc
    own = pool.swa_kv_pool if sliding else pool.full_kv_pool
    at = pool.layers_mapping[reader.layer_id][0]
    k_scale, v_scale = common.floats(owner)
    for buffer, scale in ((own.k_buffer[at], k_scale), (own.v_buffer[at], v_scale)):
        rows = (torch.arange(1.0, 5) / scale).to(FP8).view(4, 1, 1)
        buffer.view(FP8)[slots] = rows.expand(4, *buffer.shape[1:])
    handed = []
    backend.extend_attention_fwd = lambda *args, **kwargs: handed.append(args[1:3])
    q = torch.zeros(4, reader.tp_q_head_num * reader.qk_head_dim).bfloat16()
    cached = [buffer.clone() for buffer in (own.k_buffer[at], own.v_buffer[at])]
    if in_graph:
        through_a_graph(reader, q, batch, backend)
    else:
        backend.forward(q, None, None, reader, batch, save_kv_cache=False)
    ((k, v),) = handed
    for buffer, kept in zip((own.k_buffer[at], own.v_buffer[at]), cached, strict=True):
        assert torch.equal(buffer.view(torch.uint8), kept.view(torch.uint8))  # nothing is written
    assert len(k) == len(v) == 4
    return torch.stack([k.float()[:, 0, 0], v.float()[:, 0, 0]])


def world_of() -> tuple[World, Any]:
    """A world whose layers are `small_mtp`'s owners, with an 8-bit cache, and its backend."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    world = World()
    world.pool = SWAKVPool(
        size=400,
        size_swa=350,
        page_size=1,
        dtype=FP8,
        head_num=1,
        head_dim=16,
        swa_attention_layer_ids=[0, 2],
        full_attention_layer_ids=[1, 3],
        device="cpu",
    )
    world.pool.register_mapping(world.allocator.full_to_swa_index_mapping)
    world.translator.token_to_kv_pool = world.pool
    world.backend.token_to_kv_pool = world.pool
    return world, made_backend(world)


def through_a_graph(reader: Any, q: torch.Tensor, batch: Any, backend: Any) -> None:
    """The attention between two segments of a breakable graph of six tokens, four of them real."""
    from sglang.srt.layers import radix_attention
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    batch.global_num_token_non_padded_cpu = 4
    batch.mha_return_lse, batch.positions = False, None
    with pytest.MonkeyPatch.context() as patched:
        stands_in = {
            "is_in_breakable_cuda_graph": lambda: True,
            "is_in_prefill_graph_scope": lambda: True,
            "get_forward_batch": lambda: batch,
            "get_prefill_raw_num_tokens": lambda: 4,
        }
        for name, value in stands_in.items():
            patched.setattr(radix_attention, name, value)
        with forward_context(ForwardContext(attn_backend=backend)):
            reader(torch.cat([q, q[:2]]), None, None, batch, save_kv_cache=False)


class TestInEveryLine(scaled_kv.Scales):
    """`scaled_kv`'s tests, here."""

    patch = patch
    loaded = staticmethod(loaded)
    scales_of = staticmethod(scales_of)
    extend_step = staticmethod(extend_step)


def test_a_later_loading_of_weights_is_followed_and_a_revert_gives_all_back() -> None:
    turn_on(NAME)
    model = loaded()
    draft = draft_of(model)
    with torch.no_grad():
        small_mtp.load_scales(model, {SLIDING_OWNER: (4.0, 3.0), FULL_OWNER: (1.0, 1.0)})
    assert scales_of(model)[4:] == scales_of(draft) == [(4.0, 3.0), (1.0, 1.0)]
    ENGINE.revert()
    assert scales_of(model)[4:] == [(8.0, 8.0), (1.0, 1.0)]
    assert [a.k_scale for a in small_mtp.attentions(draft)] == [None, None]


@pytest.mark.parametrize("cache", ["bf16", "auto", "mxfp8"])
def test_a_cache_that_is_not_divided_by_scales_is_left_alone(cache: str) -> None:
    """Nor does any backend get an extend step of its own."""
    turn_on(NAME)
    ENGINE.runs[NAME]._decline_reason = ""
    before = engaged()
    model = loaded(cache=cache)
    assert scales_of(model)[SLIDING_READER] == (8.0, 8.0)
    assert scales_of(draft_of(model, dtype=torch.bfloat16)) == [(1.0, 1.0)] * 2
    assert engaged() == before
    assert "is not divided by scales" in ENGINE.runs[NAME].full_reason()
    assert patch.METHOD not in vars(world_of()[1])


@READERS
@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "breakable graph"])
def test_an_extend_step_sees_unscaled_keys_and_values(reader: int, in_graph: bool) -> None:
    """Stock hands the 8-bit numbers over as they are; patched, they are what the owner computed."""
    k_scale, v_scale = SCALES[reader - 2]
    stock = extend_step(loaded(), reader, in_graph=in_graph)
    assert torch.equal(stock, TRUE / torch.tensor([[k_scale], [v_scale]]))
    turn_on(NAME)
    assert torch.equal(extend_step(loaded(), reader, in_graph=in_graph), TRUE)


def test_a_backend_that_is_there_before_the_first_link() -> None:
    """As the target's, when it is the draft alone that reads other layers' caches."""
    turn_on(NAME)
    made = world_of()
    assert patch.METHOD not in vars(made[1])
    assert torch.equal(extend_step(loaded(), FULL_READER, made), TRUE)
    ENGINE.revert()
    assert patch.METHOD not in vars(made[1])


def test_extend_steps_without_scales_are_stocks() -> None:
    """Scales of 1: the 8-bit rows themselves, and nothing is counted."""
    turn_on(NAME)
    before = engaged()
    assert torch.equal(extend_step(loaded({}), FULL_READER), TRUE)
    assert engaged() == before


def test_a_reader_whose_own_scales_are_its_owners() -> None:
    """Nothing is taken over, and the numbers in the cache are divided all the same."""
    turn_on(NAME)
    same = {**SCALES, SLIDING_READER: SCALES[SLIDING_OWNER]}
    assert torch.equal(extend_step(loaded(same), SLIDING_READER), TRUE)


def test_pools_that_are_not_known_are_stocks() -> None:
    """Their rows may be anything."""
    turn_on(NAME)
    _world, backend = world_of()
    assert patch.unfit(backend) is None
    backend.dcp_size = 2
    assert "DCP" in str(patch.unfit(backend))
    backend.dcp_size, backend.token_to_kv_pool = 1, SimpleNamespace()
    assert patch.unfit(backend) == "the KV pool is a SimpleNamespace"
