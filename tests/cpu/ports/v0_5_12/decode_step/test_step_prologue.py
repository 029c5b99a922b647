"""The step prologue: kernels in Triton's interpreter, and the patch on SGLang's real classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import step_prologue as kernel
from gemma4_turbo.kernels.norms.rmsnorm import Kind
from gemma4_turbo.ports.any.decode_step import step_prologue as patch
from gemma4_turbo.ports.v0_5_12.decode_step import step_prologue as line
from gemma4_turbo.runtime.verdicts import Verdicts
from tests.cpu.conftest import only_patch, patched_sglang
from tests.cpu.ports.counted import counted

LAYERS, HIDDEN, VOCAB, PLE_VOCAB = 2, 128, 50, 40
IMAGE, VIDEO, AUDIO, PAD = 45, 46, 7, 3
KINDS = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
DTYPES = pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")  # infinities are meant


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's Gemma 4 modules imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=["step_prologue"]):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    """Each test starts with this patch on, and no other."""
    with only_patch("step_prologue"), torch.no_grad():
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def engaged() -> int:
    return ENGINE.runs["step_prologue"].counters.engaged


# -- kernels -----------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
def test_gather_is_the_reference(dtype, tokens, id_dtype):
    """Ids in and out of range, negative ones, odd rows, a width that no block divides."""
    _, table = patch.gather_inputs(generator(), dtype, width=1280)
    ids = torch.tensor([39, -1, 2, 40, 8, 2**31 - 1, 6])[:tokens].to(id_dtype)
    got = kernel.gather_per_layer(ids, table, 16.0, 40)
    assert got.shape == (tokens, 1280)
    assert patch.different_bits(got, kernel.reference_gather(ids, table, 16.0, 40)) == 0


def test_gather_replaces_placeholders_and_follows_strides():
    _, table = patch.gather_inputs(generator(), torch.bfloat16)
    ids = torch.tensor([IMAGE, 1, VIDEO, 2, AUDIO, 3, 5, 4])[::2]
    placeholders = kernel.Placeholders(IMAGE, VIDEO, AUDIO, PAD)
    got = kernel.gather_per_layer(ids, table, 16.0, 40, placeholders)
    expected = kernel.gather_per_layer(torch.tensor([PAD, PAD, PAD, 5]), table, 16.0, 40)
    assert patch.different_bits(got, expected) == 0
    reference = kernel.reference_gather(ids, table, 16.0, 40, placeholders)
    assert patch.different_bits(got, reference) == 0


@KINDS
@DTYPES
@pytest.mark.parametrize(("tokens", "layers"), [(0, 35), (1, 35), (3, 5), (7, 2)])
def test_projection_is_the_reference(dtype, kind, tokens, layers):
    """In every order, with and without per-layer inputs; odd rows and weights among them."""
    arguments = patch.project_inputs(generator(), dtype, max(tokens, 6), layers)
    arguments = (arguments[0][:tokens], *arguments[1:4], arguments[4][:tokens], arguments[5])
    rms_norm = kernel.reference_rms_norm(kind)
    for given in (arguments, arguments[:4]):
        got = kernel.project_per_layer(*given, kind=kind)
        assert got.shape == (tokens, layers, 256)
        assert patch.different_bits(got, kernel.reference_project(rms_norm, *given)) == 0


def test_the_order_of_the_sum_is_seen():
    """Rows, a few of ten thousand, on which the two orders round to different outputs."""
    rows = torch.randn(40_000, 256, generator=generator(), dtype=torch.float32).half()
    one, scale = torch.ones(256, dtype=torch.half), torch.tensor(1.0).half()
    kinds = Kind.CUTE, Kind.PRECISE
    outputs = [kernel.reference_rms_norm(kind)(rows, one, 1e-6) for kind in kinds]
    telling = (outputs[0] != outputs[1]).any(dim=1).nonzero().flatten()[:8]
    assert len(telling) > 0
    for kind, expected in zip(kinds, outputs, strict=True):
        got = kernel.project_per_layer(rows[telling], scale, one, 1e-6, kind=kind)
        assert torch.equal(got[:, 0], expected[telling])


@pytest.mark.parametrize("ascending", [True, False])
def test_the_reference_orders_its_sum_as_documented(ascending):
    """Spelt out for one row: 8 neighbours in order, then pairs of threads."""
    row = torch.randn(256, generator=generator(), dtype=torch.float32).bfloat16()
    threads = []
    for lane in range(32):
        total = torch.zeros(())
        for j in range(8):
            total = total + row[8 * lane + j].float() ** 2
        threads.append(total)
    for offset in (1, 2, 4, 8, 16) if ascending else (16, 8, 4, 2, 1):
        threads = [threads[lane] + threads[lane ^ offset] for lane in range(32)]
    expected = (row.float() * torch.rsqrt(threads[0] / 256 + 1e-6)).bfloat16()
    rms_norm = kernel.reference_rms_norm(Kind.CUTE if ascending else Kind.PRECISE)
    weight = torch.ones(256, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(row[None], weight, 1e-6)[0], expected)


def test_the_kinds_differ():
    """In the order of the sum, seen before the rounding hides it, and in subnormals."""
    rows = torch.randn(64, 256, generator=generator()).half().float()
    sums = []
    for kind in (Kind.CUTE, Kind.PRECISE):
        rms_norm = kernel.reference_rms_norm(kind)
        sums.append(rms_norm(rows, torch.ones(256), 1e-6))
    assert not torch.equal(*sums)
    tiny = torch.full((1, 256), 1e-39).bfloat16()
    one = torch.ones(256, dtype=torch.bfloat16)
    scale = torch.tensor(1.0).bfloat16()
    outputs = {
        kind: bool(kernel.project_per_layer(tiny, scale, one, 1e-6, kind=kind).any())
        for kind in Kind
    }
    assert outputs == {Kind.CUTE: True, Kind.FAST_MATH: False, Kind.PRECISE: True}


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("weight", lambda a: a | {"weight": a["weight"].float()}),
        ("weight", lambda a: a | {"weight": a["weight"].t().contiguous().t()}),
        ("vocab", lambda a: a | {"vocab": 49}),
        ("vocab", lambda a: a | {"vocab": 0}),
        ("input_ids", lambda a: a | {"input_ids": a["input_ids"][None]}),
        ("input_ids", lambda a: a | {"input_ids": a["input_ids"].short()}),
        ("input_ids", lambda a: a | {"input_ids": a["input_ids"].to("meta")}),
    ],
)
def test_gather_names_the_wrong_argument(argument, change):
    ids, table = patch.gather_inputs(generator(), torch.bfloat16)
    arguments = {"input_ids": ids, "weight": table, "embed_scale": 16.0, "vocab": 40}
    with pytest.raises(ValueError, match=argument):
        kernel.gather_per_layer(**change(arguments))


@pytest.mark.parametrize(
    ("argument", "position", "change"),
    [
        ("projection", 0, lambda t: t.float()),
        ("projection", 0, lambda t: t[:, :-1]),
        ("projection", 0, lambda t: t.t().contiguous().t()),
        ("projection_scale", 1, lambda t: t.float()),
        ("projection_scale", 1, lambda t: t[None]),
        ("projection_scale", 1, lambda t: t.to("meta")),
        ("weight", 2, lambda t: t[:128]),
        ("weight", 2, lambda t: t.half()),
        ("eps", 3, lambda eps: 0.0),
        ("per_layer_inputs", 4, lambda t: t[:, :1]),
        ("per_layer_inputs", 4, lambda t: t.half()),
        ("per_layer_inputs", 4, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
        ("input_scale", 5, lambda t: t.float()),
        ("input_scale", 5, lambda t: None),
    ],
)
def test_projection_names_the_wrong_argument(argument, position, change):
    arguments: list[Any] = list(patch.project_inputs(generator(), torch.bfloat16, 6, 4))
    arguments[position] = change(arguments[position])
    with pytest.raises(ValueError, match=argument):
        kernel.project_per_layer(*arguments, kind=Kind.CUTE)


# -- the text model ------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """A decoder layer that adds its per-layer input to the first columns."""

    def forward(self, positions, hidden_states, per_layer_input, forward_batch, **kwargs):
        if per_layer_input is not None:
            hidden_states = hidden_states + per_layer_input[:, :HIDDEN]
        return hidden_states * 0.5, None


def text_model(ple: bool = True) -> Any:
    """Stock's Gemma4TextModel, bf16, random weights, its decoder layers replaced by `Layer`."""
    from sglang.srt.models import gemma4_causal
    from transformers import Gemma4TextConfig

    from gemma4_turbo.cli import sglang_process

    sglang_process.prepare_sglang()
    config = Gemma4TextConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB,
        vocab_size_per_layer_input=PLE_VOCAB,
        hidden_size_per_layer_input=256 if ple else 0,
        num_kv_shared_layers=0,
        pad_token_id=PAD,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.MonkeyPatch.context() as patched:  # the real ones need a GPU
            layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
            patched.setattr(gemma4_causal, "make_layers", lambda *a, **k: layers)
            model = gemma4_causal.Gemma4TextModel(config)
    finally:
        torch.set_default_dtype(before)
    random = generator(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1.0, 1.0, generator=random)
    return model


