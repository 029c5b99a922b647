"""Tables for the fused experts' kernel: the files, and the patch on SGLang's real look-up function."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import moe_tables
from gemma4_turbo.kernels.moe_tables import Key, Pair
from gemma4_turbo.ports.any.experts import moe_configs as patch
from tests.cpu.conftest import patched_sglang

H200 = Key(128, 704, "NVIDIA_H200")
CONFIG = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}
FOLDERS = sorted(Path(str(moe_tables.TABLES)).glob("triton_*"))  # one for each Triton
WIDE = CONFIG | {"BLOCK_SIZE_M": 64}


def pair() -> Pair:
    return Pair(
        {1: dict(CONFIG), 1024: dict(WIDE)},
        {1: CONFIG | {"BLOCK_SIZE_N": 32}, 1024: WIDE | {"BLOCK_SIZE_N": 256}},
    )


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's MoE modules imported with the patch applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=("moe_configs",)):
        yield


class World:
    """Stock's module as if on a certain GPU, with its tables copied to a folder of the test's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config

        from gemma4_turbo.cli.sglang_process import prepare_sglang

        prepare_sglang()
        self.stock = fused_moe_triton_config
        self.monkeypatch = monkeypatch
        self.ours = folder / "ours"
        self.ours.mkdir()
        monkeypatch.setattr(moe_tables, "here", lambda: self.ours)
        self.theirs = folder / "theirs"
        self.on("NVIDIA H200")

    def on(self, device: str) -> None:
        """A GPU of this name."""
        self.monkeypatch.setattr(self.stock, "get_device_name", lambda: device)
        self.forget()

    def forget(self) -> None:
        """As in a new process."""
        patch._found.clear()
        self.look_up.cache_clear()

    @property
    def look_up(self) -> Any:
        """What SGLang calls."""
        return self.stock.get_moe_configs

    def stocks(self, down: bool) -> Any:
        """What stock makes of the folders for the experts of 26B-A4B."""
        return self.look_up.__wrapped__(128, 704, None, down_moe=down)

    def copied(self) -> Path:
        """Stock's configs as a user may have them: a copy that is SGLang's folder from now on."""
        source = Path(self.stock.__file__).parent
        shutil.copytree(source / "configs", self.theirs / "configs")
        listed = {
            str((self.theirs / Path(path).relative_to(source.resolve())).resolve()): digest
            for path, digest in patch.of_the_release().items()
        }
        assert listed
        self.monkeypatch.setattr(patch, "of_the_release", lambda: listed)
        self.monkeypatch.setattr(self.stock, "__file__", str(self.theirs / "module.py"))
        self.forget()
        return self.theirs / "configs"

    def optimal(self, tokens: int, experts: int = 128, width: int = 704, **options: Any) -> Any:
        """Stock's own choice: configuration, that of the down projection, its largest BLOCK_SIZE_M."""
        return self.stock.try_get_optimal_moe_config(
            (experts, 2 * width, 2816),
            (experts, 2816, width),
            8,
            options.pop("dtype", None),
            tokens,
            return_down_config=True,
            **options,
        )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv(patch.FOLDER_VARIABLE, raising=False)
    ENGINE.apply(only=("moe_configs",))
    run = ENGINE.runs["moe_configs"]
    assert run.state == states.ACTIVE, run.reason
    run._decline_reason = ""
    made = World(tmp_path, monkeypatch)
    yield made
    monkeypatch.undo()
    made.forget()
    ENGINE.revert()


def engaged() -> int:
    return ENGINE.runs["moe_configs"].counters.engaged


def reason() -> str:
    return ENGINE.runs["moe_configs"].full_reason()


def test_the_table_of_the_shape_and_gpu_is_found(world: World):
    moe_tables.save(H200, pair(), world.ours)
    world.forget()
    before = engaged()
    up, (down, largest) = world.optimal(3)
    assert (up, down, largest) == (CONFIG, CONFIG | {"BLOCK_SIZE_N": 32}, 64)
    up, (down, _) = world.optimal(5000)
    assert (up, down) == (WIDE, WIDE | {"BLOCK_SIZE_N": 256})
    assert engaged() == before + 4


