"""The alignment kernel against stock SGLang's function on the GPU, and the experts' output."""

from __future__ import annotations

import inspect

import pytest
import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.engine import states
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.kernels import moe_align as kernel
from gemma4_turbo.ports.any.experts import moe_align as shared
from gemma4_turbo.runtime.verdicts import Verdicts
from tests.gpu.lines import give_arguments
from tests.gpu.lines import patch as patch_of
from tests.runs import unpublished

patch = patch_of("moe_align")
MULTIPLE = lines.align_multiple()
# So few slots stock itself aligns in one launch, of so many experts: the patch leaves them to it.
OWN_SLOTS, OWN_EXPERTS = lines.slots_of_stocks(), lines.experts_of_stocks()

FUSED_MOE = lines.stock().experts_module()
STOCK = inspect.unwrap(FUSED_MOE.moe_align_block_size)  # with all that its signature has

POISON = -77_777
GUARD = 64
SIZES = (1, 7, 8, 31, 32, 33, 64, 65, 127, 128, 129, 136, 255, 256, 257, 500, 511, 512)


@pytest.fixture(autouse=True)
def _inference():
    """As in a server, and with memory that was written to before."""
    poison = torch.full((64 << 20,), 0x7B, dtype=torch.uint8, device="cuda")
    del poison
    with torch.no_grad():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(21)


def stocks(topk_ids: torch.Tensor, block: int, experts: int) -> kernel.Alignment:
    """Stock's result. Its own launch for few slots leaves out N behind the last block, which nobody reads."""
    found: kernel.Alignment = STOCK(topk_ids, block, experts)
    if 0 < topk_ids.numel() <= OWN_SLOTS and experts >= OWN_EXPERTS:
        found[0][int(found[2]) :] = topk_ids.numel()
    return found


