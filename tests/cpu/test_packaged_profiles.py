"""The GPU profiles that come with the package: each is one that its kernels can run with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo.cli import tune
from gemma4_turbo.cli.tuning import plain, subject
from gemma4_turbo.engine import gpu_profile
from gemma4_turbo.engine.gpu_profile import Key, Profile, Shape, UnfitError
from gemma4_turbo.engine.switches import Decision
from gemma4_turbo.kernels import moe_tables
from tests.cpu.conftest import REPOSITORY
from tests.cpu.found_tiles import found_by_the_kernel

FOLDER = REPOSITORY / "gemma4_turbo" / "profiles"


def problems(content: bytes) -> list[str]:
    """All that is wrong with a file of the folder."""
    try:
        profile = gpu_profile.decoded(content)
    except UnfitError as error:
        return [str(error)]
    found = [f"key: {name} is empty" for name, value in profile.key._asdict().items() if not value]
    if tune.shared(profile) != profile:
        found.append("it is not what `tune --share` prints: of known names alone")
    places = Counter((shape.kernel, shape.shape) for shape in profile.shapes)
    found += [f"{place} has {count} rows" for place, count in places.items() if count > 1]
    return found + [
        f"{shape.kernel} {list(shape.shape)}: {why}"
        for shape in profile.shapes
        if (why := unfit(shape))
    ]


def unfit(shape: Shape) -> str:
    """Why a row is none, or ""."""
    if subject.ERROR in shape.reason:
        return "an error of one machine's GPU is no finding for others"
    if shape.kernel not in plain.WITH_TILES:
        return f"no kernel with tiles, got {list(shape.tile)}" if shape.tile else ""
    if shape.tile is None and not shape.reason:
        return "neither a tile nor a reason"
    # The place of one without a tile is looked up with a tile that would do.
    tile = shape.tile if shape.tile is not None else FITTING[shape.kernel](shape.shape)
    try:
        taken = found_by_the_kernel(shape._replace(tile=tile))
    except (TypeError, ValueError) as error:
        return f"no shape of this kernel: {error}"
    return "" if taken == tile else f"the kernel does not take {list(tile)}"


# -- an example, of tiles that nobody measured ------------------------------------------------------

CONFIGS = moe_tables.load(
    moe_tables.Key(128, 704, "NVIDIA_H200"), moe_tables.tuned_under("Triton 3.6")
)
assert CONFIGS is not None
FITTING: dict[str, Callable[[tuple[Any, ...]], tuple[int, ...]]] = {
    "skinny_gemm": lambda words: (64, 64, 1, 3, 4),
    "decode_attention": lambda words: (32, 4, 2, 20, 64, 0, 1),
    "extend_attention": lambda words: (
        (16, 32, 16, 4, 2, 4, 2) if words[-1] == "split" else (64, 32, 8, 1, 1, 4, 2, 2, 0)
    ),
    "experts_few": lambda words: (4, 1, 256, 2, 8, 1, 128, 1, 0),
    "moe_configs": lambda words: moe_tables.numbers(CONFIGS),
}
PLACES: list[tuple[str, tuple[Any, ...]]] = [
    ("skinny_gemm", (2560, 2048, 0, 16)),
    ("decode_attention", (256, 2, 8)),
    ("extend_attention", (256, 4, "dense")),
    ("extend_attention", (256, 4, "masked")),
    ("extend_attention", (512, 4, "split")),
    ("experts_few", (8, 704, 2816)),
    ("moe_configs", (128, 704)),
]
ROWS = [
    Shape(kernel, words, FITTING[kernel](words), "", {"ratio": 0.9}) for kernel, words in PLACES
]
OTHERS = [
    Shape("skinny_gemm", (2560, 2048, 0, 64), None, "stock's code is faster here", {}),
    Shape("extend_attention", (512, 4, "dense"), None, "no tile runs", {}),
    Shape("layer_norms", ("e4b", 32), (), "", {"ratio": 0.5}),
    Shape("router", (plain.VERIFIED,), None, "", {}),
]
EXAMPLE = Profile(
    Key("NVIDIA L4", "570.1", "0.5.23", "2.14.1", "3.8.0", "1"),
    {"router": Decision(False, "")},
    (*ROWS, *OTHERS),
)


def edited(edit: Callable[[Any], Any]) -> bytes:
    whole = json.loads(gpu_profile.encoded(EXAMPLE))
    edit(whole)
    return json.dumps(whole).encode()


def row(of: str, **fields: Any) -> Callable[[Any], Any]:
    """An edit of the first row of a kernel."""
    return lambda whole: next(r for r in whole["shapes"] if r["kernel"] == of).update(fields)


WRONG: dict[str, bytes] = {
    "it is no JSON": b"{",
    "gemma4_turbo_gpu_profile must be 1": b"{}",
    "triton must be of type str": edited(lambda whole: whole["key"].pop("triton")),
    "key: sglang is empty": edited(lambda whole: whole["key"].update(sglang="")),
    "it is not what `tune --share` prints": edited(row("router", kernel="rooter")),
    "of known names alone": edited(row("layer_norms", shape=["/home/me", 32])),
    "has 2 rows": edited(lambda whole: whole["shapes"].append(whole["shapes"][0])),
    "does not take [48, 64": edited(row("skinny_gemm", tile=[48, 64, 1, 3, 4])),  # no power of two
    "does not take [64, 256": edited(  # K is no multiple
        row("skinny_gemm", shape=[2560, 2112, 0, 16], tile=[64, 256, 1, 3, 4])
    ),
    "does not take [64, 64, 1": edited(row("skinny_gemm", shape=[2560, 2048, 0, 20])),  # no rows
    "9 is not a valid Epilogue": edited(row("skinny_gemm", shape=[2560, 2048, 9, 16])),
    "does not take [32, 4, 2]": edited(row("decode_attention", tile=[32, 4, 2])),
    "no shape of this kernel: not enough values": edited(row("decode_attention", shape=[256, 2])),
    "does not take [64, 32, 7": edited(row("extend_attention", tile=[64, 32, 7, 1, 1, 4, 2, 2, 0])),
    "does not take [64, 32, 8": edited(row("extend_attention", shape=[256, 4, "other"])),
    "does not take [4, 1, 256, 2, 3": edited(
        row("experts_few", tile=[4, 1, 256, 2, 3, 1, 128, 1, 0])
    ),
    "does not take [1, 2, 3]": edited(row("moe_configs", tile=[1, 2, 3])),
    "neither a tile nor a reason": edited(row("moe_configs", tile=None)),
    "an error of one machine's GPU": edited(
        row("moe_configs", tile=None, reason=f"with this tile {subject.ERROR}")
    ),
    "no kernel with tiles, got [1]": edited(row("layer_norms", tile=[1])),
}


def test_nothing_is_wrong_with_the_example() -> None:
    assert problems(gpu_profile.encoded(EXAMPLE)) == []
    assert {shape.kernel for shape in ROWS} == set(plain.WITH_TILES) == set(FITTING)


@pytest.mark.parametrize("told", WRONG)
def test_what_is_wrong_is_found(told: str) -> None:
    """Else the test below would find nothing of a folder without a file."""
    assert any(told in problem for problem in problems(WRONG[told])), problems(WRONG[told])


def test_every_file_of_the_folder() -> None:
    found = {path.name: problems(path.read_bytes()) for path in FOLDER.glob("*.json")}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_nothing_else_lies_there() -> None:
    others = [path.name for path in FOLDER.iterdir() if path.suffix != ".json"]
    assert others == ["README.md"]
    assert Path(str(gpu_profile.PROFILES)) == FOLDER
