"""The step prologue against SGLang's own methods on the GPU, every bit, at the sizes of E2B and E4B."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.models.gemma4_causal import Gemma4TextModel
from sglang.srt.models.gemma4_mm import Gemma4ForConditionalGeneration

from gemma4_turbo.cli import lines
from gemma4_turbo.engine import states
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import step_prologue as kernel
from gemma4_turbo.kernels.norms.rmsnorm import Kind
from gemma4_turbo.ports.any.decode_step import step_prologue as patch
from gemma4_turbo.ports.any.stock import Embedding, Projection, text_model
from tests.gpu.lines import patch as patch_of
from tests.runs import unpublished

line = patch_of("step_prologue")

STOCK_GATHER = Gemma4TextModel.get_per_layer_inputs
STOCK_PROJECT = Gemma4TextModel.project_per_layer_inputs
STOCK_FORWARD = Gemma4ForConditionalGeneration.forward

LAYERS = pytest.mark.parametrize("layers", [35, 42], ids=["E2B", "E4B"])
TOKENS = pytest.mark.parametrize("tokens", [0, 1, 7, 32, 64, 257, 4096])
DTYPES = pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
ROWS, VOCAB = 1024, 1000
IMAGE, VIDEO, AUDIO, PAD = 1001, 1002, 7, 3
STEP = 257  # tokens of a whole forward


@pytest.fixture(autouse=True)
def _inference():
    """As in a server, and with memory that was written to before."""
    poison = torch.full((256 << 20,), 0x7B, dtype=torch.uint8, device="cuda")
    del poison
    with torch.no_grad():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(20)


def make_run() -> PatchRun:
    return unpublished("step_prologue")


def replaced(run: PatchRun) -> dict[str, Any]:
    """Stock's three methods as the line replaces them."""
    stock = {
        patch.FORWARD: STOCK_FORWARD,
        patch.GATHER: STOCK_GATHER,
        patch.PROJECT: STOCK_PROJECT,
    }
    built: dict[str, Any] = line.build(run, stock)
    return built


def bits_differ(a: torch.Tensor, b: torch.Tensor) -> int:
    """Elements with different bits, NaN and the sign of zero included."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return int((a.view(torch.int16) != b.view(torch.int16)).sum())


def ids_of(generator: torch.Generator, tokens: int) -> torch.Tensor:
    """In range, out of range on both sides, and placeholders."""
    return torch.randint(-50, ROWS + 50, (tokens,), generator=generator, device="cuda")


def model(
    generator: torch.Generator, layers: int, dtype: torch.dtype = torch.bfloat16
) -> SimpleNamespace:
    """What the two methods read of a Gemma4TextModel; the GEMM hands its input on."""
    table = torch.randn(ROWS, layers * 256, generator=generator, device="cuda")
    embedding = Embedding(patch.odd_rows(table).to(dtype), 256**0.5, VOCAB)
    _, scale, weight, eps, _, input_scale = patch.project_inputs(generator, dtype, 1, 10)
    made: SimpleNamespace = text_model(
        layers, 256, embedding, Projection(scale, weight, eps, input_scale)
    )
    return made


def projection_of(
    generator: torch.Generator, tokens: int, layers: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A GEMM's output and per-layer inputs, odd rows in both."""
    made = patch.project_inputs(generator, dtype, max(tokens, 1), layers)
    inputs = torch.randn(max(tokens, 1) * layers, 256, generator=generator, device="cuda")
    inputs = patch.odd_rows(inputs.flip(0)).to(dtype).reshape(-1, layers, 256)
    return made[0][:tokens], inputs[:tokens].contiguous()


# -- bits ------------------------------------------------------------------------------------------------


@TOKENS
@LAYERS
@DTYPES
def test_gather(dtype, layers, tokens, generator):
    """Subnormals, infinities and NaN in the table; ids of both widths."""
    text = model(generator, layers, dtype)
    gather = replaced(make_run())[patch.GATHER]
    for ids in (ids_of(generator, tokens), ids_of(generator, 2 * tokens).int()[::2]):
        assert bits_differ(gather(text, ids), STOCK_GATHER(text, ids)) == 0


