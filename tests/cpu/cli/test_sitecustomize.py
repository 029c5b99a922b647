"""`sitecustomize_example` among others that run what they shadow: each runs once, in any order."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from tests.cpu.conftest import REPOSITORY, Python

EXAMPLE = REPOSITORY / "sitecustomize_example" / "sitecustomize.py"

NOTE = """
import os, sys
with open(os.environ["RUNS"], "a") as runs:
    runs.write("{name}\\n")
"""
HERE = "here = os.path.dirname(os.path.realpath(__file__))\n"
OTHERS = HERE + "others = [p for p in sys.path if os.path.realpath(p or '.') != here]\n"
FIRST = (
    OTHERS
    + "files = [os.path.join(p, 'sitecustomize.py') for p in others]\n"
    + "file = next((file for file in files if os.path.isfile(file)), None)\n"
)
PATH_FINDER = (
    "import importlib.machinery, importlib.util\n"
    + OTHERS
    + "spec = importlib.machinery.PathFinder.find_spec('sitecustomize', others)\n"
    + "if spec is not None:\n"
    + "    module = importlib.util.module_from_spec(spec)\n"
)
# The usual ways to run the next one.
CHAINING = {
    "finder": PATH_FINDER + "    spec.loader.exec_module(module)\n",
    "finder_registered": PATH_FINDER
    + "    sys.modules['sitecustomize'] = module\n    spec.loader.exec_module(module)\n",
    "location": "import importlib.util\n"
    + FIRST
    + "if file:\n"
    + "    spec = importlib.util.spec_from_file_location('shadowed_sitecustomize', file)\n"
    + "    spec.loader.exec_module(importlib.util.module_from_spec(spec))\n",
    "import": HERE
    + "me = sys.modules.pop('sitecustomize')\n"
    + "kept = list(sys.path)\n"
    + "sys.path[:] = [p for p in sys.path if os.path.realpath(p) != here]\n"
    + "try:\n    import sitecustomize\n"
    + "except ImportError:\n    sys.modules['sitecustomize'] = me\n"
    + "finally:\n    sys.path[:] = kept\n",
    "import_forgetful": HERE
    + "del sys.modules['sitecustomize']\n"
    + "sys.path.remove(here)\n"
    + "try:\n    import sitecustomize\n"
    + "finally:\n    sys.path.insert(0, here)\n",
    "run_path": "import runpy\n" + FIRST + "if file:\n    runpy.run_path(file)\n",
    "exec": FIRST + "if file:\n    exec(compile(open(file).read(), file, 'exec'))\n",
    "exec_anonymous": FIRST + "if file:\n    exec(open(file).read(), {'__name__': 'x'})\n",
    "exec_in_a_function": FIRST
    + "def go():\n    exec(compile(open(file).read(), file, 'exec'))\n"
    + "if file:\n    go()\n",
}


class Folders:
    """Folders with a ``sitecustomize`` each, in the order of PYTHONPATH."""

    def __init__(self, root: Path, python: Python) -> None:
        self.root, self._python, self.runs = root, python, root / "runs"
        package = self.folder("package")
        (package / "gemma4_turbo.py").write_text(
            "def bootstrap():\n" + NOTE.format(name="bootstrap").replace("\n", "\n    ")
        )

    def folder(self, name: str) -> Path:
        """An empty folder."""
        made = self.root / name
        made.mkdir()
        return made

    def write(self, name: str, text: str) -> Path:
        """A ``sitecustomize`` that notes its run and does more."""
        made = self.folder(name)
        (made / "sitecustomize.py").write_text(NOTE.format(name=name) + text)
        return made

    def copy(self, name: str) -> Path:
        """This package's own."""
        made = self.folder(name)
        shutil.copy(EXAMPLE, made)
        return made

    def start(self, *folders: Path, code: str = "") -> tuple[list[str], str, str]:
        """What ran, sorted, and what was printed."""
        self.runs.unlink(missing_ok=True)
        path = ":".join(map(str, [*folders, self.root / "package"]))
        done = self._python(code, PYTHONPATH=path, RUNS=str(self.runs))
        assert done.returncode == 0, done.stderr
        ran = self.runs.read_text().split() if self.runs.exists() else []
        return sorted(ran), done.stdout, done.stderr


@pytest.fixture
def folders(tmp_path: Path, python: Python) -> Folders:
    """None yet but that of a package that counts its bootstraps."""
    return Folders(tmp_path, python)


@pytest.mark.parametrize("kind", CHAINING)
@pytest.mark.parametrize("order", ["ours first", "ours last", "two of ours", "around"])
def test_each_runs_once(folders: Folders, kind: str, order: str) -> None:
    """Ours, one that chains in this way, and a distribution's behind both that does not."""
    ours, other = folders.copy("ours"), folders.write("other", CHAINING[kind])
    plain = folders.write("plain", "")
    path = {
        "ours first": [ours, other],
        "ours last": [other, ours],
        "two of ours": [ours, other, folders.copy("again")],
        "around": [folders.copy("before"), ours, other],
    }[order]
    assert folders.start(*path, plain) == (["bootstrap", "other", "plain"], "", "")