IDS = torch.tensor([0, 39, 40, 49, 5, IMAGE, AUDIO, 12])


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """On a CPU, stock's RMSNorm adds in another order: now and then an ulp, which the sum keeps."""
    return torch.allclose(a.float(), b.float(), rtol=2**-6, atol=2**-6)


def test_scales_of_a_loaded_model():
    """As SGLang loads it: 0-dim tensors of the model's dtype, and a float for the embedding."""
    model = text_model()
    for scale in (model.per_layer_input_scale, model.per_layer_projection_scale):
        assert scale.dim() == 0
        assert scale.dtype == torch.bfloat16
    assert model.embed_tokens_per_layer.embed_scale == 16.0


def test_text_model_agrees_with_stock():
    """Per-layer embeddings to the bit; the projection but for the order of a CPU's sum."""
    model = text_model()
    before = engaged()
    gathered = model.get_per_layer_inputs(IDS)
    embeds = model.embed_tokens(IDS)
    projected = model.project_per_layer_inputs(embeds, gathered)
    alone = model.project_per_layer_inputs(embeds)
    output = model(IDS, torch.arange(8), None)
    empty = model.project_per_layer_inputs(embeds[:0], model.get_per_layer_inputs(IDS[:0]))
    assert engaged() - before == 7
    assert empty.shape == (0, LAYERS, 256)
    ENGINE.revert()
    assert torch.equal(gathered, model.get_per_layer_inputs(IDS))
    assert projected.shape == (8, LAYERS, 256)
    assert near(projected, model.project_per_layer_inputs(embeds, gathered))
    assert near(alone, model.project_per_layer_inputs(embeds))
    assert near(output, model(IDS, torch.arange(8), None))


