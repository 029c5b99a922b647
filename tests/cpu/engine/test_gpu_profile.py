"""The GPU profile: where it is, what it may hold, when it holds, and that no file in its place can harm."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma4_turbo.engine import gpu_profile, nvml, switches
from gemma4_turbo.engine.gpu_profile import Key, Lookup, Profile, Shape, UnfitError
from gemma4_turbo.engine.installer import Engine
from gemma4_turbo.engine.switches import GPU_PROFILE, Decision, read
from tests.cpu.synthetic import record

VERSIONS = {"gemma4_turbo": "1", "sglang": "2", "torch": "3", "triton": "4"}
KEY = Key("NVIDIA L4", "570.1", "2", "3", "4", "1")
SHAPES = (
    Shape("skinny_gemm", (4096, 2560, 0, 16), (64, 128, 2, 4, 4), "", {"us": 10.5, "ratio": 0.8}),
    Shape("extend_attention", (256, 4, "dense"), None, "stock's code is faster here", {}),
    Shape("layer_norms", ("e4b", 32), (), "", {"ratio": 0.4}),
)
PROFILE = Profile(KEY, {"input_norm": Decision(False, "measured here: 1.3")}, SHAPES)


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the package's own profiles, without any."""
    folder = tmp_path / "package" / "profiles"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("{")
    monkeypatch.setattr(gpu_profile, "PROFILES", folder)
    return folder


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packages: Path) -> Iterator[Path]:
    """An L4 with these versions, and a place for the profile."""
    where = tmp_path / "config" / "profile.json"
    where.parent.mkdir()
    monkeypatch.setenv(GPU_PROFILE, str(where))
    monkeypatch.setattr(gpu_profile, "versions", lambda: dict(VERSIONS))
    monkeypatch.setattr(nvml, "look", lambda: nvml.Machine("570.1", ("NVIDIA L4",)))
    gpu_profile.forget()
    yield where
    gpu_profile.forget()


# -- where it is ----------------------------------------------------------------------------------


def test_the_folder_is_the_users_configuration_folder(monkeypatch):
    monkeypatch.delenv(GPU_PROFILE)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/config")
    assert gpu_profile.path() == "/config/gemma4_turbo/gpu_profile.json"
    monkeypatch.setenv("HOME", "/home/me")
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", unusable)
        assert gpu_profile.path() == "/home/me/.config/gemma4_turbo/gpu_profile.json"
    monkeypatch.setenv("HOME", "nowhere")
    assert gpu_profile.path() is None


def test_the_variable_names_another_file_or_none(monkeypatch):
    assert str(gpu_profile.path()).endswith("profile.json")
    monkeypatch.setenv(GPU_PROFILE, "0")
    assert gpu_profile.path() is None
    assert gpu_profile.lookup() == Lookup(None, None, "")
    assert read({GPU_PROFILE: "0"}).problems == read({GPU_PROFILE: "/a"}).problems == ()
    monkeypatch.setenv(GPU_PROFILE, "here.json")
    assert gpu_profile.path() is None
    assert read().problems == (f"{GPU_PROFILE}='here.json' is neither 0 nor an absolute path",)


# -- what it holds --------------------------------------------------------------------------------


def test_what_is_saved_is_found(place):
    gpu_profile.save(str(place), PROFILE)
    assert gpu_profile.lookup() == Lookup(str(place), PROFILE, "")
    assert gpu_profile.decisions() == PROFILE.patches
    assert gpu_profile.tiles("NVIDIA L4")[("skinny_gemm", (4096, 2560, 0, 16))] == (
        (64, 128, 2, 4, 4),
        "",
    )
    assert gpu_profile.tiles("NVIDIA H200") == {}  # another GPU of the machine
    assert oct(place.stat().st_mode & 0o777) == "0o600"
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_folders_are_made(tmp_path):
    where = tmp_path / "a" / "b" / "profile.json"
    gpu_profile.save(str(where), PROFILE)
    assert gpu_profile.load(str(where)) == PROFILE


