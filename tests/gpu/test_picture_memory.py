"""The process with the image processor does not grow by what pictures leave in a memory pool."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.engine.run import PatchRun
from tests.gpu.lines import patch as patch_of
from tests.runs import unpublished

line = patch_of("picture_memory")

CALLS = 200
SEGMENT = 2 << 20  # of small tensors
DEVICE = "cuda:0"


@pytest.fixture(autouse=True)
def _no_segments() -> Iterator[None]:
    """Nothing of ours is free in the allocator before; what the test left is given back."""
    torch.zeros(1, device=DEVICE)
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """SGLang's, as much of it as a call needs, and transformers', which answers as with a picture."""
    from sglang.srt.multimodal.processors.gemma4 import Gemma4SGLangProcessor
    from transformers import BatchFeature
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    def answer(self: object, **kwargs: Any) -> Any:
        pixels = torch.rand(1, 2520, 768, device=DEVICE)
        places = torch.arange(2520 * 2, device=DEVICE).view(1, 2520, 2)
        return BatchFeature({"pixel_values": pixels, "image_position_ids": places})

    monkeypatch.setattr(Gemma4Processor, "__call__", answer)
    written_in = line.written_in
    monkeypatch.setattr(
        line, "written_in", lambda package, found: found is answer or written_in(package, found)
    )
    outer = Gemma4SGLangProcessor.__new__(Gemma4SGLangProcessor)
    outer.mm_feature_transport = "cpu"
    outer.FEATURE_NAMES = ["pixel_values"]
    return outer, Gemma4Processor.__new__(Gemma4Processor)


def growth(processors: tuple[Any, Any], device_of_positions: str) -> int:
    """Bytes that the driver gave out over `CALLS` calls, of whose results nothing is kept."""
    outer, inner = processors

    def call() -> None:
        found = outer._call_processor(inner, "text", DEVICE, {})
        assert found["pixel_values"].device.type == "cpu"
        places = found["image_position_ids"]
        assert places.device.type == device_of_positions
        assert torch.equal(places.cpu(), torch.arange(2520 * 2).view(1, 2520, 2))

    for _ in range(3):  # what the first calls load
        call()
    gc.collect()
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info(DEVICE)
    for _ in range(CALLS):
        call()
    gc.collect()
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info(DEVICE)
    return before - after


def test_stock_grows(processors: tuple[Any, Any]):
    """A segment a call: the defect is there, and seen in this way."""
    assert growth(processors, "cuda") > CALLS * SEGMENT // 2


def test_patched_does_not_grow(processors: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    """Not by a tenth of it; others on this GPU may take something meanwhile."""
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    run: PatchRun = unpublished("picture_memory")
    stock = {line.TARGET: BaseMultimodalProcessor._call_processor}
    ours = line.build(run, stock)[line.TARGET]
    monkeypatch.setattr(BaseMultimodalProcessor, line.CALL, ours)
    assert growth(processors, "cpu") < CALLS * SEGMENT // 10
    assert run.engaged_count() == CALLS + 3
