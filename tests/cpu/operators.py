"""Operators of ours do what their schemas say: each of their calls in a test's own process is checked, bit by bit.

``torch.compile`` moves and drops code by the schema. An argument that is written although it is not marked, or
a result that lies in an argument's memory, gives wrong numbers in traced code alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

ran: set[str] = set()
"""Names of the operators that were checked."""
broken: list[str] = []
"""What was wrong: somebody may catch the exception."""


def watch(module: Any) -> None:
    """Put the check round every function that ``gemma4_turbo.runtime.custom_ops`` registers."""
    register = module.register

    def watched(
        patch: str, schema: str, function: Callable[..., Any], *more: Any, **options: Any
    ) -> Any:
        return register(patch, schema, checked(schema, function), *more, **options)

    module.register = watched


def checked(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; AssertionError if it writes or returns what the schema does not say."""
    import torch

    parsed = torch._C.parse_schema(f"gemma4_turbo::{schema}")
    readonly = {
        number: argument.name
        for number, argument in enumerate(parsed.arguments)
        if argument.alias_info is None or not argument.alias_info.is_write
    }

    def call(*args: Any) -> Any:
        before = [[tensor.clone() for tensor in tensors(arg)] for arg in args]
        results = function(*args)
        for number, name in readonly.items() if len(args) == len(parsed.arguments) else ():
            for tensor, kept in zip(tensors(args[number]), before[number], strict=True):
                require(same_bits(tensor, kept), f"{parsed.name} writes {name}")
        memory = {
            tensor.untyped_storage().data_ptr(): parsed.arguments[number].name
            for number, arg in enumerate(args)
            for tensor in tensors(arg)
            if tensor.numel()
        }
        for result in tensors(results):
            name = memory.get(result.untyped_storage().data_ptr()) if result.numel() else None
            require(name is None, f"{parsed.name} returns the memory of {name}")
        ran.add(parsed.name.partition("::")[2])
        return results

    return call


def require(condition: bool, what: str) -> None:
    if not condition:
        broken.append(what)
        raise AssertionError(what)


def tensors(value: Any) -> Iterator[Any]:
    """Of an argument or a result, also in a list."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


def same_bits(a: Any, b: Any) -> bool:
    """NaN and the sign of zero included."""
    import torch

    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(torch.equal(a.view(kind), b.view(kind)))