def test_a_save_that_fails_leaves_the_old_one(place, monkeypatch):
    gpu_profile.save(str(place), PROFILE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        gpu_profile.save(str(place), PROFILE._replace(shapes=()))
    monkeypatch.undo()
    assert gpu_profile.load(str(place)) == PROFILE
    assert len(list(place.parent.iterdir())) == 1


def test_ctrl_c_once_it_is_in_place_is_ctrl_c(place, monkeypatch):
    replace = os.replace

    def pressed(source: str, target: str) -> None:
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", pressed)
    with pytest.raises(KeyboardInterrupt):
        gpu_profile.save(str(place), PROFILE)
    assert gpu_profile.load(str(place)) == PROFILE


def test_what_is_no_number_is_not_written(place):
    odd = SHAPES[0]._replace(figures={"us": float("nan"), "ratio": float("inf"), "of": 3.0})
    gpu_profile.save(str(place), PROFILE._replace(shapes=(odd,)))
    assert gpu_profile.load(str(place)).shapes[0].figures == {"of": 3.0}


def test_a_package_without_a_version_is_as_one_that_is_not_there(monkeypatch):
    """What a broken installation leaves behind."""
    monkeypatch.undo()
    monkeypatch.setattr(gpu_profile.metadata, "version", lambda package: None)
    assert gpu_profile.versions()["torch"] == ""


def test_none_is_no_news(place, caplog):
    assert gpu_profile.lookup() == Lookup(str(place), None, "")
    assert gpu_profile.decisions() == gpu_profile.tiles("NVIDIA L4") == {}
    assert caplog.records == []


WRONG: dict[str, Any] = {
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "a list": [],
    "another format": {"gemma4_turbo_gpu_profile": 2},
    "key": {"key": None},
    "gpu": {"key": {**KEY._asdict(), "gpu": 7}},
    "patches": {"patches": []},
    "on": {"patches": {"router": {"on": 1, "reason": ""}}},
    "reason": {"patches": {"router": {"on": True, "reason": "two\nlines"}}},
    "shapes": {"shapes": {}},
    "shapes must have at most": {"shapes": [SHAPES[0]._asdict()] * (gpu_profile.MAX_ROWS + 1)},
    "shape": {"shapes": [{"kernel": "router", "shape": [1.5], "tile": None, "reason": ""}]},
    "tile": {"shapes": [{"kernel": "router", "shape": [], "tile": [1 << 40], "reason": ""}]},
    "tile ": {"shapes": [{"kernel": "router", "shape": [], "tile": [1] * 600, "reason": ""}]},
    "it is no JSON": b'{"gemma4_turbo_gpu_profile": NaN}',
    "figures must be numbers": gpu_profile.encoded(PROFILE).replace(b"10.5", b"1e999"),
    "figures": {
        "shapes": [{"kernel": "a", "shape": [], "tile": None, "reason": "", "figures": {"us": "1"}}]
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_file_is_ignored_aloud_and_once(name, place, caplog):
    wrong = WRONG[name]
    if not isinstance(wrong, bytes):
        whole = json.loads(gpu_profile.encoded(PROFILE))
        wrong = json.dumps(whole | wrong if isinstance(wrong, dict) else wrong).encode()
    place.write_bytes(wrong)
    for _ in range(3):
        assert gpu_profile.lookup().profile is None
    assert gpu_profile.decisions() == {}
    (told,) = [one.getMessage() for one in caplog.records]
    assert told.startswith(f"gemma4_turbo: the GPU profile {place} is ignored: ")
    assert told.endswith("measure again: python -m gemma4_turbo tune")
    assert name not in ("it is no JSON", "figures must be numbers") or name in told
    assert "\n" not in told


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["key", "patches", "shapes", "kernel", "shape", "tile", "reason", "on", "figures"]), inner)))  # fmt: skip
def test_no_json_raises_anything_else(value):
    whole = value if not isinstance(value, dict) else {gpu_profile.MARK: 1, **value}
    with pytest.raises(UnfitError):
        gpu_profile.decoded(json.dumps(whole).encode())


# -- what may lie in its place --------------------------------------------------------------------


def refused(place: Path) -> str:
    """Why what lies there is not used."""
    gpu_profile.forget()
    found = gpu_profile.lookup()
    assert found.profile is None
    return found.reason


def test_a_link_is_not_followed_nor_replaced(place, tmp_path):
    target = tmp_path / "target"
    gpu_profile.save(str(target), PROFILE)
    place.symlink_to(target)
    assert refused(place) == "it is a symbolic link, which is not followed"
    with pytest.raises(UnfitError, match="symbolic link"):
        gpu_profile.save(str(place), PROFILE)
    assert place.is_symlink()


