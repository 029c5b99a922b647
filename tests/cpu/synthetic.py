"""A small package that stands in for SGLang where only the mechanism is in question."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gemma4_turbo.catalogue import BITWISE, Alias, Patch
from gemma4_turbo.engine import fingerprints, imports, installer, switches
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.engine.port import Port
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.engine.states import PatchStatus

RELEASE = "1.0"
Build = Callable[[PatchRun, dict[str, Any]], dict[str, Any]]

LEAF = '''\
"""Stock."""


def answer(x: int) -> int:
    """Twice."""
    return x * 2


class Model:
    """Stock's model."""

    def forward(self, x: int) -> int:
        return x + 1

    @staticmethod
    def scale(x: int) -> int:
        return x * 10

    @classmethod
    def name(cls) -> str:
        return cls.__name__
'''


class Record(NamedTuple):
    """A patch of the catalogue with its ports."""

    patch: Patch
    ports: tuple[Port, ...]

    @property
    def name(self) -> str:
        """The patch's."""
        return self.patch.name


def record(name: str, *targets: str, **fields: Any) -> Record:
    """A patch with one port; plain values for everything that is not given."""
    of_patch: dict[str, Any] = {"summary": name, "numerics": BITWISE, "default": True}
    without_code = fields.get("needless") or fields.get("tells_only")
    of_port: dict[str, Any] = {
        "module": "" if without_code else f"code_of_{name}",
        "targets": targets,
        "written_for": (RELEASE,),
        "superseded_when": (targets[0] if targets else "nowhere:nothing", "stock_has_it_now"),
    }
    for field, value in fields.items():
        (of_patch if field in Patch._fields else of_port)[field] = value
    return Record(Patch(name, **of_patch), (Port(**of_port),))


def alias(env: str, disables: bool = True) -> Alias:
    """An alias variable."""
    return Alias(env, disables)


class Code(types.ModuleType):
    """What a port's module is in the package."""

    def __init__(self, port: Port, build: Build) -> None:
        super().__init__(port.module)
        self.build = build
        self.undone = 0

    def undo(self, run: PatchRun) -> None:
        """Count the calls."""
        self.undone += 1

    def verify(self, run: PatchRun, device: str) -> list[Check]:
        """Nothing to compare."""
        return []


class World:
    """The stand-in package on disk, and engines whose patches are written for it."""

    def __init__(self, root: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.package = package
        self.leaf = f"{package}.leaf"
        self.table: dict[str, dict[str, str]] = {RELEASE: {}}
        self._monkeypatch = monkeypatch
        self._engines: list[installer.Engine] = []
        (root / package).mkdir(exist_ok=True)
        self.write("__init__", "")
        self.write("leaf", LEAF)
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.setattr(imports, "root", package)
        monkeypatch.setattr(fingerprints, "known_releases", lambda: self.table)

    def write(self, module: str, source: str) -> Path:
        """A module of the package."""
        path = self.root / self.package / f"{module}.py"
        path.write_text(source)
        importlib.invalidate_caches()
        return path

    def edit(self, old: str, new: str) -> None:
        """Change one place of the leaf's source on disk."""
        path = self.root / self.package / "leaf.py"
        text = path.read_text()
        assert text.count(old) == 1
        self.write("leaf", text.replace(old, new))

    def target(self, qualname: str, module: str = "leaf") -> str:
        """``module:qualname`` in this package."""
        return f"{self.package}.{module}:{qualname}"

    def imported(self, module: str = "leaf") -> Any:
        """A module of the package, imported now if it is not yet."""
        return importlib.import_module(f"{self.package}.{module}")

    def engine(self, *patches: tuple[Record, Build]) -> installer.Engine:
        """An engine for ``patches``, written for the package's source as it is now."""
        ports = {made.name: made.ports for made, _ in patches}
        every = [port for of_patch in ports.values() for port in of_patch]
        source = fingerprints.folder_source(self.root)
        self.table[RELEASE] |= fingerprints.record_release(source, every)
        for record, build in patches:
            for port in record.ports:
                self._monkeypatch.setitem(sys.modules, port.module, Code(port, build))
        made = installer.Engine([record.patch for record, _ in patches], ports, "elsewhere")
        self._engines.append(made)
        return made

    def close(self) -> None:
        """Leave the process as it was."""
        for engine in self._engines:
            engine.revert()
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, installer._FirstImport)]
        for name in [n for n in sys.modules if n.partition(".")[0] == self.package]:
            del sys.modules[name]


def returning(value: Any) -> Build:
    """A build whose replacements all return ``value``."""

    def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return value

        return dict.fromkeys(stock, replacement)

    return build


def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of ours is set, and none that a test sets outlives it."""
    import os

    ours = {switches.SELECTION, *(v for v in os.environ if v.startswith(switches.MASTER))}
    for variable in ours:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def only_row(engine: installer.Engine) -> PatchStatus:
    """The status of the only patch."""
    (row,) = engine.status()
    return row