def test_the_name_of_the_gpu_decides(world: World):
    moe_tables.save(H200, pair(), world.ours)
    world.on("NVIDIA H100 80GB HBM3")
    up, (down, _) = world.optimal(3)
    assert down != CONFIG | {"BLOCK_SIZE_N": 32}
    assert up != CONFIG
    assert "no table for E=128, N=704 on NVIDIA_H100_80GB_HBM3" in reason()
    moe_tables.save(H200._replace(device="NVIDIA_H100_80GB_HBM3"), pair(), world.ours)
    world.on("NVIDIA H100 80GB HBM3")
    assert world.optimal(3)[0] == CONFIG  # although SGLang ships one for another Triton


def test_without_tables_stock_runs_and_the_report_says_why(world: World):
    before = engaged()
    found = world.optimal(32)
    assert "no table for E=128, N=704 on NVIDIA_H200" in reason()
    assert engaged() == before
    ENGINE.revert()
    world.look_up.cache_clear()
    assert found == world.optimal(32)


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 64},
        {"width": 768},
        {"dtype": "fp8_w8a8"},
        {"dtype": "float32"},
        {"dtype": "fp8_w8a8", "block_shape": [128, 128]},
        {"dtype": "int8_w8a8", "per_channel_quant": True},
    ],
    ids=str,
)
def test_other_experts_are_untouched(world: World, options: dict[str, Any]):
    moe_tables.save(H200, pair(), world.ours)
    world.forget()
    before = engaged()
    found = world.optimal(64, **dict(options))
    assert engaged() == before
    ENGINE.revert()
    world.look_up.cache_clear()
    assert found == world.optimal(64, **dict(options))


def infer_deterministically(world: World) -> None:
    """By the server's argument, where this SGLang keeps it."""
    name, wanted = (
        "enable_deterministic_inference",
        SimpleNamespace(deterministic=SimpleNamespace()),
    )
    setattr(wanted.deterministic, name, True)
    if not hasattr(world.stock, "get_exec"):
        world.monkeypatch.setattr(world.stock.get_global_server_args(), name, True)
        return
    for module in (world.stock, importlib.import_module("sglang.srt.runtime_context")):
        world.monkeypatch.setattr(module, "get_exec", lambda: wanted)


def test_deterministic_inference_uses_no_table(world: World):
    moe_tables.save(H200, pair(), world.ours)
    world.forget()
    infer_deterministically(world)
    assert world.look_up(128, 704, None) is None
    assert "deterministic" in reason()


def test_the_folder_of_the_environment_wins(world: World, tmp_path: Path, monkeypatch):
    moe_tables.save(H200, pair(), world.ours)
    chosen = tmp_path / "chosen"
    theirs = CONFIG | {"num_stages": 5}
    folder = chosen / "configs" / "triton_3_6_0"
    folder.mkdir(parents=True)
    (folder / moe_tables.file_name(H200, False)).write_text(json.dumps({"7": theirs}))
    monkeypatch.setenv(patch.FOLDER_VARIABLE, str(chosen))
    world.forget()
    assert world.look_up(128, 704, None) == {7: theirs}
    assert world.look_up(128, 704, None, down_moe=True) == world.stocks(True)
    assert world.stocks(True) != pair().down
    assert patch.FOLDER_VARIABLE in reason()


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("version", ["triton_3_6_0", "triton_3_4_0"])
def test_a_table_that_the_user_put_beside_stocks_wins(world: World, version: str, down: bool):
    """For both projections, whichever it is for: half a pair could differ in BLOCK_SIZE_M."""
    moe_tables.save(H200, pair(), world.ours)
    theirs = {"7": CONFIG | {"num_stages": 5}}
    path = world.copied() / version / moe_tables.file_name(H200, down)
    path.write_text(json.dumps(theirs))
    world.forget()
    read = [world.stocks(asked) for asked in (False, True)]
    assert [world.look_up(128, 704, None, down_moe=asked) for asked in (False, True)] == read
    assert [*pair()] != read
    # A release may ship tables for a newer Triton than the user's, which stock takes before it.
    assert {7: theirs["7"]} in read or version < "triton_3_6_0"
    assert "user's own table" in reason()


def test_a_table_of_the_releases_own_does_not_win_and_an_edited_one_does(world: World):
    device = "NVIDIA_H100_80GB_HBM3"
    key = H200._replace(device=device)
    moe_tables.save(key, pair(), world.ours)
    folder = world.copied()
    world.on("NVIDIA H100 80GB HBM3")
    assert world.look_up(128, 704, None) == pair().up
    (shipped,) = folder.glob(f"*/{moe_tables.file_name(key, False)}")
    shipped.write_text(shipped.read_text().replace(" ", ""))
    world.forget()
    assert world.look_up(128, 704, None) != pair().up
    assert "user's own table" in reason()


