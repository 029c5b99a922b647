"""The fused router against stock SGLang's own closure on the GPU: every bit, ties included."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.models.gemma4_causal import Gemma4MoE

from gemma4_turbo.cli import lines
from gemma4_turbo.engine import states
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.kernels import router as kernel
from tests.gpu.lines import patch as patch_of
from tests.router_inputs import KINDS, bits_differ, logits
from tests.runs import unpublished

patch = patch_of("router")
CONSTRUCT = getattr(Gemma4MoE.__init__, "__wrapped__", Gemma4MoE.__init__)
DTYPES = kernel.LOGIT_DTYPES
RANDOM_ROWS = 10_000_000


@pytest.fixture(autouse=True)
def _inference():
    """As in a server, and with memory that was written to before."""
    poison = torch.full((64 << 20,), 0x7B, dtype=torch.uint8, device="cuda")
    del poison
    with torch.no_grad():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(20)


def both(x: torch.Tensor, scale: torch.Tensor, topk: int) -> int:
    """Rows in which fused and stock differ."""
    expected = lines.stock().routing(x, scale, topk)
    return bits_differ(kernel.fused_routing(x, scale, topk), expected)


def random_scale(experts: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(experts, device="cuda", generator=generator) * 2).to(dtype)


@pytest.mark.parametrize("topk", [1, 4, 8])
@pytest.mark.parametrize("experts", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_million_random_rows(dtype, experts, topk, generator):
    """27 cases of this test, three scales each, make ten million rows."""
    rows = -(-RANDOM_ROWS // 81)
    for width in (0.1, 1.0, 10.0):
        x = (torch.randn(rows, experts, device="cuda", generator=generator) * width).to(dtype)
        assert both(x, random_scale(experts, dtype, generator), topk) == 0


@pytest.mark.parametrize("topk", [1, 4, 8])
@pytest.mark.parametrize("experts", [64, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_rows(dtype, kind, experts, topk, generator):
    x = logits(kind, 4000, experts, topk, dtype, generator)
    assert both(x, random_scale(experts, dtype, generator), topk) == 0


@pytest.mark.parametrize("scale_dtype", kernel.SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scale_dtype(dtype, scale_dtype, generator):
    x = logits("few values", 4000, 128, 8, dtype, generator)
    assert both(x, random_scale(128, scale_dtype, generator) * 1e4, 8) == 0
    assert both(x, random_scale(128, scale_dtype, generator) * 1e-4, 8) == 0


@pytest.mark.parametrize("tokens", [1, 2, 7, 65, 799])
@pytest.mark.parametrize(
    ("experts", "topk"),
    [
        *((1, 1), (2, 2), (3, 2), (5, 5), (33, 17), (40, 32), (60, 6), (100, 16), (129, 3)),
        *((257, 31), (299, 8), (300, 8), (512, 8)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(dtype, experts, topk, tokens, generator):
    x = logits("few values", tokens, experts, topk, dtype, generator)
    assert both(x, random_scale(experts, dtype, generator), topk) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_t_below_300_experts(dtype, generator):
    """The bound on E x T: below 300 experts stock takes the one-block path at any T."""
    x = logits("few values", 60_000, 299, 8, dtype, generator)
    assert both(x, random_scale(299, dtype, generator), 8) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_no_rows(dtype, generator):
    x = logits("few values", 500, 256, 8, dtype, generator)
    scale = random_scale(128, dtype, generator)
    assert both(x[:, ::2], scale, 8) == 0
    assert both(x[::3, 5:133], scale, 8) == 0
    assert both(x[:128].t(), scale, 8) == 0
    assert both(x[:0, :128], scale, 8) == 0


def make_run() -> PatchRun:
    return unpublished("router")


def test_replay_of_a_cuda_graph(generator):
    """The patch's routing function, captured, follows new logits and a new scale on replay."""
    patch._verdicts.clear()
    scale = random_scale(128, torch.bfloat16, generator)
    stock = patch.stock_routing(CONSTRUCT, scale)
    run = make_run()
    before = run.counters.engaged
    routing = patch.routing_function(run, stock, scale)
    x = logits("few values", 64, 128, 8, torch.bfloat16, generator)
    routing(x, x, 8, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = routing(x, x, 8, True)
        unproven = routing(x.half(), x.half(), 8, True)  # fp16 was never compared: stock's path
    assert run.engaged_count() - before == 2
    assert "before the capture" in run.full_reason()
    assert unproven[1].dtype == torch.int32
    x.copy_(logits("signed zeros", 64, 128, 8, torch.bfloat16, generator))
    scale.mul_(1.5)  # a weight update while serving
    graph.replay()
    assert bits_differ(out, stock(x, x, 8, True)) == 0
    assert run.engaged_count() - before == 2  # one eager call, one capture; replays run no Python


def test_under_torch_compile(generator):
    """Traced with fullgraph, the fused kernel still runs, and gives stock's bits."""
    scale = random_scale(128, torch.bfloat16, generator)
    stock = patch.stock_routing(CONSTRUCT, scale)
    routing = patch.routing_function(make_run(), stock, scale)
    x = logits("few values", 64, 128, 8, torch.bfloat16, generator)

    from gemma4_turbo.instance import ENGINE

    before = ENGINE.runs["router"].engaged_count()
    compiled = torch.compile(lambda t: routing(t, t, 8, True), fullgraph=True)
    assert bits_differ(compiled(x), stock(x, x, 8, True)) == 0
    assert ENGINE.runs["router"].engaged_count() > before


def test_everything_else_takes_stocks_path(generator):
    """Ineligible calls give stock's result and are counted with their reason."""
    scale = random_scale(128, torch.bfloat16, generator)
    stock = patch.stock_routing(CONSTRUCT, scale)
    run = make_run()
    before = run.counters.engaged
    routing = patch.routing_function(run, stock, scale)
    x = torch.randn(9, 128, dtype=torch.float64, device="cuda", generator=generator)
    assert bits_differ(routing(x, x, 8, True), stock(x, x, 8, True)) == 0
    assert run.counters.engaged == before
    assert "float64" in run.full_reason()


def test_self_check_sees_one_wrong_row(monkeypatch, generator):
    """A kernel that is off in one row of 512 keeps the patch out, with a reason."""
    scale = random_scale(128, torch.bfloat16, generator)
    stock = patch.stock_routing(CONSTRUCT, scale)
    assert patch._compare(stock, scale, torch.bfloat16, 8) is None
    right = kernel.launch_routing

    def wrong(*args):
        weights, ids = right(*args)
        ids[17] = ids[17].flip(0)
        return weights, ids

    monkeypatch.setattr(kernel, "launch_routing", wrong)
    patch._verdicts.clear()
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    moe = SimpleNamespace(
        per_expert_scale=scale,
        topk=SimpleNamespace(
            topk_config=SimpleNamespace(custom_routing_function=stock, top_k=8, output_format=None)
        ),
    )
    stock.__qualname__ = "Gemma4MoE.__init__.<locals>.routing_function"
    run = make_run()
    patch._take_over(run, moe)
    patch._verdicts.clear()
    assert run.state == states.FAILED
    assert "1 of 512 rows of torch.bfloat16 logits differ" in run.reason
    assert moe.topk.topk_config.custom_routing_function is stock
