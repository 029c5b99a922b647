"""The step prologue on SGLang's real classes of this line; the kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.fusions.comparison import different_bits
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import step_prologue as kernel
from gemma4_turbo.kernels.norms.rmsnorm import Kind
from gemma4_turbo.ports.any.decode_step import step_prologue as shared
from gemma4_turbo.ports.v0_5_23.decode_step import step_prologue as patch
from tests.cpu.conftest import REPOSITORY, only_patch, patched_sglang, warm
from tests.cpu.ports.counted import Counted, counted

NAME = "step_prologue"
LAYERS, HIDDEN, VOCAB, PLE_VOCAB = 2, 128, 64, 40
IMAGE, VIDEO, AUDIO, PAD = 45, 46, 7, 3
# Padding, placeholders, out of the per-layer vocabulary, and the ends of both.
IDS = torch.tensor([0, 39, 40, 63, 5, IMAGE, AUDIO, 12, VIDEO, PAD, 1, 38])

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        sglang_process.prepare_sglang()
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME), torch.no_grad():
        yield


def counts() -> Counted:
    return counted(NAME)


def multimodal(ple: bool = True) -> Any:
    """Stock's whole model without encoders' inputs: bf16, random weights, its own placeholders."""
    from sglang.srt.models.gemma4_mm import Gemma4ForConditionalGeneration
    from transformers import Gemma4Config, Gemma4TextConfig, Gemma4VisionConfig

    vision = Gemma4VisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        patch_size=4,
        position_embedding_size=32,
        pooling_kernel_size=2,
    )
    text = Gemma4TextConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        global_head_dim=64,
        vocab_size=VOCAB,
        vocab_size_per_layer_input=PLE_VOCAB,
        hidden_size_per_layer_input=256 if ple else 0,
        num_kv_shared_layers=0,
        max_position_embeddings=128,
        pad_token_id=PAD,
    )
    config = Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    config.text_config.swa_head_dim = config.text_config.swa_v_head_dim = 64
    config.text_config.swa_num_key_value_heads = 1
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("sglang.srt.layers.rotary_embedding.base._is_cpu", True)
            model = Gemma4ForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    random = torch.Generator().manual_seed(7)
    for parameter in model.language_model.parameters():
        parameter.uniform_(-1.0, 1.0, generator=random)
    return model


class Ops(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def count(self, *names: str) -> int:
        return sum(any(f"aten.{name}." in called for name in names) for called in self.names)


def batch(mode: str = "DECODE") -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        forward_mode=ForwardMode[mode],
        input_embeds=None,
        mm_input_embeds=None,
        mm_inputs=None,
        contains_mm_inputs=lambda: False,
        contains_image_inputs=lambda: mode == "EXTEND",
        replace_embeds=None,
    )


class Reached:
    """What reaches the text model and the head, in place of layers and vocabulary."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.masks: list[Any] = []
        kind = type(model.language_model)

        def forward(module: Any, **given: Any) -> torch.Tensor:
            self.calls.append(given)
            return given["input_embeds"]

        monkeypatch.setattr(kind, "forward", forward)
        monkeypatch.setitem(model._modules, "logits_processor", None)
        monkeypatch.setattr(type(model), "logits_processor", self.head, raising=False)
        model._modules.pop("logits_processor")
        monkeypatch.setattr(
            type(model), "prepare_attn_masks", lambda *a, **k: self.masks.append((a[1:], k))
        )

    def head(self, *given: Any) -> tuple[Any, ...]:
        return given


