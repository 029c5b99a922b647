"""The rewritten forwards on SGLang's real Gemma 4 layers, on the CPU through Triton's interpreter."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.fusions.site import SITE, UNPROVEN, site_of
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import pdl
from gemma4_turbo.ports.any import linear, sglang_types
from gemma4_turbo.ports.any.decode_step import attention
from tests.cpu import forward_batch
from tests.cpu.ports.counted import counted as of_patch
from tests.cpu.ports.v0_5_23 import models

KINDS = ["moe", "ple", "dense"]
STEPS = {
    "moe": {"layer_norms": 2, "rope_store": 2, "input_norm": 2, "skinny_gemm": 10},
    "ple": {"layer_norms": 2, "rope_store": 2, "input_norm": 2, "ple_tail": 2, "skinny_gemm": 12},
    "dense": {"layer_norms": 2, "rope_store": 2, "input_norm": 2, "skinny_gemm": 8},
}
LAYER = {"layer_norms", "ple_tail", "input_norm", "experts_sum", "mlp_stream", "skinny_gemm", "pdl"}
BOTH = [*sorted(LAYER), "rope_store", "qkv_proj"]
ON = [*BOTH, "qkv_norm"]  # upstreamed here, and what rope_store stands on


@pytest.fixture(autouse=True)
def stock(tmp_path: Any) -> Iterator[None]:
    """Stock at first; reverted at the end, after a test's own `monkeypatch` has put back."""
    with models.stock(tmp_path):
        yield


def counted(names: Any = BOTH) -> dict[str, int]:
    return {name: ENGINE.runs[name].counters.engaged for name in names}


def engaged_since(before: dict[str, int]) -> dict[str, int]:
    after = counted(before)
    return {name: after[name] - before[name] for name in before if after[name] > before[name]}


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within rounding: the order of a CPU's sums is not the GPU's. Bits are compared on a GPU."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference < 0.06, float(difference)


@pytest.mark.parametrize("kind", KINDS)
def test_patched_model_agrees_with_stock_and_every_step_runs(kind: str):
    model = models.build(kind)
    expected = models.run(model, 2)
    seen = [layer.self_attn.attn.seen[:] for layer in model.layers]
    ENGINE.apply(only=ON)
    assert {ENGINE.runs[name].state for name in BOTH} == {states.ACTIVE}
    before = counted()
    found = models.run(model, 2)
    assert engaged_since(before) == STEPS[kind]
    for layer, theirs in zip(model.layers, seen, strict=True):
        ours = layer.self_attn.attn.seen
        assert [keep for _, _, keep in ours] == [keep for _, _, keep in theirs]
        near(ours[0][0].flatten(1), theirs[0][0].flatten(1))
    near(found, expected)


@pytest.mark.parametrize("name", BOTH)
def test_each_patch_alone(name: str):
    """Its forward is shared with patches that are off: those parts are stock's."""
    kind = "ple" if name == "ple_tail" else "moe"
    model = models.build(kind)
    expected = models.run(model, 2)
    ENGINE.apply(only=[name, "qkv_norm"])
    assert ENGINE.runs[name].state == states.ACTIVE, ENGINE.runs[name].reason
    near(models.run(model, 2), expected)


def test_without_any_step_the_bits_are_stocks():
    """The rewritten forwards, all their steps switched off once more, on a CPU."""
    model = models.build("moe")
    expected = models.run(model)
    ENGINE.apply(only=ON)
    with pytest.MonkeyPatch.context() as patch:
        steps = [*decoder_steps(), *attention.FUSIONS]
        for step in steps:
            patch.setattr(step, "run", None)
        assert torch.equal(models.run(model), expected)


def decoder_steps() -> tuple[Any, ...]:
    from gemma4_turbo.ports.v0_5_23.decode_step import decoder_layer

    return tuple(decoder_layer.steps)


# One, several, and more than skinny_gemm takes; that alone, as a norm takes a program for each token.
@pytest.mark.parametrize(
    ("tokens", "only"), [(1, ON), (9, ON), (65, ["skinny_gemm", "layer_norms"])]
)
def test_numbers_of_tokens(tokens: int, only: list[str]):
    model = models.build("dense")
    expected = models.run(model, tokens)
    ENGINE.apply(only=only)
    before = counted()
    found = models.run(model, tokens)
    near(found, expected)
    assert ("skinny_gemm" in engaged_since(before)) == (tokens < 65)


