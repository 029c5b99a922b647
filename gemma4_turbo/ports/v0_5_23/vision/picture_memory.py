"""`picture_memory`: what the image processor returns leaves the memory pool of its call before that ends.

Stock runs each call of the image processor in a CUDA memory pool of its own, and gives the pool up when
the call is over. Pixel values go to the host inside; Gemma 4's processor also returns their positions, on
the GPU. A pool that is given up returns all but the segments in which something still lives, 2 MiB for
each call, and nobody allocates from them again: the process with the image processor grows with every
request that has pictures.

So the processor's other tensors go to the host with the pixel values, on the conditions on which stock
moves those: the same numbers, which are copied to the model's device there where they are read.

Nothing of stock's function is gone round. It calls a stand-in for the processor, which calls the
processor and moves what that returned.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.sglang_types import is_a
from gemma4_turbo.runtime.attempts import one_line
from gemma4_turbo.runtime.fallback import DeclinedError

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.v0_5_23.protocols import MultimodalProcessor

_BASE = "sglang.srt.multimodal.processors.base_processor"
TARGET = f"{_BASE}:BaseMultimodalProcessor._call_processor"
CALL = "_call_processor"
POOL = "_temporary_fast_processor_cuda_pool"

BETWEEN = (
    *("process_mm_data", "process_mm_data_async", "_process_and_collect_mm_items"),
    *("collect_mm_items_from_processor_output", "process_and_combine_mm_data"),
    "process_and_combine_mm_data_async",
)
"""From the call to what is sent to the model: a wrapper there may count on a GPU."""
KNOWN = (
    ("sglang.srt.multimodal.processors.gemma4", "Gemma4SGLangProcessor"),
    ("sglang.srt.multimodal.processors.gemma4_unified", "Gemma4UnifiedSGLangProcessor"),
)
"""SGLang's processors of Gemma 4. Any other, a subclass of theirs included, runs stock's way."""
INNER = (
    ("transformers.models.gemma4.processing_gemma4", "Gemma4Processor"),
    ("transformers.models.gemma4_unified.processing_gemma4_unified", "Gemma4UnifiedProcessor"),
)
"""Those that they call: of transformers'."""
RESULT = ("transformers.feature_extraction_utils", "BatchFeature")
MOVED = frozenset({"image_position_ids", "video_position_ids", "input_features_mask"})
"""What Gemma 4's models copy to their device where they read it."""


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Stock's call, of a stand-in for a processor whose results are known."""
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    call = stock[TARGET]
    pool = vars(BaseMultimodalProcessor)[POOL]

    def _call_processor(
        self: MultimodalProcessor,
        processor: object,
        input_text: object,
        processor_device: str | None,
        kwargs: dict[str, Any],
    ) -> object:
        try:
            reason = unfit(self, processor, processor_device, _call_processor, pool)
            if reason is None:
                processor = StandIn(run, processor, frozenset(self.FEATURE_NAMES))
        except Exception as error:  # stock's call is always there
            reason = one_line(error)
        if reason is not None:
            run.declined(reason)
        return call(self, processor, input_text, processor_device, kwargs)

    return {TARGET: _call_processor}


def unfit(
    sglangs: MultimodalProcessor,
    processor: Any,
    device: str | None,
    ours: Callable[..., Any],
    pool: object,
) -> str | None:
    """Why a call is stock's, or None.

    Args:
        sglangs: SGLang's processor.
        processor: that it calls, transformers'.
        device: on which that works, None if it has no choice.
        ours: what replaces ``_call_processor``.
        pool: stock's function that makes the pool.
    """
    if not any(is_a(sglangs, known) for known in KNOWN):
        return f"the multimodal processor is a {type(sglangs).__name__}"
    if not any(is_a(processor, known) for known in INNER):
        return f"the model's processor is a {type(processor).__name__}"
    own = vars(sglangs)
    for name, known in ((CALL, ours), (POOL, pool)):
        if name in own or getattr(type(sglangs), name) is not known:
            return f"{name} was wrapped"
    for name in BETWEEN:
        if name in own or not written_in("sglang", getattr(type(sglangs), name)):
            return f"{name} was wrapped"
    if "__call__" in vars(processor) or not written_in("transformers", type(processor).__call__):
        return "the model's processor was wrapped"
    if device is None or torch.device(device).type != "cuda":
        return f"pictures are processed on {device or 'the CPU'}, in no memory pool"
    if sglangs.keep_mm_features_on_device or sglangs.precompute_hash_before_cpu_transfer:
        return "pixel values stay on the GPU"
    return None


def written_in(package: str, function: object) -> bool:
    """Whether a function's code is the package's own, whichever class or mixin it comes from."""
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    path = os.path.realpath(code.co_filename)
    folders = [os.path.realpath(folder) for folder in sys.modules[package].__path__]
    return any(path.startswith(folder + os.sep) for folder in folders)


class StandIn:
    """A processor for one call, whose result holds nothing on the GPU but what stock moves itself."""

    def __init__(self, run: PatchRun, processor: Any, features: Collection[str]) -> None:
        """``features``: names of what stock moves."""
        self._run = run
        self._processor = processor
        self._features = features

    def __call__(self, **kwargs: Any) -> Any:
        """The processor's result, some of it moved; as it is where that goes wrong."""
        result = self._processor.__call__(**kwargs)
        try:
            if is_a(result, RESULT):
                if move(result.data, self._features):
                    self._run.engaged(False)
                else:
                    self._run.declined("nothing but pixel values was on a GPU")
            else:
                self._run.declined(f"the model's processor returned a {type(result).__name__}")
        except DeclinedError as declined:
            self._run.declined(str(declined))
        except Exception as error:
            self._run.declined(f"what it returned was not moved: {one_line(error)}")
        return result


def move(data: dict[str, Any], features: Collection[str]) -> bool:
    """CUDA tensors to the host, all of them or, where one cannot be moved, none. Whether there were any.

    Raises:
        DeclinedError: for one whose reader is not known: it may count on a GPU.
    """
    found = {name: on_host(value) for name, value in list(data.items()) if name not in features}
    moved = {name: value for name, value in found.items() if value is not data[name]}
    strange = sorted(moved.keys() - MOVED)
    if strange:
        raise DeclinedError(f"the model's processor returned {', '.join(strange)} on a GPU")
    data.update(moved)
    return bool(moved)


def on_host(value: Any) -> Any:
    """``value`` with what it holds on a GPU on the host; the very object where that is nothing."""
    if isinstance(value, torch.Tensor):
        return value.to("cpu") if value.is_cuda else value
    if type(value) in (list, tuple):
        parts = [on_host(part) for part in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    if type(value) is dict:
        held = {key: on_host(part) for key, part in value.items()}
        return value if all(held[key] is value[key] for key in held) else held
    return value