@pytest.mark.parametrize("kind", CHAINING)
@pytest.mark.parametrize("ours_at", [0, 1])
def test_two_others(folders: Folders, kind: str, ours_at: int) -> None:
    """Which would run each other for ever if ours came last, with or without us."""
    path = [folders.write("one", CHAINING["finder"]), folders.write("two", CHAINING[kind])]
    path.insert(ours_at, folders.copy("ours"))
    ran, _, errors = folders.start(*path, folders.write("plain", ""))
    assert (ran, errors) == (["bootstrap", "one", "plain", "two"], "")


@pytest.mark.parametrize("kind", [kind for kind in CHAINING if kind != "import_forgetful"])
@pytest.mark.parametrize("first", ["ours", "other"])
def test_nothing_behind_them(folders: Folders, kind: str, first: str) -> None:
    """No third one: nothing is missing, nothing is run in its stead."""
    path = [folders.copy("ours"), folders.write("other", CHAINING[kind])]
    assert folders.start(*(path if first == "ours" else path[::-1])) == (
        ["bootstrap", "other"],
        "",
        "",
    )


def test_copies_of_ours(folders: Folders) -> None:
    """Three, one of them through a link: one bootstrap, and the distribution's once."""
    one, two, plain = folders.copy("one"), folders.copy("two"), folders.write("plain", "")
    link = folders.root / "link"
    link.symlink_to(one)
    for path in ([one, two, link], [link, one, two], [two, link, one]):
        assert folders.start(*path, plain) == (["bootstrap", "plain"], "", "")


def test_only_the_next_one_runs(folders: Folders) -> None:
    """Python alone would have run one; what that one does not run stays unrun."""
    path = [folders.copy("ours"), folders.write("one", ""), folders.write("two", "")]
    assert folders.start(*path)[0] == ["bootstrap", "one"]


@pytest.mark.parametrize("packed", ["ours", "plain", "other"])
@pytest.mark.parametrize("first", ["ours", "other"])
def test_from_a_zip(folders: Folders, packed: str, first: str) -> None:
    """Whichever of the three is in one."""
    path = [
        folders.copy("ours"),
        folders.write("other", CHAINING["finder"]),
        folders.write("plain", ""),
    ]
    for place, folder in enumerate(path):
        if folder.name == packed:
            path[place] = folder.with_suffix(".zip")
            with zipfile.ZipFile(path[place], "w") as archive:
                archive.write(folder / "sitecustomize.py", "sitecustomize.py")
    if packed == "other":  # its own folder is the zip
        text = CHAINING["finder"].replace(
            "dirname(os.path.realpath(__file__))", "dirname(__file__)"
        )
        with zipfile.ZipFile(folders.root / "other.zip", "w") as archive:
            archive.writestr("sitecustomize.py", NOTE.format(name="other") + text)
    if first == "other":
        path[:2] = path[1::-1]
    assert folders.start(*path) == (["bootstrap", "other", "plain"], "", "")


def test_a_package_is_one_too(folders: Folders) -> None:
    """``sitecustomize/__init__.py``; a folder of that name without it is none."""
    (folders.folder("empty") / "sitecustomize").mkdir()
    package = folders.folder("plain") / "sitecustomize"
    package.mkdir()
    (package / "__init__.py").write_text(NOTE.format(name="plain"))
    path = [folders.copy("ours"), folders.root / "empty", folders.root / "plain"]
    assert folders.start(*path) == (["bootstrap", "plain"], "", "")


LOOK = "import sys; print(sys.modules['sitecustomize'].__file__, *sys.path, sep='\\n')"


@pytest.mark.parametrize("kind", [kind for kind in CHAINING if not kind.startswith("exec")])
def test_the_process_is_as_without_ours(folders: Folders, kind: str) -> None:
    """The same ``sys.modules["sitecustomize"]`` and ``sys.path``, but for our folder."""
    other, plain = folders.write("other", CHAINING[kind]), folders.write("plain", "")
    ours = folders.copy("ours")
    _, expected, _ = folders.start(other, plain, code=LOOK)
    for path in ([ours, other, plain], [other, ours, plain]):
        _, found, _ = folders.start(*path, code=LOOK)
        assert found.replace(f"{ours}\n", "", 1) == expected


@pytest.mark.parametrize("kind", CHAINING)
@pytest.mark.parametrize("order", ["ours first", "ours last"])
@pytest.mark.parametrize("error", ["RuntimeError('theirs')", "ImportError('theirs', name='x')"])
def test_an_error_behind_both(folders: Folders, kind: str, order: str, error: str) -> None:
    """Told as Python tells it without us, once; ours bootstraps, the process goes on."""
    other = folders.write("other", CHAINING[kind])
    plain, ours = folders.write("plain", f"raise {error}\n"), folders.copy("ours")
    _, _, expected = folders.start(other, plain)
    path = [ours, other, plain] if order == "ours first" else [other, ours, plain]
    ran, _, errors = folders.start(*path)
    assert ran == ["bootstrap", "other", "plain"]
    assert errors == expected


def test_our_own_error_is_one_line(folders: Folders) -> None:
    """Not that of the one that we ran, and no traceback in every process."""
    package = folders.root / "package" / "gemma4_turbo.py"
    package.write_text("def bootstrap():\n    raise OSError('no disk')\n")
    assert folders.start(folders.copy("ours"))[2] == (
        "sitecustomize_example: this process stays stock: OSError: no disk\n"
    )
