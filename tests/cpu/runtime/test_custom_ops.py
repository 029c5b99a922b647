"""`gemma4_turbo.runtime.custom_ops`, and the check that its operators do what their schemas say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemma4_turbo.runtime import custom_ops
from tests.cpu import operators


def writes_x(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x[0] = float("nan")
    return x + y


def writes_y(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.add_(1)
    return x + y


def negates_zero(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.neg_()
    return x + y


def returns_y(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y[1:]


def as_it_says(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x + y


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        (as_it_says, None),
        (writes_x, None),  # which is marked
        (writes_y, "writes y"),
        (negates_zero, "writes y"),  # no number is another, one bit is
        (returns_y, "returns the memory of y"),
    ],
)
@pytest.mark.parametrize("strided", [False, True])
def test_what_an_operator_writes(
    function: Callable[..., Any], wrong: str | None, strided: bool
) -> None:
    checked = operators.checked("example(Tensor(a!) x, Tensor y) -> Tensor", function)
    x, y = torch.zeros(4, 4).bfloat16(), torch.zeros(4, 4).bfloat16()
    if strided:
        x, y = x.t(), y[:, ::2].t()
        x = x[: y.shape[0]]
    if wrong is None:
        checked(x, y)
        assert "example" in operators.ran
        return
    with pytest.raises(AssertionError, match=wrong):
        checked(x, y)
    assert operators.broken == [f"gemma4_turbo::example {wrong}"]
    operators.broken.clear()


def test_all_that_is_registered_is_checked() -> None:
    """By its name in `tests.cpu.conftest`, before anybody registers an operator."""
    called: list[Any] = []
    schema = "checked_in_tests(Tensor x, Tensor[] others, Tensor? none) -> Tensor"

    def function(x: torch.Tensor, others: list[torch.Tensor], none: None) -> torch.Tensor:
        called.append(others)
        others[0].zero_()
        return x.clone()

    operator = custom_ops.register(
        "layer_norms", schema, function, lambda x, *_: torch.empty_like(x), counted=False
    )
    assert custom_ops.register("layer_norms", schema, function, function) is operator
    others = [torch.ones(2)]
    with pytest.raises(AssertionError, match="checked_in_tests writes others"):
        operator(torch.ones(3), others, None)
    assert called
    operators.broken.clear()