def test_a_model_without_per_layer_embeddings_has_nothing_to_do():
    model = text_model(ple=False)
    before = engaged()
    assert model.get_per_layer_inputs(IDS) is None
    assert model.project_per_layer_inputs(model.embed_tokens(IDS)) is None
    assert engaged() == before
    assert "no per-layer inputs" in ENGINE.runs["step_prologue"].full_reason()


def test_embeddings_that_the_caller_passes_are_stocks():
    run = ENGINE.runs["step_prologue"]
    forward = line.multimodal_forward(run, lambda *given, **named: "stock")
    before = counted("step_prologue")
    assert forward(None, None, torch.arange(2), None, torch.zeros(2, HIDDEN)) == "stock"
    assert counted("step_prologue") == before.and_(declined=1)
    assert patch.EMBEDDED in run.full_reason()


def test_weight_updates_reach_the_kernels():
    """Nothing that depends on a weight is kept."""
    model = text_model()
    gathered = model.get_per_layer_inputs(IDS)
    embeds = model.embed_tokens(IDS)
    projected = model.project_per_layer_inputs(embeds)
    model.embed_tokens_per_layer.weight.data = model.embed_tokens_per_layer.weight.data * 2
    model.per_layer_projection_norm.weight.data.mul_(2)
    assert torch.equal(model.get_per_layer_inputs(IDS), gathered * 2)
    assert torch.equal(model.project_per_layer_inputs(embeds), projected * 2)
    model.per_layer_projection_scale = model.per_layer_projection_scale * 0
    assert not model.project_per_layer_inputs(embeds).any()


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch):
    model = text_model()
    embeds = model.embed_tokens(IDS)
    before = model.get_per_layer_inputs(IDS), model.project_per_layer_inputs(embeds)
    for name in ("launch_gather", "launch_project"):
        right = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, right=right: right(*a) * 3)
    assert not torch.equal(model.get_per_layer_inputs(IDS), before[0])
    assert not torch.equal(model.project_per_layer_inputs(embeds), before[1])


def subclass(model: Any) -> None:
    class Other(type(model.embed_tokens_per_layer)):  # type: ignore[misc]
        pass

    model.embed_tokens_per_layer.__class__ = Other


def other_norm(model: Any) -> None:
    class Other(type(model.per_layer_projection_norm)):  # type: ignore[misc]
        pass

    model.per_layer_projection_norm.__class__ = Other


