"""The package inside a zip, SGLang inside a zip, and files that nobody may read."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo import instance
from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.imports import installed_release
from gemma4_turbo.kernels import moe_tables
from gemma4_turbo.kernels.moe_tables import Key
from gemma4_turbo.ports.any.experts import moe_configs
from tests.cpu.conftest import REPOSITORY, Python
from tests.cpu.synthetic import LEAF, World, record, returning

H200 = Key(128, 704, "NVIDIA_H200")

ASK = """
import json, sys
import gemma4_turbo
rows = gemma4_turbo.apply()
from gemma4_turbo.engine import gates
from gemma4_turbo.kernels import moe_tables
from gemma4_turbo.instance import ENGINE
print(json.dumps({
    "file": gemma4_turbo.__file__,
    "states": sorted({row.state for row in [*rows, *gemma4_turbo.status()]}),
    "outlook": {name: ENGINE.outlook(run.patch) for name, run in ENGINE.runs.items()},
    "refusals": gates.launch_problems(ENGINE),
    "tables": {str(key): moe_tables.load(key) is not None for key in moe_tables.shipped()},
}))
"""


def pack(archive: Path, replaced: dict[str, str | None] | None = None) -> Path:
    """This package as a zip; some files with another content, or left out."""
    with zipfile.ZipFile(archive, "w") as made:
        for path in sorted((REPOSITORY / "gemma4_turbo").rglob("*")):
            if path.suffix in (".py", ".json"):
                name = path.relative_to(REPOSITORY).as_posix()
                content = (replaced or {}).get(path.name, path.read_text())
                if content is not None:
                    made.writestr(name, content)
    return archive


def asked(python: Python, place: Path, *arguments: str) -> dict[str, Any]:
    """The answers of a process that has the package from there, and had none of it before."""
    done = python(ASK, *arguments, PYTHONPATH=str(place))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["file"].startswith(str(place))
    return found


def test_everything_is_found_in_the_zip(warm_python: Python, tmp_path: Path) -> None:
    """The same answers as from the folder."""
    found = asked(warm_python, pack(tmp_path / "package.zip"))
    expected = asked(warm_python, REPOSITORY)
    assert found.pop("file") != expected.pop("file")
    assert found == expected
    assert found["refusals"] == []
    assert found["outlook"]["layer_norms"][0] == states.ACTIVE
    assert sorted(found["tables"]) == sorted(map(str, moe_tables.shipped()))
    assert all(found["tables"].values())


@pytest.mark.parametrize("content", [None, "{"])
def test_tables_missing_or_damaged_in_the_zip(
    warm_python: Python, tmp_path: Path, content: str | None
) -> None:
    """The states say so; nothing is raised."""
    name = moe_tables.file_name(H200, down=False)
    # Without one table alone, that of another release with the same source would do.
    tables = [path.name for path in (REPOSITORY / "gemma4_turbo/fingerprints").iterdir()]
    installed = f"{installed_release()}.json"
    replaced = {installed: content} if content else dict.fromkeys(tables)
    place = pack(tmp_path / "package.zip", replaced)
    found = asked(warm_python, place)
    assert {state for state, _ in found["outlook"].values()} == {states.FAILED}
    assert all(
        f"fingerprints/{installed}" in reason or reason.startswith("fingerprints cannot be used: ")
        for _, reason in found["outlook"].values()
    )
    on = [patch.name for patch in CATALOGUE if patch.default]
    assert len(found["refusals"]) == len(on)
    code = f"from gemma4_turbo.kernels import moe_tables as m; print(m.load(m.{H200!r}, m.TABLES / 'triton_3_6'))"
    place = pack(tmp_path / "tables.zip", {name: content})
    done = warm_python(code, PYTHONPATH=str(place))
    if content is None:
        assert done.stdout == "None\n"
    else:
        assert "ValueError: " in done.stderr.splitlines()[-1] or "JSONDecodeError" in done.stderr


def test_a_patch_of_a_module_in_a_zip(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source is read from there, and stock's function recognised."""
    archive = world.root / "stock.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr(f"{world.package}/__init__.py", "")
        made.writestr(f"{world.package}/leaf.py", LEAF)
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    monkeypatch.setattr(sys, "path", [str(archive), *(p for p in sys.path if p != str(world.root))])
    engine.apply()
    leaf = world.imported()
    assert leaf.__file__.startswith(str(archive))
    (row,) = engine.status()
    assert (row.state, row.reason) == (states.ACTIVE, "installed")
    assert leaf.answer(1) == "ours"