def test_a_pipe_or_a_folder_is_none(place):
    os.mkfifo(place)
    assert "no regular file" in refused(place)
    place.unlink()
    place.mkdir()
    assert "no regular file" in refused(place)
    place.rmdir()
    place.write_bytes(b"x" * (gpu_profile.MAX_BYTES + 1))
    assert refused(place) == f"it holds {gpu_profile.MAX_BYTES + 1} bytes"


def test_others_may_not_write_it(place):
    gpu_profile.save(str(place), PROFILE)
    place.chmod(0o620)
    assert refused(place) == "it can be written by others (mode 0620): chmod go-w"


def test_it_belongs_to_this_user_or_to_root(place, monkeypatch):
    gpu_profile.save(str(place), PROFILE)
    mine = place.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    monkeypatch.setattr(gpu_profile, "SYSTEM", mine + 2)
    assert refused(place) == "it is no regular file of this user"
    monkeypatch.setattr(gpu_profile, "SYSTEM", mine)
    gpu_profile.forget()
    assert gpu_profile.lookup().profile == PROFILE


def test_one_that_cannot_be_read_is_told(place, monkeypatch):
    gpu_profile.save(str(place), PROFILE)

    def denied(*args: Any, **options: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gpu_profile.guarded.os, "open", denied)
    assert refused(place) == "it cannot be read: Permission denied"


def test_a_mistake_of_ours_ends_no_server(place, monkeypatch):
    gpu_profile.save(str(place), PROFILE)
    monkeypatch.setattr(gpu_profile, "stale", lambda key: 1 / 0)
    assert refused(place) == "ZeroDivisionError: division by zero"


# -- whether it holds -----------------------------------------------------------------------------


@pytest.mark.parametrize("field", VERSIONS)
def test_other_versions_make_it_stale(field, place, caplog):
    gpu_profile.save(str(place), PROFILE._replace(key=KEY._replace(**{field: "0"})))
    here = VERSIONS[field]
    assert refused(place) == f"it was measured with {field} 0, here is {here}"
    assert len(caplog.records) == 1


def test_another_driver_or_gpu_makes_it_stale(place, monkeypatch):
    gpu_profile.save(str(place), PROFILE)
    others = nvml.Machine("570.1", ("NVIDIA L40S", "NVIDIA H200"))
    monkeypatch.setattr(nvml, "look", lambda: others)
    assert refused(place) == "it was measured on NVIDIA L4, here is NVIDIA H200, NVIDIA L40S"
    monkeypatch.setattr(nvml, "look", lambda: others._replace(driver="575"))
    assert refused(place) == "it was measured with driver 570.1, here is 575"

    def nobody() -> nvml.Machine:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(nvml, "look", nobody)
    assert "no NVIDIA driver answers here" in refused(place)


def test_a_slice_of_a_gpu_has_a_longer_name():
    assert gpu_profile.stale(KEY._replace(gpu="NVIDIA L4 MIG 1g.5gb")) is None


