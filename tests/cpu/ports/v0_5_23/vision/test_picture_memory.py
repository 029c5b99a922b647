"""What Gemma 4's processor returns on a GPU goes to the host while the memory pool of its call is there.

There is no GPU here: tensors claim to be on one, and the pool writes down when it begins and ends.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from gemma4_turbo.models import geometry_mm
from gemma4_turbo.ports.v0_5_23.vision import picture_memory as patch
from tests.cpu.conftest import standing
from tests.cpu.ports.counted import Counted, counted

NAME = "picture_memory"
GPU = "cuda:0"
TEXT = "<bos>see <|image|> and <|image|>"
events: list[str] = []
"""What has happened, in order: the pool's begin and end, and names of tensors that went to the host."""


class OnGPU(torch.Tensor):
    """Claims to be on a GPU."""

    label: str
    is_cuda = True

    def to(self, device: object) -> torch.Tensor:  # type: ignore[override]
        assert device == "cpu"
        events.append(self.label)
        return self.as_subclass(torch.Tensor)


class Stuck(OnGPU):
    """Cannot be copied."""

    def to(self, device: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of luck")


def on_gpu(name: str, kind: type[OnGPU] = OnGPU, values: torch.Tensor | None = None) -> OnGPU:
    made: OnGPU = torch.Tensor._make_subclass(kind, torch.arange(6) if values is None else values)
    made.label = name
    return made


@pytest.fixture(autouse=True)
def patched(patch_imported: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The patch, and stock's pool without a GPU under it."""
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    @contextlib.contextmanager
    def pool(made: object, device: object) -> Iterator[None]:
        assert device == GPU
        events.append("begin")
        try:
            yield
        finally:
            events.append("end")

    events.clear()
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", pool)
    with standing(NAME, BaseMultimodalProcessor._call_processor):
        yield


def classes(unified: bool = False) -> tuple[type[Any], type[Any]]:
    """SGLang's processor and transformers'."""
    if unified:
        from sglang.srt.multimodal.processors.gemma4_unified import Gemma4UnifiedSGLangProcessor
        from transformers.models.gemma4_unified.processing_gemma4_unified import (
            Gemma4UnifiedProcessor,
        )

        return Gemma4UnifiedSGLangProcessor, Gemma4UnifiedProcessor
    from sglang.srt.multimodal.processors.gemma4 import Gemma4SGLangProcessor
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    return Gemma4SGLangProcessor, Gemma4Processor


def make(outer: type[Any]) -> Any:
    """As much of SGLang's processor as the call needs."""
    made = outer.__new__(outer)
    made.mm_feature_transport = "cpu"
    made.FEATURE_NAMES = ["pixel_values", "pixel_values_videos", "audio_features", "input_features"]
    return made


Call = Callable[..., Any]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """The patched function on stand-in results: ``call(data, sglangs=, processor=, device=)``."""

    def called(
        data: dict[str, Any],
        sglangs: Any = None,
        processor: Any = None,
        device: str | None = GPU,
        unified: bool = False,
        foreign: bool = False,
    ) -> Any:
        from transformers import BatchFeature

        outer, inner = classes(unified)

        def answer(self: object, **kwargs: Any) -> Any:
            assert kwargs == {
                **{"text": [TEXT], "padding": True, "return_tensors": "pt"},
                "images": "pictures",
            }
            return BatchFeature(data)

        monkeypatch.setattr(inner, "__call__", answer)
        written_in = patch.written_in

        def own(package: str, function: Any) -> bool:
            return (function is answer and not foreign) or written_in(package, function)

        monkeypatch.setattr(patch, "written_in", own)
        sglangs = make(outer) if sglangs is None else sglangs
        processor = inner.__new__(inner) if processor is None else processor
        return sglangs._call_processor(processor, TEXT, device, {"images": "pictures"})

    return called


def counts() -> Counted:
    return counted(NAME)


def pictures() -> dict[str, Any]:
    return {
        "input_ids": torch.arange(3),
        "pixel_values": on_gpu("pixels"),
        "image_position_ids": on_gpu("positions"),
    }


def is_stocks(call: Call, reason: str) -> None:
    """Positions stay where they are, and the report says why."""
    data = pictures()
    kept = dict(data)
    before = counts()
    assert call(data)["image_position_ids"] is kept["image_position_ids"]
    assert counts() == before.and_(declined=1)
    assert reason in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize("unified", [False, True])
def test_positions_leave_the_pool(call: Call, unified: bool):
    data = pictures()
    before = counts()
    found = call(data, unified=unified)
    assert events == ["begin", "positions", "pixels", "end"]
    assert counts() == before.and_(engaged=1)
    assert found["input_ids"] is data["input_ids"]
    for name in ("pixel_values", "image_position_ids"):
        assert type(found[name]) is torch.Tensor
        assert torch.equal(found[name], torch.arange(6))


def test_stock_leaves_them(call: Call):
    """The defect, and `revert`."""
    ENGINE.revert()
    data = pictures()
    found = call(data)
    assert events == ["begin", "pixels", "end"]
    assert found["image_position_ids"] is data["image_position_ids"]


def test_lists_of_tensors(call: Call):
    """Whatever holds a tensor is made anew; what holds none is the same object."""
    data: dict[str, Any] = {
        "video_position_ids": [[on_gpu("a"), torch.arange(2)], (on_gpu("b"), "text")],
        "input_features_mask": {"inside": [on_gpu("c")], "number": 1},
        "host": [[torch.arange(3)], (1, None), {"x": "y"}],
    }
    kept = dict(data)
    found = call(data)
    assert events == ["begin", "a", "b", "c", "end"]
    assert found["host"] is kept["host"]
    (first, second), (third, text) = found["video_position_ids"]
    assert second is kept["video_position_ids"][0][1]
    assert text == "text"
    assert found["input_features_mask"]["number"] == 1
    for tensor in (first, third, found["input_features_mask"]["inside"][0]):
        assert type(tensor) is torch.Tensor
    # Another may still hold the lists: theirs are as they were.
    assert type(kept["video_position_ids"][0][0]) is OnGPU
    assert type(kept["input_features_mask"]["inside"][0]) is OnGPU


def test_features_are_left_to_stock(call: Call):
    """Those that stock leaves on the GPU, too: it moves no lists."""
    data = {"pixel_values": [on_gpu("pixels")], "input_features": torch.arange(2)}
    kept = dict(data)
    before = counts()
    found = call(data)
    assert events == ["begin", "end"]
    assert all(found[name] is kept[name] for name in kept)
    assert counts() == before.and_(declined=1)


def test_nothing_on_a_gpu_is_said(call: Call):
    data = {"input_ids": torch.arange(3), "input_features_mask": torch.ones(2)}
    kept = dict(data)
    before = counts()
    found = call(data)
    assert all(found[name] is kept[name] for name in kept)
    assert counts() == before.and_(declined=1)


def keeping(sglangs: Any) -> None:
    sglangs.mm_feature_transport = "cuda_ipc"


def hashing(sglangs: Any) -> None:
    sglangs.precompute_hash_before_cpu_transfer = True


def as_it_is(sglangs: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "device", "reason", "moved"),
    [
        (keeping, GPU, "stay on the GPU", []),
        (hashing, GPU, "stay on the GPU", []),
        (as_it_is, None, "on the CPU, in no memory pool", ["pixels"]),
        (as_it_is, "cpu", "on cpu, in no memory pool", ["pixels"]),
        (as_it_is, "xpu", "on xpu, in no memory pool", ["pixels"]),
    ],
)
def test_where_stock_makes_no_pool(call: Call, change, device, reason, moved):
    """Not even then when something on a GPU is in the result; features as stock has it."""
    sglangs = make(classes()[0])
    change(sglangs)
    data = pictures()
    kept = dict(data)
    before = counts()
    found = call(data, sglangs=sglangs, device=device)
    assert events == moved
    assert found["image_position_ids"] is kept["image_position_ids"]
    assert counts() == before.and_(declined=1)
    assert reason in ENGINE.runs[NAME].full_reason()


def a_subclass() -> dict[str, Any]:
    return {"sglangs": make(type("Theirs", (classes()[0],), {}))}


def another_model() -> dict[str, Any]:
    from sglang.srt.multimodal.processors.embedding_gemma2 import EmbeddingGemma2SGLangProcessor

    return {"sglangs": make(EmbeddingGemma2SGLangProcessor)}


def another_processor() -> dict[str, Any]:
    inner = classes()[1]
    theirs = type("TheirProcessor", (inner,), {})
    return {"processor": theirs.__new__(theirs)}


def a_wrapped_processor() -> dict[str, Any]:
    inner = classes()[1]
    made = inner.__new__(inner)
    made.__call__ = lambda **kwargs: inner.__call__(made, **kwargs)
    return {"processor": made}


def a_wrapped_call() -> dict[str, Any]:
    made = make(classes()[0])
    made._call_processor = lambda *given: type(made)._call_processor(made, *given)
    return {"sglangs": made}


def a_wrapped_pool() -> dict[str, Any]:
    made = make(classes()[0])
    made._temporary_fast_processor_cuda_pool = contextlib.nullcontext
    return {"sglangs": made}


@pytest.mark.parametrize(
    ("whose", "reason"),
    [
        (a_subclass, "the multimodal processor is a Theirs"),
        (another_model, "the multimodal processor is a EmbeddingGemma2SGLangProcessor"),
        (another_processor, "the model's processor is a TheirProcessor"),
        (a_wrapped_processor, "the model's processor was wrapped"),
        (a_wrapped_call, "_call_processor was wrapped"),
        (a_wrapped_pool, "_temporary_fast_processor_cuda_pool was wrapped"),
    ],
)
def test_what_is_not_known_runs_stocks_way(call: Call, whose, reason):
    data = pictures()
    kept = dict(data)
    before = counts()
    found = call(data, **whose())
    assert found["image_position_ids"] is kept["image_position_ids"]
    assert type(found["pixel_values"]) is torch.Tensor
    assert counts() == before.and_(declined=1)
    assert reason in ENGINE.runs[NAME].full_reason()


def test_a_tensor_that_nobody_knows_stays(call: Call):
    """And all others with it: who put it there may read them too."""
    data = pictures() | {"their_mask": on_gpu("theirs")}
    kept = dict(data)
    before = counts()
    found = call(data)
    assert all(found[name] is kept[name] for name in ("image_position_ids", "their_mask"))
    assert counts() == before.and_(declined=1)
    assert "returned their_mask on a GPU" in ENGINE.runs[NAME].full_reason()


def test_a_wrapper_round_transformers_class(call: Call):
    for unified in (False, True):
        assert patch.written_in("transformers", classes(unified)[1].__call__)
    data = pictures()
    kept = dict(data)
    before = counts()
    found = call(data, foreign=True)  # what answers is the test's own function
    assert found["image_position_ids"] is kept["image_position_ids"]
    assert counts() == before.and_(declined=1)
    assert "the model's processor was wrapped" in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize("name", patch.BETWEEN)
def test_a_wrapper_on_the_way_to_the_model(call: Call, monkeypatch: pytest.MonkeyPatch, name: str):
    outer = classes()[0]
    theirs = getattr(outer, name)

    @functools.wraps(theirs)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return theirs(*args, **kwargs)

    monkeypatch.setattr(outer, name, wrapper, raising=False)
    is_stocks(call, f"{name} was wrapped")


@pytest.mark.parametrize("name", [patch.CALL, patch.POOL])
def test_a_wrapper_round_the_class_that_came_later(
    call: Call, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Somebody else's pool may be no pool, and their call may count on what stock returns."""
    outer = classes()[0]
    theirs = getattr(outer, name)
    monkeypatch.setattr(outer, name, lambda *given: theirs(*given), raising=False)
    is_stocks(call, f"{name} was wrapped")


def test_a_tensor_that_cannot_be_moved(call: Call):
    """Stock's result, all of it."""
    data = pictures() | {"video_position_ids": [on_gpu("stuck", Stuck)]}
    kept = dict(data)
    before = counts()
    found = call(data)
    assert events == ["begin", "positions", "pixels", "end"]
    for name in ("image_position_ids", "video_position_ids", "input_ids"):
        assert found[name] is kept[name]
    assert type(found["pixel_values"]) is torch.Tensor
    assert counts() == before.and_(declined=1)
    assert "was not moved: RuntimeError: CUDA error: out of luck" in (
        ENGINE.runs[NAME].full_reason()
    )


def test_a_look_that_fails(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patch, "unfit", lambda *given: 1 / 0)
    is_stocks(call, "ZeroDivisionError")


def test_a_result_of_another_form(call: Call, monkeypatch: pytest.MonkeyPatch):
    """A dict of somebody's own, which may do other things when it is written to."""
    import transformers

    class Theirs(dict[str, Any]):
        pass

    monkeypatch.setattr(transformers, "BatchFeature", Theirs)
    data = pictures()
    before = counts()
    assert call(data)["image_position_ids"] is data["image_position_ids"]
    assert counts() == before.and_(declined=1)
    assert "returned a Theirs" in ENGINE.runs[NAME].full_reason()


def test_a_processor_that_raises(monkeypatch: pytest.MonkeyPatch):
    """Its own exception, and nothing is counted."""
    outer, inner = classes()
    error = ValueError("no picture")

    def fail(self: object, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(inner, "__call__", fail)
    monkeypatch.setattr(patch, "written_in", lambda package, function: True)
    before = counts()
    with pytest.raises(ValueError, match="no picture") as raised:
        make(outer)._call_processor(inner.__new__(inner), TEXT, GPU, {})
    assert raised.value is error
    assert events == ["begin", "end"]
    assert counts() == before


# -- transformers' own processor ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoProcessor

    folder = geometry_mm.write_model(tmp_path_factory.mktemp("model") / "mm", "26b-a4b", 6)
    made = AutoProcessor.from_pretrained(folder)
    assert type(made) is classes()[1]
    return made


def items_of(processor: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """What two pictures become, and the parts that go to the scheduler."""
    from PIL import Image
    from sglang.srt.managers.mm_utils import get_new_expanded_mm_items
    from sglang.srt.managers.schedule_batch import Modality

    kind = type(processor.image_processor)
    with monkeypatch.context() as inside:
        stocks = kind._preprocess

        def on_the_gpu(self: object, *given: Any, **named: Any) -> Any:
            made = stocks(self, *given, **named)
            for name, value in made.items():
                if isinstance(value, torch.Tensor):
                    made[name] = on_gpu(name, values=value)
            return made

        inside.setattr(kind, "_preprocess", on_the_gpu)
        sglangs = make(classes()[0])
        images = [Image.new("RGB", (96, 64), colour) for colour in ("red", "blue")]
        made = sglangs._call_processor(processor, TEXT, GPU, {"images": images})
    sglangs.ATTR_NAME_TO_MODALITY = {
        "pixel_values": Modality.IMAGE,
        "image_position_ids": Modality.IMAGE,
    }
    (item,) = sglangs.collect_mm_items_from_processor_output(made)
    item.offsets = [(0, 1), (2, 3)]
    return made, get_new_expanded_mm_items([item])


def test_what_the_scheduler_gets(processor: Any, monkeypatch: pytest.MonkeyPatch):
    """Of transformers' own processor: stock's numbers, hashes and ids, all of it on the host."""
    before = counts()
    made, items = items_of(processor, monkeypatch)
    assert events == ["begin", "image_position_ids", "pixel_values", "end"]
    assert counts() == before.and_(engaged=1)
    assert not any(getattr(value, "is_cuda", False) for value in made.values())
    ENGINE.revert()
    events.clear()
    expected, theirs = items_of(processor, monkeypatch)
    assert events == ["begin", "pixel_values", "end"]
    left = [name for name, value in expected.items() if getattr(value, "is_cuda", False)]
    assert left == ["image_position_ids"]
    assert list(made) == list(expected)
    assert torch.equal(made["input_ids"], expected["input_ids"])
    assert len(items) == len(theirs) == 2
    for ours, stocks in zip(items, theirs, strict=True):
        sent = pickle.loads(pickle.dumps(ours))
        places = stocks.image_position_ids.as_subclass(torch.Tensor)
        assert torch.equal(sent.image_position_ids, places)
        assert sent.image_position_ids.dtype == places.dtype
        assert torch.equal(sent.feature, stocks.feature)
        for one in (sent, stocks):
            one.set_pad_value()
        assert (sent.hash, sent.pad_value) == (stocks.hash, stocks.pad_value)


def test_the_names_that_it_is_known_by():
    """They are those of the classes that are there; a renamed one would silently run stock's way."""
    import sys

    for unified in (False, True):
        outer, inner = classes(unified)
        assert (outer.__module__, outer.__name__) in patch.KNOWN
        assert (inner.__module__, inner.__name__) in patch.INNER
    from transformers import BatchFeature

    module, name = patch.RESULT
    assert getattr(sys.modules[module], name) is BatchFeature
    assert patch.is_a(SimpleNamespace(), patch.RESULT) is False


def test_the_module_that_it_waits_for():
    """It is in before a model's processor is: that takes its functions from the class that is patched."""
    from gemma4_turbo.instance import PORTS

    port = PORTS[NAME][0]
    assert port.modules == (patch.TARGET.partition(":")[0],)