# -- the residual stream --------------------------------------------------------------------------


def test_each_layer_leaves_its_result_as_the_stream():
    from sglang.srt.layers.layer_boundary.residual import batch

    model = models.build("dense")
    ENGINE.apply(only=ON)
    given, layer = forward_batch.prefill(), model.layers[0]
    x = torch.randn(2, 256).bfloat16()
    batch.start(given)
    out = layer(
        positions=torch.arange(2), hidden_states=x, per_layer_input=None, forward_batch=given
    )
    assert isinstance(out, torch.Tensor)  # nobody asked for the next norm
    assert given.residual_stream.residual is out
    assert given.residual_stream.pending is None


def test_a_layer_of_stocks_goes_on_from_one_of_ours_and_back():
    """Where one layer is stock's, here as its input is captured, the stream is whole between them."""
    model = models.build("dense", 4)
    model.layers_to_capture = [1, 2, 4]
    expected, theirs = models.run(model)
    ENGINE.apply(only=ON)
    before = counted(["layer_norms"])
    found, ours = models.run(model)
    assert engaged_since(before) == {"layer_norms": 2}
    assert "captured" in ENGINE.runs["layer_norms"].full_reason()
    near(found, expected)
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        near(one, other)


def test_a_stream_with_a_sum_to_come_is_stocks():
    from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
    from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream

    model = models.build("dense")
    x, residual = torch.randn(2, 256).bfloat16(), torch.randn(2, 256).bfloat16()

    def once() -> torch.Tensor:
        given = forward_batch.prefill()
        given.residual_stream = ResidualStream(residual.clone())
        handle = given.residual_stream.record(x.clone(), PLAIN_ADD)
        return model.layers[0](torch.arange(2), handle, None, given)

    expected = once()
    ENGINE.apply(only=ON)
    before = counted(["layer_norms", "input_norm", "skinny_gemm"])
    steps = sorted(LAYER - {"skinny_gemm"})  # which is a step of attention's, too
    declined = [of_patch(name).declined for name in steps]
    found = once()
    engaged = engaged_since(before)
    assert "layer_norms" not in engaged
    # Once each, also input_norm, which has two steps in a layer.
    assert [of_patch(name).declined for name in steps] == [n + 1 for n in declined]
    near(found, expected)


def spread(**widths: Any) -> Any:
    """SGLang's answer to who shares the work: two GPUs by tensor parallelism, but for these widths."""
    widths = {"attn_tp_size": 2, "moe_ep_size": 1, "moe_dp_size": 1, "stages": 1, **widths}
    stages = SimpleNamespace(world_size=widths.pop("stages"))
    return lambda: SimpleNamespace(tp_size=2, pp_group=stages, **widths)


@pytest.mark.parametrize(
    ("widths", "reason"),
    [
        ({}, None),
        ({"attn_tp_size": 1}, "attention is not spread over all GPUs"),
        ({"moe_ep_size": 2}, "whole experts"),
        ({"moe_dp_size": 2}, "whole experts"),
        ({"stages": 2}, "pipeline parallelism"),
    ],
)
def test_ways_to_share_the_work(
    monkeypatch: pytest.MonkeyPatch, widths: dict[str, int], reason: str | None
):
    from gemma4_turbo.ports.v0_5_23 import sums

    models.prepare_sglang()
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", spread(**widths))
    found = sums.parallel_unfit()
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("switch", ["sequence parallelism", "LoRA"])
def test_switches_that_share_the_work_otherwise(monkeypatch: pytest.MonkeyPatch, switch: str):
    from gemma4_turbo.ports.v0_5_23 import sums

    models.prepare_sglang()
    on = SimpleNamespace(sp=SimpleNamespace(enabled=True), enable_lora=True)
    which = "get_flags" if switch == "sequence parallelism" else "get_lora"
    monkeypatch.setattr(f"sglang.srt.runtime_context.{which}", lambda: on)
    assert sums.parallel_unfit() is None  # one GPU
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", spread())
    assert switch in str(sums.parallel_unfit())


