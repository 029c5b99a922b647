"""On which GPUs a kernel runs, and with which tiles: those that this package knows, and those measured here.

The kernels' own tiles were chosen on Hopper. Elsewhere a kernel runs at the shapes that the GPU profile, the
user's or one of the package's, has a tile for; on Hopper, too, a profile's tile comes first. Torch is imported where a device is
asked for: `gemma4_turbo.apply` imports this module.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Word = int | str
Place = tuple[str, tuple[Word, ...]]
Tiles = Mapping[Place, tuple[tuple[int, ...] | None, str]]

logger = logging.getLogger("gemma4_turbo")

KNOWN = (9,)
"""Major compute capabilities that the package's own tiles were measured on."""

NOTHING = "the GPU profile has nothing of this shape"


class Row(NamedTuple, Generic[T]):
    """What was measured at a shape."""

    tile: T | None
    reason: str  # why there is no tile: stock's code is to run


def _nothing(gpu: str) -> Tiles:
    return {}


source: Callable[[str], Tiles] = _nothing
"""By a GPU's name, what was measured on it. Set where the package is put together."""


@functools.cache
def tiles(device: torch.device) -> Tiles:
    """All that was measured on a device."""
    import torch

    return source(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def look(
    kernel: str,
    device: torch.device,
    shape: tuple[Word, ...],
    tile_of: Callable[[tuple[int, ...]], T],
) -> Row[T] | None:
    """What was measured of a kernel at a shape; None if nothing was.

    Args:
        kernel: its name.
        device: where it is to run.
        shape: as the kernel spells it.
        tile_of: a tile from its numbers; ValueError if the kernel cannot be cut so.
    """
    # Nearly always nothing, at every call of a kernel: no longer key is hashed then.
    return _look(kernel, device, shape, tile_of) if tiles(device) else None


@functools.cache
def _look(
    kernel: str,
    device: torch.device,
    shape: tuple[Word, ...],
    tile_of: Callable[[tuple[int, ...]], T],
) -> Row[T] | None:
    found = tiles(device).get((kernel, shape))
    if found is None:
        return None
    numbers, reason = found
    if numbers is None:
        return Row(None, reason)
    try:
        return Row(tile_of(numbers), "")
    except (TypeError, ValueError) as error:  # the file was edited, or is of other kernels
        refused(kernel, shape, str(error))
        return None


@functools.cache
def refused(kernel: str, shape: tuple[Word, ...], why: str) -> None:
    """Say once that what was measured at a shape is not used."""
    logger.warning("gemma4_turbo: the GPU profile's %s %s is not used: %s", kernel, shape, why)


def nearest(
    kernel: str,
    device: torch.device,
    shape: tuple[Word, ...],
    size: int,
    tile_of: Callable[[tuple[int, ...]], T],
) -> Row[T] | None:
    """`look` at the measured shape ``(*shape, n)`` whose n is closest to ``size``, by their ratio."""
    return _nearest(kernel, device, shape, size, tile_of) if tiles(device) else None


@functools.cache
def _nearest(
    kernel: str,
    device: torch.device,
    shape: tuple[Word, ...],
    size: int,
    tile_of: Callable[[tuple[int, ...]], T],
) -> Row[T] | None:
    sizes = [
        words[-1]
        for name, words in tiles(device)
        if name == kernel and words[:-1] == shape and isinstance(words[-1], int) and words[-1] > 0
    ]
    if not sizes:
        return None
    size = max(size, 1)
    closest = min(sizes, key=lambda n: (abs(math.log(n / size)), n))
    return look(kernel, device, (*shape, closest), tile_of)


@functools.cache
def has(kernel: str, device: torch.device) -> bool:
    """Whether anything was measured of a kernel."""
    return any(name == kernel for name, _ in tiles(device))


def forget() -> None:
    """Ask `source` again."""
    for function in (tiles, _look, _nearest, has, known, refused):
        function.cache_clear()


@functools.cache
def known(argument: str, device: torch.device) -> str | None:
    """Why the package's own tiles are not for the GPU where ``argument`` lies, or None."""
    reason = impossible(argument, device)
    if reason is not None:
        return reason
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in KNOWN:
        return f"{argument} is on a GPU of compute capability {capability}, the kernel is tuned for 9.0"
    return None


def impossible(argument: str, device: torch.device) -> str | None:
    """Why a compiled kernel cannot run where ``argument`` lies, or None."""
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return f"{argument} must be on a CUDA device, got {device}"
    return None


def unfit(argument: str, device: torch.device, row: Row[T] | None) -> str | None:
    """Why a compiled kernel does not run where ``argument`` lies, or None.

    Args:
        argument: the kernel's, for the sentence.
        device: of the argument.
        row: what was measured there at the call's shape.
    """
    if row is None:
        reason = known(argument, device)
        return f"{reason}; {NOTHING}" if reason is not None and tiles(device) else reason
    return impossible(argument, device) or (row.reason if row.tile is None else None)


def require(condition: bool, tile: tuple[int, ...]) -> None:
    """ValueError if a tile from a profile is not one that the kernel can be cut into."""
    if not condition:
        raise ValueError(f"no tile of this kernel: {list(tile)}")


def power(value: int, least: int, most: int) -> bool:
    """Whether a number is a power of two within bounds."""
    return least <= value <= most and not value & (value - 1)
