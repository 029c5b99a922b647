"""What `docs/architecture.md` and `docs/adding-a-patch.md` say is so."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gemma4_turbo import catalogue, instance
from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.installer import Engine
from gemma4_turbo.engine.port import Port
from tests.cpu.conftest import REPOSITORY

PACKAGE = REPOSITORY / "gemma4_turbo"
ROOMS = ("engine", "kernels", "plans", "runtime", "fusions", "models", "sitecustomize_example")
FILES = ("catalogue.py", "instance.py", "plugin.py", "version.py", "__init__.py")
LIBRARIES = ("sgl_kernel", "flashinfer")  # SGLang's own kernels, and those that it calls
PAGE = (REPOSITORY / "docs" / "adding-a-patch.md").read_text()
ROOMS_PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()


def strings(path: Path) -> list[str]:
    """The strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said
    ]


def identifiers(path: Path) -> set[str]:
    """Names, attributes and imports of a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.name for alias in node.names}
            found.add(getattr(node, "module", None) or "")
    return found


def named(path: Path) -> set[str]:
    """SGLang and its libraries as a module's code names them; prose, comments and links are none."""
    found = {
        text
        for text in strings(path)
        if text == "sglang" or "sglang." in text or any(name in text for name in LIBRARIES)
    }
    return found | {
        name
        for name in identifiers(path)
        if name.partition(".")[0] == "sglang" or any(library in name for library in LIBRARIES)
    }


@pytest.mark.parametrize("room", [*ROOMS, *FILES])
def test_no_name_of_sglangs_outside_the_ports(room: str) -> None:
    """The package, ``"sglang.module:function"``, an import and a library's name. Not a GPU profile's field."""
    place = PACKAGE / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    assert files
    found = {path.name: named(path) for path in files}
    found["gpu_profile.py"] = found.get("gpu_profile.py", set()) - {"sglang"}
    assert {name: names for name, names in found.items() if names} == {}