def test_a_machine_without_a_driver_raises_an_oserror(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-thing.so.1")
    with pytest.raises(OSError, match="no-such-thing"):
        nvml.look()


# -- those that come with the package ---------------------------------------------------------------

PLACE, TILE = ("skinny_gemm", (4096, 2560, 0, 16)), (32, 64, 1, 4, 4)
OTHERS = PROFILE._replace(  # another machine's: of its driver and of an earlier version of this package
    key=KEY._replace(driver="535.9", gemma4_turbo="0.9"),
    shapes=(Shape(*PLACE, TILE, "", {}), *SHAPES[1:]),
)


def put(folder: Path, name: str = "l4.json", profile: Profile = OTHERS, **key: str) -> str:
    """One of the package's, and its path."""
    (folder / name).write_bytes(
        gpu_profile.encoded(profile._replace(key=profile.key._replace(**key)))
    )
    gpu_profile.forget()
    return str(folder / name)


GPU = "NVIDIA L4"
STOCKS = ("extend_attention", (256, 4, "dense"))


def used(gpu: str = GPU) -> str | None:
    """Path of the package's profile for a GPU."""
    one = gpu_profile.packaged(gpu)
    return None if one is None else one.path


def test_the_users_rows_come_before_the_packages(place, packages):
    """Of a shape that both have; the others are there too, and the user's is what is found."""
    file = put(packages)
    assert PROFILE.shapes[0].tile != TILE
    gpu_profile.save(str(place), PROFILE._replace(shapes=PROFILE.shapes[:1]))
    assert gpu_profile.lookup().path == str(place)
    assert used() == file
    tiles = gpu_profile.tiles(GPU)
    assert tiles[PLACE][0] == SHAPES[0].tile
    assert tiles[STOCKS] == (None, "stock's code is faster here")


@pytest.mark.parametrize("home", [True, False])
def test_the_packages_where_the_user_has_none(home, place, packages, monkeypatch, caplog):
    """Or has no home to have one in."""
    file = put(packages)
    if not home:
        monkeypatch.delenv(GPU_PROFILE)
        monkeypatch.setenv("XDG_CONFIG_HOME", "")
        monkeypatch.setenv("HOME", "nowhere")
    assert gpu_profile.lookup() == Lookup(str(place) if home else None, None, "")
    assert gpu_profile.packaged(GPU) == (file, OTHERS._replace(patches={}))
    assert gpu_profile.tiles(GPU)[PLACE] == (TILE, "")
    assert gpu_profile.tiles(GPU)[STOCKS] == (None, "stock's code is faster here")
    assert caplog.records == []


def test_which_patches_are_on_is_not_taken_from_the_packages(packages):
    put(packages)
    assert OTHERS.patches
    assert gpu_profile.decisions() == {}


def test_a_stale_one_of_the_users_is_ignored_aloud_and_the_packages_counts(place, packages, caplog):
    put(packages)
    gpu_profile.save(str(place), PROFILE._replace(key=KEY._replace(driver="535.9")))
    for _ in range(2):
        why = "it was measured with driver 535.9, here is 570.1"
        assert gpu_profile.lookup() == Lookup(str(place), None, why)
        assert gpu_profile.tiles(GPU)[PLACE] == (TILE, "")
    assert gpu_profile.decisions() == {}
    (told,) = [one.getMessage() for one in caplog.records]
    assert told.startswith(f"gemma4_turbo: the GPU profile {place} is ignored: ")


def test_a_mistake_in_the_users_is_no_reason_to_use_none(place, packages):
    put(packages)
    place.write_bytes(b"{")
    assert gpu_profile.tiles(GPU)[PLACE] == (TILE, "")


@pytest.mark.parametrize("value", ["0", "here.json"])
def test_none_at_all_where_the_variable_says_so(value, packages, monkeypatch):
    """Or has a wrong value, of which the switches tell."""
    put(packages)
    monkeypatch.setenv(GPU_PROFILE, value)
    assert gpu_profile.lookup() == Lookup(None, None, "")
    assert used() is None
    assert gpu_profile.tiles(GPU) == gpu_profile.decisions() == {}


@pytest.mark.parametrize("field", ["gpu", "sglang", "torch", "triton"])
def test_the_packages_for_others_is_not_used_and_no_news(field, packages, caplog):
    put(packages, **{field: "0"})
    assert used() is None
    assert gpu_profile.tiles(GPU) == {}
    assert caplog.records == []


def test_a_build_of_the_same_torch(packages, monkeypatch):
    """Triton compiles our kernels, whatever CUDA torch is built for."""
    file = put(packages, torch=f"{VERSIONS['torch']}+cu130")
    assert used() == file
    monkeypatch.setattr(gpu_profile, "versions", lambda: VERSIONS | {"torch": "9.9+cu130"})
    put(packages, torch="9.9")
    assert used() == file
    put(packages, torch="9.90")
    assert used() is None


def test_of_two_that_fit_the_first_by_name(packages):
    put(packages, "b.json", OTHERS._replace(shapes=()))
    put(packages, "c.json", OTHERS._replace(shapes=()))
    file = put(packages, "a.json")
    put(packages, "0.json", sglang="0")
    assert used() == file
    assert gpu_profile.tiles(GPU)[PLACE] == (TILE, "")


def test_each_gpu_of_a_machine_has_its_own(packages):
    """A slice of one, too."""
    files = {
        "NVIDIA L4 MIG 1g.5gb": put(packages, "a.json", gpu="NVIDIA L4 MIG 1g.5gb"),
        "NVIDIA H200": put(packages, "b.json", gpu="NVIDIA H200"),
        GPU: put(packages, "c.json"),
        "NVIDIA L40S": None,
    }
    assert {gpu: used(gpu) for gpu in files} == files
    assert [bool(gpu_profile.tiles(gpu)) for gpu in files] == [True, True, True, False]


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_one_is_skipped_aloud_and_once(name, packages, caplog):
    file = put(packages)
    damaged = packages / "a.json"
    wrong = WRONG[name]
    if not isinstance(wrong, bytes):
        whole = json.loads(gpu_profile.encoded(OTHERS))
        wrong = json.dumps(whole | wrong if isinstance(wrong, dict) else wrong).encode()
    damaged.write_bytes(wrong)
    for _ in range(3):
        assert used() == file
    (told,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert told.getMessage().startswith(
        f"gemma4_turbo: the package's GPU profile {damaged} is skipped: "
    )
    assert "\n" not in told.getMessage()


def test_what_is_no_file_or_cannot_be_read_is_skipped(packages, monkeypatch, caplog):
    file = put(packages)
    (packages / "a.json").mkdir()
    os.mkfifo(packages / "b.json")
    put(packages, "c.json")
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.name == "c.json":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert used() == file
    told = [one.getMessage().rpartition(": ")[2] for one in caplog.records]
    assert told == ["it is no regular file"] * 2 + ["[Errno 13] Permission denied"]


def test_no_folder_is_no_news(packages, monkeypatch, caplog):
    """Git and wheels know no empty ones."""
    monkeypatch.setattr(gpu_profile, "PROFILES", packages / "gone")
    assert used() is None
    assert caplog.records == []


def test_a_folder_that_cannot_be_read_ends_no_server(packages, monkeypatch, caplog):
    def denied(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    for _ in range(2):
        assert gpu_profile.tiles(GPU) == {}
    (told,) = [one.getMessage() for one in caplog.records]
    assert "the package's GPU profiles cannot be used: PermissionError" in told


def test_without_a_file_no_version_is_looked_up(packages, monkeypatch):
    """Nor twice."""
    asked = []
    monkeypatch.setattr(gpu_profile, "versions", lambda: asked.append(1) or VERSIONS)
    assert used() is None
    assert asked == []
    put(packages)
    put(packages, "m4.json", triton="0")
    assert used()
    assert asked == [1]


def test_one_in_a_zip_is_found(packages, tmp_path, monkeypatch):
    put(packages)
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for file in packages.iterdir():
            archive.write(file, f"profiles/{file.name}")
    monkeypatch.setattr(
        gpu_profile, "PROFILES", zipfile.Path(tmp_path / "package.zip", "profiles/")
    )
    assert used() == str(tmp_path / "package.zip" / "profiles" / "l4.json")
    assert gpu_profile.tiles(GPU)[PLACE] == (TILE, "")


# -- what patches make of it ----------------------------------------------------------------------


def test_the_switches_come_before_it():
    patch = record("loose", "m:f", numerics="tolerance", default=True).patch
    measured = {"loose": Decision(False, "measured here")}

    def decided(environ: dict[str, str], **selection: Any) -> Decision:
        chosen = switches.Selection(**selection)
        return read(environ, chosen, [patch], measured).decisions["loose"]

    assert decided({}) == Decision(False, "measured here")
    assert decided({"GEMMA4_TURBO_LOOSE": "1"}).on
    assert decided({}, only=("loose",)).on
    assert decided({"GEMMA4_TURBO_PROFILE": "all"}) == Decision(False, "measured here")
    assert "exact" in decided({"GEMMA4_TURBO_PROFILE": "exact"}).reason


def test_the_engine_asks_where_a_patch_is_decided():
    patch = record("loose", "m:f", default=True).patch
    asked = []

    def measured() -> dict[str, Decision]:
        asked.append(1)
        return {"loose": Decision(False, "measured here")}

    engine = Engine([patch], {}, measured=measured)
    assert asked == []
    assert engine.decision(patch) == (False, "measured here")


def test_the_instance_reads_the_file(place, monkeypatch):
    from gemma4_turbo.instance import ENGINE
    from gemma4_turbo.kernels import measured

    monkeypatch.setattr(ENGINE, "_selection", None)  # other tests' is that it was reverted
    assert measured.source is gpu_profile.tiles
    gpu_profile.save(str(place), PROFILE)
    assert ENGINE.decision(ENGINE.runs["input_norm"].patch) == (False, "measured here: 1.3")
