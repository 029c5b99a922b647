"""Other packages' wrappers on what a patch relies on or goes round are told, and not bypassed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import wrapt

from gemma4_turbo.catalogue import by_name
from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.instance import ENGINE
from tests.cpu.conftest import patched_sglang, state_by_default


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory):
        yield


@pytest.fixture(autouse=True)
def stock() -> Iterator[None]:
    ENGINE.revert()
    yield
    ENGINE.revert()


def resolve(target: str) -> tuple[Any, str]:
    module, _, qualname = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = qualname.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def plain(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs)


class Called:
    """A wrapper that is no function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def proxy(function: Any) -> Any:
    """Which says of itself that it is the function."""
    return wrapt.FunctionWrapper(function, lambda f, instance, args, kwargs: f(*args, **kwargs))


# Where a release keeps the kernels of Gemma 4's layers.
OPS = "sglang.kernels.ops.layernorm.gemma4_fused_ops"
if fingerprints.installed_source(OPS) is None:
    OPS = "sglang.srt.layers.gemma4_fused_ops"
KINDS = (wrapped, plain, Called, functools.partial, functools.lru_cache, proxy)


# The KV pool's store, linear and activation methods, norms, the router, a forward that is inherited, a
# function behind a decorator: what the patches of the second column go round.
CASES = {
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer": "rope_store",
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply": "skinny_gemm",
    "sglang.srt.layers.activation:GeluAndMul.forward_cuda": "skinny_gemm",
    "sglang.srt.layers.linear:ColumnParallelLinear.forward": "qkv_proj",
    "sglang.srt.layers.layernorm:RMSNorm.forward_cuda": "layer_norms",
    "sglang.srt.layers.layernorm:RMSNorm.forward": "input_norm",
    "sglang.srt.models.gemma3_causal:Gemma3MLP.forward": "skinny_gemm",
    "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.forward_impl": "experts_sum",
    "sglang.srt.layers.radix_attention:RadixAttention.forward": "rope_store",
    "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_cuda": "rope_store",
}


@pytest.mark.parametrize("how", [wrapped, plain])
@pytest.mark.parametrize(("target", "patch"), CASES.items())
def test_before_the_installation(
    target: str, patch: str, how: Any, monkeypatch: pytest.MonkeyPatch
):
    owner, name = resolve(target)
    monkeypatch.setattr(owner, name, how(getattr(owner, name)), raising=False)
    ENGINE.apply(only=[patch, *by_name(patch).requires])
    run = ENGINE.runs[patch]
    assert run.state == states.CONFLICT
    assert ".".join(target.partition(":")[2].split(".")[-2:]) in run.reason
    assert not run.swaps


@pytest.mark.parametrize("how", KINDS)
def test_a_method_that_a_class_is_known_to_take_from_its_base(
    how: Any, monkeypatch: pytest.MonkeyPatch
):
    """Somebody has put one on the class: before the installation, and when the model stands."""
    owner, name = resolve("sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward")
    run = ENGINE.runs["rope_store"]
    wanted = ["rope_store", *by_name("rope_store").requires]
    ENGINE.apply(only=wanted)
    assert run.state == states.ACTIVE
    monkeypatch.setattr(owner, name, how(getattr(owner, name)), raising=False)
    ENGINE.look_at_neighbours()
    assert run.state == states.CONFLICT
    assert "TritonAttnBackend.forward" in run.reason
    ENGINE.revert()
    ENGINE.apply(only=wanted)
    assert run.state == states.CONFLICT
    assert not run.swaps


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(
    ("target", "patch"),
    [
        ("sglang.srt.layers.layernorm:RMSNorm.forward_cuda", "layer_norms"),
        ("sglang.srt.models.gemma4_causal:gemma_qkv_rmsnorm", "rope_store"),
        (f"{OPS}:_gemma_qkv_rmsnorm_kernel", "rope_store"),
    ],
)
def test_whatever_the_wrapper_is(
    target: str, patch: str, how: Any, monkeypatch: pytest.MonkeyPatch
):
    """On a method, a function that is imported from elsewhere, and a kernel."""
    owner, name = resolve(target)
    monkeypatch.setattr(owner, name, how(getattr(owner, name)))
    ENGINE.apply(only=[patch, *by_name(patch).requires])
    assert ENGINE.runs[patch].state == states.CONFLICT


def test_how_modules_are_called(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.layers.layernorm import RMSNorm

    monkeypatch.setattr(RMSNorm, "__call__", wrapped(RMSNorm.__call__), raising=False)
    ENGINE.apply(only=["layer_norms"])
    assert ENGINE.runs["layer_norms"].state == states.CONFLICT
    assert "RMSNorm.__call__" in ENGINE.runs["layer_norms"].reason


@pytest.mark.parametrize(("target", "patch"), list(CASES.items())[:4])
def test_when_the_model_stands(target: str, patch: str, monkeypatch: pytest.MonkeyPatch):
    """As SGLang applies other plugins' hooks: after ours were registered."""
    ENGINE.apply(only=[patch, *by_name(patch).requires])
    assert ENGINE.runs[patch].state == states.ACTIVE
    owner, name = resolve(target)
    monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    ENGINE.look_at_neighbours()
    assert ENGINE.runs[patch].state == states.CONFLICT
    assert not ENGINE.runs[patch].swaps


def test_sglangs_own_registry(monkeypatch: pytest.MonkeyPatch):
    """Also on a name that a module only imports, whose source says nothing."""
    from sglang.srt.layers import layernorm
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(layernorm, "rmsnorm", lambda x, *rest: x, raising=False)
    HookRegistry.register(
        "sglang.srt.layers.layernorm.rmsnorm", lambda f, *a, **k: f(*a, **k), HookType.AROUND
    )
    HookRegistry.apply_hooks()
    ENGINE.apply()
    for patch in ("layer_norms", "input_norm", "router_norm"):
        if state_by_default(by_name(patch)) == states.UPSTREAMED:
            continue
        assert ENGINE.runs[patch].state == states.CONFLICT
        assert "HookRegistry" in ENGINE.runs[patch].reason
    assert ENGINE.runs["qkv_proj"].state == states.ACTIVE


def test_a_class_in_the_place_of_stocks(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.mem_cache import memory_pool

    class Pool(memory_pool.MHATokenToKVPool):  # type: ignore[misc]
        pass

    monkeypatch.setattr(memory_pool, "MHATokenToKVPool", Pool)
    ENGINE.apply(only=["rope_store", "qkv_norm"])
    assert ENGINE.runs["rope_store"].state == states.CONFLICT


def test_nothing_is_told_of_stock_and_of_our_own():
    ENGINE.apply()
    ENGINE.give_up_waiting()
    ENGINE.look_at_neighbours()
    for row in ENGINE.status():
        assert row.state == state_by_default(by_name(row.name)), row