def check(topk_ids: torch.Tensor, block: int, experts: int) -> None:
    """Against stock, in poisoned buffers with guards, twice: the slots' order is always the same."""
    capacity = kernel.padded_capacity(topk_ids.numel(), block, experts, MULTIPLE)
    lengths = (capacity, -(-capacity // block), 1)
    results = []
    for poison in (POISON, 0):
        storage = [
            torch.full((length + 2 * GUARD,), poison, dtype=torch.int32, device="cuda")
            for length in lengths
        ]
        outputs = tuple(whole[GUARD:-GUARD] for whole in storage)
        kernel.align_into(topk_ids, block, experts, *outputs)
        for whole in storage:
            assert (whole[:GUARD] == poison).all()
            assert (whole[-GUARD:] == poison).all()
        blocks = int(outputs[2]) // block
        assert (outputs[1][blocks:] == poison).all()
        results.append(outputs)
    assert torch.equal(results[0][0], results[1][0])
    expected = stocks(topk_ids, block, experts)
    assert kernel.difference(results[0], expected, block) is None
    reference = kernel.reference_align(topk_ids, block, experts, MULTIPLE)
    assert torch.equal(results[0][0], reference[0])


@pytest.mark.parametrize(
    ("experts", "block"),
    [
        *((128, block) for block in (1, 8, 16, 32, 48, 64, 128)),
        *((experts, 16) for experts in (1, 2, 60, 63, 64, 100, 256, 511, 512)),
        *((experts, 64) for experts in (64, 100, 256)),
    ],
)
def test_against_stock(experts, block, generator):
    """Every kind of batch; below 64 experts stock runs another kernel."""
    for slots in SIZES:
        for _, topk_ids in shared.samples(slots, experts, generator):
            check(topk_ids, block, experts)


@pytest.mark.parametrize("topk", range(1, 9))
def test_every_topk(topk, generator):
    """Distinct experts for each token, as a router gives them."""
    for tokens in (1, 2, 3, 8, 15, 16, 17, 32, 64):
        scores = torch.rand(tokens, 128, device="cuda", generator=generator)
        check(scores.topk(topk)[1].int(), 16, 128)


def test_extremes():
    for count in (1, 15, 16, 17, 32, 33, 512):
        for expert in (-1, 0, 127):
            check(torch.full((count, 1), expert, dtype=torch.int32, device="cuda"), 16, 128)
    for experts in (64, 128, 512):
        ids = torch.arange(experts, dtype=torch.int32, device="cuda")
        check(ids.reshape(-1, 1), 16, experts)
        check(ids.flip(0).reshape(-1, 1).contiguous(), 64, experts)


def test_no_tokens():
    """Stock launches an empty grid here; ours says that there is no block."""
    ids = torch.empty((0, 8), dtype=torch.int32, device="cuda")
    sorted_token_ids, expert_ids, post_pad = kernel.moe_align(ids, 16, 128)
    assert (sorted_token_ids.numel(), expert_ids.numel(), post_pad.tolist()) == (0, 0, [0])


def test_always_the_same(generator):
    """A race between the fill and the slots' stores would show here."""
    for slots in (8, 64, 128, 256, 512):
        ids = torch.randint(
            0, 128, (slots, 1), generator=generator, device="cuda", dtype=torch.int32
        )
        for block in (16, 128):
            expected = kernel.reference_align(ids, block, 128)[0]
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(2000):
                wrong += (kernel.launch_align(ids, block, 128)[0] != expected).sum()
            assert int(wrong) == 0


def make_run() -> PatchRun:
    return unpublished("moe_align")


def replacement(run: PatchRun):
    return patch.build(run, {patch.TARGET: STOCK})[patch.TARGET]


@pytest.fixture
def proven_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been compared with stock yet."""
    monkeypatch.setattr(shared, "_verdicts", Verdicts())


def test_replay_of_a_cuda_graph(proven_anew, generator):
    """The patch's function, captured, follows new ids on replay."""
    run = make_run()
    align = replacement(run)
    ids = torch.randint(0, 128, (32, 8), generator=generator, device="cuda", dtype=torch.int32)
    before = run.counters.engaged
    align(ids, 16, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = align(ids, 16, 128)
        unproven = align(ids, 32, 128)  # this block size was never compared: stock's path
    assert run.engaged_count() - before == 2
    assert "before the capture" in run.full_reason()
    for low, high in ((0, 128), (5, 6), (-1, 3)):
        ids.random_(low, high, generator=generator)
        graph.replay()
        assert kernel.difference(out, STOCK(ids, 16, 128), 16) is None
        assert kernel.difference(unproven, STOCK(ids, 32, 128), 32) is None
    assert run.engaged_count() - before == 2


def test_everything_else_takes_stocks_path(proven_anew, generator):
    run = make_run()
    align = replacement(run)
    before = run.counters.engaged
    many = torch.randint(0, 128, (65, 8), generator=generator, device="cuda", dtype=torch.int32)
    for ids in (many, many[: OWN_SLOTS // 8 + 4].long()):
        assert kernel.difference(align(ids, 16, 128), STOCK(ids, 16, 128), 16) is None
    assert run.counters.engaged == before
    assert "at most 512" in run.full_reason()


def test_self_check_sees_one_wrong_slot(proven_anew, monkeypatch, generator):
    """A kernel that puts one slot elsewhere keeps the patch out, with a reason."""
    tokens = max(8, OWN_SLOTS // 8 + 1)
    ids = torch.randint(0, 128, (tokens, 8), generator=generator, device="cuda", dtype=torch.int32)
    right = kernel.launch_align

    def wrong(*args):
        sorted_token_ids, expert_ids, post_pad = right(*args)
        sorted_token_ids[0] = sorted_token_ids[int(post_pad) - 1]
        return sorted_token_ids, expert_ids, post_pad

    run = make_run()
    monkeypatch.setattr(kernel, "launch_align", wrong)
    got = replacement(run)(ids, 16, 128)
    assert kernel.difference(got, STOCK(ids, 16, 128), 16) is None
    assert run.state == states.FAILED
    assert "an expert's slots differ" in run.reason


@pytest.fixture
def global_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    give_arguments(monkeypatch)


@pytest.mark.parametrize("skewed", [False, True], ids=["any expert", "few experts"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 32, 33, 64])
def test_output_of_the_experts(
    proven_anew, global_arguments, monkeypatch, generator, tokens, skewed
):
    """A whole fused_experts call, bf16, 26B-A4B's geometry but narrower: every bit of stock's."""
    experts, topk, hidden, width = 128, 8, 512, 256

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, device="cuda", generator=generator, dtype=torch.float32)
        return (made / shape[-1] ** 0.5).bfloat16()

    w1, w2 = normal(experts, 2 * width, hidden), normal(experts, hidden, width)
    x = normal(tokens, hidden) * hidden**0.5
    scores = torch.rand(tokens, experts, device="cuda", generator=generator)
    if skewed:  # every token on the same eight or nine experts: blocks fill up
        scores[:, 40:49] += 1
    weights, ids = scores.softmax(dim=-1).topk(topk)

    def run_experts() -> torch.Tensor:
        return lines.stock().fused_experts(x, w1, w2, weights.float(), ids.int())

    monkeypatch.setattr(FUSED_MOE, "moe_align_block_size", STOCK)
    expected = run_experts()
    run = make_run()
    before = run.counters.engaged
    monkeypatch.setattr(FUSED_MOE, "moe_align_block_size", replacement(run))
    got = run_experts()
    assert (run.engaged_count() > before) == (tokens * topk > OWN_SLOTS)
    assert expected.isfinite().all()
    assert torch.equal(got, expected)
