"""Every operator writes the arguments that its schema says it writes, nothing else, and returns none of them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import run
from gemma4_turbo.fusions import ple_tail
from gemma4_turbo.kernels.norms.rmsnorm import Kind
from gemma4_turbo.ports.any.decode_step import step_prologue
from gemma4_turbo.ports.v0_5_12.experts import router
from tests import router_inputs
from tests.cpu.conftest import REPOSITORY
from tests.fusion_cases import EPS, Draw, case, tail
from tests.op_schemas import checked

SCHEMA = re.compile(r"(\w+)\(.*\) -> .+")
# They run inside of SGLang's own forward; `tests.cpu.ports.v0_5_12.prefill` checks them there.
OF_A_BATCH = {"shared_kv_attention", "shared_kv_layers"}


@pytest.fixture(autouse=True)
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators count their calls with the runs of this process's patches."""
    nobody = SimpleNamespace(engaged=lambda captured: None)
    monkeypatch.setattr(run, "RUNS", defaultdict(lambda: nobody))


def of_fusion(name: str, unsummed: bool = False) -> None:
    """By the call that traced code makes."""
    fusion, args = case(name, "cpu")
    if unsummed:
        args = tail(Draw("cpu"), 512, "unsummed", True)
    fusion.op = partial(checked, fusion.operator())
    fusion.traced(args, Kind.PRECISE)


def norm_add(following: bool, scaled: bool) -> None:
    draw = Draw("cpu")
    x, residual, weight = draw.rows(3, 512), draw.rows(3, 512), draw.weight(512)
    more = draw.weight(512) if following else None, EPS, Kind.PRECISE
    scalar = draw.scalar(0.7) if scaled else None
    checked(ple_tail.norm_add_op(), x, weight, EPS, residual, scalar, *more)


def gelu_mul() -> None:
    draw = Draw("cpu")
    checked(ple_tail.gelu_mul_op(), draw.rows(3, 256), draw.rows(3, 256))


def gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_prologue, "embedding_unfit", lambda: None)  # it imports SGLang
    step_prologue.gather_method(run.peer(step_prologue.NAME), print)
    ids, table = step_prologue.gather_inputs(torch.Generator().manual_seed(0), torch.bfloat16)
    checked(torch.ops.gemma4_turbo.gather_per_layer.default, ids, table, 16.0, 40)


def project(with_inputs: bool) -> None:
    step_prologue.project_method(run.peer(step_prologue.NAME), print, lambda *args: None)
    generator = torch.Generator().manual_seed(0)
    args = step_prologue.project_inputs(generator, torch.bfloat16, 6, 4)
    if not with_inputs:
        args = (*args[:4], None, None)
    checked(torch.ops.gemma4_turbo.project_per_layer.default, *args)


def routing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = router_inputs.logits("wide", 4, 128, 8, torch.bfloat16, generator)
    checked(router._custom_op(), logits, Draw("cpu").weight(128), 8)


RUNS: dict[str, list[Callable[..., None]]] = {
    "layer_norms": [
        partial(of_fusion, "layer_norms"),
        partial(of_fusion, "layer_norms, router"),
        partial(of_fusion, "layer_norms, folded router"),
    ],
    "router_norm": [partial(of_fusion, "router_norm")],
    "layer_tail": [
        partial(of_fusion, "input_norm"),
        partial(of_fusion, "input_norm, experts"),
        partial(of_fusion, "experts_sum", True),
    ],
    "qkv": [
        partial(of_fusion, "qkv_norm"),
        partial(of_fusion, "qkv_norm, shared KV"),
        partial(of_fusion, "rope_store"),
        partial(of_fusion, "rope_store, shared KV"),
    ],
    "norm_add": [
        partial(of_fusion, "ple_tail, next norm"),
        partial(norm_add, False, False),
        partial(norm_add, False, True),
        partial(norm_add, True, False),
    ],
    "gelu_mul": [gelu_mul],
    "gather_per_layer": [gather],
    "project_per_layer": [partial(project, True), partial(project, False)],
    "fused_routing": [routing],
}


def schemas() -> list[str]:
    """The names of the operators whose schema is written anywhere in the package."""
    found = [
        SCHEMA.fullmatch(node.value)
        for path in (REPOSITORY / "gemma4_turbo").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [match[1] for match in found if match]


def test_every_operator_is_run():
    assert sorted(schemas()) == sorted(RUNS.keys() | OF_A_BATCH)


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name in RUNS for number in range(len(RUNS[name]))]
)
def test_an_operator_writes_what_its_schema_says(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
):
    """One layout of arguments after the other: with what is optional and without."""
    example = RUNS[name][number]
    example(monkeypatch) if example is gather else example()


# -- the check itself ------------------------------------------------------------------------------


class Operator:
    """A schema, and a function in plain torch."""

    def __init__(self, schema: str, function: Callable[..., Any]) -> None:
        self._schema, self.function = torch._C.parse_schema(schema), function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


BOTH = "x(Tensor(a!) a, Tensor b) -> Tensor"


@pytest.mark.parametrize(
    ("told", "function"),
    [
        (r"\['b'\]", lambda a, b: b.neg_()),
        (r"\['a', 'b'\]", lambda a, b: a.add_(1) + b.add_(1)),
        (r"\[\]", lambda a, b: a + b),  # a schema that says too much orders what needs no order
        (r"\['a', 'b'\]", lambda a, b: a.as_strided((7,), (1,)).add_(1)),
        ("beside", lambda a, b: a.as_strided((4,), (1,)).add_(1).clone()),
        ("shares", lambda a, b: a.add_(1)),
        ("shares", lambda a, b: (a.add_(1), b[:1])),
        ("shares", lambda a, b: (a.add_(1).clone(),) * 2),
    ],
)
def test_an_operator_that_does_otherwise_is_seen(told: str, function: Callable[..., Any]):
    """``a``, a gap, ``b``: rows of one storage, as Q, K and V are. Zero and minus zero are not the same."""
    whole = torch.zeros(7)
    a, b = whole[:3], whole[4:]
    with pytest.raises(AssertionError, match=told):
        checked(Operator(BOTH, function), a, b)


def test_an_operator_that_does_as_it_says():
    whole = torch.zeros(8)[::2]
    found = checked(Operator(BOTH, lambda a, b: a.add_(1) + b), whole[:2], whole[2:])
    assert found.tolist() == [1, 1]
