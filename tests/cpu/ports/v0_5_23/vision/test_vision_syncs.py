"""The vision attention's lengths stay on the host, by the argument that this line's backends take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_23.vision import vision_syncs as patch
from gemma4_turbo.runtime import custom_ops
from tests.cpu import vision
from tests.cpu.conftest import only_patch, patched_sglang
from tests.cpu.ports.counted import Counted, counted

NAME = "vision_syncs"
FLASH = ("VisionFlash3Attention", "VisionFlash4Attention")


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME), torch.no_grad():
        yield


def counts() -> Counted:
    return counted(NAME)


@pytest.mark.parametrize("batch", [1, 3])
def test_triton_backend_in_the_whole_encoder(batch: int):
    """Stock's bits; a read-back a layer fewer, though nobody asked for another shape before."""
    tower = vision.model("triton_attn").vision_tower
    feature, places = vision.pixels(12, 8)  # more than one block of the kernel
    feature, places = feature.bfloat16().expand(batch, -1, -1), places.expand(batch, -1, -1)
    before = counts()
    with vision.ReadBacks() as ours:
        found, _ = tower(feature, places)
    assert counts() == before.and_(engaged=2)
    ENGINE.revert()
    with vision.ReadBacks() as stock:
        expected, _ = tower(feature, places)
    assert stock.count - ours.count == 2
    assert torch.equal(found, expected)


def flash(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """Stock's class; its kernel needs a GPU and hands over its arguments here."""
    from sglang.srt.layers.attention import vision as stock

    received: list[Any] = []
    monkeypatch.setattr(
        stock,
        "flash_attn_func",
        lambda q, k, v, **rest: received.append((q, k, v, rest)) or q,
        raising=False,
    )
    return getattr(stock, name).__new__(getattr(stock, name)), received


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize(("bsz", "seq_len"), [(3, 4), (1, 1), (1, 12), (12, 1)])
@pytest.mark.parametrize("options", [{}, {"window_size": (3, 0), "s_aux": torch.ones(2)}])
def test_flash_attention_receives_what_stock_gives_it(name, bsz, seq_len, options, monkeypatch):
    """Every argument, its type and its dtype."""
    attention, received = flash(name, monkeypatch)
    q, k, v = torch.zeros(3, 24, 2, 8)[:, :: 24 // (bsz * seq_len)]
    call = {"bsz": bsz, "seq_len": seq_len, "softmax_scale": 1.0, **options}
    with vision.ReadBacks() as ours:
        attention.forward(q=q, k=k, v=v, cu_seqlens=None, attention_mask=None, **call)
    assert ours.count == 0
    ENGINE.revert()
    with vision.ReadBacks() as stock:
        attention.forward(q=q, k=k, v=v, cu_seqlens=None, attention_mask=None, **call)
    assert stock.count == 1
    (*tensors, found), (*_, expected) = received
    assert all(a is b for a, b in zip(tensors, (q, k, v), strict=True))
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert type(found[key]) is type(value), key
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key
            assert found[key].dtype == value.dtype, key
        else:
            assert found[key] == value, key


def starts() -> torch.Tensor:
    return torch.tensor([0, 3, 12], dtype=torch.int32)


def metadata() -> Any:
    from sglang.srt.layers.attention.vision import prepare_vision_attention_metadata

    return prepare_vision_attention_metadata(starts(), torch.device("cpu"))


def cache() -> Any:
    from sglang.srt.layers.attention.vision import SingletonCache

    return SingletonCache(starts())


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize(
    ("reason", "given", "longest"),
    [
        ("different lengths", lambda: {"cu_seqlens": starts()}, 9),
        ("different lengths", lambda: {"cu_seqlens": cache()}, 9),
        ("known already", lambda: {"forward_metadata": metadata()}, 9),
        ("known already", lambda: {"max_seqlen": 7}, 7),
        ("known already", lambda: {"max_seqlen": torch.tensor(7)}, 7),
        ("sequences of 0", lambda: {"seq_len": 0}, None),
        ("0 sequences", lambda: {"bsz": 0}, None),
        ("sequences of 4294967296", lambda: {"seq_len": 2**32}, 0),
    ],
)
def test_what_is_not_known_is_stocks(name, reason, given, longest, monkeypatch):
    """Lengths of one's own, what somebody else has told, and what stock raises at."""
    attention, received = flash(name, monkeypatch)
    q = torch.zeros(12, 2, 8)
    call = {"cu_seqlens": None, "bsz": 1, "seq_len": 12, **given()}
    before = counts()
    if longest is None:
        with pytest.raises(RuntimeError):
            attention.forward(q, q, q, **call)
    else:
        attention.forward(q, q, q, **call)
        assert received[0][3]["max_seqlen_q"] == longest
    assert counts() == before.and_(declined=1)
    assert reason in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (patch.TRITON, "VisionTritonAttention"),
        (patch.FLASH3, "VisionFlash3Attention"),
        (patch.FLASH4, "VisionFlash4Attention"),
    ],
)
def test_stocks_own_forward_is_what_runs(target, name, monkeypatch):
    """Of each class its own, with its arguments in place and one more."""
    from sglang.srt.layers.attention import vision as stock

    assert target.endswith(f":{name}.forward")
    given = []
    told = patch.build(
        ENGINE.runs[NAME], dict.fromkeys(patch_targets(), None) | {target: record(given)}
    )
    assert getattr(stock, name).forward is not told[target]
    assert told[target]("self", "q", "k", "v", None, 2, 3, softmax_scale=0.5, more=1) == "out"
    assert given == [(("self", "q", "k", "v", None, 2, 3, 0.5, None), {"more": 1, "max_seqlen": 3})]


def patch_targets() -> tuple[str, ...]:
    return patch.TRITON, patch.FLASH3, patch.FLASH4


def record(given: list[Any]) -> Any:
    def attention(*args: Any, **kwargs: Any) -> str:
        given.append((args, kwargs))
        return "out"

    return attention


def test_a_vision_graph_takes_stocks_path(monkeypatch: pytest.MonkeyPatch):
    """Its lengths are lists of buffers, and stock says so if they are not. Nothing is counted."""
    monkeypatch.setenv("SGLANG_VIT_ENABLE_CUDA_GRAPH", "1")
    tower = vision.model("triton_attn").vision_tower
    feature, places = vision.pixels(4, 4)
    before = counts()
    with pytest.raises(RuntimeError, match="output_ws"):
        tower(feature.bfloat16()[None], places[None])
    assert counts() == before


def test_a_capture_is_counted_as_one(monkeypatch: pytest.MonkeyPatch):
    """Without the read-back it can be captured."""
    attention, _ = flash(FLASH[0], monkeypatch)
    monkeypatch.setattr(custom_ops, "capturing", lambda: True)
    before = counts()
    q = torch.zeros(12, 2, 8)
    attention.forward(q, q, q, None, 3, 4)
    assert counts() == before.and_(engaged=1, captured=1)


def test_traced_code_sees_stock(monkeypatch: pytest.MonkeyPatch):
    attention, received = flash(FLASH[0], monkeypatch)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    before = counts()
    q = torch.zeros(12, 2, 8)
    attention.forward(q, q, q, None, 3, 4)
    assert received[0][3]["max_seqlen_q"] == 4
    assert counts() == before
