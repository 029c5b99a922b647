"""Tuned tables for SGLang's fused experts' kernel, as files in ``moe_configs/``, a folder for each Triton.

A table maps a number of tokens to the kernel's block sizes; the closest entry is used. The up and the
down projection have one each, and the release requires equal ``BLOCK_SIZE_M`` in both.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

import torch

from gemma4_turbo.kernels import measured
from gemma4_turbo.kernels.gpu import gpu

TABLES = resources.files("gemma4_turbo.kernels") / "moe_configs"  # in a zip, if the package is
REQUIRED = (
    "BLOCK_SIZE_M",
    "BLOCK_SIZE_N",
    "BLOCK_SIZE_K",
    "GROUP_SIZE_M",
    "num_warps",
    "num_stages",
)

Table = dict[int, dict[str, int]]


class Pair(NamedTuple):
    """The tables of one shape on one GPU."""

    up: Table
    down: Table


class Key(NamedTuple):
    """What a pair is for. Activations and weights in bf16 or fp16."""

    experts: int
    width: int  # of one expert's hidden layer, on this GPU
    device: str  # name of the GPU, underscores for blanks


@cache
def triton() -> str:
    """The Triton that compiles the kernel, ``Triton 3.6``: what is fast under one is not under the next."""
    import triton as installed

    return named(installed.__version__)


def named(version: str) -> str:
    """``Triton 3.6`` for 3.6.0."""
    return "Triton " + ".".join(version.split(".")[:2])


def tuned_under(name: str) -> Traversable:
    """The folder of the tables that were tuned under a Triton, there or not."""
    return TABLES / name.lower().replace(" ", "_").replace(".", "_")


def here() -> Traversable:
    """That of this Triton."""
    return tuned_under(triton())


def file_name(key: Key, down: bool) -> str:
    """As SGLang names it."""
    tail = "_down" if down else ""
    return f"E={key.experts},N={key.width},device_name={key.device}{tail}.json"


def check(pair: Pair) -> None:
    """Raise ValueError, naming the table and the entry, if SGLang could not run with these."""
    for name, table in (("up", pair.up), ("down", pair.down)):
        if not table:
            raise ValueError(f"{name} has no entries")
        for tokens, config in table.items():
            if tokens < 1:
                raise ValueError(f"{name} has an entry for {tokens} tokens")
            if sorted(config) != sorted(REQUIRED):
                raise ValueError(f"{name}[{tokens}] must have exactly {', '.join(REQUIRED)}")
            for field, value in config.items():
                if value < 1 or (field != "num_stages" and value & (value - 1)):
                    raise ValueError(
                        f"{name}[{tokens}].{field} must be a power of two, got {value}"
                    )
    if pair.up.keys() != pair.down.keys():
        # The closest entry to a number of tokens must be the same one in both.
        raise ValueError("down must have entries for the same numbers of tokens as up")
    for tokens, config in pair.up.items():
        if config["BLOCK_SIZE_M"] != pair.down[tokens]["BLOCK_SIZE_M"]:
            raise ValueError(f"down[{tokens}].BLOCK_SIZE_M must be that of up")


def load(key: Key, folder: Traversable | None = None) -> Pair | None:
    """The tables for a shape, a GPU and this Triton, None if there are none.

    Raises:
        ValueError: if they are there and wrong, or cannot be read.
    """
    folder = here() if folder is None else folder
    try:
        paths = [folder / file_name(key, down) for down in (False, True)]
        if not all(path.is_file() for path in paths):
            return None
        up, down = (
            {int(tokens): config for tokens, config in json.loads(path.read_bytes()).items()}
            for path in paths
        )
        pair = Pair(up, down)
        check(pair)
    except ValueError:
        raise
    except Exception as error:  # no permission, a damaged zip, JSON of another shape
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return pair


def numbers(pair: Pair) -> tuple[int, ...]:
    """The tables as a GPU profile has them: 13 numbers for each number of tokens."""
    found: list[int] = []
    for tokens in sorted(pair.up):
        rows = (pair.up[tokens], pair.down[tokens])
        found += [tokens, *(row[field] for row in rows for field in REQUIRED)]
    return tuple(found)


def tables_of(flat: tuple[int, ...]) -> Pair:
    """The inverse of `numbers`; ValueError if SGLang could not run with these."""
    width = 1 + 2 * len(REQUIRED)
    measured.require(len(flat) % width == 0, flat)
    pair = Pair({}, {})
    for first in range(0, len(flat), width):
        tokens, *values = flat[first : first + width]
        half = len(REQUIRED)
        pair.up[tokens] = dict(zip(REQUIRED, values[:half], strict=True))
        pair.down[tokens] = dict(zip(REQUIRED, values[half:], strict=True))
    check(pair)
    for row in (row for table in pair for row in table.values()):
        blocks = (row["BLOCK_SIZE_M"], row["BLOCK_SIZE_N"], row["BLOCK_SIZE_K"])
        measured.require(all(measured.power(n, 16, 256) for n in blocks), flat)
        measured.require(measured.power(row["num_warps"], 1, 16), flat)
        measured.require(row["num_stages"] <= 8 and row["GROUP_SIZE_M"] <= 256, flat)
    return pair


def measured_row(experts: int, width: int, device: torch.device) -> measured.Row[Pair] | None:
    """What was measured on this GPU; None if nothing was, or stock's kernel would not start with it.

    A launch of stock's is not ours to catch. Triton keeps a block in shared memory for each stage at most: of
    wgmma on Hopper each, elsewhere all but one. `tune` counts as here.
    """
    row = measured.look("moe_configs", device, (experts, width), tables_of)
    if row is None or row.tile is None:
        return row
    most = max(map(_bytes, (config for table in row.tile for config in table.values())))
    return row if most <= gpu(device).shared_memory else None


def _bytes(config: dict[str, int]) -> int:
    m, n, k = (config[f"BLOCK_SIZE_{edge}"] for edge in "MNK")
    return bytes_in_flight(m, n, k, config["num_stages"])


def bytes_in_flight(m: int, n: int, k: int, stages: int) -> int:
    """Of shared memory for blocks of x and of the weights, with numbers of two bytes."""
    return stages * (m + n) * k * 2


def save(key: Key, pair: Pair, folder: Path | None = None) -> list[Path]:
    """Write both files; the tables are checked before."""
    check(pair)
    folder = Path(str(here())) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for down, table in ((False, pair.up), (True, pair.down)):
        path = folder / file_name(key, down)
        ordered = {str(tokens): table[tokens] for tokens in sorted(table)}
        path.write_text(json.dumps(ordered, indent=1) + "\n")
        paths.append(path)
    return paths


def shipped(folder: Traversable | None = None) -> list[Key]:
    """What there are tables for, under this Triton."""
    folder = here() if folder is None else folder
    pattern = re.compile(r"E=(\d+),N=(\d+),device_name=(\w+)\.json")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = map(pattern.fullmatch, names)
    return [
        Key(int(match[1]), int(match[2]), match[3])
        for match in found
        if match is not None and not match[3].endswith("_down")
    ]
