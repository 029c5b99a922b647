"""Weights that are not a plain parameter: the layers that hold them run stock's way, all others do not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch

import gemma4_turbo
from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from tests.cpu import quantised
from tests.cpu.conftest import patched_sglang

PRODUCTS = ("qkv_proj", "skinny_gemm")
"""The patches that read the weight of a linear layer. The others fuse what lies between products."""

AROUND = {
    "dense": {"layer_norms", "rope_store", "input_norm"},
    "moe": {"layer_norms", "rope_store", "input_norm", "router"},
    "ple": {"layer_norms", "rope_store", "input_norm", "ple_tail", "step_prologue"},
    "kv": {"layer_norms", "rope_store", "input_norm"},
}


class Case(NamedTuple):
    """A model: its kind, SGLang's quantisation, and what is done to it before it runs."""

    kind: str
    quantisation: Callable[[], Any] | None = None
    change: Callable[[Any], None] | None = None


class Outcome:
    """What stock made of a case, what came of it under the patches, and what their rows said then."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.error: Exception | None = None
        self._attempt(self._stock)

    def _attempt(self, part: Callable[[quantised.Small], None]) -> None:
        if self.error is not None:
            return
        with pytest.MonkeyPatch.context() as patch:
            for run in ENGINE.runs.values():
                patch.setattr(run, "_decline_reason", "")
            try:
                part(quantised.build(*self.case, patch))
            except Exception as error:  # raised again by the case's own test
                self.error = error

    def _stock(self, small: quantised.Small) -> None:
        self.expected, self.stock_calls = small.run(), list(small.calls)

    def patched(self) -> None:
        """The model is built again, under the patches, as in a server."""
        self._attempt(self._patched)

    def _patched(self, small: quantised.Small) -> None:
        before = {name: run.engaged_count() for name, run in ENGINE.runs.items()}
        self.found, self.calls = small.run(), list(small.calls)
        self.engaged = {n: run.engaged_count() - before[n] for n, run in ENGINE.runs.items()}
        self.rows = {row.name: row for row in gemma4_turbo.status()}
        attention = small.model.layers[0].self_attn
        self.has_weight = hasattr(attention.qkv_proj, "weight")
        self.method = type(getattr(attention.qkv_proj, "quant_method", None)).__name__

    def ran(self) -> None:
        """Neither way raised, and the same products were computed in the same order."""
        if self.error is not None:
            raise self.error
        assert self.found.dtype == self.expected.dtype
        assert self.found.shape == self.expected.shape
        assert self.calls == self.stock_calls

    def agrees(self) -> None:
        """Within rounding, as the order of a CPU's sums is not the interpreter's."""
        self.ran()
        scale = self.expected.float().abs().max()
        difference = float((self.found.float() - self.expected.float()).abs().max() / scale)
        assert difference < 0.06, difference

    def declined(self, patch: str, *words: str, but: int = 0) -> None:
        """The patch ran for no layer ``but`` so many, and its row says why, with one of these words."""
        row = self.rows[patch]
        assert self.engaged[patch] == but
        assert row.state == states.ACTIVE, row.reason
        assert "some calls take stock's path" in row.reason, row.reason
        assert any(word in row.reason for word in words), row.reason

    def around(self) -> None:
        """What fuses no product ran."""
        wanted = AROUND[self.case.kind]
        assert {name for name in wanted if self.engaged[name]} == wanted


@contextlib.contextmanager
def eager() -> Iterator[pytest.MonkeyPatch]:
    """Nothing is compiled, or multiplied in the interpreter."""
    from gemma4_turbo.kernels import skinny_gemm as kernel

    def launch(x: Any, weight: Any, config: Any, epilogue: Any, extra: Any, arrived: Any) -> Any:
        # A kernel reads memory: it knows nothing of what a tensor's class makes of it.
        assert type(weight) in (torch.Tensor, torch.nn.Parameter), type(weight)
        return kernel.reference_skinny_gemm(x, weight, epilogue, extra)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kernel, "launch_skinny_gemm", launch)  # a second for each product there
        with torch._dynamo.config.patch(disable=True):
            yield patch


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's modules imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=PRODUCTS):
        yield


def run_all(cases: list[Case], only: Sequence[str] | None = None) -> dict[int, Outcome]:
    """All with stock first and then all with the patches: to apply them takes seconds."""
    ENGINE.revert()
    try:
        outcomes = {id(case): Outcome(case) for case in cases}
        ENGINE.apply(only=only)
        for name in PRODUCTS:
            assert ENGINE.runs[name].state == states.ACTIVE, ENGINE.runs[name].reason
        for outcome in outcomes.values():
            outcome.patched()
        return outcomes
    finally:
        ENGINE.revert()


def wanted(request: pytest.FixtureRequest, fixture: str) -> list[Case]:
    """The cases of the tests that were selected and take this fixture."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    return [spec.params[fixture] for spec in parameters if spec and fixture in spec.params]