def installed_at(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    """SGLang is found there."""
    spec = ModuleSpec("sglang", None, is_package=True)
    spec.submodule_search_locations = [str(place) for place in places]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    fingerprints._tell.cache_clear()


def test_the_installed_source_in_a_zip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Modules and packages, present and absent."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("sglang/__init__.py", "a = 1\r\n")
        archive.writestr("sglang/srt/leaf.py", LEAF)
    installed_at(monkeypatch, tmp_path / "a.zip" / "sglang")
    assert fingerprints.installed_source("sglang") == "a = 1\n"
    assert fingerprints.installed_source("sglang.srt.leaf") == LEAF
    assert fingerprints.installed_source("sglang.srt") is None
    assert fingerprints.installed_source("sglang.srt.absent") is None


def test_the_installed_source_of_a_namespace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Spread over folders, one of which is none."""
    (tmp_path / "one" / "sglang").mkdir(parents=True)
    (tmp_path / "two" / "sglang").mkdir(parents=True)
    (tmp_path / "file").write_text("no zip")
    (tmp_path / "two" / "sglang" / "leaf.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    places = [tmp_path / "gone" / "sglang", tmp_path / "file" / "sglang"]
    installed_at(monkeypatch, *places, tmp_path / "one" / "sglang", tmp_path / "two" / "sglang")
    assert fingerprints.installed_source("sglang.leaf") == "# coding: latin-1\nx = 'é'\n"
    assert fingerprints.installed_source("sglang.absent") is None


def test_an_installed_source_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """None, and told once: no permission, another encoding, a damaged zip."""
    folder = tmp_path / "sglang"
    (folder / "folder.py").mkdir(parents=True)
    (folder / "bytes.py").write_bytes(b"x = '\xff'\n")
    (folder / "locked.py").write_text("x = 1\n")
    (tmp_path / "a.zip").write_bytes(b"PK\x05\x06" + bytes(10))
    installed_at(monkeypatch, folder, tmp_path / "a.zip" / "sglang")
    read = Path.read_bytes

    def locked(path: Path) -> bytes:
        if folder in path.parents and "locked" in path.relative_to(folder).parts[0]:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", locked)
    for module in ("sglang.folder", "sglang.bytes", "sglang.locked", "sglang.locked.inner"):
        for _ in range(2):
            assert fingerprints.installed_source(module) is None
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    for what in ("bytes.py", "locked.py", "locked/inner.py"):
        assert sum(f"{folder}/{what} cannot be read: " in line for line in told) == 1


def test_sglang_cannot_be_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when ``sys.modules`` holds something without a spec, or a finder fails."""
    fingerprints._tell.cache_clear()
    monkeypatch.setitem(sys.modules, "sglang", type(sys)("sglang"))
    assert fingerprints.installed_source("sglang.leaf") is None


def test_the_outlook_never_raises(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for in the main process of a server, before the launch."""
    engine = world.engine((record("one", world.target("answer")), returning("ours")))
    monkeypatch.setattr(fingerprints, "installed_source", lambda module: "def broken(:\n")
    state, reason = engine.outlook(engine.runs["one"].patch)
    assert state == states.FAILED
    assert reason.startswith("SyntaxError")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"1": 2}', '{"1": null}', '{"x": {}}', "[" * 100_000, b"\xff\xfe\xff"],
)
def test_a_table_of_block_sizes_that_cannot_be_used(tmp_path: Path, content: Any) -> None:
    """ValueError, which the patch makes a reason of."""
    for down in (False, True):
        path = tmp_path / moe_tables.file_name(H200, down)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"."):
        moe_tables.load(H200, tmp_path)


def test_tables_in_a_folder_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Told by the patch's check; a folder that is not there holds none."""
    assert moe_tables.shipped(tmp_path / "gone") == []
    assert moe_tables.load(H200, tmp_path / "gone") is None

    def locked(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "is_file", locked)
    monkeypatch.setattr(Path, "iterdir", locked)
    monkeypatch.setattr(moe_tables, "here", lambda: tmp_path)
    with pytest.raises(ValueError, match="PermissionError"):
        moe_tables.load(H200)
    (check,) = moe_configs.verify(instance.ENGINE.runs["moe_configs"], "cpu")
    assert not check.passed
    assert "Permission denied" in check.allowed


def test_a_table_in_sglang_s_folder_that_cannot_be_read(tmp_path: Path) -> None:
    """Is not one that SGLang shipped: stock is left to it."""
    name = moe_tables.file_name(H200, down=False)
    (tmp_path / "configs" / "triton_3" / name).mkdir(parents=True)
    assert moe_configs.users_own(tmp_path, (name,)) == tmp_path / "configs" / "triton_3" / name
