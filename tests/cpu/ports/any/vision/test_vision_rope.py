"""The vision encoder's rotation in one launch: Triton's interpreter against stock's function."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import vision_rope as kernel
from gemma4_turbo.ports.any.vision import vision_rope as patch
from gemma4_turbo.runtime import custom_ops
from tests.cpu import vision
from tests.cpu.conftest import only_patch, patched_sglang

NAME = "vision_rope"
DTYPES = pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")  # infinities are meant


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME), torch.no_grad():
        yield


def stock() -> Any:
    return ENGINE.runs[NAME].swaps[0].function


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 4), (5, 3, 8), (33, 2, 64), (17, 12, 72)])
def test_every_bit_is_stocks(dtype: torch.dtype, shape: tuple[int, int, int]):
    """Signed zeros and infinities included; head sizes that no block divides."""
    tokens, heads, head_dim = shape
    x, cos, sin = patch.samples("cpu", dtype, heads, head_dim, tokens)
    x[0, 0, :3] = torch.tensor([-0.0, torch.inf, 0.0])
    expected = stock()(x, cos, sin)
    found = kernel.vision_rope(x, cos, sin)
    same = (bits(found) == bits(expected)) | (found.isnan() & expected.isnan())
    assert bool(same.all())
    reference = kernel.reference_vision_rope(x, cos, sin)
    same = (bits(reference) == bits(expected)) | (reference.isnan() & expected.isnan())
    assert bool(same.all())


def test_the_whole_encoder_is_stocks_bit_for_bit():
    model = vision.model("triton_attn")
    items = [vision.image(4, 4), vision.image(4, 2, 8, seed=1)]
    before = ENGINE.runs[NAME].counters.engaged
    found = model.get_image_feature(items)
    assert ENGINE.runs[NAME].counters.engaged - before == 2 * 2 * 2  # images, layers, Q and K
    ENGINE.revert()
    assert torch.equal(found, model.get_image_feature(items))


def tensors(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return patch.samples("cpu", dtype, 2, 8, 3)


DECLINES = [
    ("bf16 or fp16", lambda x, c, s: (x.float(), c.float(), s.float())),
    ("bf16 or fp16", lambda x, c, s: (x, c.half(), s.half())),
    ("multiple of 4", lambda x, c, s: (x[..., :6], c[..., :6], s[..., :6])),
    ("multiple of 4", lambda x, c, s: (x[:0], c[:0], s[:0])),
    ("head_dim", lambda x, c, s: (x, c.expand(-1, 2, -1), s.expand(-1, 2, -1))),
    ("contiguous", lambda x, c, s: (x.transpose(0, 1).contiguous().transpose(0, 1), c, s)),
]


@pytest.mark.parametrize(("reason", "change"), DECLINES)
def test_everything_else_takes_stocks_path(reason: str, change: Any):
    from sglang.srt.models import gemma4_vision

    arguments = change(*tensors())
    before = ENGINE.runs[NAME].counters.engaged
    found = gemma4_vision._apply_multidimensional_rope(*arguments)
    assert ENGINE.runs[NAME].counters.engaged == before
    assert reason in ENGINE.runs[NAME].full_reason()
    assert torch.equal(found, stock()(*arguments))
    with pytest.raises(ValueError, match=reason):
        kernel.vision_rope(*arguments)


def test_a_wrong_kernel_is_refused_and_stock_runs(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.models import gemma4_vision

    run = ENGINE.runs[NAME]
    assert all(check.passed for check in patch.verify(run, "cpu"))
    right = kernel.launch_vision_rope
    monkeypatch.setattr(kernel, "launch_vision_rope", lambda x, cos, sin: right(x, sin, cos))
    assert not any(check.passed for check in patch.verify(run, "cpu"))
    arguments = tensors()
    assert torch.equal(gemma4_vision._apply_multidimensional_rope(*arguments), stock()(*arguments))
    assert run.state == states.FAILED
    assert "differ from stock" in run.reason


def test_nothing_is_compared_inside_a_capture(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.models import gemma4_vision

    monkeypatch.setattr(custom_ops, "capturing", lambda: True)
    monkeypatch.setattr(patch, "differing", None)
    gemma4_vision._apply_multidimensional_rope(*tensors())
    assert "before the capture" in ENGINE.runs[NAME].full_reason()


def test_a_launch_that_raises_is_stocks(monkeypatch: pytest.MonkeyPatch):
    """After a comparison that went well, too: another length is another variant of the kernel."""
    x, cos, sin = patch.samples("cpu", torch.float16, 2, 64)
    run, tries = ENGINE.runs[NAME], []
    rotate = sys.modules["sglang.srt.models.gemma4_vision"]._apply_multidimensional_rope
    expected = rotate(x, cos, sin)
    before = run.counters.engaged

    def fails(*given: Any) -> torch.Tensor:
        tries.append(given)
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(kernel, "launch_vision_rope", fails)
    for _ in range(2):
        assert torch.equal(rotate(x, cos, sin), expected)
    assert len(tries) == 1
    assert run.counters.engaged == before
    assert run.state == states.FAILED
    assert "shared memory" in run.reason
    assert torch.equal(rotate(x[:, :1].contiguous(), cos, sin), stock()(x[:, :1], cos, sin))
    assert len(tries) == 2  # other heads are another configuration