GATHER_DECLINES = [
    ("a Other", subclass),
    ("max_norm", lambda m: setattr(m.embed_tokens_per_layer, "max_norm", 1e9)),
    ("hooks", lambda m: m.embed_tokens_per_layer.register_forward_hook(lambda *a: None)),
    ("no float", lambda m: setattr(m.embed_tokens_per_layer, "embed_scale", torch.tensor(16.0))),
    ("float32", lambda m: m.embed_tokens_per_layer.float()),
]
PROJECT_DECLINES = [
    ("a Other", other_norm),
    ("equation", lambda m: setattr(m.per_layer_projection_norm, "variance_size_override", 256)),
    ("rounds", lambda m: setattr(m.per_layer_projection_norm, "cast_x_before_out_mul", True)),
    ("hooks", lambda m: m.per_layer_projection_norm.register_forward_hook(lambda *a: None)),
    ("weight is", lambda m: m.per_layer_projection_norm.float()),
    ("eps", lambda m: setattr(m.per_layer_projection_norm, "variance_epsilon", 0.0)),
    (
        "projection_scale",
        lambda m: setattr(m, "per_layer_projection_scale", m.per_layer_projection_scale.float()),
    ),
]


@pytest.mark.parametrize(("reason", "change"), GATHER_DECLINES + PROJECT_DECLINES)
def test_everything_else_takes_stocks_path(reason, change, monkeypatch: pytest.MonkeyPatch):
    """Stock's result, nothing engaged, and the reason is in the report."""
    model = text_model()
    change(model)
    run = ENGINE.runs["step_prologue"]
    monkeypatch.setattr(run, "_decline_reason", "")
    gather = (reason, change) in GATHER_DECLINES
    name = "get_per_layer_inputs" if gather else "project_per_layer_inputs"
    argument = IDS if gather else model.embed_tokens(IDS)
    before = engaged()
    got = getattr(model, name)(argument)
    assert engaged() == before
    assert reason in run.full_reason()
    ENGINE.revert()
    assert torch.equal(got, getattr(model, name)(argument))