@LAYERS
def test_gather_of_the_whole_vocabulary(layers, generator):
    """More elements than 32 bits can count."""
    text = model(generator, layers)
    vocab = 262_144
    table = torch.empty(vocab, layers * 256, dtype=torch.bfloat16, device="cuda")
    table.normal_(generator=generator)
    text.embed_tokens_per_layer.weight = torch.nn.Parameter(table)
    text.vocab_size_per_layer_input = vocab
    ids = torch.cat([torch.tensor([vocab - 1, vocab, -1], device="cuda"), ids_of(generator, 9)])
    ids[5:] = ids[5:].abs() * 240
    gather = replaced(make_run())[patch.GATHER]
    assert bits_differ(gather(text, ids), STOCK_GATHER(text, ids)) == 0


@TOKENS
@LAYERS
@DTYPES
def test_project(dtype, layers, tokens, generator):
    """Odd rows and weights; with per-layer inputs and without."""
    text = model(generator, layers, dtype)
    run = make_run()
    project = replaced(run)[patch.PROJECT]
    projection, inputs = projection_of(generator, tokens, layers, dtype)
    for given in ((projection, inputs), (projection, None)):
        before = run.counters.engaged
        assert bits_differ(project(text, *given), STOCK_PROJECT(text, *given)) == 0
        assert run.counters.engaged == before + 1, run.full_reason()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@DTYPES
def test_fifty_million_numbers(dtype, size, generator):
    """The orders of the sum differ in one of a million: enough of them to see it."""
    text = model(generator, 42, dtype)
    project = replaced(make_run())[patch.PROJECT]
    for _ in range(5):
        projection = torch.randn(1024, 42 * 256, generator=generator, device="cuda") * size
        projection = projection.to(dtype)
        assert bits_differ(project(text, projection), STOCK_PROJECT(text, projection)) == 0


@DTYPES
def test_a_traced_norm(dtype, generator):
    """What SGLang's RMSNorm comes to under Dynamo, which may be another kernel than in eager."""
    arguments = patch.project_inputs(generator, dtype, 4096, 42)
    kind, unfit = patch.norm_kind(make_run(), arguments[0], True, False)
    assert unfit is None
    expected = kernel.reference_project(patch._traced_rms_norm(), *arguments)
    assert bits_differ(kernel.project_per_layer(*arguments, kind=kind), expected) == 0


def test_which_norm_stock_runs(generator, record_property):
    """For the log: nothing here depends on it."""
    for traced in (False, True):
        like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
        kind, unfit = patch.norm_kind(make_run(), like, traced, False)
        assert unfit is None
        name = Kind(kind).name
        record_property("traced" if traced else "eager", name)
        print(f"{'traced' if traced else 'eager'} RMSNorm: {name}")


@LAYERS
@DTYPES
def test_project_is_near_fp64(dtype, layers, generator):
    """From the scaled projection, which stock stores, on: three roundings, so with u = eps / 2
    an error of at most (|y| + |y + p|) u s + |out| u, and 1 % for fp32's share of it."""
    run = make_run()
    projection = torch.randn(257, layers * 256, generator=generator, device="cuda").to(dtype)
    _, scale, weight, eps, inputs, input_scale = patch.project_inputs(generator, dtype, 257, layers)
    inputs = inputs.clamp(-64, 64)
    kind, unfit = patch.norm_kind(run, projection, False, False)
    assert unfit is None
    got = kernel.project_per_layer(
        projection, scale, weight, eps, inputs, input_scale, kind=kind
    ).double()
    x = (projection * scale).double().reshape(257, layers, 256)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()
    total, s, u = y + inputs.double(), input_scale.double(), torch.finfo(dtype).eps / 2
    bound = 1.01 * ((y.abs() + total.abs()) * u * s + (total * s).abs() * u)
    # A subnormal's spacing, and what a norm that flushes fp32's subnormals leaves out.
    bound += 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound += 2 * torch.finfo(torch.float32).tiny
    assert bool(((got - total * s).abs() <= bound).all())


# -- the patch ---------------------------------------------------------------------------------------------