def test_an_override_still_wins(world: World):
    from sglang.srt.layers.moe.moe_runner.triton_utils import override_config

    moe_tables.save(H200, pair(), world.ours)
    world.forget()
    with override_config(WIDE):
        assert world.optimal(1) == (WIDE, (None, None))


def test_a_wrong_table_is_not_used(world: World):
    made = pair()
    moe_tables.save(H200, made, world.ours)
    made.down[1024]["BLOCK_SIZE_M"] = 128
    text = json.dumps({str(tokens): config for tokens, config in made.down.items()})
    (world.ours / moe_tables.file_name(H200, True)).write_text(text)
    world.forget()
    assert world.optimal(2000)[0]["BLOCK_SIZE_M"] == 64  # stock's default
    assert "BLOCK_SIZE_M must be that of up" in reason()


def test_stock_comes_back(world: World):
    ours = world.look_up
    stock = ours.__wrapped__
    assert ours.cache_info() == stock.cache_info()
    ENGINE.revert()
    assert world.stock.get_moe_configs is stock
    assert world.optimal(1)[0] != CONFIG


def test_the_fused_experts_module_gets_ours(world: World):
    """What the kernel is launched with goes through the look-up that is replaced."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    moe_tables.save(H200, pair(), world.ours)
    world.forget()
    before = engaged()
    fused_moe.try_get_optimal_moe_config((128, 1408, 2816), (128, 2816, 704), 8, None, 1)
    assert engaged() == before + 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_shipped_table_obeys_the_rules(folder: Path):
    """Equal BLOCK_SIZE_M above all: stock asserts it at every call."""
    for key in moe_tables.shipped(folder):
        found = moe_tables.load(key, folder)
        assert found is not None, f"half a pair: {key}"
        moe_tables.check(found)
        for tokens, up in found.up.items():
            assert up["BLOCK_SIZE_M"] == found.down[tokens]["BLOCK_SIZE_M"]
    assert all(check.passed for check in patch.verify(None, "cpu"))  # type: ignore[arg-type]
    names = {path.name for path in folder.glob("*.json")}
    shipped = moe_tables.shipped(folder)
    assert names == {moe_tables.file_name(key, down) for key in shipped for down in (0, 1)}


def test_a_triton_without_tables_of_its_own_has_none(monkeypatch: pytest.MonkeyPatch):
    """Those of another one are not fast there."""
    monkeypatch.setattr(moe_tables, "triton", lambda: "Triton 9.9")
    assert moe_tables.shipped() == []
    assert moe_tables.load(H200) is None
    (check,) = patch.verify(None, "cpu")  # type: ignore[arg-type]
    assert check.passed
    assert "Triton 9.9" in check.what


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_gpu_has_tables_for_one_and_for_two(folder: Path):
    widths: dict[str, set[int]] = {}
    for key in moe_tables.shipped(folder):
        assert key.experts == 128
        widths.setdefault(key.device, set()).add(key.width)
    assert {"NVIDIA_H200", "NVIDIA_H100_80GB_HBM3"} <= widths.keys()
    assert all(found == {704, 352} for found in widths.values())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p.down.pop(1), "same numbers of tokens"),
        (lambda p: p.up.clear(), "up has no entries"),
        (lambda p: p.down[1].update(BLOCK_SIZE_M=32), "BLOCK_SIZE_M must be that of up"),
        (lambda p: p.up[1].update(BLOCK_SIZE_N=48), "up\\[1\\].BLOCK_SIZE_N"),
        (lambda p: p.up[1].update(USE_TMA=1), "exactly"),
        (lambda p: p.up[1].pop("num_warps"), "exactly"),
        (lambda p: p.up.__setitem__(0, dict(CONFIG)), "0 tokens"),
    ],
)
def test_wrong_tables_are_named(change, named: str, tmp_path: Path):
    made = pair()
    change(made)
    with pytest.raises(ValueError, match=named):
        moe_tables.save(H200, made, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_read_back(tmp_path: Path):
    moe_tables.save(H200, pair(), tmp_path)
    assert moe_tables.load(H200, tmp_path) == pair()
    assert moe_tables.shipped(tmp_path) == [H200]
    assert moe_tables.load(H200._replace(width=352), tmp_path) is None
