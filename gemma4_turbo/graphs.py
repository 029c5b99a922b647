"""What a CUDA graph capture that failed leaves behind."""

from __future__ import annotations

import contextlib

import torch


def settle() -> None:
    """Let the GPU's random generator know that nothing is recorded any more. Without a GPU, nothing.

    Where CUDA itself breaks a capture off (something in it waited for the GPU), PyTorch leaves the
    generator as during one, and the next random number raises: that would be a sampler's. A capture
    that succeeds puts it right, so a single fill is recorded and thrown away. Should that fail too,
    the first failure is what is to be told.
    """
    if not torch.cuda.is_available():
        return
    with (
        contextlib.suppress(RuntimeError),
        # The outer one puts the stream back where `torch.cuda.graph` fails to.
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device="cuda")