def test_batch_invariant_mode_takes_stocks_path(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.batch_invariant_ops import batch_invariant_ops

    model = text_model()
    monkeypatch.setattr(ENGINE.runs["step_prologue"], "_decline_reason", "")
    monkeypatch.setattr(batch_invariant_ops, "_batch_invariant_MODE", True)
    model.project_per_layer_inputs(model.embed_tokens(IDS))
    assert "batch-invariant" in ENGINE.runs["step_prologue"].full_reason()


@pytest.mark.parametrize("ple", [True, False])
def test_survives_fullgraph(ple: bool, monkeypatch: pytest.MonkeyPatch):
    """Traced with fullgraph the kernels run, behind operators; a sentinel changes the output."""
    torch._dynamo.reset()
    model = text_model(ple)
    positions = torch.arange(8)
    expected = model(IDS, positions, None)
    before = engaged()
    compiled = torch.compile(
        lambda ids: model(ids, positions, None), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(IDS), expected)
    assert engaged() - before == (2 if ple else 0)
    explained = torch._dynamo.explain(lambda ids: model(ids, positions, None))(IDS)
    assert explained.graph_break_count == 0
    if ple:
        for name in ("launch_gather", "launch_project"):
            with monkeypatch.context() as patched:
                right = getattr(kernel, name)
                patched.setattr(kernel, name, lambda *a, right=right: right(*a) * 3)
                assert not torch.equal(compiled(IDS), expected)


@pytest.mark.parametrize("method", ["forward_cuda", "forward_native", "foreign"])
def test_traced_calls_see_what_the_norm_runs(method: str, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: ``forward_cuda`` passes, under Dynamo too, and only the device is left."""
    torch._dynamo.reset()
    norm = text_model().per_layer_projection_norm
    norm._forward_method = getattr(norm, method, lambda x: x)
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    reason_of = patch.norm_unfit()
    embeds = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: (x + 1, reason_of(norm, x)), fullgraph=True, backend="eager")
    reasons = {"forward_cuda": "CUDA device", "forward_native": "runs forward_native"}
    expected = reasons.get(method, "somebody else's")
    for reason in (reason_of(norm, embeds), compiled(embeds)[1]):
        assert expected in reason


def test_traced_calls_keep_stocks_numbers_where_ours_are_not(monkeypatch: pytest.MonkeyPatch):
    """A GPU on which a bit differs: the operators run stock's steps."""
    arguments = patch.project_inputs(generator(), torch.bfloat16, 6, 4)
    ids, table = patch.gather_inputs(generator(), torch.bfloat16)
    rms_norm = kernel.reference_rms_norm(Kind.PRECISE)
    unfit = Kind.PRECISE, "self-check: 3 of 512 numbers differ"
    monkeypatch.setattr(patch, "norm_kind", lambda *a: unfit)
    monkeypatch.setattr(patch, "_traced_rms_norm", lambda: rms_norm)
    monkeypatch.setattr(kernel, "launch_project", None)
    monkeypatch.setattr(kernel, "launch_gather", None)
    expected = kernel.reference_project(rms_norm, *arguments)
    assert patch.different_bits(patch._traced_project(*arguments), expected) == 0
    expected = kernel.reference_gather(ids, table, 16.0, 40)
    assert patch.different_bits(patch._traced_gather(ids, table, 16.0, 40), expected) == 0


# -- which RMSNorm stock runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "kind", "norm", "gather"])
def test_another_norm_or_embedding_is_seen(wrong: str | None, monkeypatch: pytest.MonkeyPatch):
    """Stand-ins for stock on a CPU: what computes like our kind passes, and nothing else."""
    tokens = patch.project_inputs
    monkeypatch.setattr(patch, "project_inputs", lambda g, d, *shape: tokens(g, d, 6, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    right = kernel.reference_rms_norm(Kind.CUTE)

    def rms_norm(x, weight, eps):
        y = right(x, weight, eps)
        if wrong == "norm":
            y[11, 7] *= 1.02
        return y

    if wrong == "gather":
        gather = kernel.launch_gather
        monkeypatch.setattr(kernel, "launch_gather", lambda *a: gather(*a) * 1.02)
    like = torch.empty(0, dtype=torch.bfloat16)
    kind = Kind.FAST_MATH if wrong == "kind" else Kind.CUTE  # which flushes subnormals
    unfit = patch.compare(rms_norm, kind, like, rounds=1)
    assert (unfit is None) == (wrong is None)
    assert wrong is None or "differ from stock on a GPU" in str(unfit)


def test_the_kind_is_looked_for_once_and_never_during_a_capture(monkeypatch: pytest.MonkeyPatch):
    """On a CUDA tensor, which only says so here."""
    like: Any = SimpleNamespace(device="cuda:0", dtype=torch.bfloat16, is_cuda=True)
    run = copy.copy(ENGINE.runs["step_prologue"])
    monkeypatch.setattr(run, "_host", SimpleNamespace(publish=lambda: None))
    calls: list[Any] = []
    monkeypatch.setattr(patch, "_verdicts", Verdicts())
    monkeypatch.setattr(patch, "_kinds", {})
    monkeypatch.setattr(patch, "_rms_norm", lambda: None)
    monkeypatch.setattr(patch, "_traced_rms_norm", lambda: None)
    kinds = norm_kinds.Kinds(eager=Kind.CUTE, traced=Kind.FAST_MATH)
    monkeypatch.setattr(norm_kinds, "find", lambda like, width: kinds)
    monkeypatch.setattr(patch, "compare", lambda _, kind, like: calls.append(kind))
    assert "before the capture" in str(patch.norm_kind(run, like, False, True)[1])
    assert not calls
    for capturing in (False, True):
        assert patch.norm_kind(run, like, False, capturing) == (Kind.CUTE, None)
    assert patch.norm_kind(run, like, True, False) == (Kind.FAST_MATH, None)
    assert calls == [Kind.CUTE, Kind.FAST_MATH]


@pytest.mark.parametrize("wrong", ["kind", "kernel"])
def test_no_kernel_without_a_kind_that_agrees(wrong: str, monkeypatch: pytest.MonkeyPatch):
    like: Any = SimpleNamespace(device="cuda:0", dtype=torch.bfloat16, is_cuda=True)
    run = copy.copy(ENGINE.runs["step_prologue"])
    monkeypatch.setattr(run, "_host", SimpleNamespace(publish=lambda: None))
    monkeypatch.setattr(patch, "_verdicts", Verdicts())
    monkeypatch.setattr(patch, "_rms_norm", lambda: None)
    kinds = norm_kinds.Kinds(reason="self-check: no" if wrong == "kind" else None)
    monkeypatch.setattr(norm_kinds, "find", lambda like, width: kinds)
    compared = None if wrong == "kind" else "self-check: no"
    monkeypatch.setattr(patch, "compare", lambda *a: compared)
    assert patch.norm_kind(run, like, False, False)[1] == "self-check: no"
    assert run.state == states.FAILED