def test_replay_of_a_cuda_graph(generator):
    """New ids, activations and weights reach a captured prologue; an unproven dtype is declined."""
    patch._verdicts.clear()
    run = make_run()
    text = model(generator, 35)
    gather = replaced(run)[patch.GATHER]
    project = replaced(run)[patch.PROJECT]
    ids = ids_of(generator, 64)
    projection, _ = projection_of(generator, 64, 35, torch.bfloat16)
    half = model(generator, 35, torch.float16)
    before = run.counters.engaged
    project(text, projection, gather(text, ids))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = project(text, projection, gather(text, ids))
        gather(half, ids)  # fp16 was never compared: stock's path
    assert run.counters.engaged - before == 4
    assert "before the capture" in run.full_reason()
    ids.copy_(ids_of(generator, 64))
    projection.copy_(projection_of(generator, 64, 35, torch.bfloat16)[0] * 0.5)
    text.embed_tokens_per_layer.weight.mul_(1.5)
    text.per_layer_projection_norm.weight.mul_(1.5)
    graph.replay()
    expected = STOCK_PROJECT(text, projection, STOCK_GATHER(text, ids))
    assert bits_differ(out, expected) == 0


def test_under_torch_compile(generator, monkeypatch):
    """Traced with fullgraph: the kernels run, with the bits that stock has when it is traced."""
    torch._dynamo.reset()
    run = make_run()
    text = model(generator, 35)
    gather = replaced(run)[patch.GATHER]
    project = replaced(run)[patch.PROJECT]
    ids = ids_of(generator, 64)
    projection, _ = projection_of(generator, 64, 35, torch.bfloat16)

    project(text, projection, gather(text, ids))  # as in a server: a step ran before

    def prologue(token_ids: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
        return project(text, activations, gather(text, token_ids))

    counters = ENGINE.runs[
        "step_prologue"
    ].counters  # not from 0: other tests of this process count
    before = counters.engaged
    compiled = torch.compile(prologue, fullgraph=True)
    got = compiled(ids, projection)
    assert counters.engaged == before + 2
    expected = kernel.reference_project(
        patch._traced_rms_norm(),
        projection,
        text.per_layer_projection_scale,
        text.per_layer_projection_norm.weight,
        text.per_layer_projection_norm.variance_epsilon,
        STOCK_GATHER(text, ids),
        text.per_layer_input_scale,
    )
    assert bits_differ(got, expected) == 0
    assert torch._dynamo.explain(prologue)(ids, projection).graph_break_count == 0
    for name in ("launch_gather", "launch_project"):
        with monkeypatch.context() as patched:
            right = getattr(kernel, name)
            patched.setattr(kernel, name, lambda *a, right=right: right(*a) * 3)
            assert bits_differ(compiled(ids, projection), expected) > 0


def launches(call: Any) -> int:
    """Kernels, copies and fills that one call puts on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profile.events())


def test_launches(generator):
    """Beside the GEMM: 7 and 4 in stock, one and one here."""
    text = model(generator, 35)
    ids = ids_of(generator, 32)
    projection, inputs = projection_of(generator, 32, 35, torch.bfloat16)
    gather = replaced(make_run())[patch.GATHER]
    project = replaced(make_run())[patch.PROJECT]
    assert launches(lambda: gather(text, ids)) == 1
    assert launches(lambda: project(text, projection, inputs)) == 1
    assert launches(lambda: STOCK_GATHER(text, ids)) == 7
    assert launches(lambda: STOCK_PROJECT(text, projection, inputs)) == 4


def multimodal(generator: torch.Generator, ple: bool) -> Any:
    """Stock's class with what its forward reads; its language model hands its inputs on."""
    received = model(generator, 35) if ple else SimpleNamespace(embed_tokens_per_layer=None)
    table = torch.randn(ROWS + 50, 64, generator=generator, device="cuda").bfloat16()

    def hand_on(input_ids, forward_batch, input_embeds, positions, per_layer_inputs, **others):
        assert not any(value is not None for value in others.values())
        return input_embeds, positions.clone(), per_layer_inputs

    text, mm = (kind.__new__(kind) for kind in (Gemma4TextModel, Gemma4ForConditionalGeneration))
    for made in (text, mm):
        torch.nn.Module.__init__(made)
    given = vars(received) | {
        "embed_tokens": lambda ids: table[ids.clamp(min=0)],
        "forward": hand_on,
        "pp_group": SimpleNamespace(world_size=1, is_first_rank=True, is_last_rank=True),
    }
    for name, value in given.items():
        setattr(text, name, value)
    config = SimpleNamespace(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        text_config=SimpleNamespace(pad_token_id=PAD),
    )
    given = {
        "config": config,
        "language_model": text,
        "pp_group": text.pp_group,
        "capture_aux_hidden_states": False,
        "lm_head_is_tied": True,
        "logits_processor": lambda ids, hidden_states, *others: hidden_states,
    }
    for name, value in given.items():
        setattr(mm, name, value)
    return mm


def decode_batch() -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        input_embeds=None,
        mm_input_embeds=None,
        mm_inputs=None,
        contains_mm_inputs=lambda: False,
        replace_embeds=None,
    )


