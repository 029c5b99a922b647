"""On which GPUs kernels run and with which tiles: what was measured there comes first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.fusions import skinny_gemm as fusion
from gemma4_turbo.kernels import experts_few, measured, moe_tables, skinny_gemm
from gemma4_turbo.kernels.attention import decode, extend
from gemma4_turbo.kernels.attention import extend_tiles as tiles
from gemma4_turbo.kernels.gpu import Gpu, gpu
from gemma4_turbo.kernels.skinny_gemm import Config, Epilogue

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SKINNY = (64, 64, 2, 3, 4)
DENSE, SPLIT = (64, 32, 8, 1, 1, 4, 2, 2, 0), (16, 32, 16, 4, 2, 4, 2)
FASTER = "stock's code is faster here"
ROWS: dict[Any, Any] = {
    ("skinny_gemm", (128, 256, 0, 16)): (SKINNY, ""),
    ("skinny_gemm", (128, 256, 0, 64)): (None, FASTER),
    ("skinny_gemm", (128, 192, 0, 16)): ((64, 128, 2, 3, 4), ""),  # does not divide 192
    ("skinny_gemm", (256, 256, 0, 16)): ((48, 64, 2, 3, 4), ""),  # no power of two
    ("decode_attention", (256, 2, 8)): ((32, 4, 2, 20, 64, 0, 1), ""),
    ("decode_attention", (256, 2, 64)): ((16, 4, 2, 20, 64, 0, 1), ""),
    ("decode_attention", (256, 2, 256)): (None, FASTER),
    ("extend_attention", (256, 2, "dense")): (DENSE, ""),
    ("extend_attention", (256, 2, "masked")): (None, FASTER),
    ("extend_attention", (256, 2, "split")): (SPLIT, ""),
    ("experts_few", (8, 704, 2816)): ((4, 1, 256, 2, 8, 1, 128, 1, 0), ""),
}


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """Measured here, on the CPU and on an L4."""
    found = dict(ROWS)
    monkeypatch.setattr(measured, "source", lambda gpu: found)
    measured.forget()
    yield found
    monkeypatch.undo()
    measured.forget()


@pytest.fixture
def l4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU of tensors on the CPU, which compiled kernels are asked about."""
    monkeypatch.setattr(measured, "impossible", lambda argument, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    here = Gpu((8, 9), 58, 99 * 1024)
    for module in (skinny_gemm, extend, tiles, decode, moe_tables):
        monkeypatch.setattr(module, "gpu", lambda device: here)
    for module in (skinny_gemm, extend, decode, experts_few):
        monkeypatch.setattr(module, "INTERPRETED", False)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


# -- tiles ------------------------------------------------------------------------------------------


def test_a_measured_tile_comes_before_the_packages_own():
    assert skinny_gemm.cut(ones(128, 256), Epilogue.NONE) == Config(*SKINNY)
    assert tiles.dense(256, 2, False, CPU) == tiles.Dense(64, 32, 8, 1, 1, 4, 2, 2)
    assert tiles.split(256, 2, CPU) == tiles.Split(*SPLIT)
    assert experts_few.cut(8, 704, 2816, CPU).up.warps == 2


def test_what_was_not_measured_keeps_the_packages_own():
    weight = ones(64, 256)
    own = skinny_gemm.choose((64, 256), Epilogue.NONE, 8)
    assert skinny_gemm.cut(weight, Epilogue.NONE) == own
    assert tiles.dense(512, 2, False, CPU) == tiles.DENSE[512, False]
    assert decode.cut(1, 1, 4, 256, CPU) == decode.choose(1, 1, 4, 256)
    assert experts_few.cut(4, 704, 2816, CPU) == experts_few.choose(4)


@pytest.mark.parametrize(
    ("count", "room"), [(0, 16), (1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)]
)
def test_rows_are_told_apart_as_compiled_kernels_are(count, room, rows, monkeypatch):
    """In the profile, in a layer's cuts, and by the launch."""
    assert skinny_gemm.room(count) == room
    weight = ones(128, 256)
    rows["skinny_gemm", (128, 256, 0, 32)] = (32, 64, 2, 3, 4), ""
    measured.forget()
    own = skinny_gemm.choose((128, 256), Epilogue.NONE, gpu(CPU).processors, 64)
    cuts = Config(*SKINNY), Config(32, 64, 2, 3, 4), own
    assert tuple(skinny_gemm.cut(weight, Epilogue.NONE, most) for most in (16, 32, 64)) == cuts
    launched: list[Config] = []
    monkeypatch.setattr(
        skinny_gemm, "launch_skinny_gemm", lambda x, w, cut, *_: launched.append(cut)
    )
    args = fusion.Args(ones(count, 256), weight, cuts, Epilogue.NONE, None, torch.zeros(1))
    fusion.SkinnyGemm("skinny_gemm").launch(args, 0)
    assert launched == [cuts[(16, 32, 64).index(room)]]


@pytest.mark.parametrize(
    ("batch", "block_n"), [(1, 32), (4, 32), (11, 32), (12, 16), (32, 16), (60, 16)]
)
def test_the_closest_number_of_pairs_by_its_ratio(batch, block_n):
    """Two KV heads: 8 and 64 pairs were measured; 22 are closer to 8, 24 to 64."""
    assert decode.cut(batch, 2, 2, 256, CPU).block_n == block_n


@pytest.mark.parametrize("shape", [(128, 192), (256, 256)])
def test_a_tile_that_cannot_be_is_not_used(shape):
    own = skinny_gemm.choose(shape, Epilogue.NONE, 8)
    assert skinny_gemm.cut(ones(*shape), Epilogue.NONE) == own


def test_a_tile_that_cannot_be_is_told_once(caplog):
    for _ in range(3):
        skinny_gemm.cut(ones(256, 256), Epilogue.NONE)
    (told,) = caplog.records
    assert "no tile of this kernel: [48, 64, 2, 3, 4]" in told.getMessage()


MADE = {
    skinny_gemm.tile_of: SKINNY,
    decode.tile_of: ROWS["decode_attention", (256, 2, 8)][0],
    tiles.dense_tile: DENSE,
    tiles.split_tile: SPLIT,
    experts_few.tile_of: ROWS["experts_few", (8, 704, 2816)][0],
    moe_tables.tables_of: (8, *(16, 64, 64, 1, 4, 3) * 2),
}


@pytest.mark.parametrize("made", MADE, ids=lambda made: f"{made.__module__}.{made.__name__}")
def test_every_number_of_a_tile_is_looked_at(made):
    good = MADE[made]
    made(good)
    bad = [good[:-1], (*good, 1)]
    bad += [(*good[:i], value, *good[i + 1 :]) for i in range(len(good)) for value in (-1, 1 << 20)]
    for numbers in bad:
        if made is moe_tables.tables_of and numbers[1:] == good[1:] and numbers[0] > 0:
            continue  # a number of tokens may be any
        with pytest.raises(ValueError, match=r"tile|must|entry"):
            made(numbers)


def test_tables_that_do_not_fit_are_not_used(l4, rows):
    """Stock launches its kernel itself: an exception there would end the server."""
    for stages, fits in ((3, True), (4, True), (5, False), (8, False)):
        rows["moe_configs", (128, 704)] = (8, *(64, 128, 64, 8, 4, stages) * 2), ""
        measured.forget()
        assert (moe_tables.measured_row(128, 704, CPU) is not None) == fits
    rows["moe_configs", (128, 704)] = None, FASTER
    measured.forget()
    assert moe_tables.measured_row(128, 704, CPU) == measured.Row(None, FASTER)


def test_tables_and_back():
    config = dict(zip(moe_tables.REQUIRED, (16, 64, 64, 1, 4, 3), strict=True))
    pair = moe_tables.Pair({1: config, 64: config}, {1: config, 64: {**config, "num_warps": 8}})
    assert moe_tables.tables_of(moe_tables.numbers(pair)) == pair


# -- GPUs -------------------------------------------------------------------------------------------


def test_the_packages_own_tiles_are_for_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    for capability, runs in (((9, 0), True), ((8, 9), False), ((10, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        measured.forget()
        assert (measured.unfit("x", CUDA, None) is None) == runs
    assert "CUDA device" in str(measured.unfit("x", CPU, None))


def test_elsewhere_a_linear_layer_runs_where_it_was_measured(l4):
    def unfit(rows: int, n: int) -> str | None:
        return skinny_gemm.unfit(ones(rows, 256), ones(n, 256), Epilogue.NONE)

    assert unfit(16, 128) is None
    assert unfit(33, 128) == FASTER
    nothing = str(unfit(32, 128))  # of those nothing is known
    assert "compute capability (8, 9)" in nothing
    assert nothing.endswith(measured.NOTHING)
    assert "compute capability (8, 9)" in str(unfit(16, 64))
    assert "compute capability (8, 9)" in str(unfit(16, 256))  # its tile cannot be


def test_without_a_profile_none_is_spoken_of(l4, rows):
    rows.clear()
    measured.forget()
    reason = str(skinny_gemm.unfit(ones(32, 256), ones(128, 256), Epilogue.NONE))
    assert reason.endswith("the kernel is tuned for 9.0")


def test_a_tile_that_does_not_divide_k_is_told_once(caplog):
    for _ in range(2):
        assert skinny_gemm.measured_row((128, 192), Epilogue.NONE, 16, CPU) is None
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "skinny_gemm (128, 192, 0, 16) is not used: K cannot be cut so" in told[0]


def test_elsewhere_attention_runs_where_it_was_measured(l4):
    def reason(heads: int, batch: int = 1) -> str | None:
        q, cache = ones(batch, heads, 256), ones(4, 2, 256)
        indptr = torch.zeros(batch + 1, dtype=torch.int32)
        return decode.unfit(q, cache, cache, indptr, torch.zeros(1, dtype=torch.int64))

    assert reason(4) is None
    assert reason(4, 200) == FASTER
    assert "compute capability (8, 9)" in str(reason(8))


def test_elsewhere_each_kind_of_prefill_is_asked_for_itself(l4, rows):
    q, k = ones(2, 4, 256), ones(2, 2, 256)
    mask = {"custom_mask": torch.ones(4, dtype=torch.bool), "mask_indptr": torch.zeros(2)}

    def reason(**options: Any) -> str | None:
        return extend.unfit(q, k, k, k, k, **options)

    assert reason() is None
    assert reason(**mask) == FASTER
    assert reason(few=True) is None
    assert reason(few=True, **mask) is None  # a verification's tree takes the split kernel
    assert "compute capability (8, 9)" in str(extend.unfit(q, q, q, q, q))
    rows.clear()
    measured.forget()
    assert "must be on a Hopper GPU" in str(reason())


def test_on_hopper_a_slower_shape_is_stocks_too(l4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert skinny_gemm.unfit(ones(33, 256), ones(128, 256), Epilogue.NONE) == FASTER
    assert skinny_gemm.unfit(ones(33, 256), ones(64, 256), Epilogue.NONE) is None
