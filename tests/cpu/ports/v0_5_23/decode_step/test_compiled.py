"""A decoder layer in code of torch.compile (``--enable-torch-compile``)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import ExplainWithBackend

from gemma4_turbo.instance import ENGINE
from gemma4_turbo.runtime.custom_ops import TRACED
from tests.cpu import forward_batch, interpreted
from tests.cpu.ports import reasons
from tests.cpu.ports.counted import counted
from tests.cpu.ports.v0_5_23 import models

pytestmark = interpreted.MARKS
TOKENS = 2
NAMES = {
    *("layer_norms", "ple_tail", "input_norm", "experts_sum", "mlp_stream", "pdl"),
    *("router_few", "skinny_gemm", "mlp_few", "qkv_proj", "rope_store"),
}


@pytest.fixture(autouse=True)
def stock(tmp_path: Any) -> Iterator[None]:
    """Stock at first; reverted at the end, with nothing compiled left."""
    with models.stock(tmp_path):
        yield
    torch.compiler.reset()


def step(layer: Any, forward: Any) -> torch.Tensor:
    from sglang.srt.layers.layer_boundary.residual import batch as residual

    x = torch.linspace(-1, 1, TOKENS * 256).bfloat16().view(TOKENS, 256)
    wide = x.flip(0).contiguous() if layer.has_ple else None
    given = forward_batch.prefill()
    residual.start(given)
    residual.set_written(x, given)
    found: torch.Tensor = forward(torch.arange(TOKENS), x, wide, given)
    return found


def compiled(layer: Any, backend: Any = "aot_eager") -> torch.Tensor:
    """One step, traced and run; twice, as the second finds the first one's code."""
    torch.compiler.reset()
    forward = torch.compile(layer.forward, dynamic=False, backend=backend)
    found, again = step(layer, forward), step(layer, forward)
    assert torch.equal(found, again)
    return found


@functools.cache
def stocks(kind: str) -> torch.Tensor:
    """Of stock's layer, compiled as well: called while no patch is in. A trace takes 9 s of a core."""
    return compiled(models.build(kind).layers[0])


# Eager first: a trace compares nothing with stock. Both kinds: each has a patch that the other has not.
@pytest.mark.parametrize(("kind", "eager_first"), [("moe", False), ("moe", True), ("ple", True)])
def test_a_layer_is_traced_and_says_what_is_stocks(kind: str, eager_first: bool):
    """Without an exception, within rounding of stock's layer that is compiled as well."""
    expected = stocks(kind)
    layer = models.build(kind).layers[0]
    ENGINE.apply(only=[*NAMES, "qkv_norm"])
    if eager_first:
        step(layer, layer.forward)
    operators = ["layer_norms", "rope_store", *(["ple_tail"] if kind == "ple" else [])]
    before = [counted(name).engaged for name in operators]
    found: list[torch.Tensor] = []
    silent = reasons.silent(lambda: found.append(compiled(layer)), NAMES)
    difference = (found[0].float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference < 0.06
    said = {name: reasons.of(name) for name in NAMES}
    assert not any("of its own" in each for each in said.values()), said  # what a trace mistakes
    # The next layer's norm comes with the next layer, and there is none.
    assert set(silent) <= {"input_norm"}, said
    assert said["skinny_gemm"].endswith(TRACED), said
    assert kind == "moe" or said["mlp_few"].endswith(TRACED), said
    ran = [counted(name).engaged > was for name, was in zip(operators, before, strict=True)]
    assert ran == [eager_first] * len(operators), said


def test_a_declined_layer_breaks_no_graph_of_its_own():
    """SGLang's boundaries break the graph of a layer, which runs around them. Bits as stock's."""
    expected = stocks("moe")
    layer: Any = models.build("moe").layers[0]
    own = layer._next_stream
    layer._next_stream = lambda *args: own(*args)  # whatever the call, the layer is stock's
    ENGINE.apply(only=[*NAMES, "qkv_norm"])
    reasons.forget()
    noting = ExplainWithBackend("eager")
    assert torch.equal(compiled(layer, noting), expected)
    told: Any = noting.output()
    # SGLang's cached properties take a lock in Python 3.11: a frame of functools is its caller's.
    stacks = [[frame.filename for frame in reason.user_stack] for reason in told.break_reasons]
    places = [[file for file in stack if file != functools.__file__][-1] for stack in stacks]
    assert places
    assert all("/sglang/" in place for place in places), places
    for name in ("layer_norms", "mlp_stream", "experts_sum"):
        assert "_next_stream of its own" in reasons.of(name)