def launches_for_ids() -> int:
    """Of stock's forward, on a copy of the ids for each placeholder's comparison and replacement."""
    # Where it selects instead of writing, the padding's id is a tensor that is filled each time.
    return 10 if lines.uses(patch.FORWARD, "where") else 7


@pytest.mark.parametrize("ple", [True, False], ids=["E2B", "no PLE"])
def test_multimodal_forward(ple, generator):
    """The same inputs reach the language model, in so many launches fewer."""
    mm = multimodal(generator, ple)
    ours = replaced(make_run())[patch.FORWARD]
    ids = ids_of(generator, STEP)
    ids[:8] = torch.tensor([IMAGE, VIDEO, AUDIO, PAD, -1, VOCAB, 0, 1], device="cuda")
    kept = ids.clone()
    results = []
    for forward in (ours, STOCK_FORWARD):
        positions = torch.arange(STEP, device="cuda")
        results.append(forward(mm, ids, positions, decode_batch()))
        assert int(positions[0]) == 1
        assert torch.equal(ids, kept)
    (embeds, positions, inputs), (stock_embeds, stock_positions, stock_inputs) = results
    assert torch.equal(embeds, stock_embeds)
    assert torch.equal(positions, stock_positions)
    if ple:
        assert bits_differ(inputs, stock_inputs) == 0
    else:
        assert inputs is None
        assert stock_inputs is None
    positions = torch.arange(STEP, device="cuda")
    ours_launches = launches(lambda: ours(mm, ids, positions, decode_batch()))
    stock_launches = launches(lambda: STOCK_FORWARD(mm, ids, positions, decode_batch()))
    embedding = 6 if ple else 0  # seven in stock, one here
    assert stock_launches - ours_launches == launches_for_ids() + embedding


def test_a_failed_comparison_keeps_stock(monkeypatch, generator):
    """One number that is off: stock's path for both methods, state failed, with the reason."""
    patch._verdicts.clear()
    right = kernel.launch_project

    def wrong(*arguments):
        out = right(*arguments)
        out[5, 7, 9] *= 1.5
        return out

    monkeypatch.setattr(kernel, "launch_project", wrong)
    run = make_run()
    text = model(generator, 35)
    projection, inputs = projection_of(generator, 7, 35, torch.bfloat16)
    project = replaced(run)[patch.PROJECT]
    gather = replaced(run)[patch.GATHER]
    before = run.counters.engaged
    expected = STOCK_PROJECT(text, projection, inputs)
    assert bits_differ(project(text, projection, inputs), expected) == 0
    ids = ids_of(generator, 7)
    assert bits_differ(gather(text, ids), STOCK_GATHER(text, ids)) == 0
    assert run.counters.engaged == before
    assert run.state == states.FAILED
    assert "differ from stock" in run.reason
    patch._verdicts.clear()


def test_everything_else_takes_stocks_path(generator):
    """fp32 tables and activations."""
    run = make_run()
    text = model(generator, 35, torch.float32)
    ids = ids_of(generator, 7)
    gather = replaced(run)[patch.GATHER]
    before = run.counters.engaged
    assert torch.equal(
        gather(text, ids).view(torch.int32), STOCK_GATHER(text, ids).view(torch.int32)
    )
    assert run.counters.engaged == before
    assert "float32" in run.full_reason()
