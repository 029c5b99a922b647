"""No mask is built for a vision attention that reads none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_turbo.instance import ENGINE
from tests.cpu import vision
from tests.cpu.conftest import only_patch, patched_sglang

NAME = "vision_masks"


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME), torch.no_grad():
        yield


class Masks(TorchDispatchMode):
    """Counts boolean results of a patch by patch size."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches, self.count = patches, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
            self.count += out.numel() == self.patches**2 and "mul" in str(function)
        return out


@pytest.mark.parametrize(("backend", "needed"), [("triton_attn", False), ("sdpa", True)])
def test_a_mask_where_it_is_read_and_nowhere_else(backend: str, needed: bool):
    """An image with padding: stock's bits either way."""
    model, item = vision.model(backend), vision.image(4, 2, 8)
    run = ENGINE.runs[NAME]
    before = run.counters.engaged
    with Masks(16) as ours:
        found = model.get_image_feature([item])
    assert run.counters.engaged - before == (0 if needed else 2)
    assert ("may read the mask" in run.full_reason()) == needed
    ENGINE.revert()
    with Masks(16) as stock:
        expected = model.get_image_feature([item])
    assert stock.count == 2
    assert ours.count == (2 if needed else 0)
    assert torch.equal(found, expected)


def test_a_backend_of_the_same_name_may_read_it(monkeypatch: pytest.MonkeyPatch):
    """Somebody's subclass too, and stock's own under a forward that somebody has set."""
    from sglang.srt.layers.attention import vision as stock

    model, item = vision.model("triton_attn"), vision.image(4, 2, 8)
    attention = model.vision_tower.encoder.layers[0].self_attn
    kind = stock.VisionTritonAttention
    other = type(kind.__name__, (kind,), {})(**{})
    run = ENGINE.runs[NAME]
    with monkeypatch.context() as context:
        context.setitem(attention._modules, "qkv_backend", other)
        with Masks(16) as masks:
            model.get_image_feature([item])
    assert masks.count == 1
    assert "VisionTritonAttention may read the mask" in run.full_reason()
    monkeypatch.setattr(run, "_decline_reason", "")
    shown = []
    backend = attention.qkv_backend
    stocks = backend.forward

    def forward(*given: Any, **named: Any) -> torch.Tensor:
        shown.append(named["attention_mask"])
        return stocks(*given, **named)

    with monkeypatch.context() as context:
        context.setitem(vars(backend), "forward", forward)
        model.get_image_feature([item])
    assert shown[0] is not None
    assert "VisionTritonAttention has forward hooks" in run.full_reason()