def same(a: Any, b: Any) -> bool:
    """The same object, or tensors of the same bits."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return a is b or a == b


def both(
    model: Any, ids: torch.Tensor, reached: Reached, mode: str = "DECODE", **given: Any
) -> int:
    """Ours and stock's on the same call: every argument and result is the same. Ours' operators."""
    results = []
    for patched in (True, False):
        positions = torch.arange(len(ids))
        kept = ids.clone()
        if not patched:
            ENGINE.revert()
        with Ops() as ops:
            result = model.forward(ids, positions, batch(mode), **given)
        assert torch.equal(ids, kept)
        results.append((result, positions, reached.calls.pop(), len(reached.masks), ops))
        reached.masks.clear()
    (ours, positions, call, masks, ops), (stocks, stocks_positions, stocks_call, theirs, _) = (
        results
    )
    assert torch.equal(positions, stocks_positions)
    assert masks == theirs
    assert set(call) == set(stocks_call)
    for name in call:
        assert name == "forward_batch" or same(call[name], stocks_call[name]), name
    assert len(ours) == len(stocks) == 5
    for place in (0, 1, 2, 4):
        assert same(ours[place], stocks[place]), place
    return ops.count("where", "eq", "clone")


# -- the text model -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        IDS[:0],
        IDS[:1],
        torch.tensor([[-1, -100, 2**31 - 1], [39, 40, 41]]).flatten(),
        torch.stack([IDS, IDS + 1], 1)[:, 0],
    ],
    ids=["all", "none", "one", "outside", "strided"],
)
def test_per_layer_embeddings_have_stocks_bits(ids, dtype):
    """Odd numbers in the table among them: infinities, NaN, subnormals, signed zeros."""
    text = multimodal().language_model
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-39, -1e-39, 3e38])
    text.embed_tokens_per_layer.weight[:, : len(odd)] = odd.bfloat16()
    before = counts()
    ours = text.get_per_layer_inputs(ids.to(dtype))
    assert counts() == before.and_(engaged=1)
    ENGINE.revert()
    theirs = text.get_per_layer_inputs(ids.to(dtype))
    assert ours.shape == theirs.shape == (len(ids), LAYERS, 256)
    assert different_bits(ours, theirs) == 0


@pytest.mark.parametrize("kind", [Kind.PRECISE])
@pytest.mark.parametrize("tokens", [0, 1, 12])
def test_the_projection_is_stocks_but_for_a_cpus_order_of_the_sum(tokens, kind, monkeypatch):
    """Bit for bit where stock's norm adds as its CUDA kernel does, which a CPU's does not."""
    text = multimodal().language_model
    embeds = text.embed_tokens(IDS[:tokens])
    gathered = text.get_per_layer_inputs(IDS[:tokens])
    norm = text.per_layer_projection_norm
    before = counts()
    ours = [text.project_per_layer_inputs(embeds, given) for given in (gathered, None)]
    assert counts() == before.and_(engaged=2)
    ENGINE.revert()
    near = [text.project_per_layer_inputs(embeds, given) for given in (gathered, None)]
    rms_norm = kernel.reference_rms_norm(kind)

    def in_order(x: torch.Tensor) -> torch.Tensor:
        y = rms_norm(x.reshape(-1, 256), norm.weight, norm.variance_epsilon) if len(x) else x
        return y.reshape(x.shape)

    monkeypatch.setattr(norm, "_forward_method", in_order)
    theirs = [text.project_per_layer_inputs(embeds, given) for given in (gathered, None)]
    for a, b, c in zip(ours, theirs, near, strict=True):
        assert a.shape == (tokens, LAYERS, 256)
        assert different_bits(a, b) == 0
        assert torch.allclose(a.float(), c.float(), rtol=2**-6, atol=2**-6)


def test_a_model_without_per_layer_embeddings_has_nothing_to_do():
    text = multimodal(ple=False).language_model
    before = counts()
    assert text.get_per_layer_inputs(IDS) is None
    assert text.project_per_layer_inputs(text.embed_tokens(IDS)) is None
    assert counts() == before.and_(declined=1)
    assert shared.NOT_PER_LAYER in ENGINE.runs[NAME].full_reason()


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch):
    text = multimodal().language_model
    embeds = text.embed_tokens(IDS)
    before = text.get_per_layer_inputs(IDS), text.project_per_layer_inputs(embeds)
    for name in ("launch_gather", "launch_project"):
        right = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, right=right: right(*a) * 3)
    assert not torch.equal(text.get_per_layer_inputs(IDS), before[0])
    assert not torch.equal(text.project_per_layer_inputs(embeds), before[1])


def of_another_class(module: Any) -> None:
    module.__class__ = type("Other", (type(module),), {})


def forced(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.kernels import fused_op

    monkeypatch.setattr(fused_op, "_forced_backend", fused_op.KernelBackend.TORCH)


def traced(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.kernels import fused_op

    monkeypatch.setattr(fused_op, "_trace_enabled", True)


def batch_invariant(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.batch_invariant_ops import batch_invariant_ops

    monkeypatch.setattr(batch_invariant_ops, "_batch_invariant_MODE", True)


GATHER = [
    ("is a Other", lambda t, m: of_another_class(t.embed_tokens_per_layer)),
    ("max_norm", lambda t, m: setattr(t.embed_tokens_per_layer, "max_norm", 1e9)),
    ("hooks", lambda t, m: t.embed_tokens_per_layer.register_forward_hook(lambda *a: None)),
    ("no float", lambda t, m: setattr(t.embed_tokens_per_layer, "embed_scale", torch.tensor(16.0))),
    ("float32", lambda t, m: t.embed_tokens_per_layer.float()),
]
PROJECT = [
    ("a Other", lambda t, m: of_another_class(t.per_layer_projection_norm)),
    ("equation", lambda t, m: setattr(t.per_layer_projection_norm, "variance_size_override", 256)),
    ("rounds", lambda t, m: setattr(t.per_layer_projection_norm, "cast_x_before_out_mul", True)),
    ("hooks", lambda t, m: t.per_layer_projection_norm.register_forward_hook(lambda *a: None)),
    ("weight is", lambda t, m: t.per_layer_projection_norm.float()),
    ("eps", lambda t, m: setattr(t.per_layer_projection_norm, "variance_epsilon", 0.0)),
    ("quantise", lambda t, m: t.per_layer_projection_norm.fuse_input_quant(t.layers[0].mlp)),
    ("forced onto torch", forced),
    ("writes down", traced),
    ("batch-invariant", batch_invariant),
]


@pytest.mark.parametrize(
    ("method", "reason", "change"),
    [("get_per_layer_inputs", *row) for row in GATHER]
    + [("project_per_layer_inputs", *row) for row in PROJECT],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_everything_else_takes_stocks_path(method, reason, change, monkeypatch):
    """Stock's result, nothing engaged, one call declined, and the reason is in the report."""
    text = multimodal().language_model
    argument = IDS if method == "get_per_layer_inputs" else text.embed_tokens(IDS)
    change(text, monkeypatch)
    before = counts()
    try:
        ours = getattr(text, method)(argument)
    except Exception as error:  # this machine has not what stock's path wants
        ours = type(error)
    assert counts() == before.and_(declined=1)
    assert reason in ENGINE.runs[NAME].full_reason()
    ENGINE.revert()
    if isinstance(ours, type):
        with pytest.raises(ours):
            getattr(text, method)(argument)
    else:
        assert torch.equal(ours, getattr(text, method)(argument))


