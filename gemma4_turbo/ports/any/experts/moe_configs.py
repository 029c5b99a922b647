"""`moe_configs`: the fused experts' kernel gets the block sizes that were tuned for Gemma 4's shapes.

The function that looks tables up is replaced, not the folder that it looks in, so that all of SGLang's
own tables stay. A table of the user's own wins, and so does ``SGLANG_MOE_CONFIG_DIR``. Up and down
projection are decided together: half of a pair could break stock's rule of equal ``BLOCK_SIZE_M``.

A trace of torch.compile sees stock's function. A line says how the server's arguments are read.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.kernels import moe_tables
from gemma4_turbo.kernels.moe_tables import Key, Pair
from gemma4_turbo.ports.any.sources import ROOT
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

MODULE = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config"
TARGET = f"{MODULE}:get_moe_configs"
FOLDER_VARIABLE = "SGLANG_MOE_CONFIG_DIR"

_found: dict[tuple[int, int], tuple[Pair | None, str]] = {}  # per shape: tables, or why none


def build(
    run: PatchRun, stock: dict[str, Any], deterministic: Callable[[], bool]
) -> dict[str, Any]:
    """The package's tables where there are some for this shape and GPU, else stock's look-up.

    ``deterministic``: whether inference is to be, which no table is for.
    """
    look_up: Callable[..., moe_tables.Table | None] = stock[TARGET]

    @functools.wraps(look_up)
    def get_moe_configs(
        E: int,
        N: int,
        dtype: str | None,
        block_n: int | None = 0,
        block_k: int | None = 0,
        per_channel_quant: bool = False,
        down_moe: bool = False,
    ) -> moe_tables.Table | None:
        def stocks() -> moe_tables.Table | None:
            return look_up(
                E, N, dtype, block_n, block_k,
                per_channel_quant=per_channel_quant, down_moe=down_moe,
            )  # fmt: skip

        if torch.compiler.is_compiling():
            custom_ops.not_traced("moe_configs")
            return stocks()
        pair, reason = None, "the experts are quantised, or in fp32"
        if dtype is None and not block_n and not block_k and not per_channel_quant:
            pair, reason = _tables(E, N, deterministic)
        if pair is None:
            run.declined(reason)
            return stocks()
        run.engaged(custom_ops.capturing())
        return pair.down if down_moe else pair.up

    # What callers of stock's may reset still is what is asked when there is no table here.
    for name in ("cache_clear", "cache_info", "cache_parameters"):
        setattr(get_moe_configs, name, getattr(look_up, name))
    return {TARGET: get_moe_configs}


def undo(run: PatchRun) -> None:
    """Look again after the next installation."""
    _found.clear()


def _tables(experts: int, width: int, deterministic: Callable[[], bool]) -> tuple[Pair | None, str]:
    """Both tables, or None and why. The files are looked at once per shape, as stock does."""
    if deterministic():
        return None, "deterministic inference uses no table"
    if FOLDER_VARIABLE in os.environ:
        return None, f"{FOLDER_VARIABLE} is set"
    if (experts, width) not in _found:
        _found[experts, width] = _look(experts, width)
    return _found[experts, width]


def _look(experts: int, width: int) -> tuple[Pair | None, str]:
    import importlib

    stock = importlib.import_module(MODULE)
    device = stock.get_device_name().replace(" ", "_")
    key = Key(experts, width, device)
    names = tuple(
        stock.get_config_file_name(experts, width, None, [0, 0], False, down_moe=down)
        for down in (False, True)
    )
    own = users_own(Path(os.path.realpath(str(stock.__file__))).parent, names)
    if own is not None:
        return None, f"the user's own table is there: {own}"
    measured = moe_tables.measured_row(experts, width, _device())
    if measured is not None:
        return measured.tile, measured.reason
    try:
        pair = moe_tables.load(key)
    except ValueError as error:
        return None, f"the table for E={experts}, N={width} on {device} is wrong: {error}"
    if pair is None:
        return None, f"no table for E={experts}, N={width} on {device} with {moe_tables.triton()}"
    return pair, ""


@functools.cache
def of_the_release() -> dict[str, str]:
    """SHA-256 (urlsafe base64) of every table that SGLang itself ships, by path.

    Empty if the installation has no record of its files: then every table there counts as the user's.
    """
    try:
        listed = metadata.files(ROOT) or []
    except metadata.PackageNotFoundError:
        return {}
    return {
        os.path.realpath(file.locate()): file.hash.value
        for file in listed
        if file.hash is not None and file.match("moe_runner/triton_utils/configs/*/*.json")
    }


def users_own(folder: Path, names: tuple[str, ...]) -> Path | None:
    """A table of these names below SGLang's ``configs`` that SGLang did not ship, if there is one."""
    for name in names:
        for path in sorted(folder.glob(f"configs/triton_*/{name}")):
            known = of_the_release().get(os.path.realpath(path))
            try:
                digest = hashlib.sha256(path.read_bytes()).digest()
            except OSError:
                return path  # not ours to read: what stock makes of it is stock's
            if known != base64.urlsafe_b64encode(digest).decode().rstrip("="):
                return path
    return None


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def verify(run: PatchRun, device: str) -> list[Check]:
    """Every table that the package ships for this Triton obeys the release's rules."""
    checks = []
    try:
        shipped = moe_tables.shipped()
    except OSError as error:
        return [Check("moe_configs", "the shipped tables", "-", 0, 1, str(error), False)]
    for key in shipped:
        try:
            pair = moe_tables.load(key)
            problem = "" if pair is not None else "the down projection's table is missing"
        except ValueError as error:
            pair, problem = None, str(error)
        checks.append(
            Check(
                "moe_configs",
                f"E={key.experts}, N={key.width}, {key.device}",
                "the release's rules",
                0 if pair is None else len(pair.up) + len(pair.down),
                int(bool(problem)),
                problem or "equal BLOCK_SIZE_M of up and down",
                not problem,
            )
        )
    if not checks:
        none = f"no table is shipped for {moe_tables.triton()}"
        checks.append(Check("moe_configs", none, "-", 0, 0, "-", True))
    return checks
