"""GPU tests and benchmarks work with the release line that is installed, as far as no GPU is needed."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo.engine.fingerprints import Definitions, installed_source
from tests.cpu.conftest import REPOSITORY, run_scenario

FILES = sorted(
    path for folder in ("tests/gpu", "bench") for path in (REPOSITORY / folder).rglob("*.py")
)
# It looks what there is before it imports, and all of it is called below.
LOOKS_FIRST = REPOSITORY / "tests" / "gpu" / "lines.py"
WITHOUT_SGLANG = {"test_pdl.py", "test_skinny_gemm.py", "test_vision_batch.py"}


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Every ``import module`` and ``from module import name`` in a file; name may be empty."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


@functools.cache  # the files name the same few
def there(module: str, name: str) -> bool:
    """Whether the installed SGLang has the module and, if it is one, the name in it."""
    if installed_source(f"{module}.{name}" if name else module) is not None:
        return True
    source = installed_source(module) if name else None
    if source is None:
        return False
    definitions = Definitions(installed_source)
    return bool(definitions.node(f"{module}:{name}") or definitions.origins(module, name)) or any(
        isinstance(node, ast.Name) and node.id == name for node in ast.walk(ast.parse(source))
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_names_a_moved_module(path: Path):
    """Also in functions that only a GPU calls; and no release line's folder."""
    for module, name in imported(path):
        assert not module.startswith("gemma4_turbo.ports.v"), module
        assert not name.startswith("v0_"), name
        if module.partition(".")[0] == "sglang" and path != LOOKS_FIRST:
            assert there(module, name), f"{module} {name}"


@pytest.fixture(scope="module")
def found(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process of its own says; see `tests.cpu.gpu_tests_scenario`."""
    folder = tmp_path_factory.mktemp("gpu_tests")
    return run_scenario("tests.cpu.gpu_tests_scenario", environment, folder, timeout=1200)


def test_every_gpu_test_is_collected_or_says_why(found: Any):
    assert found["failed"] == {}
    files = {path.name for path in FILES if path.name.startswith("test_")}
    assert set(found["counts"]) | set(found["skipped"]) == files
    assert not set(found["counts"]) & set(found["skipped"])
    absent = found["line"]["absent"]
    for patch in ("router", "router_few", "picture_memory", "yoco_graph"):
        said = found["skipped"].pop(f"test_{patch}.py", None)
        assert (said is None) == (absent[patch] is None)
        assert said is None or absent[patch] in said
    assert found["skipped"] == {}
    assert set(found["counts"]) > WITHOUT_SGLANG
    assert min(found["counts"].values()) > 0


def test_every_benchmark_can_be_imported(found: Any):
    assert {name for name, error in found["imports"].items() if error} == set(), found["imports"]
    assert {"kernels.py", "tune_moe.py", "workers/engine.py"} < set(found["imports"])


def test_what_a_cpu_can_run_of_them_passes(found: Any):
    assert not any(found["calls"].values()), "\n".join(found["calls"].values())
    assert len(found["calls"]) == 7


def test_the_line_is_one_and_its_stock_is_followed(found: Any):
    line = found["line"]
    assert line["followed"] == f"{line['package']}.stock"
    expected = {
        "gemma4_turbo.ports.v0_5_12": (False, None, 1, [0, 0]),
        "gemma4_turbo.ports.v0_5_23": (True, 0, 4, [64, 64]),
    }[line["package"]]
    assert (line["folded"], line["skipped"], line["multiple"], line["own"]) == expected
    assert (line["absent"]["router_norm"] is not None) == line["folded"]
