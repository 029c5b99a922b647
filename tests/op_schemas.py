"""Whether an operator does to its arguments what its schema says.

Code that is traced is ordered by schemas alone: what an operator writes beside them is lost or comes too late.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

Storages = dict[int, torch.Tensor]
"""The bytes of each storage, by its number."""


def checked(op: Any, *args: Any) -> Any:
    """What the operator gives for arguments with a tensor at least, which it is run on once.

    AssertionError, naming the arguments, where what it writes is not what its schema says, to the bit and to
    the byte of a storage, or where a result shares a storage.
    """
    given = {
        argument.name: (value, argument.alias_info is not None and argument.alias_info.is_write)
        for argument, value in zip(op._schema.arguments, args, strict=True)
        if isinstance(value, torch.Tensor)
    }
    storages: Storages = {_number(x): _bytes(x) for x, _ in given.values()}
    before = {number: content.clone() for number, content in storages.items()}
    found = op(*args)
    changed = {number: content != before[number] for number, content in storages.items()}
    touched = [name for name, (x, _) in given.items() if (changed[_number(x)] & _covers(x)).any()]
    assert touched == [name for name, (_, writes) in given.items() if writes], touched
    for x, writes in given.values():
        if writes:
            changed[_number(x)] &= ~_covers(x)
    assert not any(beside.any() for beside in changed.values()), "a storage beside its arguments"
    made = [_number(x) for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
    assert len(made) == len(set(made) - storages.keys()), "a result shares a storage"
    return found


def _number(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """Of its storage."""
    return x.new_empty(0, dtype=torch.uint8).set_(x.untyped_storage())  # type: ignore[arg-type, call-overload]


def _covers(x: torch.Tensor) -> torch.Tensor:
    """Which of its storage's bytes are its own."""
    whole = torch.zeros(x.untyped_storage().nbytes(), dtype=torch.bool)
    elements = whole.view(-1, x.element_size())
    for byte in elements.unbind(1):
        place = [step * elements.stride(0) for step in x.stride()]
        start = byte.storage_offset() + x.storage_offset() * elements.stride(0)
        byte.as_strided(x.shape, place, start).fill_(True)
    return whole
