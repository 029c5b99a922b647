"""Forward hooks on whatever a fusion goes round: called, and obeyed, as under stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import skinny_gemm
from gemma4_turbo.runtime import hooks
from tests.cpu.ports.v0_5_12.decode_step import test_forwards as forwards
from tests.cpu.ports.v0_5_12.decode_step.test_forwards import applied, no_grad  # noqa: F401 - fixtures of every test here

# One name for each module that some fusion does not call, or calls on something else than stock does.
# Linear layers in a run of their own: with `skinny_gemm` other functions call what is between them.
WHERE = {
    ("dense", "fusions"): (
        "",
        "input_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.q_norm",
        "self_attn.v_norm",
        "self_attn.rotary_emb",
        "self_attn.attn",
    ),
    ("dense", "linear"): (
        "mlp",
        "mlp.gate_up_proj",
        "mlp.act_fn",
        "mlp.down_proj",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
    ),
    ("moe", "fusions"): (
        "router",
        "router.norm",
        "moe",
        "moe.experts",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_1",
    ),
    ("ple", "fusions"): ("post_per_layer_input_norm", "per_layer_input_gate"),
}
PATCHES: dict[str, dict[str, Any]] = {
    "fusions": {"skip": ["skinny_gemm"]},
    "linear": {"only": ["skinny_gemm", "qkv_norm"]},
}


@pytest.fixture(autouse=True)
def products_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called is compared here: the kernel's own sums, in `test_forwards` and its own tests."""

    def launch(x: Any, weight: Any, config: Any, epilogue: Any, extra: Any, arrived: Any) -> Any:
        return skinny_gemm.reference_skinny_gemm(x, weight, epilogue, extra)

    monkeypatch.setattr(skinny_gemm, "launch_skinny_gemm", launch)


class Seen:
    """A hook that counts, keeps the shapes of what it sees, and bends the first tensor of a result."""

    def __init__(self) -> None:
        self.shapes: list[Any] = []

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        self.shapes.append([_shapes(args), _shapes(output)])
        return _bent(output)


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return [_shapes(part) for part in value if isinstance(part, torch.Tensor | tuple | list)]
    return None


def _bent(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0:
        ramp = torch.linspace(-0.5, 0.5, value.shape[-1], dtype=torch.float32)
        return (value.float() * 0.5 + ramp).to(value.dtype)
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        rest = value[1:]
        if hasattr(value, "_replace"):  # a named tuple of the top-k
            return None
        return (_bent(value[0]), *rest)
    return None


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def hooked(model: Any, register: Callable[[Any], Any]) -> tuple[torch.Tensor, Any]:
    """The model's result with the hook, and what the hook saw."""
    seen = Seen()
    handle = register(seen)
    found = forwards.run(model, tokens=1)
    handle.remove()
    return found, seen.shapes


def compare(
    model: Any,
    hooks_of: dict[str, Callable[[Any], Any]],
    patches: str = "fusions",
    warm: bool = True,
) -> None:
    """One hook after another: stock's result and calls are the patched model's."""
    ENGINE.revert()
    stock = {what: hooked(model, register) for what, register in hooks_of.items()}
    ENGINE.apply(**PATCHES[patches])
    if warm:
        forwards.run(model, tokens=1)  # the hooks come when sites and verdicts are there
    for what, register in hooks_of.items():
        found, shapes = hooked(model, register)
        expected, stocks = stock[what]
        assert shapes == stocks, what
        assert distance(found, expected) < 0.06, what


@pytest.mark.parametrize(("kind", "patches"), WHERE)
def test_a_hook_sees_and_changes_what_it_does_under_stock(kind: str, patches: str):
    """On the first layer of two, registered when the model has run already."""
    model = forwards.build(kind)
    hooks_of = {
        where: model.layers[0].get_submodule(where).register_forward_hook
        for where in WHERE[kind, patches]
    }
    compare(model, hooks_of, patches)


def test_a_hook_that_is_there_first_and_one_before_a_call():
    model = forwards.build("dense")
    norm = model.layers[1].post_attention_layernorm
    compare(model, {"norm": norm.register_forward_hook}, warm=False)

    def pre(seen: Seen) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            seen.shapes.append(sorted(kwargs))
            return args, {**kwargs, "hidden_states": _bent(kwargs["hidden_states"])}

        return model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)

    compare(model, {"a pre-hook, which sees stock's arguments and no others": pre})


def test_a_hook_for_all_modules():
    """As a debugger registers it: ``register_module_forward_hook``."""
    from torch.nn.modules.module import register_module_forward_hook

    model = forwards.build("moe")

    def register(seen: Seen) -> Any:
        return register_module_forward_hook(
            lambda module, args, output: seen.shapes.append(type(module).__name__)
        )

    compare(model, {"all modules": register})


def test_a_forward_that_was_set_on_the_module():
    """As accelerate does: no hook in torch's sense, and called all the same."""
    model = forwards.build("dense")
    norm = model.layers[0].post_attention_layernorm

    def register(seen: Seen) -> Any:
        stock = type(norm).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return seen(norm, args, stock(norm, *args, **kwargs))

        norm.forward = forward

        class Handle:
            @staticmethod
            def remove() -> None:
                del norm.__dict__["forward"]

        return Handle

    compare(model, {"norm.forward": register})


def test_what_declines_says_so():
    model = forwards.build("dense")
    ENGINE.apply(**PATCHES["fusions"])
    model.layers[0].self_attn.rotary_emb.register_forward_hook(lambda *args: None)
    ENGINE.runs["rope_store"]._decline_reason = ""
    forwards.run(model, tokens=1)
    assert "forward hooks" in ENGINE.runs["rope_store"].full_reason()
    assert ENGINE.runs["qkv_norm"].counters.engaged > 0


def test_a_module_in_the_place_of_another_ends_the_site():
    """A wrapper that comes when the layer has run: it is called, whatever it is made of."""
    model = forwards.build("dense")
    ENGINE.apply()
    forwards.run(model, tokens=1)
    layer = model.layers[0]

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            self.calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.inner(*args, **kwargs)

    places = ("post_attention_layernorm", "post_feedforward_layernorm", "mlp")
    for place in places:
        setattr(layer, place, Wrapper(getattr(layer, place)))
    for place in ("qkv_proj", "rotary_emb", "q_norm", "o_proj"):
        setattr(layer.self_attn, place, Wrapper(getattr(layer.self_attn, place)))
    found = forwards.run(model, tokens=1)
    wrapped = [m for m in model.modules() if isinstance(m, Wrapper)]
    # Stock reads q_norm's scale_shift on a GPU only: here it is called as any other.
    assert [m.calls for m in wrapped] == [1] * len(wrapped)
    ENGINE.revert()
    assert distance(found, forwards.run(model, tokens=1)) < 0.06


def test_watched_sees_hooks_that_come_and_go():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    watched = hooks.Watched([module])
    assert not watched.hooked()
    handle = module[0].register_forward_pre_hook(lambda *args: None)
    assert watched.hooked()
    assert hooks.hooked(module[0])
    assert not hooks.hooked(module)
    handle.remove()
    assert not watched.hooked()