# -- which function the norm runs -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("forward_cuda", "CUDA device"),  # only the device is left to say no
        ("forward_native", "runs forward_native"),
        ("foreign", "forward_cuda of somebody else's"),
        ("plain", "function of somebody else's"),
        (None, "runs forward_"),  # as this machine resolves it
    ],
)
def test_the_norms_function_is_looked_at(method, expected, monkeypatch: pytest.MonkeyPatch):
    """Also before its first call, when stock has not chosen yet; as on a GPU."""
    norm = multimodal().language_model.per_layer_projection_norm

    def forward_cuda(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    functions = {
        "foreign": forward_cuda.__get__(norm),
        "plain": lambda x: x,
        None: None,
    }
    norm._forward_method = functions.get(method) if method in functions else getattr(norm, method)
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    embeds = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    assert expected in str(patch.norm_unfit()(norm, embeds))
    if method is None:
        assert norm._forward_method == norm._resolve_forward_method()


def test_stocks_norms_are_followed(environment: dict[str, str]):
    """This line's, whose names are in the module that RMSNorm calls. Other tests may follow another's here."""
    code = (
        "from gemma4_turbo.ports.v0_5_23.decode_step import step_prologue\n"
        "from gemma4_turbo.fusions.stock import followed\n"
        "assert followed() is step_prologue.STOCK"
    )
    there = {"env": {**environment, "PYTHONPATH": str(REPOSITORY)}, "cwd": str(REPOSITORY)}
    done = warm(environment).run(code=code, arguments=[], timeout=300, **there)
    assert done.returncode == 0, done.stderr


# -- the multimodal forward -----------------------------------------------------------------------


@pytest.mark.parametrize("ple", [True, False], ids=["E2B", "no PLE"])
@pytest.mark.parametrize("mode", ["DECODE", "EXTEND"])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_same_reaches_the_text_model_and_the_head(ple, mode, in_place, monkeypatch):
    """Without a launch for ids of ours: stock has seven, whether anybody reads them or not."""
    monkeypatch.setenv("SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION", str(not in_place).lower())
    model = multimodal(ple)
    reached = Reached(model, monkeypatch)
    before = counts()
    assert both(model, IDS, reached, mode, extra=5) == 0
    assert counts() == before.and_(engaged=1)
    with Ops() as ops:
        model.forward(IDS, torch.arange(len(IDS)), batch(mode))  # stock's by now
    assert ops.count("where", "eq", "clone") >= 7
    assert (reached.calls[-1]["per_layer_inputs"] is None) == (not ple)


@pytest.mark.parametrize(
    "ids",
    [
        IDS[:0],
        IDS[:1],
        torch.tensor([-1, VOCAB - 1, PLE_VOCAB, IMAGE, VIDEO, AUDIO, PAD, 0]).clamp(min=0),
        torch.stack([IDS, IDS], 1)[:, 1],
    ],
    ids=["none", "one", "edges", "strided"],
)
@pytest.mark.parametrize("ple", [True, False])
def test_the_same_for_any_ids(ids, ple, monkeypatch):
    model = multimodal(ple)
    both(model, ids, Reached(model, monkeypatch))


@pytest.mark.parametrize("pad", [0, PLE_VOCAB + 1, -1])
def test_the_same_for_any_padding(pad, monkeypatch):
    """Also one that is out of the vocabulary, or is itself a placeholder's."""
    model = multimodal()
    model.config.text_config.pad_token_id = pad
    reached = Reached(model, monkeypatch)
    both(model, IDS, reached)
    model.config.text_config.pad_token_id = IMAGE
    ENGINE.apply(only=[NAME])
    both(model, IDS, reached)


def test_layers_of_eagle_and_a_head_of_its_own(monkeypatch: pytest.MonkeyPatch):
    model = multimodal()
    reached = Reached(model, monkeypatch)
    model.lm_head_is_tied, model.capture_aux_hidden_states = False, True
    model.lm_head = torch.nn.Linear(2, 2)
    aux = object()
    kind = type(model.language_model)
    monkeypatch.setattr(kind, "forward", lambda module, **given: (given["input_embeds"], aux))
    result = model.forward(IDS, torch.arange(len(IDS)), batch())
    assert result[2] is model.lm_head
    assert result[4] is aux
    assert not reached.calls


def own(target: str) -> Any:
    """A ``get_per_layer_inputs`` on an object."""

    def change(model: Any) -> None:
        owner = model if target == "model" else model.language_model
        owner.get_per_layer_inputs = type(owner).get_per_layer_inputs.__get__(owner)

    return change


def subclassed(model: Any) -> None:
    kind = type(model)
    model.__class__ = type(
        "Other",
        (kind,),
        {"get_per_layer_inputs": lambda self, ids: kind.get_per_layer_inputs(self, ids)},
    )


def ranks(model: Any) -> None:
    group = model.pp_group
    model.pp_group = SimpleNamespace(
        world_size=2, is_first_rank=group.is_first_rank, is_last_rank=group.is_last_rank
    )


@pytest.mark.parametrize("ple", [True, False])
@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("pipeline ranks", ranks),
        ("text model is a Other", lambda m: of_another_class(m.language_model)),
        ("model has a get_per_layer_inputs", own("model")),
        ("model has a get_per_layer_inputs", own("text")),
        ("Other has a get_per_layer_inputs", subclassed),
        ("token id is not set", lambda m: setattr(m.config, "image_token_id", None)),
        ("token id is not set", lambda m: setattr(m.config.text_config, "pad_token_id", None)),
    ],
)
def test_what_is_not_known_runs_stocks_forward(reason, change, ple, monkeypatch):
    """Once declined; what stock raises is what is raised."""
    model = multimodal(ple)
    reached = Reached(model, monkeypatch)
    change(model)
    before = counts().declined
    outcomes = []
    for patched in (True, False):
        if not patched:
            declined = counts().declined
            ENGINE.revert()
        try:
            model.forward(IDS, torch.arange(len(IDS)), batch())
            outcomes.append(reached.calls.pop()["per_layer_inputs"])
        except TypeError as error:
            outcomes.append(type(error))
    assert same(*outcomes)
    assert reason in ENGINE.runs[NAME].full_reason()
    assert declined > before


