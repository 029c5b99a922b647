"""A batch of SGLang's own, as far as layers read it."""

from __future__ import annotations

import dataclasses
from typing import Any


def prefill(**fields: Any) -> Any:
    """Of one prompt; what no layer reads is None."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    required = {
        field.name: None
        for field in dataclasses.fields(ForwardBatch)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    given: Any = {**required, "forward_mode": ForwardMode.EXTEND, "batch_size": 1, **fields}
    return ForwardBatch(**given)
