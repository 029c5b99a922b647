"""A decoder layer in code of torch.compile (``--enable-torch-compile``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.ports.any import feed_forward_few
from gemma4_turbo.runtime.custom_ops import TRACED
from tests.cpu import forward_batch, interpreted
from tests.cpu.ports import reasons
from tests.cpu.ports.v0_5_23 import models

pytestmark = interpreted.MARKS
TOKENS = 2
NAMES = {
    *("layer_norms", "ple_tail", "input_norm", "experts_sum", "mlp_stream", "pdl"),
    *("router_few", "skinny_gemm", "qkv_proj", "rope_store"),
}


@pytest.fixture(autouse=True)
def stock(tmp_path: Any) -> Iterator[None]:
    """Stock at first; reverted at the end, with nothing compiled left."""
    with models.stock(tmp_path):
        yield
    torch.compiler.reset()


def compiled(layer: Any) -> torch.Tensor:
    """One step, traced and run; twice, as the second finds the first one's code."""
    from sglang.srt.layers.layer_boundary.residual import batch as residual

    torch.compiler.reset()
    step = torch.compile(layer.forward, dynamic=False, backend="aot_eager")
    found = []
    for _ in range(2):
        x = torch.linspace(-1, 1, TOKENS * 256).bfloat16().view(TOKENS, 256)
        wide = x.flip(0).contiguous() if layer.has_ple else None
        given = forward_batch.prefill()
        residual.start(given)
        residual.set_written(x, given)
        found.append(step(torch.arange(TOKENS), x, wide, given))
    assert torch.equal(*found)
    return found[0]


@pytest.mark.parametrize("kind", ["moe", "ple"])
def test_a_layer_is_traced_and_says_what_is_stocks(kind: str):
    """Without an exception, within rounding of stock's layer that is compiled as well."""
    layer = models.build(kind).layers[0]
    expected = compiled(layer)
    found: list[torch.Tensor] = []
    silent = reasons.silent(lambda: found.append(compiled(layer)), NAMES)
    difference = (found[0].float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference < 0.06
    said = {name: reasons.of(name) for name in NAMES}
    assert not any("of its own" in each for each in said.values()), said  # what a trace mistakes
    # The next layer's norm comes with the next layer, and there is none.
    assert set(silent) <= {"input_norm"}, said
    for name in ("router_few", "mlp_stream") if kind == "moe" else ("skinny_gemm",):
        # The norms are not compared in a trace, and the router's product follows them.
        assert said[name].endswith((TRACED, feed_forward_few.NO_NORMS)), said
