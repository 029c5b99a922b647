"""CUDA graph captures in a running server: which servers have none, and what one that failed leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def argument_unfit(arguments: Any, reasons: Mapping[str, str]) -> str | None:
    """What the first of the server's arguments that is set among ``reasons`` means there, or None."""
    return next((reason for name, reason in reasons.items() if getattr(arguments, name)), None)


@contextlib.contextmanager
def recording(graph: Any, pool: Any = None) -> Iterator[None]:
    """What runs on the GPU inside goes into ``graph``, its tensors into ``pool`` or memory of its own."""
    # The outer one puts the stream back where `torch.cuda.graph` fails to. The server's other
    # threads may do on the GPU what this one may not now.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        yield


def settle() -> None:
    """Let the GPU's random generator know that nothing is recorded any more. Without a GPU, nothing.

    Where CUDA itself breaks a capture off (something in it waited for the GPU), PyTorch leaves the
    generator as during one, and the next random number raises: that would be a sampler's. A capture
    that succeeds puts it right, so a single fill is recorded and thrown away. Should that fail too,
    the first failure is what is to be told.
    """
    if not torch.cuda.is_available():
        return
    with contextlib.suppress(RuntimeError), recording(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