@pytest.fixture(scope="module")
def all_defaults(request: pytest.FixtureRequest, applied: None) -> dict[int, Outcome]:
    """Under all patches that are on by default."""
    with eager():
        return run_all(wanted(request, "outcome"))


@pytest.fixture(scope="module")
def all_products(request: pytest.FixtureRequest, applied: None) -> dict[int, Outcome]:
    """Under those of the products alone; stock's norms of Q, K and V are those of a CPU."""
    with eager() as patch:
        patch.setattr("gemma4_turbo.kernels.qkv.INTERPRETED", False)
        return run_all(wanted(request, "of_products"), PRODUCTS)


@pytest.fixture
def outcome(request: pytest.FixtureRequest, all_defaults: dict[int, Outcome]) -> Outcome:
    """Of the test's case, under all default patches."""
    return all_defaults[id(request.param)]


@pytest.fixture
def of_products(request: pytest.FixtureRequest, all_products: dict[int, Outcome]) -> Outcome:
    """Of the test's case, under the patches of the products alone."""
    return all_products[id(request.param)]


def cases(fixture: str, made: dict[str, Case]) -> pytest.MarkDecorator:
    """The test runs once per case."""
    return pytest.mark.parametrize(fixture, list(made.values()), ids=list(made), indirect=True)


# -- SGLang's own methods ----------------------------------------------------------------------------

CONFIGS = quantised.CONFIGS


# One configuration per class of methods, as that is what the patches look at, on one kind: which layers a
# model has is the same for all. Those of the next test but one are left out.
DISTINCT = ["awq", "gptq", "gguf", "w4a16", "qoq", "modelopt_fp4", "modelopt_fp8", "compressed_fp8"]
DISTINCT += ["bitsandbytes", "w8a8_int8", "w8a8_fp8", "fbgemm_fp8", "int8_blocks"]


@cases("outcome", {name: Case("dense", CONFIGS[name]) for name in DISTINCT})
def test_all_default_patches(outcome: Outcome, request: pytest.FixtureRequest):
    outcome.agrees()
    assert outcome.has_weight == (request.node.callspec.id not in quantised.WITHOUT_WEIGHT)
    outcome.around()
    for patch in PRODUCTS:
        outcome.declined(patch, outcome.method, "weight")


# All configurations, without the fusions: then every call is stock's, and so is every bit.
@cases("of_products", {name: Case("dense", make) for name, make in CONFIGS.items()})
def test_the_patches_of_the_products_alone(of_products: Outcome):
    of_products.ran()
    assert torch.equal(of_products.found, of_products.expected)
    for patch in PRODUCTS:
        of_products.declined(patch, of_products.method, "weight")


