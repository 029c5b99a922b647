"""``tune`` without a GPU: small shapes through Triton's interpreter, and a clock that says what it is told."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from gemma4_turbo.__main__ import app
from gemma4_turbo.cli import doctor, tune, verify
from gemma4_turbo.cli.modules import CannotRunError
from gemma4_turbo.cli.tuning import (
    budget,
    compiling,
    decode,
    device,
    experts,
    extend,
    linear,
    moe,
    plain,
    processes,
    works,
)
from gemma4_turbo.cli.tuning import subject as subjects
from gemma4_turbo.cli.tuning.device import Device
from gemma4_turbo.engine import gpu_profile, nvml, switches
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.engine.gpu_profile import Key, Shape
from gemma4_turbo.kernels import moe_tables
from gemma4_turbo.kernels.gpu import Gpu
from gemma4_turbo.models import geometry, geometry_mm
from gemma4_turbo.models.geometry import GEOMETRIES, Geometry
from tests.cpu.found_tiles import found_by_the_kernel
from tests.cpu.interpreted import MARKS

pytestmark = MARKS

KEY = Key("NVIDIA L4", "570.1", "0.5", "2.9", "3.6", "1")
SMALL_GPU = Gpu((8, 9), 4, 99 * 1024)
SMALL = Geometry(128, 128, 6, 6, 2, 1, 1, 32, True, 0, 0, False, 8, 2, 64)


class Times:
    """Microseconds by a call's place in a measurement: stock's first."""

    def __init__(self, quick: Callable[[int], float], again: Callable[[int], float]) -> None:
        self.by_readings = {subjects.QUICK: quick, subjects.THOROUGH: again}
        self.asked: list[int] = []

    def readings(self, calls: Sequence[Any], count: int) -> list[list[float]]:
        self.asked.append(len(calls))
        by_place = self.by_readings.get(count, self.by_readings[subjects.THOROUGH])
        return [[by_place(place)] * count for place in range(len(calls))]


def even(place: int) -> float:
    """Ours takes half of stock's time, whatever the tile."""
    return 50.0 if place else 100.0


EVEN = Times(even, even)


class Stand(NamedTuple):
    """A subject whose tiles are their own results."""

    tiles: tuple[float, ...]
    kernel: str = "skinny_gemm"
    place: tuple[int, ...] = (1,)
    title: str = "stand-in"
    bytes: int = 0

    def candidates(self, gpu: Gpu) -> list[float]:
        return list(self.tiles)

    def numbers(self, tile: float) -> tuple[int, ...]:
        return (int(tile),)

    def benches(self, place: str) -> Iterator[Any]:
        yield from (StandBench(), StandBench())

    @property
    def like_stock(self) -> None:
        return None

    def alike(self, tile: float) -> tuple[Stand, float]:
        return self, tile

    def compile(self, tile: float, place: str) -> None:
        pass

    def compile_stock(self, place: str) -> None:
        pass


class StandBench:
    calls = 1

    def ours(self, tile: float) -> Any:
        def call(i: int) -> float:
            if tile < 0:
                raise RuntimeError(f"out of resource: shared memory {tile}")
            return tile % 1

        return call

    def stock(self) -> Any:
        return lambda i: 0.01

    def error(self, call: Any) -> float:
        return float(call(0))


def ratio(kernel: str, value: float, *words: int | str) -> Shape:
    return Shape(kernel, words, (), "", {"ratio": value})


