"""`sitecustomize_example`: chaining, and what happens without the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gemma4_turbo.ports.any.launch import routes
from tests.cpu.conftest import REPOSITORY, Python

EXAMPLE = REPOSITORY / "sitecustomize_example"
SHADOWED = "import os\nos.environ['SHADOWED_RAN'] = __file__\n"
LOOK = """
import os, sys
import sitecustomize
print("gemma4_turbo" in sys.modules)
from gemma4_turbo.engine import installer
print(os.environ.get("SHADOWED_RAN"))
print(sitecustomize.__file__)
print(any(isinstance(finder, installer._FirstImport) for finder in sys.meta_path))
"""


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """A folder with the ``sitecustomize`` that a distribution or an image ships."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHADOWED)
    return folder


def joined(*folders: Path) -> str:
    """As the value of PYTHONPATH."""
    return ":".join(map(str, folders))


def test_bootstraps(python: Python) -> None:
    """In any process that has the folder on PYTHONPATH, without an import of ours."""
    done = python(LOOK, PYTHONPATH=joined(EXAMPLE, REPOSITORY))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("True", "True")


def test_not_on_the_path_not_bootstrapped(python: Python) -> None:
    """The counterpart of the test above: importing the package registers nothing."""
    done = python(LOOK.replace("import sitecustomize\n", "import os as sitecustomize\n"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_runs_the_one_that_it_shadows(python: Python, shadowed: Path) -> None:
    """Both run, and ``sys.modules`` holds the one that was there before."""
    done = python(LOOK, PYTHONPATH=joined(EXAMPLE, shadowed, REPOSITORY))
    assert done.returncode == 0, done.stderr
    theirs = str(shadowed / "sitecustomize.py")
    assert done.stdout.splitlines() == ["True", theirs, theirs, "True"]


def test_does_not_run_itself_again(python: Python, shadowed: Path, tmp_path: Path) -> None:
    """The folder twice on the path, once through a link: no recursion, the next one runs once."""
    link = tmp_path / "link"
    link.symlink_to(EXAMPLE)
    done = python(LOOK, PYTHONPATH=joined(link, EXAMPLE, shadowed, REPOSITORY))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
    assert done.stdout.splitlines()[1] == str(shadowed / "sitecustomize.py")


def test_bootstraps_even_if_the_shadowed_one_fails(python: Python, shadowed: Path) -> None:
    """Python reports the other's error as it always did; ours goes on."""
    (shadowed / "sitecustomize.py").write_text(SHADOWED + "raise RuntimeError('theirs')\n")
    done = python(
        LOOK.replace("import sitecustomize\n", "import os as sitecustomize\n"),
        PYTHONPATH=joined(EXAMPLE, shadowed, REPOSITORY),
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: theirs" in done.stderr
    assert done.stdout.splitlines()[-1] == "True"


def test_without_the_package_one_line_and_on(python: Python, shadowed: Path) -> None:
    """A process that cannot import gemma4_turbo runs as if nothing had been asked."""
    (shadowed / "gemma4_turbo.py").write_text("raise ImportError('not here')\n")
    done = python("print('ran')", PYTHONPATH=joined(EXAMPLE, shadowed))
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr == "sitecustomize_example: gemma4_turbo is not on the path: not here\n"


def test_a_broken_package_does_not_stop_the_process(python: Python, shadowed: Path) -> None:
    """`bootstrap` swallows and logs what goes wrong inside it."""
    code = (
        "import gemma4_turbo.instance as p\n"
        "def broken(*args): raise RuntimeError('our mistake')\n"
        "p.ENGINE._select = broken\n"
        "import gemma4_turbo; gemma4_turbo.bootstrap(); print('ran')"
    )
    done = python(code)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "this process stays stock" in done.stderr


@pytest.mark.parametrize(
    ("plugins", "folders", "ways"),
    [
        ("", [], ["entry point"]),
        ("gemma4_turbo", [], ["entry point"]),
        ("other, gemma4_turbo", [], ["entry point"]),
        ("other", [], []),
        ("other", ["example"], ["sitecustomize"]),
        ("", ["example"], ["entry point", "sitecustomize"]),
        ("other", ["nothing", "example"], ["sitecustomize"]),
        ("other", ["shipped", "example"], []),  # Python runs the first one only
        ("other", ["example", "shipped"], ["sitecustomize"]),
    ],
)
def test_routes(
    monkeypatch: pytest.MonkeyPatch,
    shadowed: Path,
    tmp_path: Path,
    plugins: str,
    folders: list[str],
    ways: list[str],
) -> None:
    """By which ways a spawned process gets the patches, as this package is installed here."""
    places = {"example": EXAMPLE, "shipped": shadowed, "nothing": tmp_path / "nothing"}
    monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    monkeypatch.setenv("PYTHONPATH", joined(*[places[name] for name in folders]))
    monkeypatch.chdir(tmp_path)
    assert routes.bootstrap_routes() == ways


def test_the_entry_point_is_registered() -> None:
    """In the group that SGLang's plugin loader reads, and it can be loaded."""
    from importlib.metadata import entry_points

    (entry,) = entry_points(group=routes.PLUGIN_GROUP, name="gemma4_turbo")
    assert entry.value == "gemma4_turbo.plugin:register"
    assert entry.load().__module__ == "gemma4_turbo.plugin"
    assert sys.modules["gemma4_turbo.plugin"].register is entry.load()
