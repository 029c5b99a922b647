"""`yoco_graph.CudaGraph` on the GPU: what it records, what it leaves behind where it cannot record."""

from __future__ import annotations

import gc

import pytest
import torch

from gemma4_turbo.ports.any.prefill import yoco_graph
from tests.gpu.lines import need

need("yoco_graph")


def test_replays_read_the_buffers_and_share_memory():
    weight = torch.randn(64, 64, device="cuda")
    x = torch.zeros(4, 64, device="cuda")

    def layers(rows: int) -> torch.Tensor:
        return torch.relu(x[:rows] @ weight) @ weight

    layers(4), layers(2)  # cuBLAS makes its workspace
    four = yoco_graph.CudaGraph(lambda: layers(4), None)
    two = yoco_graph.CudaGraph(lambda: layers(2), four.pool)
    assert two.pool == four.pool
    assert gc.isenabled()
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        for graph, rows in ((four, 4), (two, 2)):
            found = graph.replay().clone()
            assert torch.equal(found, layers(rows))
    weight.mul_(2)  # written over in place: the graph reads it
    assert torch.equal(four.replay(), layers(4))


@pytest.mark.parametrize("wrong", ["python", "synchronise"])
def test_a_failure_leaves_nothing_recording(wrong: str):
    x = torch.ones(4, device="cuda")

    def layers() -> torch.Tensor:
        if wrong == "python":
            raise ValueError("no")
        return x * float(x.sum())  # waits for the GPU, which a recorded stream cannot

    stream = torch.cuda.current_stream()
    with pytest.raises((ValueError, RuntimeError)):
        yoco_graph.CudaGraph(layers, None)
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    assert gc.isenabled()
    assert float((x + torch.rand(4, device="cuda")).min()) >= 1
    assert torch.equal(yoco_graph.CudaGraph(lambda: x * 2, None).replay(), x * 2)