REAL = tune.subjects
STANDS = [
    Stand((10, 20), place=(i,), kernel=kernel)
    for i, kernel in enumerate(("skinny_gemm", "decode_attention", "skinny_gemm"))
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Few rows and short caches, and a place for the profile."""
    where = tmp_path / "config" / "profile.json"
    monkeypatch.setenv(switches.GPU_PROFILE, str(where))
    monkeypatch.setenv(switches.SELECTION, "")
    monkeypatch.setattr(linear, "POINTS", {16: (1,), 64: (17,)})
    monkeypatch.setattr(linear, "TILES", ((16, 64, 2),))
    monkeypatch.setattr(linear, "SMALL_TILES", ())
    monkeypatch.setattr(linear, "COPIES", 2)
    monkeypatch.setattr(decode, "BATCHES", (2,))
    monkeypatch.setattr(decode, "LENGTHS", (40,))
    monkeypatch.setattr(decode, "TARGETS", (20,))
    monkeypatch.setattr(decode, "TILES", {256: ((16, 4, 2, False),), 512: ((16, 4, 2, False),)})
    monkeypatch.setattr(decode, "L2_BYTES", 1)
    points = {"dense": (((5,), (3,), ""),), "masked": (((5,), (3,), "holes"),)}
    monkeypatch.setattr(extend, "POINTS", points | {"split": (((2,), (20,), "tree"),)})
    monkeypatch.setattr(extend, "CHECKED", ((6, 1), (0, 4)))
    monkeypatch.setattr(extend, "FEW", ((2, 1), (9, 3)))
    for name in ("DENSE", "MASKED", "SPLIT"):
        monkeypatch.setattr(extend, name, {256: (), 512: ()})
    monkeypatch.setattr(experts, "UPS", ())
    monkeypatch.setattr(experts, "DOWNS", ())
    monkeypatch.setattr(plain, "cases", lambda models: [])
    monkeypatch.setattr(works, "checks", lambda *_: [])
    monkeypatch.setattr(compiling, "first_workers", lambda: 0)
    monkeypatch.setattr(compiling, "later_workers", lambda free: {})
    monkeypatch.setattr(tune, "tables", lambda models: [])
    monkeypatch.setattr(tune, "subjects", lambda models: list(STANDS))
    monkeypatch.setattr(gpu_profile, "PROFILES", tmp_path / "profiles")
    # The interpreter's stock is decode's equation: its kernel needs a CUDA device.
    monkeypatch.setattr(decode.Arena, "stock", lambda self: self.ours(decode.kernel.choose(2, 1, 2, 256)))  # fmt: skip
    gpu_profile.forget()
    yield where
    gpu_profile.forget()


def machine(clock: Any = EVEN, known: bool = False, free: int = 1 << 40) -> Device:
    return Device("cpu", KEY, SMALL_GPU, known, free, clock)


def session(where: Path, found: Device | None = None, seconds: float = 1e9) -> tune.Session:
    store = tune.Store(str(where), KEY, False)
    return tune.Session(found or machine(), store, compiling.Compiler(), seconds)


def measured(where: Path, **options: Any) -> int:
    """The exit status of a whole run over the small model."""
    one = session(where, **options)
    return tune.report_of(one, lambda: tune.measure(one, {"e4b": SMALL}, lambda: None))


# -- a whole run ------------------------------------------------------------------------------------


def one_of_each() -> list[Any]:
    """A shape of every kernel, of prefill one for each kind of tile."""
    found = {(one.kernel, getattr(one, "kind", "")): one for one in REAL({"e4b": SMALL})}
    return list(found.values())


def test_every_kernel_is_compared_timed_and_written(small, capsys, monkeypatch):
    """And finds its own tile, one that it accepts, under the place where it looks."""
    wanted = one_of_each()
    assert {one.kernel for one in wanted} == {*plain.WITH_TILES} - {"moe_configs"}
    monkeypatch.setattr(tune, "subjects", lambda models: wanted)
    assert measured(small) == 0
    profile = gpu_profile.load(str(small))
    assert profile.key == KEY
    assert {(s.kernel, s.shape) for s in profile.shapes} == {(s.kernel, s.place) for s in wanted}
    for shape in profile.shapes:
        assert shape.tile, shape
        assert shape.figures["ratio"] == pytest.approx(0.5)
        assert shape.figures["of_own"] == 1.0
        assert shape.figures["tiles"] == shape.figures["of"]
        assert 0 < shape.figures["error"] < 2.0**-7
        assert found_by_the_kernel(shape) == shape.tile
    out, err = capsys.readouterr()
    assert f"{len(wanted)} measurements on NVIDIA L4 in {small}" in out
    assert f"Profile: {small}" in err
    assert "0.50 of stock's time, 1.00 of the package's own tile's" in err


def test_what_is_measured_is_not_measured_again(small):
    assert measured(small) == 0
    clock = Times(even, even)
    assert measured(small, found=machine(clock)) == 0
    assert clock.asked == []
    store = tune.Store(str(small), KEY, True)
    assert store.shapes == {}


def test_a_profile_of_another_gpu_is_named_and_replaced_by_the_first_measurement(small, capsys):
    other = gpu_profile.Profile(KEY._replace(gpu="NVIDIA H200"), {}, ())
    gpu_profile.save(str(small), other)
    measured(small, seconds=-1)
    said = capsys.readouterr()
    assert "The first measurement replaces one for NVIDIA H200, SGLang 0.5" in said.err
    assert f"Nothing was measured, and {small} is as it was; the time is up" in said.out
    assert gpu_profile.load(str(small)) == other
    measured(small)
    assert gpu_profile.load(str(small)).key == KEY


OLD = gpu_profile.Profile(KEY, {}, tuple(ratio("layer_norms", 0.5, i) for i in range(50)))


@pytest.mark.parametrize("key", [KEY, KEY._replace(driver="1")], ids=["fresh", "stale"])
@pytest.mark.parametrize(
    ("free", "problem"),
    [
        (0, None),
        (1 << 40, CannotRunError("SGLang cannot be imported: ImportError")),
        (1 << 40, KeyboardInterrupt()),
        (1 << 40, tune.TerminatedError()),
    ],
    ids=["memory", "import", "ctrl-c", "sigterm"],
)
def test_an_old_profile_outlives_a_run_that_measures_nothing(key, free, problem, small, monkeypatch):  # fmt: skip
    """Whatever comes before the first measurement, with --fresh and where it does not hold any more."""

    def prepare() -> None:
        if problem is not None:
            raise problem

    monkeypatch.setattr(device, "find", lambda: machine(free=free))
    monkeypatch.setattr(tune.ENGINE, "revert", lambda: None)
    monkeypatch.setattr(tune.report, "torch_problem", lambda: None)
    monkeypatch.setattr(tune, "_import_sglang", prepare)
    gpu_profile.save(str(small), OLD._replace(key=key))
    before = small.read_bytes()
    if isinstance(problem, KeyboardInterrupt):
        assert tune.run(["e4b"], 5, key == KEY, False) in (tune.INTERRUPTED, tune.TERMINATED)
    else:
        with pytest.raises(CannotRunError):
            tune.run(["e4b"], 5, key == KEY, False)
    assert small.read_bytes() == before
    assert os.listdir(small.parent) == [small.name]


def test_fresh_replaces_with_the_first_measurement(small):
    gpu_profile.save(str(small), OLD)
    store = tune.Store(str(small), KEY, True)
    store.add()  # of a comparison that has found nothing
    full = Check("input_norm", "the comparison", "-", 0, 0, "CUDA out of memory", False)
    store.add(*plain.verified([full]))
    assert gpu_profile.load(str(small)) == OLD
    assert store.profile().shapes == ()
    store.add(ratio("router", 0.5, 1))
    found = gpu_profile.load(str(small)).shapes
    assert [shape.kernel for shape in found] == ["input_norm", "router"]


def test_a_place_that_cannot_be_written_is_known_before_anything_is_measured(small, monkeypatch):
    gpu_profile.save(str(small), OLD)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotRunError, match=r"cannot be written: No space left on device"):
        tune.Store(str(small), KEY, False)
    assert gpu_profile.load(str(small)) == OLD
    assert os.listdir(small.parent) == [small.name]


def test_the_time_is_up_and_what_was_measured_stays(small, capsys):
    """The same command goes on with what is left."""
    one = session(small)
    rest = iter([1] * 7)

    def go_on() -> None:
        if next(rest, None) is None:
            raise tune.TimeIsUpError

    one.go_on = go_on  # type: ignore[method-assign]
    assert tune.report_of(one, lambda: tune.measure(one, {"e4b": SMALL}, lambda: None)) == 0
    kept = len(gpu_profile.load(str(small)).shapes)
    assert 0 < kept < len(STANDS)
    assert "the time is up: the same command goes on" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured(small, capsys):
    class Interrupted(Times):
        def readings(self, calls: Sequence[Any], count: int) -> list[list[float]]:
            if len(self.asked) == 4:  # two points of two shapes
                raise KeyboardInterrupt
            return super().readings(calls, count)

    assert measured(small, found=machine(Interrupted(even, even))) == tune.INTERRUPTED
    assert len(gpu_profile.load(str(small)).shapes) == 2
    assert "interrupted: the same command goes on" in capsys.readouterr().out


def broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The benches of one shape, decode's, raise."""

    def benches(self: Stand, place: str) -> Iterator[Any]:
        if self.kernel == "decode_attention":
            raise error
        yield from (StandBench(), StandBench())

    monkeypatch.setattr(Stand, "benches", benches)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("cannot import name 'decode_attention_fwd'"), "ImportError: cannot import"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the GPU's memory does not suffice"),
        (RuntimeError("CUDA error: out of memory"), "the GPU's memory does not suffice"),
    ],
)
def test_what_fails_alone_is_left_out(error, said, small, monkeypatch, capsys):
    broken(monkeypatch, error)
    assert measured(small) == 0
    assert [shape.shape for shape in gpu_profile.load(str(small)).shapes] == [(0,), (2,)]
    assert f"not measured: {said}" in capsys.readouterr().err


