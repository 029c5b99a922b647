"""Two patches around one function of the triton backend, on stock's own class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_12.attention import extend_attention, extend_wraps, kv_scales
from tests.cpu.conftest import patched_sglang

PATCHES = ("extend_attention", "kv_scales")


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang imported; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=PATCHES):
        yield


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Who is called, from the outside in; both patches are off before and after."""
    ENGINE.revert()
    called: list[str] = []

    def spied(name: str, wrap: Any) -> Any:
        def around(run: Any, inner: Any) -> Any:
            assert run is ENGINE.runs[name]
            assert callable(wrap(run, inner))

            def call(*arguments: Any) -> Any:
                called.append(name)
                return inner(*arguments)

            return call

        return around

    for code, attribute in ((extend_attention, "_forward"), (kv_scales, "_extend")):
        name = code.__name__.rpartition(".")[2]
        monkeypatch.setattr(code, attribute, spied(name, getattr(code, attribute)))
    yield called
    ENGINE.revert()


def backend_class() -> Any:
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    return TritonAttnBackend


def call_it() -> None:
    """Stock refuses K without V, after the wraps; it is the proof that stock was reached."""
    backend = object.__new__(backend_class())
    layer: Any = type("Layer", (), {"qk_head_dim": 1, "v_head_dim": 1})()
    q = torch.zeros(1)
    with pytest.raises(ValueError, match="Both k and v should be None"):
        backend.forward_extend(q, q, None, layer, None)


@pytest.mark.parametrize("order", [PATCHES, PATCHES[::-1]])
def test_scales_come_before_the_kernel(calls: list[str], order: tuple[str, ...]) -> None:
    """Whichever was switched on first; both are active."""
    ENGINE.apply(only=order[:1])
    ENGINE.apply(only=order)
    assert [ENGINE.runs[name].state for name in PATCHES] == [states.ACTIVE] * 2
    call_it()
    assert calls == ["kv_scales", "extend_attention"]


@pytest.mark.parametrize("staying", PATCHES)
def test_one_leaves_and_the_other_stays(calls: list[str], staying: str) -> None:
    """The function in stock's place stays the same; at last stock's own is back."""
    stock = vars(backend_class())["forward_extend"]
    ENGINE.apply(only=PATCHES)
    ours = vars(backend_class())["forward_extend"]
    ENGINE.apply(only=[staying])
    assert vars(backend_class())["forward_extend"] is ours is extend_wraps.forward_extend
    call_it()
    assert calls == [staying]
    ENGINE.revert()
    assert vars(backend_class())["forward_extend"] is stock
    call_it()
    assert calls == [staying]


def test_a_backend_that_kept_the_function_gets_stocks(calls: list[str]) -> None:
    """After a revert nothing of the patches runs in it."""
    ENGINE.apply(only=PATCHES)
    kept = vars(backend_class())["forward_extend"]
    ENGINE.revert()
    assert kept is not vars(backend_class())["forward_extend"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_class(), "forward_extend", kept)
        call_it()
    assert calls == []
