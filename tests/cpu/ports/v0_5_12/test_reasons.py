"""No patch is silently inactive: what a model or a server gives it nothing to do for is in its row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cpu import interpreted
from tests.cpu.ports import reasons
from tests.cpu.ports.v0_5_12.decode_step import test_forwards as forwards
from tests.cpu.ports.v0_5_12.decode_step.test_forwards import applied, no_grad  # noqa: F401 - fixtures of every test here

pytestmark = interpreted.MARKS
# Another patch runs what `router_norm` would, see `forwards.WITHOUT`; the others are not on this line.
OF_LAYERS = reasons.OF_LAYERS - {"router_norm", "router_few"}


@pytest.fixture(autouse=True)
def said() -> Iterator[None]:
    reasons.forget()
    yield
    reasons.forget()


# A dense layer lacks experts and per-layer embeddings, one with experts the latter, "ple" experts.
@pytest.mark.parametrize("kind", ["moe", "ple", "dense"])
def test_every_patch_of_a_layer_has_run_or_says_why_not(kind: str, monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.server_args import get_global_server_args

    model = forwards.build(kind)
    monkeypatch.setattr(get_global_server_args(), "disable_piecewise_cuda_graph", True)
    rows = reasons.silent(lambda: forwards.run(model, 2), OF_LAYERS | {"yoco_piecewise"})
    assert rows == []
    reasons.check_absent(kind)


def test_what_is_between_two_layers_is_stocks():
    reasons.check_between(forwards.build("ple"), forwards.run)
