"""A chain of the package's kernels in a CUDA graph: the same bits with and without dependent launch."""

from __future__ import annotations

import pytest
import torch

from gemma4_turbo.kernels import pdl, qkv, skinny_gemm
from gemma4_turbo.kernels.norms import layer_norms, ple_tail
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.skinny_gemm import Epilogue

EPS = 1e-6
WIDTH, MLP, LAYERS = 2560, 4096, 24


class Chain:
    """Layers that feed each other, every kernel reading what the one before it wrote."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator("cuda").manual_seed(rows)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", generator=generator)

        self.x = randn(rows, WIDTH).bfloat16()
        self.norm = (randn(WIDTH).tanh() + 1.5).bfloat16()
        self.head = (randn(256).tanh() + 1.5).bfloat16()
        self.up = (randn(2 * MLP, WIDTH) / WIDTH**0.5).bfloat16()
        self.down = (randn(WIDTH, MLP) / MLP**0.5).bfloat16()
        self.gate = (randn(256, WIDTH) / WIDTH**0.5).bfloat16()
        self.back = (randn(WIDTH, 256) / 16).bfloat16()
        self.extra = randn(rows, 256).bfloat16()
        self.one = torch.ones(1, device="cuda", dtype=torch.bfloat16)
        self.arrived = [torch.zeros(512, dtype=torch.int32, device="cuda") for _ in range(4)]

    def product(
        self, x: torch.Tensor, weight: torch.Tensor, place: int, kind: Epilogue
    ) -> torch.Tensor:
        config = skinny_gemm.choose(weight.shape, kind, 132)
        extra = self.extra if kind == Epilogue.GELU_TIMES else None
        return skinny_gemm.launch_skinny_gemm(x, weight, config, kind, extra, self.arrived[place])

    def __call__(self) -> torch.Tensor:
        x, kind = self.x.clone(), norms.Kind.CUTE
        for _ in range(LAYERS):
            residual = x.clone()
            turned, _, _ = qkv.launch_qkv(
                x.clone(), None, None, self.head, None, EPS, 256, None, None
            )
            hidden, _, _ = layer_norms.launch_layer_norms(
                turned, residual, self.norm, EPS, self.norm, EPS, None, kind
            )
            hidden = self.product(hidden, self.up, 0, Epilogue.GELU_AND_MUL)
            hidden = self.product(hidden, self.down, 1, Epilogue.NONE)
            out, _ = ple_tail.launch_norm_add(
                hidden, self.norm, EPS, residual, None, None, 0.0, kind
            )
            gated = self.product(out, self.gate, 2, Epilogue.GELU_TIMES)
            back = self.product(gated, self.back, 3, Epilogue.NONE)
            x, _ = ple_tail.launch_norm_add(
                back, self.norm, EPS, out, self.one, self.norm, EPS, kind
            )
        return x


def replayed(chain: Chain, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    monkeypatch.setattr(pdl, "wanted", wanted)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain()
        found = []
        for _ in range(20):
            graph.replay()
            found.append(out.clone())
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("rows", [1, 8, 33])
def test_the_same_bits(rows, monkeypatch):
    chain = Chain(rows)
    usual = replayed(chain, False, monkeypatch)
    early = replayed(chain, True, monkeypatch)
    assert bool(usual[0].isfinite().all())
    for found in usual + early:
        assert torch.equal(found.view(torch.int16), usual[0].view(torch.int16))
