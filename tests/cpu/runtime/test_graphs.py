"""After a capture that failed a second one follows, which succeeds; with stand-ins for CUDA's."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest
import torch

from gemma4_turbo.ports.any.prefill import yoco_graph
from gemma4_turbo.runtime import graphs


class Cuda:
    """Captures: what went into each, and which of them CUDA breaks off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...]) -> None:
        self.begun = 0
        self.generator_captures = False
        self.broken = broken
        zeros = torch.zeros
        for name, fake in (
            ("is_available", lambda: True),
            ("current_stream", lambda: None),
            ("stream", contextlib.nullcontext),
            ("CUDAGraph", lambda: None),
            ("graph", self.graph),
        ):
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))

    @contextlib.contextmanager
    def graph(
        self, graph: object, pool: object = None, capture_error_mode: str = ""
    ) -> Iterator[None]:
        """As PyTorch's, whose generator is told of the end only if there is one."""
        assert capture_error_mode == "thread_local"
        number, self.begun = self.begun, self.begun + 1
        self.generator_captures = True
        yield
        if number in self.broken:
            raise RuntimeError(f"capture {number} was invalidated")
        self.generator_captures = False


def layers() -> torch.Tensor:
    return torch.ones(1)


def test_the_generator_is_told(monkeypatch: pytest.MonkeyPatch):
    cuda = Cuda(monkeypatch, broken=(0,))
    with pytest.raises(RuntimeError, match="capture 0"):
        yoco_graph.CudaGraph(layers, None)
    assert (cuda.begun, cuda.generator_captures) == (2, False)
    assert gc.isenabled()


def test_the_first_failure_is_told(monkeypatch: pytest.MonkeyPatch):
    cuda = Cuda(monkeypatch, broken=(0, 1))
    with pytest.raises(RuntimeError, match="capture 0"):
        yoco_graph.CudaGraph(layers, None)
    assert cuda.begun == 2


def test_without_a_gpu_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    cuda = Cuda(monkeypatch, broken=())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    graphs.settle()
    assert cuda.begun == 0