def test_an_error_of_the_gpu_ends_the_run_and_is_not_met_again(small, monkeypatch):
    broken(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(CannotRunError, match=r"the GPU reported an error: .*goes on with the rest"):
        measured(small)
    good, bad = gpu_profile.load(str(small)).shapes
    assert (good.tile is None, bad.tile is None) == (False, True)
    assert measured(small) == 0
    assert len(gpu_profile.load(str(small)).shapes) == len(STANDS)


# -- one subject ------------------------------------------------------------------------------------


def decided(
    tiles: tuple[float, ...], clock: Any, known: bool = False, most: int = 1 << 30
) -> Shape:
    return subjects.measure(Stand(tiles), "cpu", SMALL_GPU, clock, known, lambda: None, most)


def listed(*us: float) -> Callable[[int], float]:
    return lambda place: us[place]


def test_the_fastest_is_taken_if_it_is_so_again():
    """10 is the package's own; 40 is the fastest at first, but 30 is when the best are read again."""
    clock = Times(listed(100, 60, 90, 40, 30), listed(100, 60, 50, 30))
    found = decided((10, 20, 30, 40), clock)  # read again: 10, then in order of speed 40 and 30
    assert found.tile == (30,)
    assert found.figures["ratio"] == pytest.approx(0.3)
    assert found.figures["of_own"] == pytest.approx(0.5)
    assert clock.asked == [5, 5, 4, 4]


def test_few_tiles_are_read_once_and_well():
    clock = Times(listed(), listed(100, 60, 50, 40))
    assert decided((10, 20, 30), clock).tile == (30,)
    assert clock.asked == [4, 4]


def test_another_tile_must_be_enough_faster():
    for us, taken in ((59, 10), (58.5, 20)):
        clock = Times(listed(), listed(100, 60, us))
        assert decided((10, 20), clock).tile == (taken,)


class Scattered(Times):
    """The second tile's readings alternate around a twentieth less than the own tile's."""

    def __init__(self, by: float) -> None:
        super().__init__(even, even)
        self.by = by

    def readings(self, calls: Sequence[Any], count: int) -> list[list[float]]:
        other = [95.0 * (1 + self.by * (-1 if i % 2 else 1)) for i in range(count)]
        return [[200.0] * count, [100.0] * count, other]


@pytest.mark.parametrize(("by", "taken"), [(0.01, 20), (0.2, 10)])
def test_another_tile_must_be_faster_by_more_than_noise(by, taken):
    assert decided((10, 20), Scattered(by)).tile == (taken,)


def test_what_slows_a_reading_slows_its_neighbours():
    """A clock that falls by half meets all calls that are read in turn."""
    slow = [1.0, 2.0] * 6
    found = subjects.against([[95.0 * one for one in slow]], [[100.0 * one for one in slow]])
    assert found.ratio == pytest.approx(0.95)
    assert found.noise == pytest.approx(0, abs=1e-9)
    assert found.faster


def test_another_tile_must_not_be_slower_anywhere():
    """Half the time at one point does not outweigh a twentieth more at the other."""
    times = iter([listed(100, 60, 30), listed(100, 60, 63)])

    class Points(Times):
        def readings(self, calls: Sequence[Any], count: int) -> list[list[float]]:
            here = next(times)
            return [[here(place)] * count for place in range(len(calls))]

    assert decided((10, 20), Points(even, even)).tile == (10,)


def test_fewer_tiles_are_tried_for_want_of_time():
    clock = Times(even, even)
    found = decided((10, 20, 30, 40), clock, most=1)
    assert (found.figures["tiles"], found.figures["of"]) == (1, 4)
    assert tune.few(found)
    assert clock.asked == [2, 2]
    assert not tune.few(decided((10, 20, 30, 40), Times(even, even)))


def test_the_own_tile_is_read_again_however_slow_it_was():
    clock = Times(listed(100, 99, 4, 3, 2, 1), listed(100, 10, 10, 10))
    assert decided((10, 20, 30, 40, 50), clock).tile == (10,)
    assert clock.asked == [6, 6, 4, 4]


def test_a_wrong_tile_is_not_timed():
    """Stock's error is 0.01: 0.02 is too far."""
    clock = Times(even, even)
    found = decided((10.02, 20.0101), clock)
    assert found.tile == (20,)
    assert clock.asked == [2, 2]
    assert "of_own" not in found.figures
    wrong = decided((10.02,), clock)
    assert (wrong.tile, wrong.reason) == (
        None,
        "no tile has the right result: relative error 2.0e-02, stock's is 1.0e-02",
    )
    assert decided((float("nan"),), clock).tile is None


def test_a_tile_that_does_not_run_is_left_out():
    assert decided((-1, 20), Times(even, even)).tile == (20,)
    none = decided((-1,), Times(even, even))
    assert none.reason == "no tile runs: RuntimeError: out of resource: shared memory -1"


class Picky(Times):
    """Tiles that are right and cannot be timed: always, or when the best ones are read again."""

    def __init__(self, *never: float, again: tuple[float, ...] = (), first: bool = False) -> None:
        super().__init__(even, even)
        self.never, self.again, self.first = never, again, first

    def readings(self, calls: Sequence[Any], count: int) -> list[list[float]]:
        bad = {*self.never, *(self.again if count != subjects.QUICK else ())}
        if self.first and len(self.asked) == 0:
            bad = set()  # the first point of the shape
        if any(getattr(call, "tile", None) in bad for call, _ in calls):
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        return super().readings(calls, count)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls tell the tile that they are of."""
    ours = StandBench.ours

    def known(self: StandBench, tile: float) -> Any:
        call = ours(self, tile)
        call.tile = tile
        return call

    monkeypatch.setattr(StandBench, "ours", known)


@pytest.mark.parametrize("first", [False, True], ids=["everywhere", "at the second point"])
def test_a_tile_that_cannot_be_timed_is_left_out(first, named):
    """One round, and two; the own tile, and another one."""
    assert decided((10, 20, 30), Picky(20, first=first)).tile == (10,)
    assert decided((10, 20, 30), Picky(10, first=first)).tile == (20,)
    assert decided((10, 20, 30, 40, 50), Picky(10, first=first)).tile == (20,)


def test_a_tile_that_cannot_be_timed_again_is_left_out(named):
    assert decided((10, 20, 30, 40, 50), Picky(again=(10,))).tile == (20,)
    assert decided((10, 20, 30, 40, 50), Picky(again=(10, 20, 30))).tile == (40,)


def test_no_tile_that_can_be_timed(named):
    for tiles in ((10, 20), (10, 20, 30, 40, 50)):
        found = decided(tiles, Picky(*tiles))
        assert (found.tile, found.reason) == (
            None,
            "no tile runs: RuntimeError: Triton Error [CUDA]: invalid argument",
        )
        assert found.figures["stock_us"] == 200.0


@pytest.mark.parametrize(
    "said", ["CUDA error: an illegal memory access", "CUDA error: out of memory", "stock's"]
)
def test_what_no_tile_is_to_blame_for_is_of_the_whole_shape(said, named):
    class Broken(Times):
        def readings(self, calls: Sequence[Any], count: int) -> list[list[float]]:
            self.asked.append(len(calls))
            if len(calls) > 1:
                raise RuntimeError(said)
            return [[50.0] * count]

    clock = Broken(even, even)
    with pytest.raises(RuntimeError, match=said):
        decided((10, 20), clock)
    assert clock.asked == ([3, 1, 1] if said == "stock's" else [3])


def test_want_of_memory_is_held_against_no_tile(monkeypatch):
    """As it is with torch's own exception: the shape is left out, and measured the next time."""

    def call(self: StandBench, call: Any) -> float:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    bench = StandBench()
    monkeypatch.setattr(bench, "error", lambda call: 0.0 if call == "stock" else call(0), raising=False)  # fmt: skip
    monkeypatch.setattr(bench, "stock", lambda: "stock", raising=False)
    monkeypatch.setattr(bench, "ours", lambda tile: functools.partial(call, bench), raising=False)
    monkeypatch.setattr(Stand, "benches", lambda self, place: iter([bench]))
    with pytest.raises(RuntimeError, match="out of memory"):
        decided((10,), EVEN)


@pytest.mark.parametrize(
    ("us", "known", "taken"), [(101, False, False), (99, False, True), (101, True, True), (103, True, False)]
)  # fmt: skip
def test_a_new_gpu_takes_what_is_faster_and_a_known_one_keeps_what_is_not_slower(us, known, taken):
    clock = Times(listed(100, us), listed(100, us))
    found = decided((10,), clock, known)
    assert (found.tile is not None) == taken
    if not taken:
        assert found.reason == f"stock's code is faster here: ours takes {us / 100:.2f} of its time"


@pytest.mark.parametrize(
    ("said", "fatal"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: out of memory", False),
        ("out of resource: shared memory, Required: 131072, Hardware limit: 101376", False),
        ("Triton Error [CUDA]: invalid argument", False),
    ],
)
def test_after_which_errors_nothing_runs_any_more(said, fatal):
    assert subjects.is_fatal(RuntimeError(said)) == fatal


# -- what is compared -------------------------------------------------------------------------------


def test_every_kind_of_column_is_compared():
    """A fragment of a matrix product holds every second, fourth or eighth column."""
    layer = linear.Linear("", 2048, 64, linear.Epilogue.NONE, 16)
    bench = linear.LinearBench(layer, 1, "cpu", 2)
    for every in (2, 4, 8, 16):

        def wrong(i: int, every: int = every) -> torch.Tensor:
            found = torch.as_tensor(bench.stock()(i))
            found[:, every - 1 :: every] = 0
            return found

        assert bench.error(wrong) > 0.1
    assert bench.error(bench.stock()) < 2.0**-8


def test_what_a_second_call_finds_is_compared():
    """Counters that the first one left behind."""
    layer = linear.Linear("", 128, 64, linear.Epilogue.NONE, 16)
    bench = linear.LinearBench(layer, 1, "cpu", 2)
    done = []

    def once(i: int) -> torch.Tensor:
        done.append(i)
        found = torch.as_tensor(bench.stock()(i))
        return found if len(done) == 1 else found * 0

    assert bench.error(once) > 0.9


def attended(arena: decode.Arena, block: int, rows: int) -> Callable[[int], None]:
    """Decode's equation over whole blocks of keys and the first rows alone."""

    def call(i: int) -> None:
        bounds = arena.indptr.tolist()
        for row in range(min(rows, len(bounds) - 1)):
            at = arena.indices[0][bounds[row] : bounds[row + 1]]
            at = at[: max(1, len(at) // block * block)]
            logits = arena.q[row].double() @ arena.k[at, 0].double().T * arena.scale
            arena.out[row] = (logits.softmax(-1) @ arena.v[at, 0].double()).to(arena.out.dtype)

    return call


def test_a_tile_that_does_not_run_leaves_the_lengths_as_they_are():
    arena = decode.Arena(decode.Point(decode.Shape("", 2, 1, 256, None), 2, 64, False), "cpu", 1)

    def fails(i: int) -> None:
        raise RuntimeError("out of resource: shared memory")

    with pytest.raises(RuntimeError):
        arena.error(fails)
    assert arena.indptr.tolist() == [0, 64, 128]


@pytest.mark.parametrize("batch", [1, 8])
def test_decode_is_compared_at_lengths_that_are_no_whole_blocks(batch):
    """All lengths that are timed are; a server's are not."""
    shape = decode.Shape("", 2, 1, 256, None)
    arena = decode.Arena(decode.Point(shape, batch, 64, False), "cpu", 1)
    before = arena.indptr.clone()
    assert arena.error(attended(arena, 1, batch)) < 2.0**-8
    assert arena.error(attended(arena, 16, batch)) > 0.05
    assert torch.equal(arena.indptr, before)


def test_the_last_sequence_is_compared():
    shape = decode.Shape("", 2, 1, 256, None)
    arena = decode.Arena(decode.Point(shape, 8, 64, False), "cpu", 1)
    assert not arena.error(attended(arena, 1, 7)) < 1


# -- time -------------------------------------------------------------------------------------------


def test_what_is_left_is_measured_with_fewer_tiles_before_any_of_it_is_left_out(small, monkeypatch, capsys):  # fmt: skip
    stands = [Stand((10, 20, 30, 40), place=(i,)) for i in range(5)]
    monkeypatch.setattr(tune, "subjects", lambda models: stands)
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])

    class Slow(Times):
        def readings(self, calls: Sequence[Any], count: int) -> list[list[float]]:
            now[0] += 5.0 * (len(calls) - 1)
            return super().readings(calls, count)

    monkeypatch.setattr(budget, "TRUST_S", 0.1)
    assert measured(small, found=machine(Slow(even, even)), seconds=140.0) == 0
    found = gpu_profile.load(str(small)).shapes
    assert [int(shape.figures["tiles"]) for shape in found] == [4, 1, 1, 1, 1]
    out, err = capsys.readouterr()
    assert "4 with fewer tiles, for want of time" in out
    assert "1.00 of the package's own tile's; with 1 of 4, for want of time" in err
    # The same command goes on with these.
    clock = Times(even, even)
    assert measured(small, found=machine(clock)) == 0
    assert len(clock.asked) == 4 * 4
    assert not any(map(tune.few, gpu_profile.load(str(small)).shapes))


def test_fewer_tiles_are_measured_again_when_time_is_left_after_all(small, monkeypatch, capsys):
    stands = [Stand((10, 20, 30, 40), place=(i,)) for i in range(3)]
    monkeypatch.setattr(tune, "subjects", lambda models: stands)
    short = iter([1, 0, 0, 0])  # the first guess is that of a machine that was still compiling
    monkeypatch.setattr(budget.Budget, "level", lambda self, seconds, left: next(short, 0))
    clock = Times(even, even)
    assert measured(small, found=machine(clock)) == 0
    found = gpu_profile.load(str(small)).shapes
    assert [int(shape.figures["tiles"]) for shape in found] == [4, 4, 4]
    assert "want of time" not in capsys.readouterr().out


class Late(compiling.Compiler):
    """The first shape's kernels are compiled when the others are measured; so is what ``verify`` finds."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found, self.pauses = found, 0

    def ready(self, key: Any) -> bool:
        return key != ("skinny_gemm", (0,)) or self.pauses > 1

    def pause(self) -> None:
        self.pauses += 1

    def ask(self, job: compiling.Job) -> Any:
        if job.function is not works.checks:
            return None
        future: Future[Any] = Future()
        if self.found is not None:
            future.set_result(self.found)
        return future


def with_others(small: Path, found: Any, seconds: float = 1e9) -> list[Shape]:
    """The profile of a run beside such processes."""
    one = session(small, seconds=seconds)
    one.compiler = Late(found)
    assert tune.report_of(one, lambda: tune.measure(one, {"e4b": SMALL}, lambda: None)) == 0
    return list(gpu_profile.load(str(small)).shapes)


CHECKS = [Check("layer_norms", "rows", "stock", 8, 0, "no bit", True)]


def test_what_is_compiled_comes_before_what_is_not(small):
    found = with_others(small, CHECKS)
    assert [shape.shape for shape in found] == [(plain.VERIFIED,), (1,), (2,), (0,)]


def test_what_verify_could_not_do_beside_is_done_here(small, monkeypatch):
    monkeypatch.setattr(works, "checks", lambda *_: [CHECKS[0]._replace(patch="router")])
    failed = processes.Failed("RuntimeError: the process was killed")
    assert with_others(small, failed)[-1].kernel == "router"


def test_verify_is_waited_for_until_the_time_is_up(small, capsys):
    """What it has not found is undecided; all else is kept."""
    assert len(with_others(small, None, seconds=1.0)) == len(STANDS)
    assert "the time is up" in capsys.readouterr().out


def test_guesses_are_trusted_less_the_longer_it_takes():
    one = budget.guess("skinny_gemm", [2, 1, 1, 1], 4)
    assert one.seconds == pytest.approx((0.3 + 0.2 + 1.25, 0.3 + 0.15 + 1.0, 0.3 + 0.05 + 0.5))
    kept = budget.Budget()
    assert kept.level(10 * one.seconds[0], [one] * 10) == 0
    assert kept.level(10 * one.seconds[1], [one] * 10) == 1
    assert kept.level(0, [one] * 10) == 2
    for _ in range(100):
        kept.add(one, 0, 2 * one.seconds[0])
    assert kept.level(10 * one.seconds[0], [one] * 10) == 2


def test_the_time_counts_from_the_process_start(monkeypatch):
    assert budget.since_start() >= 0
    monkeypatch.setattr(budget, "LONGEST_START_S", float("inf"))
    code = "import time; time.sleep(0.5); from gemma4_turbo.cli.tuning.budget import since_start; print(since_start())"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert 0.5 <= float(done.stdout) < 300
    monkeypatch.setattr(budget, "LONGEST_START_S", 0.0)
    assert budget.since_start() == 0.0


def test_sigterm_keeps_what_was_measured(small, capsys):
    class Killed(Times):
        def readings(self, calls: Sequence[Any], count: int) -> list[list[float]]:
            if len(self.asked) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            return super().readings(calls, count)

    before = signal.getsignal(signal.SIGTERM)
    with tune.signals(60):
        assert measured(small, found=machine(Killed(even, even))) == tune.TERMINATED
    assert len(gpu_profile.load(str(small)).shapes) == 1
    assert "interrupted: the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_takes_too_long_is_broken_off(small, capsys):
    """A single step, such as a kernel that is compiled; it is no error of the kernel's."""

    class Stuck(Times):
        def readings(self, calls: Sequence[Any], count: int) -> list[list[float]]:
            if len(self.asked) == 2:
                time.sleep(60)
            return super().readings(calls, count)

    begun = time.monotonic()
    with tune.signals(1):
        assert measured(small, found=machine(Stuck(even, even))) == 0
    assert time.monotonic() - begun < 30
    assert "the time is up" in capsys.readouterr().out
    assert len(gpu_profile.load(str(small)).shapes) == 1


@pytest.mark.parametrize("minutes", ["inf", "1e9", "nan", "0"])
def test_a_time_that_is_none_is_an_option_that_is_wrong(minutes):
    done = CliRunner().invoke(app, ["tune", "--minutes", minutes])
    assert done.exit_code == 2, done.output
    assert "--minutes" in done.output


def test_ctrl_c_before_anything_is_measured(gpu, monkeypatch):
    def pressed() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(device, "find", pressed)
    assert CliRunner().invoke(app, ["tune"]).exit_code == tune.INTERRUPTED


def test_no_signal_breaks_off_the_end():
    before = signal.getsignal(signal.SIGINT)
    with tune.undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


# -- patches ----------------------------------------------------------------------------------------


def test_a_patch_is_off_where_it_is_wrong_or_slow():
    checks = [
        Check("layer_norms", "rows", "stock", 8, 3, "no bit", False),
        Check("input_norm", "rows", "stock", 8, 0, "no bit", True),
        Check("skinny_gemm", "rows", "stock", 8, 8, "not here", False),
    ]
    shapes = plain.verified(checks)
    assert [shape.kernel for shape in shapes] == ["layer_norms", "input_norm"]
    shapes += [ratio("layer_norms", 0.1), ratio("input_norm", 0.9), ratio("input_norm", 1.2, 1)]
    shapes += [ratio("router", 1.2), ratio("router", 1.2, 1)]
    found = plain.decisions(shapes)
    assert {name: one.on for name, one in found.items()} == {"layer_norms": False, "router": False}
    assert "differs from stock's on this GPU: rows against stock" in found["layer_norms"].reason
    assert found["router"].reason == "measured here: 1.20 of stock's time"


def test_a_patch_that_brought_the_gpu_to_an_error_is_off(small):
    """As the command says of it; the next run does not measure it again, and a server must not meet it."""
    case = ("layer_norms", ("e4b", 32))

    def run() -> list[Shape]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(CannotRunError, match="left to stock's code"):
        session(small).one("layer_norms", [case], run)
    found = gpu_profile.load(str(small)).patches["layer_norms"]
    assert not found.on
    assert found.reason.startswith("the GPU reported an error: RuntimeError: CUDA error")


def test_verify_after_an_error_of_the_gpu_finds_nothing():
    """All that is compared after it fails too, and is not to blame."""
    said = "AcceleratorError: CUDA error: an illegal memory access was encountered"
    checks = [
        Check("input_norm", "rows", "stock", 8, 0, "no bit", True),
        Check("layer_norms", "the comparison", "-", 0, 0, said, False),
        Check("router", "the comparison", "-", 0, 0, said, False),
        Check("skinny_gemm", "the comparison", "-", 0, 0, said, False),
    ]
    found = {shape.kernel: (shape.tile, shape.reason) for shape in plain.verified(checks)}
    assert found == {
        "input_norm": ((), ""),
        "layer_norms": (None, f"the comparison against -: {said}"),
        "router": (None, "not compared: the GPU reported an error at layer_norms"),
    }
    assert [*plain.decisions(plain.verified(checks))] == ["layer_norms"]
    (left,) = plain.verified([checks[3], checks[0]])
    assert (left.kernel, plain.unasked(left)) == ("input_norm", True)


def asked(small: Path, monkeypatch: pytest.MonkeyPatch, *checks: Check) -> list[str] | None:
    """Patches that a run leaves out of its comparison, which finds so much; None: it compares nothing."""
    known: list[list[str]] = []

    def compare(place: str, names: Sequence[str]) -> list[Check]:
        known.append([name for name in names if name not in plain.WITH_TILES])
        assert {*plain.WITH_TILES} <= {*names}
        return list(checks)

    monkeypatch.setattr(works, "checks", compare)
    measured(small)
    return known[0] if known else None


GOOD = Check("input_norm", "rows", "stock", 8, 0, "no bit", True)
BROKEN = Check("layer_norms", "rows", "stock", 8, 8, "CUDA error: an illegal memory access", False)


def test_what_was_not_compared_is_compared_by_the_next_run(small, monkeypatch, capsys):
    """After an error of the GPU, and where the memory does not suffice; then nothing is left."""
    full = GOOD._replace(patch="qkv_norm", allowed="CUDA out of memory", passed=False)
    after = BROKEN._replace(patch="router")
    with pytest.raises(CannotRunError, match=r"verify: the GPU reported an error.*goes on"):
        asked(small, monkeypatch, GOOD, full, BROKEN, after)
    said = capsys.readouterr().err
    assert "verify, router: not compared: the GPU reported an error at layer_norms" in said
    assert [*gpu_profile.load(str(small)).patches] == ["layer_norms"]
    wrong = GOOD._replace(patch="router", passed=False)
    known = asked(small, monkeypatch, full._replace(passed=True, allowed=""), wrong)
    assert known == ["input_norm", "layer_norms"]
    assert [*gpu_profile.load(str(small)).patches] == ["layer_norms", "router"]
    assert asked(small, monkeypatch) is None


def test_an_error_of_the_gpu_in_another_process_ends_nothing_here(small):
    found = with_others(small, [GOOD, BROKEN])
    assert len(found) == 2 + len(STANDS)


def test_a_patch_is_compared_again_if_the_memory_sufficed_for_a_part(small):
    full = GOOD._replace(allowed="CUDA out of memory", passed=False)
    (left,) = plain.verified([GOOD, full])
    assert plain.unasked(left)
    (wrong,) = plain.verified([GOOD._replace(passed=False), full])
    assert not plain.unasked(wrong)
    assert tune.shared(gpu_profile.Profile(KEY, {}, (left,))).shapes[0].reason == "not compared"


def test_patches_that_are_left_out_are_not_compared(monkeypatch):
    class Run(NamedTuple):
        patch: Any
        swaps: tuple[int, ...] = (1,)

        def verify(self, place: str) -> list[Check]:
            return [GOOD._replace(patch=self.patch.name)]

    runs = {name: Run(type("P", (), {"name": name})) for name in ("router", "input_norm")}
    monkeypatch.setattr(verify.ENGINE, "runs", runs)
    assert [check.patch for check in verify.check_all("cpu", but=["router"])] == ["input_norm"]


@pytest.mark.parametrize("said", ["OutOfMemoryError: CUDA out of memory", "AcceleratorError: CUDA error: out of memory"])  # fmt: skip
def test_want_of_memory_is_held_against_no_patch(said):
    """``verify`` runs beside the measurements, which need the memory themselves."""
    checks = [
        Check("layer_norms", "the comparison", "-", 0, 0, said, False),
        Check("input_norm", "rows", "stock", 8, 0, "no bit", True),
    ]
    found = plain.verified(checks)
    assert [(shape.kernel, plain.unasked(shape)) for shape in found] == [
        ("input_norm", False),
        ("layer_norms", True),
    ]
    assert plain.decisions(found) == {}


@pytest.mark.parametrize("figures", [{"ratio": 0.0}, {"ratio": -1.0}, {}])
def test_figures_that_cannot_be_decide_nothing(figures):
    assert plain.decisions([Shape("router", (1,), (), "", figures)]) == {}


def test_cases_are_of_the_models_asked_for():
    from gemma4_turbo.cli.tuning.kernel_cases import CASES

    named = {"31b": GEOMETRIES["31b"]}
    every = {name: make(named) for name, make in CASES.items()}
    assert {name for name, found in every.items() if not found} == {
        "router", "step_prologue", "moe_align", "router_norm", "ple_tail", "experts_sum", "router_few",
    }  # fmt: skip
    assert {case.case.split()[0] for found in every.values() for case in found} == {"31b"}


# -- subjects of the models -------------------------------------------------------------------------


def test_the_models_shapes(monkeypatch):
    monkeypatch.undo()
    every = REAL(GEOMETRIES)
    places = [(one.kernel, one.place) for one in every]
    assert len(set(places)) == len(places)
    assert ("skinny_gemm", (4224, 2816, 1, 16)) in places  # gate and up of 26B-A4B
    assert ("decode_attention", (256, 2, 8)) in places
    assert ("extend_attention", (512, 16, "dense")) in places  # 12B's layers that see everything
    assert ("experts_few", (8, 704, 2816)) in places
    assert [one.place for one in tune.tables(GEOMETRIES)] == [(128, 704)]
    for gpu in (SMALL_GPU, Gpu((9, 0), 132, 227 * 1024)):
        for one in every:
            tiles = one.candidates(gpu)
            assert 2 <= len(set(tiles)) <= 20, one
            assert all(isinstance(n, int) for n in one.numbers(tiles[0]))
            assert 0 < one.bytes < 6 << 30


def test_own_tiles_come_first_and_fit_the_gpu(monkeypatch):
    monkeypatch.undo()
    for one in REAL(GEOMETRIES):
        if one.kernel == "skinny_gemm":
            for tile in one.candidates(SMALL_GPU)[1:]:
                rows = tile.block_n * one.halves + one.most
                assert tile.stages * rows * tile.block_k * 2 <= SMALL_GPU.shared_memory
                assert 1 <= tile.split <= one.k // tile.block_k
        if one.kernel == "extend_attention" and one.kind == "dense":
            assert one.candidates(SMALL_GPU)[0] == extend.config.DENSE_99K[one.dim, False]


def test_compiling_launches_what_a_bench_would():
    """For other processes: on little memory, and each tile."""
    for one in one_of_each():
        one.compile(one.candidates(SMALL_GPU)[0], "cpu")


def test_tables_are_stocks_or_better_and_hold(monkeypatch):
    stock = moe.Tile(64, 128, 64, 8, 4, 3)
    monkeypatch.setattr(moe, "prepare_sglang", lambda: None)
    monkeypatch.setattr(moe, "HANDFUL_TOKENS", (8, 4096))
    monkeypatch.setattr(moe, "stock_tile", lambda tokens, width: stock)
    monkeypatch.setattr(moe, "near", lambda experts, projection, tile, stock: tile.m != 16)
    asked = []

    class Fake(moe.Times):
        def __init__(self, experts: Any, failed: Any, replays: int) -> None:
            self.us, self.experts = {}, experts

        def measure(self, tokens: int, wanted: Any) -> None:
            asked.append(len(wanted := list(wanted)))
            self.us |= {(tokens, *pair): float(pair[1].n) for pair in wanted}

        def decide(self, tokens: int, stock: moe.Tile) -> tuple[moe.Tile, moe.Tile]:
            m = 16 if tokens == 8 else 64
            return (self.best(tokens, moe.UP, m, 1)[0], self.best(tokens, moe.DOWN, m, 1)[0])

    monkeypatch.setattr(moe, "Times", Fake)
    monkeypatch.setattr(moe, "Experts", lambda width: width)
    row = moe.Tile(32, 64, 64, 1, 4, 2).config()
    shipped = moe_tables.Pair({8: row}, {8: row})
    pair, figures = moe.few(moe.Tables(704), 99 * 1024, shipped, lambda: None)
    assert pair.up[8] == stock.config()  # its own was wrong
    assert pair.up[4096]["BLOCK_SIZE_N"] == 64
    assert min(asked) >= 8
    assert figures["ratio"] == (2 * 128 + 2 * 64) / (4 * 128)
    assert figures["of_own"] == (2 * 128 + 2 * 64) / (4 * 64)
    moe_tables.tables_of(moe_tables.numbers(pair))


@pytest.mark.parametrize("memory", [99 * 1024, 163 * 1024, 227 * 1024])
def test_a_handful_fits(memory):
    for m in (16, 32, 64, 128, 256):
        found = moe.handful(m, memory)
        assert found or (m == 256 and memory < 100 * 1024)
        assert all(tile.stages * (m + tile.n) * tile.k * 2 <= memory for tile in found)
    jobs = moe.Tables(704).jobs(memory)
    assert len(set(jobs)) == len(jobs) > 40


# -- what is wrong is one line ----------------------------------------------------------------------


def refused(*arguments: str) -> str:
    """What the command says, in one line, with exit status 3."""
    done = CliRunner().invoke(app, ["tune", *arguments])
    assert done.exit_code == 3, done.output
    (line,) = done.output.splitlines()
    return line.removeprefix("gemma4_turbo: ")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An idle L4 that CUDA shows; what a test changes of it."""
    state: dict[str, Any] = {"busy": 0, "free": 20 << 30}
    properties = type("P", (), {"pci_domain_id": 0, "pci_bus_id": 59, "pci_device_id": 0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (state["free"], 24 << 30))
    monkeypatch.setattr(nvml, "look", lambda: nvml.Machine("570.1", ("NVIDIA L4",)))

    def utilisation(bus: str) -> int:
        assert bus == "00000000:3b:00.0"
        return int(state["busy"])

    monkeypatch.setattr(nvml, "utilisation", utilisation)
    monkeypatch.setattr(device, "PAUSE_S", 0)
    monkeypatch.setattr(device, "gpu", lambda place: SMALL_GPU)
    monkeypatch.setattr(
        device, "_libraries", lambda: {k: v for k, v in KEY._asdict().items() if k not in ("gpu", "driver")}
    )  # fmt: skip
    return state


def test_no_gpu():
    assert refused() == "no NVIDIA GPU: torch.cuda.is_available() is false"


@pytest.mark.parametrize("told", ["CUDA error: out of memory\nCUDA kernel errors might be", ""])
def test_a_gpu_that_others_have_for_themselves(gpu, monkeypatch, told):
    """The first use of it raises, where torch makes its context."""

    def raises(*_: Any) -> Any:
        raise RuntimeError(told)

    monkeypatch.setattr(torch.cuda, "mem_get_info", raises)
    first = told.partition("\n")[0] or "RuntimeError"
    assert refused() == f"the GPU cannot be used: {first}; nvidia-smi lists who uses it"


def test_a_busy_gpu(gpu):
    gpu["busy"] = 87
    assert refused().startswith("the GPU is busy, 87 % with other processes")


def test_too_little_memory(gpu, monkeypatch):
    gpu["free"] = 2 << 30
    monkeypatch.setattr(tune, "_import_sglang", lambda: None)
    monkeypatch.setattr(tune.ENGINE, "revert", lambda: None)
    monkeypatch.setattr(tune, "subjects", REAL)
    done = CliRunner().invoke(app, ["tune", "--model", "31b"])
    assert done.exit_code == 3
    assert "the GPU has 2.0 GiB free and" in done.output.splitlines()[-1]


def test_a_profile_that_cannot_be_written(gpu, small, monkeypatch):
    def denied(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "makedirs", denied)
    assert refused() == f"{small} cannot be written: Permission denied"
    monkeypatch.undo()


def test_a_file_that_is_no_profile_is_left_alone(gpu, small):
    """The variable may name the wrong file."""
    small.parent.mkdir()
    small.write_text('{"model_type": "gemma4"}')
    assert refused().startswith(f"{small} is left alone: it is no GPU profile")
    assert small.read_text() == '{"model_type": "gemma4"}'


def test_a_damaged_profile_is_replaced_and_named(small):
    small.parent.mkdir()
    small.write_bytes(gpu_profile.encoded(gpu_profile.Profile(KEY, {}, ()))[:-5])
    store = tune.Store(str(small), KEY, False)
    assert store.replaced == "one that is not used: it is no JSON: JSONDecodeError"
    store.add(ratio("router", 0.5, 1))
    assert gpu_profile.load(str(small)).key == KEY


def test_a_pipe_in_the_profiles_place_is_not_waited_for(gpu, small):
    small.parent.mkdir()
    os.mkfifo(small)
    assert refused().startswith(
        f"{small} cannot be written: it is a symbolic link or no regular file"
    )


def test_two_at_the_same_time(gpu, small):
    """Each would slow the other's kernels and write over what it has written. The lock is the folder's."""
    for name in (small.name, "other.json"):
        with tune.alone(str(small.with_name(name))):
            assert refused() == (
                f"another tune is running, with its profile in {small.parent}: times would be wrong"
            )
    assert os.listdir(small.parent) == []
    with tune.alone(str(small)):
        pass


def test_a_file_system_without_locks(small, monkeypatch):
    def none(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(tune.fcntl, "flock", none)
    with tune.alone(str(small)):
        pass


def test_no_place_for_a_profile(monkeypatch):
    monkeypatch.setenv(switches.GPU_PROFILE, "0")
    assert (
        refused()
        == f"there is no place for the profile: set {switches.GPU_PROFILE} to an absolute path"
    )


def test_a_folder_that_is_no_gemma(tmp_path):
    said = refused("--model", str(tmp_path / "none"))
    assert said.endswith("is none of 26b-a4b, 31b, 12b, e4b, e2b, and no model folder: No such file or directory")  # fmt: skip
    config = tmp_path / "config.json"
    for content, told in (
        ("[]", "is no JSON object"),
        ("{", "is no JSON object"),
        (" " * (tune.CONFIG_BYTES + 1), "is no JSON object"),
        ('{"model_type": "llama"}', "config.json is of a llama, no Gemma 4"),
        ("{}", "config.json is of a model without a model_type, no Gemma 4"),
        ('{"model_type": "a\\nb"}', "config.json is of a 'a\\nb', no Gemma 4"),
        ('{"model_type": "gemma4"}', "config.json has no swa_head_dim: it is no Gemma 4's"),
    ):
        config.write_text(content)
        assert refused("--model", str(tmp_path)).endswith(told)


def test_a_config_that_is_a_pipe(tmp_path):
    """Nobody may ever write into it."""
    os.mkfifo(tmp_path / "config.json")
    assert refused("--model", str(tmp_path)).endswith("no model folder: its config.json is no file")


@pytest.mark.parametrize(
    "change", [{"hidden_size": -1}, {"num_attention_heads": 7}, {"swa_head_dim": 64}, {"sliding_window": "x"},
               {"hidden_size": 0}, {"intermediate_size": 0}, {"layer_types": 5}, {"layer_types": {"full_attention": 1}},
               {"num_hidden_layers": "a\nb" * 300}]
)  # fmt: skip
def test_a_config_with_odd_numbers_is_named(change):
    with pytest.raises(ValueError, match=r"^[^\n]{,200}config\.json[^\n]{,200}$"):
        geometry.of_config(geometry.config("e4b") | {"swa_head_dim": 256} | change)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_models_folder_is_its_geometry(name, tmp_path):
    geometry.write_model(tmp_path, name)
    assert tune.geometries([str(tmp_path)]) == {name: GEOMETRIES[name]}
    assert geometry.of_config(geometry_mm.config(name)) == GEOMETRIES[name]


def test_another_size_is_measured_without_its_name(tmp_path):
    folder = tmp_path / "secret-project"
    geometry.write_model(folder, "e4b")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    (found,) = tune.geometries([str(folder)]).items()
    assert found == ("folder 1", GEOMETRIES["e4b"]._replace(mlp=1024))
    assert list(tune.geometries([])) == list(GEOMETRIES)


# -- sharing, and doctor ----------------------------------------------------------------------------


def test_sharing_prints_no_name_and_no_path(small, capsys):
    shapes = (
        Shape("skinny_gemm", (1, 2, 0, 16), (1,), "", {"ratio": 0.5, "/home/me": 1.0}),
        Shape("decode_attention", (256, 2, 8), None, "no tile runs: /home/me/.triton denied", {}),
        Shape("layer_norms", ("26b-a4b", 32), (), "", {"ratio": 0.5}),
        Shape("layer_norms", ("/home/me/model", 32), (), "", {"ratio": 0.5}),
        Shape("qkv_norm", ("e4b /home/me", 32), (), "", {"ratio": 0.5}),
        Shape("qkv_norm", ("e4b sliding", 32), (), "", {"ratio": 0.5}),
        Shape("/home/me", (1,), (), "", {}),
    )
    patches = {"router": switches.Decision(False, "/home/me"), "/home/me": switches.Decision(True, "")}  # fmt: skip
    gpu_profile.save(str(small), gpu_profile.Profile(KEY, patches, shapes))
    assert tune.run((), 5, False, True) == 0
    said = capsys.readouterr().out
    assert "/home" not in said
    assert str(small) not in said
    shared = gpu_profile.decoded(said.encode())
    assert [shape.shape for shape in shared.shapes] == [
        (1, 2, 0, 16), (256, 2, 8), ("26b-a4b", 32), ("other", 32), ("other", 32), ("e4b sliding", 32),
    ]  # fmt: skip
    assert shared.shapes[1].reason == "no tile runs"
    assert shared.shapes[0].figures == {"ratio": 0.5}


def test_without_torch_it_is_one_line(small, monkeypatch):
    told = "PyTorch is not installed: No module named 'torch'"
    monkeypatch.setattr(tune.report, "torch_problem", lambda: told)
    assert refused("--model", "e2b") == told


def test_there_is_nothing_to_share(small):
    assert refused("--share") == f"there is no profile at {small}: python -m gemma4_turbo tune"
    small.parent.mkdir()
    small.write_text("{}")
    assert refused("--share") == f"{small} is not used: gemma4_turbo_gpu_profile must be 1"


def told(gpu: str | None = "NVIDIA L4") -> str:
    gpu_profile.forget()
    return str(doctor._gpu_profile(gpu)["told"])


def test_doctor_names_the_profile_or_says_what_it_would_take(small, monkeypatch):
    monkeypatch.setattr(doctor, "_known", lambda: False)
    assert told(None) == f"none at {small}, and no GPU to measure"
    assert "extend_attention, decode_attention, skinny_gemm, experts_few run stock's code" in told()
    monkeypatch.setattr(doctor, "_known", lambda: True)
    assert "the package's own tiles are for this GPU" in told()
    measured(small)
    assert "is ignored: it was measured with" in told()
    monkeypatch.setattr(gpu_profile, "stale", lambda key: None)
    whole = gpu_profile.load(str(small))
    patches = {name: switches.Decision(False, "") for name in ("input_norm", "of_a_later_version")}
    gpu_profile.save(str(small), whole._replace(patches=patches))
    assert told().endswith("on NVIDIA L4; off: input_norm")
    gpu_profile.save(str(small), whole)
    assert told("NVIDIA H200").endswith("on NVIDIA L4; NVIDIA H200 takes none of the tiles")
    count = len(STANDS)
    assert told() == f"{small}: {count} tiles of {count} measurements on NVIDIA L4"
    monkeypatch.setenv(switches.GPU_PROFILE, "0")
    assert told() == "none: GEMMA4_TURBO_GPU_PROFILE says so, or there is no home folder"


def packaged(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile of the package's that holds here; its folder."""
    folder = Path(str(gpu_profile.PROFILES))
    folder.mkdir()
    tile, stocks = STANDS[:2]
    shapes = (
        Shape(tile.kernel, tile.place, (7,), "", {}),
        Shape(stocks.kernel, stocks.place, None, "stock's code is faster here", {}),
    )
    patches = {"input_norm": switches.Decision(False, "")}
    profile = gpu_profile.Profile(KEY._replace(driver="535.9", gemma4_turbo="0"), patches, shapes)
    (folder / "l4.json").write_bytes(gpu_profile.encoded(profile))
    here = {name: getattr(KEY, name) for name in ("gemma4_turbo", *gpu_profile.PACKAGES)}
    monkeypatch.setattr(gpu_profile, "versions", lambda: here)
    machine = nvml.Machine(KEY.driver, (KEY.gpu,))
    monkeypatch.setattr(nvml, "look", lambda: machine)
    gpu_profile.forget()
    return folder


THEIRS = "the package's, measured on NVIDIA L4 with driver 535.9: 1 tiles of 2 measurements"
MEASURE = "python -m gemma4_turbo tune measures, in five minutes on an idle GPU"


def test_doctor_names_the_packages_profile(small, monkeypatch):
    folder = packaged(monkeypatch)
    whole = f"{THEIRS}; {MEASURE}"
    file = str(folder / "l4.json")
    record = {"path": str(small), "in_use": False, "ignored": False, "packaged": file}
    assert doctor._gpu_profile("NVIDIA L4") == record | {"told": whole}
    (line,) = doctor._lines("gpu_profile", record | {"told": whole}, False).lines
    assert line == (f"GPU profile: {whole}", 2, "")
    small.parent.mkdir()
    small.write_text("{}")
    stale = f"{small} is ignored: gemma4_turbo_gpu_profile must be 1; {MEASURE}"
    assert told() == f"{THEIRS}; {stale}"
    assert doctor._gpu_profile("NVIDIA L4")["ignored"]
    assert told("NVIDIA H200") == stale
    monkeypatch.setenv(switches.GPU_PROFILE, "0")
    assert told().startswith("none: GEMMA4_TURBO_GPU_PROFILE says so")
    assert not doctor._gpu_profile("NVIDIA L4")["packaged"]


def test_doctor_names_the_users_before_the_packages(small, monkeypatch):
    packaged(monkeypatch)
    assert measured(small) == 0
    count = len(STANDS)
    users = f"{small}: {count} tiles of {count} measurements on NVIDIA L4"
    assert told() == f"{users}; for other shapes {THEIRS}"
    assert doctor._gpu_profile("NVIDIA L4")["in_use"]


def test_tune_measures_against_tiles_without_any_profile(small, monkeypatch):
    """The package's own profile says otherwise until then, and the user's file is written all the same."""
    from gemma4_turbo.kernels import measured as tiles

    packaged(monkeypatch)
    monkeypatch.setattr(tiles, "source", lambda gpu: gpu_profile.tiles(KEY.gpu))
    tiles.forget()
    place = (STANDS[0].kernel, STANDS[0].place)
    assert tiles.tiles(torch.device("cpu"))[place] == ((7,), "")
    seen = []

    def candidates(self: Stand, gpu: Gpu) -> list[float]:
        seen.append(dict(tiles.tiles(torch.device("cpu"))))
        return list(self.tiles)

    monkeypatch.setattr(Stand, "candidates", candidates)
    monkeypatch.setattr(device, "find", machine)
    monkeypatch.setattr(tune, "_import_sglang", lambda: None)
    monkeypatch.setattr(tune, "geometries", lambda names: {"e4b": SMALL})
    monkeypatch.setattr(tune.report, "torch_problem", lambda: None)
    monkeypatch.setattr(tune.ENGINE, "revert", lambda: None)
    assert tune.run((), 5, False, False) == 0
    assert len(seen) >= len(STANDS)
    assert not any(seen)
    assert len(gpu_profile.load(str(small)).shapes) == len(STANDS)
    tiles.forget()


def test_other_processes_end_if_ctrl_c_comes_while_they_start(monkeypatch):
    """The executor's thread was about to begin: it cannot be waited for."""
    from concurrent.futures import process
    from multiprocessing import active_children

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(process._ExecutorManagerThread, "start", interrupted)
    before = set(active_children())
    compiler = compiling.Compiler()
    with pytest.raises(KeyboardInterrupt):
        compiler.start(compiling.Kind.OURS, 1)
    assert set(active_children()) > before
    compiler.close()
    assert set(active_children()) == before