def test_no_module_is_in_no_room() -> None:
    """What neither these tests nor an exception of theirs looks at."""
    others = {"__main__.py", "cli", "ports", "fingerprints", "profiles"}
    there = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - {"__pycache__"} == {*ROOMS, *FILES, *others}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('PLACE = "sglang.srt:name"', "sglang.srt:name"),
        ('find("sglang")', "sglang"),
        ("def run():\n    from sglang.srt import models", "sglang.srt"),
        ("import sglang", "sglang"),
        ("import sgl_kernel.ops", "sgl_kernel.ops"),
        ("torch.ops.sgl_kernel.rmsnorm", "sgl_kernel"),
        ('modules["flashinfer.norm"]', "flashinfer.norm"),
        ("if flashinfer is None: pass", "flashinfer"),
        ('"""sglang.srt and flashinfer."""  # sgl_kernel', ""),
        ('SOURCE = "sgl-project/sglang#1"', ""),
    ],
)
def test_such_a_name_is_found(code: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    assert named(path) == ({found} if found else set())


STAGES = {
    "extend_attention_fwd", "decode_attention_fwd", "gemma4_fused_routing", "stock_routing",
    "gemma_qkv_rmsnorm", "gemma_rmsnorm_residual_scalar", "gemma_dual_rmsnorm_residual_scalar",
    "apply_rope_with_cos_sin_cache_inplace", "StandardTopKOutput", "MoeRunnerConfig",
    "Gemma3TextScaledWordEmbedding",
}  # fmt: skip
"""What a line's ``stock.py`` alone calls, of what benchmarks, ``tune`` and GPU tests need."""


@pytest.mark.parametrize("folder", ["gemma4_turbo/cli", "bench", "tests/gpu"])
def test_stock_is_called_through_the_lines_stock(folder: str) -> None:
    """The router's patch is handed stock's closure: its GPU tests make one."""
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files
    called = {path.name: identifiers(path) & STAGES for path in files}
    called["test_router.py"] = called.get("test_router.py", set()) - {"stock_routing"}
    assert {name: found for name, found in called.items() if found} == {}


def test_every_stage_is_called_there() -> None:
    """The other test would find none of a name that is wrong."""
    files = list((PACKAGE / "ports").rglob("stock.py"))
    assert len(files) == 3
    assert set().union(*map(identifiers, files)) >= STAGES


@pytest.mark.parametrize("patch", catalogue.CATALOGUE, ids=lambda patch: patch.name)
def test_a_port_for_every_patch(patch: catalogue.Patch) -> None:
    """And none for a patch that the catalogue does not have."""
    assert instance.PORTS[patch.name]
    names = {patch.name for patch in catalogue.CATALOGUE}
    assert all(line.PORTS.keys() <= names for line in instance.LINES)


def test_what_is_only_read_is_named() -> None:
    """No fingerprint of a whole class, which any edit to it would change: its methods, or `Port.reads`.

    But of the one that takes the function it runs from its base: a method of its own would be another.
    """
    sources = {source for port in instance.every_port() for source in port.sources}
    classes = {name for name in sources if re.fullmatch(r"_*[A-Z]\w*", re.split(r"[:.]", name)[-1])}
    assert {name.rpartition(":")[2] for name in classes} == {"Gemma4RotaryEmbedding"}


# -- the example of docs/adding-a-patch.md ----------------------------------------------------------


def block(start: str) -> str:
    """The page's Python that begins so."""
    (found,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        if code.startswith(start)
    ]
    return found


def test_the_example_of_the_documentation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Record, port and code as they stand there, on SGLang's own class."""
    monkeypatch.setenv("GEMMA4_TURBO_STATE_DIR", str(tmp_path / "state"))
    names = {**vars(catalogue), "Port": Port, "HERE": "the_line"}
    patch = eval(block("Patch("), names)
    ports = eval("{" + block('"example": Port(') + "}", names)
    code = types.ModuleType("the_line.decode_step.example")
    exec(block("from gemma4_turbo.runtime"), vars(code))
    monkeypatch.setitem(sys.modules, "the_line.decode_step.example", code)
    (port,) = ports.values()
    prints = fingerprints.record_release(fingerprints.installed_source, [port])
    table: Any = {**fingerprints.known_releases(), **dict.fromkeys(port.written_for, prints)}
    monkeypatch.setattr(fingerprints, "known_releases", lambda: table)

    from sglang.srt.models.gemma4_causal import Gemma4TextModel

    stocks = vars(Gemma4TextModel)["get_input_embeddings"]
    engine = Engine([patch], {patch.name: (port,)}, "sglang.srt.models.gemma4_")
    engine.apply()
    try:
        run = engine.runs["example"]
        assert run.state == states.ACTIVE, run.reason
        before = run.counters.engaged  # of another test's engine in this process, too
        model = mock.Mock(embed_tokens=mock.Mock())
        assert Gemma4TextModel.get_input_embeddings(model) is model.embed_tokens
        assert run.engaged_count() == before + 1
        model.embed_tokens.__dict__["_forward_hooks"] = {1: print}
        assert Gemma4TextModel.get_input_embeddings(model) is stocks(model)
        assert run.engaged_count() == before + 1
        assert "the embedding has forward hooks" in run.full_reason()
    finally:
        engine.revert()
    assert vars(Gemma4TextModel)["get_input_embeddings"] is stocks


# -- the benchmarks ---------------------------------------------------------------------------------

BENCH = REPOSITORY / "bench"
BENCH_ROOMS = sorted(path.parent for path in BENCH.glob("*/__init__.py"))


def test_import_linter_knows_every_benchmark() -> None:
    """Its contracts name rooms and what a user runs one by one."""
    linter = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]
    contracts = {contract["name"]: contract for contract in linter["contracts"]}
    start = "Benchmarks: what a user runs "
    runs = sorted(f"bench.{path.stem}" for path in BENCH.glob("*.py"))
    assert contracts[f"{start}is imported by no room"]["forbidden_modules"] == runs
    assert contracts[f"{start}knows nothing of the others"]["modules"] == runs
    rooms = {f"bench.{room.name}" for room in BENCH_ROOMS}
    named = set(contracts[f"{start}is imported by no room"]["source_modules"])
    assert named == rooms | {"bench.site"}
    (floors,) = (c["layers"] for c in linter["contracts"] if "bench.common" in str(c.get("layers")))
    assert {name for floor in floors for name in floor.split(" | ")} == rooms


@pytest.mark.parametrize("room", BENCH_ROOMS, ids=lambda room: room.name)
def test_a_room_of_the_benchmarks_says_its_rule(room: Path) -> None:
    """And nothing that a user runs lies in it, but for the processes that benchmarks start."""
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert said is not None
    assert "\nRule: " in said
    assert f"`bench/{room.name}/`" in ROOMS_PAGE
    runs = [path.name for path in room.glob("*.py") if "__main__" in path.read_text()]
    assert not runs or room.name == "workers"