# The other kinds: they have other layers. One method without `weight` and one with.
@cases(
    "outcome",
    {
        f"{kind}-{name}": Case(kind, CONFIGS[name])
        for kind in ("moe", "ple", "kv")
        for name in ("gptq_marlin", "fp8")
    },
)
def test_every_kind_of_model(outcome: Outcome, request: pytest.FixtureRequest):
    outcome.agrees()
    outcome.around()
    # SGLang quantises no router: of each of the two layers its product is as ever.
    routers = 2 if request.node.callspec.id.startswith("moe") else 0
    for patch in PRODUCTS:
        runs = routers if patch == "skinny_gemm" else 0
        outcome.declined(patch, outcome.method, "weight", but=runs)


# Experts of the other methods that have some of their own: their class is another one each. (Those of
# ModelOpt's NVFP4 ask CUDA for the GPU when they are made.)
@cases(
    "outcome",
    {name: Case("moe", CONFIGS[name]) for name in ("awq_marlin", "gguf", "w4a16")},
)
def test_quantised_experts(outcome: Outcome):
    outcome.agrees()
    outcome.around()


def but(kind: str, *plain: str) -> Case:
    """AWQ for all linear layers but these."""
    return Case(kind, lambda: quantised.awq_without(*plain))


# Checkpoints that leave some layers as they were: a product's neighbours decide which function calls it.
# The numbers: products of qkv_proj, and of skinny_gemm (None: stock's MLP as a whole will do, too).
PARTLY = {
    "attention": (but("kv", "self_attn"), 1, 1 + 2),  # the KV-shared layer needs Q alone
    "mlp": (but("kv", "mlp"), 0, 4),
    "o_proj": (but("kv", "o_proj"), 0, 2),
    "gate_up_proj": (but("dense", "gate_up_proj"), 0, 2),
    "down_proj": (but("dense", "down_proj"), 0, None),
    "per_layer_input_gate": (but("ple", "per_layer_input_gate"), 0, 2),
    "per_layer_projection": (but("ple", "per_layer_projection"), 0, 2),
    "per_layer_model_projection": (but("ple", "per_layer_model_projection"), 0, 0),
}


@cases("outcome", {name: case for name, (case, _, _) in PARTLY.items()})
def test_some_layers_are_plain(outcome: Outcome, request: pytest.FixtureRequest):
    _, rows, products = PARTLY[request.node.callspec.id]
    outcome.agrees()
    outcome.around()
    assert outcome.engaged["qkv_proj"] == rows
    assert products is None or outcome.engaged["skinny_gemm"] == products
    assert "AWQLinearMethod" in outcome.rows["skinny_gemm"].reason


# -- modules in the place of stock's -----------------------------------------------------------------


PLACES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def put(model: Any, place: str, make: Callable[[Any], Any]) -> None:
    """Every layer's module at a place becomes what is made of it."""
    for layer in model.layers:
        parent, _, name = place.rpartition(".")
        owner = layer.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)))