def test_another_ranks_tensors_run_stocks_forward(monkeypatch: pytest.MonkeyPatch):
    model = multimodal()
    reached = Reached(model, monkeypatch)
    proxy = object()
    model.forward(IDS, torch.arange(len(IDS)), batch(), None, proxy)
    assert reached.calls[0]["pp_proxy_tensors"] is proxy
    assert "pipeline rank's tensors" in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize("given", ["neither", "both"])
def test_given_embeddings_and_stocks_own_errors(given, monkeypatch: pytest.MonkeyPatch):
    model = multimodal()
    Reached(model, monkeypatch)
    ids, embeds = (None, None) if given == "neither" else (IDS, torch.zeros(12, HIDDEN))
    with pytest.raises(ValueError, match="exactly one"):
        model.forward(ids, torch.arange(12), batch(), embeds)
    assert shared.EMBEDDED in ENGINE.runs[NAME].full_reason()


def test_verify(monkeypatch: pytest.MonkeyPatch):
    """Passes, and sees one wrong number."""
    run = ENGINE.runs[NAME]
    checks = patch.verify(run, "cpu")
    assert checks
    assert all(check.passed for check in checks)
    right = kernel.launch_gather

    def wrong(*arguments: Any) -> torch.Tensor:
        out = right(*arguments)
        out[3, 5] += 1
        return out

    monkeypatch.setattr(kernel, "launch_gather", wrong)
    assert not all(check.passed for check in patch.verify(run, "cpu"))
    assert patch.verify is shared.verify
