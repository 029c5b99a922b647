"""Clamps that bound nothing are left out of SGLang's clippable linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.vision import vision_clamps as patch
from gemma4_turbo.runtime import custom_ops, weights
from tests.cpu import vision
from tests.cpu.conftest import only_patch, patched_sglang

NAME = "vision_clamps"


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        sglang_process.prepare_sglang()
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME), torch.no_grad():
        yield


class Clamps(TorchDispatchMode):
    """Counts clamps and read-backs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "clamp" in str(function)
        return function(*args, **(kwargs or {}))


def layer(name: str) -> Any:
    from sglang.srt.layers import clippable_linear as stock

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = {
            "row": lambda: stock.ClippableRowParallelLinear(16, 8),
            "column": lambda: stock.ClippableColumnParallelLinear(16, 8),
            "qkv": lambda: stock.ClippableQKVParallelLinear(16, 4, 2, 1),
            "gate_up": lambda: stock.ClippableGateUpParallelLinear(16, 12),
        }[name]()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.uniform_(-1, 1, generator=generator)
    return made


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
X[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, -0.0, torch.nan])
LAYERS = {"row": patch.ROW, "column": patch.COLUMN, "qkv": patch.QKV, "gate_up": patch.GATE_UP}


def bits(out: Any) -> list[torch.Tensor]:
    outs = out if isinstance(out, tuple) else (out,)
    return [x.contiguous().view(torch.int16) for x in outs]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bounded", ["none", "first", "last", "all", "low only", "crossed"])
def test_every_bit_is_stocks(name: str, bounded: str):
    """Infinities, NaN and signed zeros included; only pairs that bound something are clamped."""
    made = layer(name)
    pairs = patch.PAIRS[LAYERS[name]]
    chosen = {
        "none": (),
        "first": pairs[:1],
        "last": pairs[-1:],
        "all": pairs,
        "low only": pairs[:1],
        "crossed": pairs[:1],
    }[bounded]
    for pair in chosen:
        low, high = (-0.5, 0.75) if bounded != "low only" else (-0.5, torch.inf)
        if bounded == "crossed":
            low, high = torch.inf, torch.inf
        getattr(made, f"{pair}_min").fill_(low)
        getattr(made, f"{pair}_max").fill_(high)
    run = ENGINE.runs[NAME]
    before = run.counters.engaged
    made(X)
    with Clamps() as clamps:
        found = made(X)
    assert clamps.count == len(chosen)
    assert run.counters.engaged - before == (0 if bounded == "all" else 2)
    if bounded == "all":
        assert "finite" in run.full_reason()
    ENGINE.revert()
    with Clamps() as clamps:
        expected = made(X)
    assert clamps.count == len(pairs)
    assert all(a.equal(b) for a, b in zip(bits(found), bits(expected), strict=True))


def test_the_bounds_are_read_once_and_again_after_a_load(monkeypatch: pytest.MonkeyPatch):
    """Weights arrive through ``load_weights``, in place, also when the model serves already."""
    model = vision.model("triton_attn")
    linear = model.vision_tower.encoder.layers[0].self_attn.o_proj
    reads = []
    read = patch.read_bounds
    monkeypatch.setattr(patch, "read_bounds", lambda *a: reads.append(a) or read(*a))
    x = torch.randn(1, 3, 64).bfloat16()
    free = linear(x)
    linear(x)
    assert len(reads) == 1
    name = "model.vision_tower.encoder.layers.0.self_attn.o_proj.output_max"
    before = linear.output_max.clone()
    try:
        model.load_weights([(name, torch.tensor(0.01))])
        assert float(linear.output_max) == pytest.approx(0.01, rel=1e-2)
        found = linear(x)
        assert len(reads) == 2
        assert float(found.max()) <= float(linear.output_max) < float(free.max())
        ENGINE.revert()
        assert torch.equal(found, linear(x))
    finally:
        linear.output_max.copy_(before)


def test_a_capture_reads_nothing_back(monkeypatch: pytest.MonkeyPatch):
    """Bounds that were not read before it: stock's clamps are captured."""
    made = layer("row")
    monkeypatch.setattr(custom_ops, "capturing", lambda: True)
    monkeypatch.setattr(patch, "read_bounds", None)
    with Clamps() as clamps:
        made(X)
    assert clamps.count == 2
    assert "before the capture" in ENGINE.runs[NAME].full_reason()


def test_the_whole_encoder():
    """Stock's bits, and eleven clamps a layer fewer."""
    model, item = vision.model("triton_attn"), vision.image(4, 4)
    with Clamps() as clamps:
        found = model.get_image_feature([item])
    ENGINE.revert()
    with Clamps() as stock:
        expected = model.get_image_feature([item])
    assert stock.count - clamps.count == 2 * 11
    assert torch.equal(found, expected)


def in_place(made: Any) -> None:
    made.output_max.fill_(0.01)


def in_inference_mode(made: Any) -> None:
    with torch.inference_mode():
        made.output_max.fill_(0.01)


def replaced(made: Any) -> None:
    made.output_max = torch.tensor(0.01)


def moved(made: Any) -> None:
    made.output_max.fill_(0.01)
    made._apply(lambda tensor: tensor.clone())


def loaded(made: Any) -> None:
    """As SGLang's ``default_weight_loader``, whose callers tell `weights`."""
    made.output_max.data.copy_(torch.tensor(0.01))
    weights.written()


def as_data(made: Any) -> None:
    made.output_max.data = torch.tensor(0.01)
    weights.written()


@pytest.mark.parametrize("write", [in_place, in_inference_mode, replaced, moved, loaded, as_data])
def test_bounds_that_anybody_wrote_are_read_again(write: Any):
    made = layer("row")
    x = torch.full((1, 16), 3.0).bfloat16()
    free = made(x)
    write(made)
    found = made(x)
    assert float(found.max()) == pytest.approx(0.01, rel=1e-2)
    assert float(free.max()) > 1
    ENGINE.revert()
    assert torch.equal(found, made(x))


def test_bounds_made_in_inference_mode_are_stocks():
    """They do not count what is written to them."""
    made = layer("row")
    with torch.inference_mode():
        made.output_max = torch.tensor(torch.inf)
    with Clamps() as clamps:
        made(X)
    assert clamps.count == 2
    assert "do not tell" in ENGINE.runs[NAME].full_reason()


def test_a_captured_clamp_is_not_decided_on_old_bounds(monkeypatch: pytest.MonkeyPatch):
    made = layer("row")
    made(X)
    made.output_max.fill_(0.01)
    monkeypatch.setattr(custom_ops, "capturing", lambda: True)
    with Clamps() as clamps:
        made(X)
    assert clamps.count == 2


def test_a_hook_inside_gets_stocks_copy():
    """What it does in place is nothing that the caller's tensor is to show."""
    made = layer("row")
    x = X.clone()

    def zeroed(module: Any, given: Any) -> None:
        given[0].zero_()

    with made.linear.register_forward_pre_hook(zeroed):
        made(x)
    assert torch.equal(x.nan_to_num(), X.nan_to_num())
    assert "linear has forward hooks" in ENGINE.runs[NAME].full_reason()


def test_bounds_that_cannot_be_read_are_stocks(monkeypatch: pytest.MonkeyPatch):
    made = layer("row")
    tries = []

    def fails(*given: Any) -> Any:
        tries.append(given)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(patch, "read_bounds", fails)
    for _ in range(2):
        with Clamps() as clamps:
            made(X)
        assert clamps.count == 2
    assert len(tries) == 1
    run = ENGINE.runs[NAME]
    assert run.state == states.FAILED
    assert "no memory" in run.reason