def everywhere(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """The same at every place of a linear layer: each is read by another function of the patches."""

    def change(model: Any) -> None:
        for place in PLACES:
            put(model, place, make)

    return change


class Backend:
    """A LoRA backend in plain torch: ``base_output + x A^T B^T``."""

    name = "test"

    def run_lora_a_sgemm(self, x: Any, weights: Any) -> Any:
        return x @ weights.T

    def run_lora_b_sgemm(self, x: Any, weights: Any, base_output: Any, **others: Any) -> Any:
        return base_output + x @ weights.T

    def run_qkv_lora(self, x: Any, qkv_lora_a: Any, qkv_lora_b: Any, base_output: Any, **o: Any):
        return base_output + x @ qkv_lora_a.T @ qkv_lora_b.T

    def run_gate_up_lora(self, x: Any, gate_up_lora_a: Any, gate_up_lora_b: Any, **o: Any):
        half = gate_up_lora_a.shape[0] // 2
        gate, up = gate_up_lora_b.chunk(2)
        a, b = gate_up_lora_a[:half], gate_up_lora_a[half:]
        return o["base_output"] + torch.cat([x @ a.T @ gate.T, x @ b.T @ up.T], dim=-1)


def with_lora(base: Any) -> Any:
    """SGLang's wrapper of a linear layer, with an adapter of rank 8 that is in use."""
    from sglang.srt.lora import layers

    real = torch.tensor

    def unpinned(*arguments: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        return real(*arguments, **named)  # pinned memory needs a GPU

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", unpinned)
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        wrapped = layers.get_lora_layer(base, Backend())
        rank = 16 if isinstance(wrapped, layers.MergedColumnParallelLinearWithLoRA) else 8
        wrapped.set_lora_info(
            quantised.drawn(f"a of a {type(base).__name__}", rank, base.input_size),
            quantised.drawn(f"b of a {type(base).__name__}", base.output_size, 8),
        )
    assert type(wrapped).__name__ == f"{type(base).__name__}WithLoRA"
    return wrapped


# Over a plain layer the wrapper shows its `weight`, over another one it has none either.
@cases(
    "outcome",
    {
        "plain": Case("kv", None, everywhere(with_lora)),
        "gguf": Case("kv", CONFIGS["gguf"], everywhere(with_lora)),
    },
)
def test_a_lora_wrapper_is_called(outcome: Outcome):
    outcome.agrees()
    for patch in PRODUCTS:
        outcome.declined(patch, "WithLoRA")


def subclass(base: Any) -> Any:
    """Of the layer's own class, with a product of its own."""

    class Tripled(type(base)):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            out, bias = super().forward(x)
            return out * 3, bias

    base.__class__ = Tripled
    return base


def foreign(base: Any) -> Any:
    """Of a class of the same name that is not stock's, with the same attributes."""

    def forward(self: Any, x: Any) -> Any:
        return torch.nn.functional.linear(x, self.weight).flip(-1), None

    made = type(type(base).__name__, (torch.nn.Module,), {"forward": forward})()
    for name, value in base.__dict__.items():
        made.__dict__[name] = value
    return made


def bare(base: Any) -> Any:
    """Of a class of the same name that has nothing but a forward."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = base

        def forward(self, x: Any) -> Any:
            return self.inner(x)[0].flip(-1), None

    Module.__name__ = type(base).__name__
    return Module()


def method_of_its_own(base: Any) -> Any:
    """A quantisation method of the name of stock's that is another."""

    def apply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        return torch.nn.functional.linear(x, layer.weight).flip(-1)

    base.quant_method = type("UnquantizedLinearMethod", (), {"apply": apply})()
    return base


def method_subclass(base: Any) -> Any:
    """A method that derives from stock's."""

    class Method(type(base.quant_method)):  # type: ignore[misc]
        def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return super().apply(layer, x, bias).flip(-1)

    base.quant_method = Method()
    return base


def without_method(base: Any) -> Any:
    """A layer that has none, as it computes by itself."""
    weight = base.weight
    base.forward = lambda x: (torch.nn.functional.linear(x, weight).flip(-1), None)
    del base.quant_method
    return base


def complex_weight(base: Any) -> Any:
    """A dtype that no kernel here knows: its real part is multiplied."""

    def apply(layer: Any, x: Any, bias: Any = None) -> Any:
        return torch.nn.functional.linear(x, layer.weight.real.to(x.dtype))

    base.weight = torch.nn.Parameter(base.weight.data.float() + 1j, requires_grad=False)
    base.quant_method.apply = apply
    return base


def offloaded(base: Any) -> Any:
    """As SGLang's offloader leaves a module: the weight on ``meta``, the real one for a call only."""
    from sglang.srt.utils.offloader import _hook_module_forward_raw

    real = base.weight.data
    base.weight = torch.nn.Parameter(real.to("meta"), requires_grad=False)
    _hook_module_forward_raw(base, lambda: None, lambda: {"weight": real})
    return base


def torchao(base: Any) -> Any:
    """A weight whose class is torchao's: ``F.linear`` knows it, a kernel sees its bytes."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(base, Int8WeightOnlyConfig(), filter_fn=lambda module, name: True)
    assert type(base.weight) not in (torch.nn.Parameter, torch.Tensor)
    return base


class Halved(torch.nn.Parameter):
    """A parameter of another class, whose product is its own."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.nn.functional.linear:
            return torch.nn.functional.linear(args[0], args[1].as_subclass(torch.Tensor)) / 2
        return super().__torch_function__(function, types, args, kwargs or {})


def tensor_subclass(base: Any) -> Any:
    """The same with a class that keeps bf16 numbers in the usual place."""
    base.weight = Halved(base.weight.data, requires_grad=False)
    return base


# Each is told from stock's by another look: at the class, at the method, or at the weight.
ODD = [subclass, foreign, bare]
ODD += [method_of_its_own, method_subclass, without_method]
ODD += [complex_weight, offloaded, torchao, tensor_subclass]


@cases("outcome", {make.__name__: Case("kv", None, everywhere(make)) for make in ODD})
def test_a_linear_layer_that_is_not_stocks(outcome: Outcome):
    outcome.agrees()
    outcome.around()
    for patch in PRODUCTS:
        outcome.declined(patch, "")


def rms_norm(base: Any) -> Any:
    """A class that is also called RMSNorm: its weight is applied the other way round."""

    class RMSNorm(torch.nn.Module):
        def forward(self, x: Any, residual: Any = None) -> Any:
            if residual is not None:
                residual = x + residual
                return self(residual), residual
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            weight = self.weight.flip(-1) if hasattr(self, "weight") else 2.0
            return (wide * weight).to(x.dtype)

    return RMSNorm()


def rms_norm_like_stock(base: Any) -> Any:
    """The same, with all attributes of stock's."""
    made = rms_norm(base)
    for name, value in base.__dict__.items():
        made.__dict__[name] = value
    return made


def rms_norm_subclass(base: Any) -> Any:
    """A class that derives from stock's."""

    class Doubled(type(base)):  # type: ignore[misc]
        def forward(self, x: Any, *others: Any) -> Any:
            out = super().forward(x, *others)
            return (out[0].flip(-1), out[1]) if isinstance(out, tuple) else out.flip(-1)

    base.__class__ = Doubled
    return base


NORMS = {
    "dense": [
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ],
    "moe": ["router.norm", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_1"],
    "ple": ["post_per_layer_input_norm"],
}


def norm(kind: str, place: str, make: Callable[[Any], Any]) -> Case:
    """A case with another norm at one place of every layer."""
    return Case(kind, None, lambda model: put(model, place, make))


def last_norm(model: Any) -> None:
    model.norm = rms_norm_like_stock(model.norm)


def projection_norm(model: Any) -> None:
    model.per_layer_projection_norm = rms_norm_like_stock(model.per_layer_projection_norm)


# Every norm that a fusion covers, with stock's attributes: nothing but its class tells it apart.
@cases(
    "outcome",
    {place: norm(kind, place, rms_norm_like_stock) for kind in NORMS for place in NORMS[kind]}
    | {"norm": Case("dense", None, last_norm)}
    | {"per_layer_projection_norm": Case("ple", None, projection_norm)},
)
def test_a_foreign_norm_is_called(outcome: Outcome):
    outcome.agrees()


# Without them, and derived: one place in the middle of a fusion and one that is the next layer's.
@cases(
    "outcome",
    {
        f"{make.__name__}-{place}": norm("dense", place, make)
        for make in (rms_norm, rms_norm_subclass)
        for place in ("input_layernorm", "post_attention_layernorm")
    },
)
def test_a_norm_of_another_class(outcome: Outcome):
    outcome.agrees()