def test_boundaries_that_sum_otherwise_are_stocks(monkeypatch: pytest.MonkeyPatch):
    """Here those of one GPU, whose entry of the feed-forward sums nothing."""
    from gemma4_turbo.ports.v0_5_23.decode_step import decoder_layer

    model = models.build("dense")
    expected = models.run(model)
    ENGINE.apply(only=[*LAYER])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sglang.srt.runtime_context.get_parallel", spread())
        for layer in model.layers:
            layer.__dict__.pop(SITE, None)
            site_of(layer, decoder_layer.LayerSite)
    before = counted()
    near(models.run(model), expected)
    assert engaged_since(before).keys() <= {"skinny_gemm"}  # of the attention, which sums nothing
    assert "another way than by an all-reduce" in ENGINE.runs["layer_norms"].full_reason()


# Of the two that a layer reads through; that of the feed-forward is in another one, which asks it.
@pytest.mark.parametrize("name", ["NormQuantReadout", "NormReadout"])
def test_a_read_that_is_another_one_for_each_batch_is_stocks(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    """No release's are. SGLang asks the object for it at every call."""
    from sglang.srt.layers.layer_boundary.residual import add_norm

    kind: Any = getattr(add_norm, name)

    class Bound(kind):  # type: ignore[misc]
        bind = None

        def read(self, *args: Any, **kwargs: Any) -> Any:
            normed, residual = super().read(*args, **kwargs)
            return normed * 2, residual

        def update_and_read(self, *args: Any, **kwargs: Any) -> Any:
            normed, residual = super().update_and_read(*args, **kwargs)
            return normed * 2, residual

    monkeypatch.setattr(kind, "bind", lambda self, batch, context: Bound())
    model = models.build("dense")
    expected = models.run(model)
    ENGINE.apply(only=ON)
    before = counted(["layer_norms"])
    assert torch.equal(models.run(model), expected)
    assert not engaged_since(before)
    assert "reads each batch in a way of its own" in ENGINE.runs["layer_norms"].full_reason()
    monkeypatch.undo()
    again = models.build("dense")
    assert not torch.equal(models.run(again), expected)  # it was another read
    assert engaged_since(before) == {"layer_norms": 2}


def test_an_update_that_is_another_one_for_each_batch_is_stocks(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.layers.layer_boundary.residual import add_norm

    model = models.build("dense")
    expected = models.run(model)
    monkeypatch.setattr(add_norm.ReplaceAtExit, "bind", lambda self, batch, context: Unbound())

    class Unbound(add_norm.ReplaceAtExit):
        bind = None

    ENGINE.apply(only=ON)
    before = counted(["layer_norms"])
    assert torch.equal(models.run(model), expected)
    assert not engaged_since(before)
    assert "write each batch in a way of its own" in ENGINE.runs["layer_norms"].full_reason()


@pytest.mark.parametrize("of", ["attn_boundary", "ffn_boundary"])
def test_a_boundary_that_reads_through_another_object_is_stocks(of: str):
    """Here one that rounds before it norms, which SGLang has for other models."""
    import functools

    import msgspec
    from sglang.srt.layers.layer_boundary.residual.add_norm import UNFUSED_NORM_READOUT

    model = models.build("dense")
    plan = getattr(model.layers[0], of).plan
    for variant, path in plan.paths.items():
        prepare = functools.partial(path.entry.prepare, read=UNFUSED_NORM_READOUT)
        entry = msgspec.structs.replace(path.entry, prepare=prepare)
        plan.paths[variant] = msgspec.structs.replace(path, entry=entry)
    ENGINE.apply(only=ON)
    before = counted(["layer_norms"])
    models.run(model)
    assert engaged_since(before) == {"layer_norms": 1}  # the other layer's
    assert "reads through a UnfusedNormReadout" in ENGINE.runs["layer_norms"].full_reason()


# -- hooks, captures, weights ---------------------------------------------------------------------


@pytest.mark.parametrize("of", ["layer", "post_attention_layernorm", "router", "self_attn", "mlp"])
def test_a_hook_sees_what_stock_gives_it(of: str):
    """And may change it: the fusion that goes round the module declines, also later."""
    model = models.build("moe")
    module = model.layers[1] if of == "layer" else getattr(model.layers[1], of)
    calls: list[Any] = []

    def change(module: Any, args: Any, output: Any) -> Any:
        calls.append(output)
        return tuple(x * 2 for x in output) if isinstance(output, tuple) else output * 2

    def hooked_run() -> torch.Tensor:
        handle = module.register_forward_hook(change)
        try:
            # A layer's result belongs to the stream: another tensor is an error of stock's.
            if of == "layer":
                with pytest.raises(RuntimeError, match="residual"):
                    models.run(model)
                return torch.zeros(1)
            return models.run(model)
        finally:
            handle.remove()

    expected, plain = hooked_run(), models.run(model)
    count = len(calls)
    ENGINE.apply(only=ON)
    near(models.run(model), plain)  # the sites are made before the hook comes
    near(hooked_run(), expected) if of != "layer" else hooked_run()
    assert len(calls) == 2 * count > 0
    near(models.run(model), plain)


def _doubling(inner: Any, calls: list[Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        found = inner(*args, **kwargs)
        return tuple(found) if isinstance(found, tuple) else found * 2

    return call


def _compiled(module: Any, calls: list[Any]) -> None:
    module.compile(backend="eager")
    module._compiled_call_impl = _doubling(module._call_impl, calls)  # no compiler is the matter


def _of_another_class(module: Any, calls: list[Any]) -> None:
    kind = type(module)

    def forward(self: Any, *args: Any) -> Any:
        return _doubling(kind.forward.__get__(self), calls)(*args)

    module.__class__ = type(f"{kind.__name__}OfSomebody", (kind,), {"forward": forward})


def _of_another_method(module: Any, calls: list[Any]) -> None:
    module._forward_method = _doubling(sglang_types.rules().running(module), calls)


# Of the modules that a site covers each once, as one condition looks at all of them; every change of the
# next layer's norm and of the feed-forward, which are looked at by themselves. A method of its own is what
# a platform's function may be set on: norms alone have it.
FIRST, TAIL, FOLLOWING = "post_attention_layernorm", "post_feedforward_layernorm", "input_layernorm"


@pytest.mark.parametrize(
    ("change", "of"),
    [
        *((_compiled, of) for of in (FIRST, FOLLOWING, "mlp", "self_attn.o_proj")),
        *((_of_another_class, of) for of in (TAIL, FOLLOWING, "mlp", "mlp.gate_up_proj")),
        *((_of_another_method, of) for of in (FIRST, TAIL, FOLLOWING)),
    ],
)
def test_a_module_that_is_changed_in_place_is_called(change: Any, of: str):
    """After the first look: `torch.nn.Module.compile`, a class of its own, a function of its own."""
    model, calls = models.build("dense"), []
    ENGINE.apply(only=ON)
    models.run(model)
    change(model.layers[1].get_submodule(of), calls)
    found, ours = models.run(model), len(calls)
    ENGINE.revert()
    near(found, models.run(model))
    assert 2 * ours == len(calls) > 0


def test_a_shallow_copy_of_a_module_is_looked_at_by_itself():
    """It brings the attributes of the first one along, and has a forward of its own."""
    model, calls = models.build("dense"), []
    ENGINE.apply(only=ON)
    models.run(model)
    mlp = model.layers[1].mlp
    mlp.down_proj = copy.copy(mlp.down_proj)
    inner = mlp.down_proj.forward

    def forward(*args: Any) -> Any:
        calls.append(args)
        return inner(*args)

    mlp.down_proj.forward = forward
    models.run(model)
    assert len(calls) == 1


@pytest.mark.parametrize("at", [0, 1])
def test_a_layers_result_in_another_tensor_is_an_error_of_stocks(at: int):
    """The stream holds what a layer wrote: its reader, a layer or the last norm, takes nothing else."""
    model = models.build("dense")
    ENGINE.apply(only=ON)
    models.run(model)  # the sites are made before the hook comes
    model.layers[at].register_forward_hook(lambda module, args, output: output.clone())
    for _ in range(2):  # ours, then stock
        with pytest.raises(RuntimeError, match="written residual does not match"):
            models.run(model)
        ENGINE.revert()


@pytest.mark.parametrize("seen_before", [True, False])
def test_a_layers_own_way_to_its_result_is_called(seen_before: bool):
    """A method that stock's forward calls: a layer has another, or a subclass of SGLang's layer."""
    model, calls = models.build("dense"), []
    layer: Any = model.layers[0]
    theirs = type(layer)._next_stream

    def own(self: Any, *args: Any) -> torch.Tensor:
        calls.append(seen_before)
        return theirs(self, *args) * 2  # type: ignore[no-any-return]

    ENGINE.apply(only=ON)
    if seen_before:
        models.run(model)
        layer._next_stream = types.MethodType(own, layer)
    else:
        layer.__class__ = type("Doubled", (type(layer),), {"_next_stream": own})
    before = counted()
    found = models.run(model)
    assert calls == [seen_before]
    assert engaged_since(before)["layer_norms"] == 1  # the other layer's
    assert "_next_stream of its own" in ENGINE.runs["layer_norms"].full_reason()
    ENGINE.revert()
    near(found, models.run(model))


def test_a_capture_compares_nothing(monkeypatch: pytest.MonkeyPatch):
    """A layer that was never compared runs stock's calls while a graph is recorded, and is asked again."""
    model = models.build("dense")
    expected = models.run(model)
    ENGINE.apply(only=ON)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("gemma4_turbo.fusions.fusion", "gemma4_turbo.ports.any.linear"):
            patch.setattr(f"{module}.capturing", lambda: True)
        before = counted()
        near(models.run(model), expected)
        assert not engaged_since(before)
        assert model.layers[0].__dict__[SITE].layer_norms is UNPROVEN
    before = counted()
    models.run(model)
    assert engaged_since(before) == STEPS["dense"]


def test_the_routers_scale_is_folded_once_as_by_stock():
    """From then on its weight is what counts: a write to it reaches the kernel."""
    model = models.build("moe")
    ENGINE.apply(only=ON)
    models.run(model)
    router = model.layers[0].router
    assert router._scale_fused
    assert torch.equal(router.norm.weight, (router.scale * router.root_size).to(torch.bfloat16))
    router.norm.weight.data.mul_(4)
    changed = models.run(model)
    ENGINE.revert()
    near(changed, models.run(model))


# The switches may be thrown at any time; which of the two it is does not matter to that.
@pytest.mark.parametrize(
    ("switch", "seen_before"), [("forced", True), ("forced", False), ("trace", True)]
)
def test_fused_ops_that_are_forced_or_written_down_are_stocks(
    monkeypatch: pytest.MonkeyPatch, switch: str, seen_before: bool
):
    """Debug switches for every module: its ``forward`` has to be called, for as long as they are on."""
    from sglang.kernels import fused_op
    from sglang.kernels.spec import KernelBackend

    model = models.build("dense")
    expected = models.run(model)
    ENGINE.apply(only=ON)
    if seen_before:
        models.run(model)
    with monkeypatch.context() as patch:
        if switch == "forced":
            patch.setattr(fused_op, "_forced_backend", KernelBackend.TORCH)
        else:
            patch.setattr(fused_op, "_trace_enabled", True)
        before = counted()
        assert torch.equal(models.run(model), expected)
        assert not engaged_since(before)
    assert "fused operators" in ENGINE.runs["layer_norms"].full_reason()
    before = counted()
    models.run(model)
    assert engaged_since(before) == STEPS["dense"]
    fused_op.clear_fused_op_trace()


BOUND = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"]


# Each norm in a layer that was looked at; one of them also in a layer that was not.
@pytest.mark.parametrize(
    ("name", "seen_before"), [*((name, True) for name in BOUND), (BOUND[0], False)]
)
def test_a_norm_put_in_the_place_of_a_layers_is_what_stock_makes_of_it(
    name: str, seen_before: bool
):
    """The layer's boundaries keep the norm that they were made with."""
    model = models.build("dense")
    layer = model.layers[1]
    first = getattr(layer, name)
    ENGINE.apply(only=ON)
    if seen_before:
        models.run(model)
    ENGINE.revert()
    other = type(first)(256, eps=first.variance_epsilon).bfloat16()
    other.weight.data.fill_(-3.0)
    setattr(layer, name, other)
    expected = models.run(model)
    ENGINE.apply(only=ON)
    before = counted()
    near(models.run(model), expected)
    assert engaged_since(before)["layer_norms"] == 1  # the other layer's
    assert "replaced" in ENGINE.runs["layer_norms"].full_reason()


@pytest.mark.parametrize("name", ["prepare", "finish", "sum_part", "exit"])
def test_a_boundarys_own_method_is_called(name: str):
    model = models.build("dense")
    ENGINE.apply(only=ON)
    if name != "exit":  # of those that stock's layer calls itself, also after the first look
        models.run(model)
    boundary, calls = model.layers[0].ffn_boundary, []
    theirs = getattr(boundary, name)

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return theirs(*args, **kwargs)

    setattr(boundary, name, own)
    models.run(model)
    assert calls == [name]


def test_a_wrapper_around_a_layers_forward_gets_stocks_result(monkeypatch: pytest.MonkeyPatch):
    """Also one that comes later than the patches: it knows nothing of a pair."""
    from sglang.srt.models.gemma4_causal import Gemma4DecoderLayer

    model = models.build("dense")
    expected = models.run(model)
    ENGINE.apply(only=ON)
    models.run(model)
    ours, results = Gemma4DecoderLayer.forward, []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        results.append(ours(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(Gemma4DecoderLayer, "forward", wrapper)
    near(models.run(model), expected)
    assert [type(result) for result in results] == [torch.Tensor] * 2


def test_the_experts_sum_begins_where_stocks_does(monkeypatch: pytest.MonkeyPatch):
    """At zero by the kernel for GPUs with early launches, else at the first expert."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    ENGINE.apply(only=["experts_sum"])
    for supported in (True, False):
        monkeypatch.setattr(fused_moe, "is_arch_support_pdl", lambda found=supported: found)
        assert sglang_types.rules().sums_from_zero() is supported


def test_weights_elsewhere_than_on_cuda_are_stocks():
    from gemma4_turbo.ports.v0_5_23.decode_step import decoder_layer

    model = models.build("dense")
    ENGINE.apply(only=ON)
    layer = model.layers[0].to("meta")
    assert "meta" in str(decoder_layer.LayerSite(layer).stocks)
    assert "meta" in str(attention.AttentionSite(layer.self_attn).stocks)


def test_another_gemm_backend_is_stocks(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.layers.quantization import unquant

    model = models.build("dense")
    monkeypatch.setattr(unquant, "_BF16_GEMM_BACKEND", unquant.Bf16GemmBackend.CUTEDSL)
    ENGINE.apply(only=["skinny_gemm"])
    before = counted()
    models.run(model)
    assert not engaged_since(before)
    assert "--bf16-gemm-backend cutedsl" in ENGINE.runs["skinny_gemm"].full_reason()


def test_early_launches_are_counted_per_layer(monkeypatch: pytest.MonkeyPatch):
    """On a GPU that has them: a counter that went up in the layer is one engaged call."""
    model = models.build("dense")
    ENGINE.apply(only=ON)

    def options(like: torch.Tensor) -> dict[str, Any]:
        pdl.launches += 1
        return {"PDL": False}

    monkeypatch.setattr(pdl, "options", options)
    before = counted()
    models.run(model)
    assert engaged_since(before)["pdl"] == 2
    assert linear.SKINNY_GEMM.run is not None


@pytest.mark.parametrize(
    "name", [":bind_update", ".batch:written_residual", ".add_norm:_update_and_read_residual_plain"]
)
def test_who_watches_the_residual_stream_is_not_gone_round(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """A wrapper on what stock's boundaries call around a layer: the layer is stock's."""
    import functools
    import importlib

    models.build("dense")
    path, _, function = f"sglang.srt.layers.layer_boundary.residual{name}".partition(":")
    module = importlib.import_module(path)
    inner = getattr(module, function)
    wrapper = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    monkeypatch.setattr(module, function, wrapper)
    ENGINE.apply(only=ON)
    for patch in ("layer_norms", "skinny_gemm", "pdl"):
        assert ENGINE.runs[patch].state == states.CONFLICT, (patch, ENGINE.runs[patch].reason)
