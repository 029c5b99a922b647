"""The command line as a user calls it, on a machine without GPU."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gemma4_turbo.__main__ import app
from gemma4_turbo.catalogue import BEHAVIOUR, CATALOGUE, DEFECTS, Patch
from gemma4_turbo.cli import demo, doctor, report, serve
from gemma4_turbo.cli.modules import CannotRunError
from gemma4_turbo.engine.run import ledger
from gemma4_turbo.engine.switches import SELECTION
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import moe_tables
from gemma4_turbo.models import geometry
from gemma4_turbo.version import __version__
from tests.cpu.conftest import REPOSITORY, Python, patched_sglang, state_by_default, warm
from tests.cpu.synthetic import clean_environment

STATES = ("active", "upstreamed", "off", "unsupported")
PATCH_KEYS = {
    *("name", "summary", "env", "default", "state", "reason"),
    *("numerics", "targets", "engaged", "origin"),
}

# Moves a call to another stream, which a CPU lacks; does no arithmetic; is off.
# Of their own: they call SGLang's layers on other rows, in another order, or not at all.
WITHOUT_ARITHMETIC = {
    *("mlp_stream", "pdl", "yoco", "yoco_piecewise", "mtp_sync"),
    *("vision_batch", "vision_clamps", "vision_masks", "vision_syncs", "picture_memory"),
} | {patch.name for patch in CATALOGUE if patch.numerics == BEHAVIOUR or not patch.default}


def command(
    environment: dict[str, str], *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``python -m gemma4_turbo ARGUMENTS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gemma4_turbo", *arguments],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def counted(patches: Sequence[Patch]) -> str:
    """How many patches have each state on the installed release, as it is on record."""
    found = Counter(map(state_by_default, patches))
    assert found["active"] > 15
    return ", ".join(f"{found[state]} {state}" for state in STATES if found[state])


def closing() -> str:
    """The last line of a report: defects that are not in the release are counted apart."""
    absent = [patch for patch in DEFECTS if state_by_default(patch) == "upstreamed"]
    rest = counted([patch for patch in CATALOGUE if patch not in absent])
    return f"{rest}; {len(absent)} defects looked for, none found"


def looked_for() -> str:
    """The line of a report that names these defects."""
    absent = [patch.name for patch in DEFECTS if state_by_default(patch) == "upstreamed"]
    return f"{len(absent)} defects looked for: none found ({', '.join(absent)})"


def warm_command(
    environment: dict[str, str], *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The same in a fork of a process that has the libraries under SGLang, and nothing of SGLang."""
    return warm(environment).run(
        module="gemma4_turbo",
        arguments=arguments,
        env={**environment, **variables},
        cwd=os.getcwd(),
        timeout=600,
    )


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SGLang's modules, which take most of a minute to import."""
    with patched_sglang(tmp_path_factory, only=[]):
        pass


@pytest.fixture
def unselected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was asked for as yet, whatever tests ran before in this process."""
    clean_environment(monkeypatch)
    monkeypatch.setattr(ENGINE, "_selection", None)


@pytest.fixture
def answer(
    imported: None, unselected: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Result]]:
    """The command in this process, as before the first call of ours: a process takes 10 s and more."""
    monkeypatch.setenv("GEMMA4_TURBO_STATE_DIR", str(tmp_path / "state"))

    def run(*arguments: str, **variables: str) -> Result:
        ENGINE.revert()
        monkeypatch.delenv(SELECTION)
        monkeypatch.setattr(ENGINE, "_selection", None)
        ledger().close()
        ledger.cache_clear()
        return CliRunner().invoke(app, list(arguments), env=variables)

    yield run
    ENGINE.revert()
    ledger().close()
    ledger.cache_clear()


def test_doctor_json(environment, answer, tmp_path):
    """stdout is one JSON object; the sources say what installing the patches says.

    They are installed in this process, where SGLang is imported already.
    """
    variables = {"GEMMA4_TURBO_STATE_DIR": str(tmp_path)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(environment, "doctor", "--json", **variables)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken < 20, "15 s, and some more where several processes share a core"
    found = json.loads(done.stdout)
    assert {"versions", "device", "patches"} <= set(found)
    installed = answer("doctor", "--import", "--json")
    assert installed.exit_code == 0, installed.stderr
    states = [
        [(patch["name"], patch["state"]) for patch in json.loads(one.stdout)["patches"]]
        for one in (done, installed)
    ]
    assert states[0] == states[1]
    rows = {patch["name"]: patch for patch in json.loads(installed.stdout)["patches"]}
    assert rows["layer_norms"]["reason"] == "installed"
    assert found["verdict"] == counted(CATALOGUE)
    assert found["obstacles"] == []
    assert found["versions"]["sglang"] == metadata.version("sglang")
    assert [set(patch) for patch in found["patches"]] == [PATCH_KEYS] * len(found["patches"])
    norms = next(patch for patch in found["patches"] if patch["name"] == "layer_norms")
    assert norms["state"] == "active"
    assert norms["env"] == "GEMMA4_TURBO_LAYER_NORMS"
    assert norms["numerics"] == "bitwise"
    assert "entry point" in found["bootstrap"]


@pytest.mark.parametrize(
    ("variable", "value"), [("GEMMA4_TURBO", "banana"), ("GEMMA4_TURBO_ROUTER", "maybe")]
)
def test_doctor_names_the_variable_and_the_choices(answer, variable, value):
    done = answer("doctor", "--json", **{variable: value})
    assert done.exit_code == 2
    found = json.loads(done.stdout)
    assert found["problems"] == [f"{variable}={value!r} is not one of 0, 1"]
    assert found["patches"][0]["state"] == "off"
    assert variable in found["patches"][0]["reason"]


def test_doctor_says_what_switched_a_patch_off(answer):
    done = answer("doctor", "--json", GEMMA4_TURBO_ROUTER="0")
    assert done.exit_code == 0
    patches = {patch["name"]: patch for patch in json.loads(done.stdout)["patches"]}
    router = patches.pop("router")
    assert (router["state"], router["reason"]) == ("off", "GEMMA4_TURBO_ROUTER=0")
    others = {name: patch["state"] for name, patch in patches.items()}
    assert others == {p.name: state_by_default(p) for p in CATALOGUE if p.name != "router"}


def test_doctor_says_why_no_server_can_be_seen(answer, tmp_path):
    """In the JSON; in strict mode it is a problem, as it is for a server."""
    tmp_path.chmod(0o777)
    variables = {"GEMMA4_TURBO_STATE_DIR": str(tmp_path), "GEMMA4_TURBO": "0"}
    done = answer("doctor", "--json", **variables)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    told = f"GEMMA4_TURBO_STATE_DIR: {str(tmp_path)!r} can be written by others (mode 0777)"
    assert found["state_folder"].startswith(told)
    assert (found["problems"], found["servers"]) == ([], [])
    assert {told in patch["reason"] for patch in found["patches"]} == {True}
    done = answer("doctor", "--json", GEMMA4_TURBO_STRICT="1", **variables)
    assert done.exit_code == 2
    assert json.loads(done.stdout)["problems"] == [found["state_folder"]]
    tmp_path.chmod(0o700)
    done = answer("doctor", "--json", **variables)
    assert json.loads(done.stdout)["state_folder"] is None


def test_doctor_prints_why_no_server_can_be_seen(monkeypatch, capsys):
    """As it is, whatever brackets the path has."""
    why = "GEMMA4_TURBO_STATE_DIR: '/tmp/[bold]a[/nonsense]' is a symbolic link"
    found = {key: [] for key in ("patches", "servers", "notes", "problems", "bootstrap")}
    found |= {"versions": {}, "device": None, "state_folder": why}
    monkeypatch.setattr(doctor, "examine", lambda imported: iter(found.items()))
    assert doctor.run(as_json=False) == 0
    assert f"Other processes cannot be seen: {why}\n" in capsys.readouterr().out
    found["state_folder"] = None
    doctor.run(as_json=False)
    assert "cannot be seen" not in capsys.readouterr().out


def test_doctor_in_a_pipe(environment, answer, tmp_path):
    """Versions first, a line a patch, the verdict last; all there is with ``--all``."""
    done = warm_command(environment, "doctor", COLUMNS="80", GEMMA4_TURBO_STATE_DIR=str(tmp_path))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gemma4_turbo ")
    assert lines[-1] == closing()
    assert "GPU: none" in lines
    for patch in CATALOGUE:
        rows = sum(line.startswith(f"  {patch.name} ") for line in lines)
        aside = patch in DEFECTS and state_by_default(patch) == "upstreamed"
        assert rows == (not aside), patch.name
        assert patch.env not in done.stdout
    assert lines.count(looked_for()) == 1
    more = answer("doctor", "--all").stdout
    assert all(patch.env in more and patch.summary in more for patch in CATALOGUE)


NOTHING_WORKS = """
import contextlib, io, json, os
from gemma4_turbo.cli import doctor, outlook, report

def run(as_json):
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = doctor.run(as_json)
    return code, told.getvalue()

doctor.bootstrap_routes = list
report.torch_problem = lambda: "PyTorch cannot be imported: OSError: x"
report.device = lambda: None
doctor.installed_release = outlook.installed_release = lambda: None
answers = [run(False), run(True)]
os.environ["GEMMA4_TURBO"] = "0"
doctor.installed_release = outlook.installed_release = lambda: "0.5.12.post1"
print(json.dumps([*answers, run(False)]))
"""


def test_doctor_says_what_keeps_everything_from_working(python: Python):
    """Exit 3: no way into spawned processes, no PyTorch, no SGLang; not if all is meant to be off."""
    done = python(NOTHING_WORKS, PYTHONPATH=str(REPOSITORY), COLUMNS="200")
    assert done.returncode == 0, done.stderr
    (code, told), (code_of_json, as_json), (code_off, _) = json.loads(done.stdout)
    assert code == 3
    lines = told.splitlines()
    assert f"error: {doctor.NOT_INSTALLED}" in lines
    assert "error: PyTorch cannot be imported: OSError: x" in lines
    assert f"error: {doctor.STAY_STOCK}" in lines
    on = sum(patch.default for patch in CATALOGUE)
    assert lines[-1] == f"nothing can work; {len(CATALOGUE) - on} off, {on} waiting"
    assert sum(line.startswith(f"waiting ({on}): SGLang is not installed") for line in lines) == 1
    assert code_of_json == 3
    assert len(json.loads(as_json)["obstacles"]) == 3
    assert code_off == 0


def test_a_torch_that_cannot_be_imported(monkeypatch):
    """Whatever it raises."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert report.torch_problem().startswith("PyTorch is not installed")
    monkeypatch.delitem(sys.modules, "torch")

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(sys, "meta_path", [Broken()])
    assert report.torch_problem() == (
        "PyTorch cannot be imported: OSError: libcudart.so.13: cannot open shared object file"
    )
    assert report.device() is None


def test_version_help_and_completion():
    """Each command's help has its exit codes, ``-h`` is ``--help``."""
    assert CliRunner().invoke(app, ["--version"]).output == f"gemma4-turbo {__version__}\n"
    assert "--install-completion" in CliRunner().invoke(app, ["-h"]).output
    for name in (
        "doctor",
        "verify",
        "bisect",
        "demo",
        "serve",
        "sitecustomize",
        "record",
        "release",
    ):
        told = CliRunner().invoke(app, [name, "-h"])
        assert told.exit_code == 0
        assert "Exit 3" in told.output or "Exit 2" in told.output, name


def test_options_are_named():
    """Some releases of typer call an option that has a metavar and no name by its metavar."""
    source = (REPOSITORY / "gemma4_turbo/__main__.py").read_text()
    options = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option"
    ]
    with_metavar = [
        option for option in options if any(word.arg == "metavar" for word in option.keywords)
    ]
    assert len(with_metavar) > 5
    unnamed = [
        ast.unparse(option)
        for option in with_metavar
        if not any(ast.unparse(name).startswith("'--") for name in option.args)
    ]
    assert not unnamed


def test_a_failure_is_json_too(unselected, monkeypatch):
    """What is missing, and what nobody expected; the traceback goes to stderr."""
    monkeypatch.setattr(report, "torch_problem", lambda: "PyTorch is not installed: x")
    told = CliRunner().invoke(app, ["verify", "--json"])
    assert (told.exit_code, json.loads(told.stdout)) == (
        3,
        {"error": "PyTorch is not installed: x"},
    )

    def broken(*args):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(doctor, "run", broken)
    told = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(told.stdout) == {"error": "ZeroDivisionError: by zero"}
    assert told.exit_code == 1
    assert "Traceback" in told.stderr
    told = CliRunner().invoke(app, ["bisect", "--json", "--", "no-such-command-anywhere"])
    assert told.exit_code == 2
    assert "no-such-command-anywhere cannot be started" in json.loads(told.stdout)["error"]


def test_sitecustomize_prints_a_folder_that_works(environment, tmp_path):
    """The one at the top of the repository is the same file."""
    folder = CliRunner().invoke(app, ["sitecustomize"]).output.strip()
    file = Path(folder, "sitecustomize.py")
    assert file.samefile(REPOSITORY / "sitecustomize_example" / "sitecustomize.py")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print('gemma4_turbo.instance' in sys.modules)"],
        env={**environment, "PYTHONPATH": f"{folder}:{REPOSITORY}"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout == "True\n"


DEMO_AND_VERIFY = """
import contextlib, io, json
from gemma4_turbo.__main__ import app
from gemma4_turbo.cli import verify

stock, made = verify.check_all, []

def once(device, begin):
    if not made:
        made.append(stock(device, begin))
    return made[0]

verify.check_all = once
answers = []
for arguments in (["demo"], ["verify", "--json"]):
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = app(arguments, standalone_mode=False)
    answers.append([code, told.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def compared(environment) -> tuple[list[tuple[int, str]], str]:
    """Exit code and stdout of each, and stderr: in a process of their own, on the same comparisons."""
    done = warm(environment).run(
        **{"code": DEMO_AND_VERIFY, "arguments": [], "env": environment, "cwd": str(REPOSITORY)},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_demo_runs_stock_against_patched(compared):
    """Without a GPU: the report and the comparison, exit 0, no traceback."""
    ((code, stdout), _), stderr = compared
    assert code == 0, stdout + stderr
    for told in demo.SMALL.values():
        (line,) = [line for line in stdout.splitlines() if f"A step of {told}: " in line]
        assert re.search(r"ran a patch's code: .*layer_norms 2, .*rope_store 2", line)
    assert re.fullmatch(r"demo: \d+ comparisons, all .*", stdout.splitlines()[-1])
    assert "not exercised here" in stdout
    assert f"\n{looked_for()}\n" in stdout
    assert f"\n{closing()}\n" in stdout
    assert "importing SGLang" in stderr
    assert "DIFFERENT" not in stdout
    assert "Traceback" not in stderr


INTERPRETED = """
import sys
from gemma4_turbo.__main__ import app
from gemma4_turbo.cli import demo, verify
assert "triton" not in sys.modules
verify.prepare_device()
import triton.language
print(type(triton.language.cdiv).__name__)
"""


def test_the_interpreter_is_chosen_before_triton_is_imported(environment):
    """Afterwards is too late: Triton's own functions are made as it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "InterpretedFunction\n", done.stderr


def test_verify_json(compared):
    (_, (code, stdout)), stderr = compared
    assert code == 0, stderr
    checks = json.loads(stdout)["checks"]
    compared = [check["patch"] for check in checks]
    on = {patch.name for patch in CATALOGUE if state_by_default(patch) == "active"}
    assert set(compared) >= on - WITHOUT_ARITHMETIC
    assert (compared.count("step_prologue"), compared.count("ple_tail")) == (4, 2)
    assert all(check["passed"] for check in checks)
    empty = [check for check in checks if check["result"] == "not exercised here"]
    assert [check["patch"] for check in empty] == ["moe_configs"] * (not moe_tables.shipped())
    for check in checks:
        if check not in empty:
            assert check["compared"] > 0
            assert check["result"] == ("within bounds" if check["differing"] else "same bits")
    found = json.loads(stdout)
    count = len(checks) - len(empty)
    assert found["verdict"].startswith(f"verify: {count} comparisons, all within bounds")
    assert set(found["not_compared"]["not exercised here"]) <= WITHOUT_ARITHMETIC
    assert "comparing layer_norms with stock" in stderr


def test_verify_with_everything_off_compares_nothing(answer):
    """No green light for no comparison."""
    assert answer("verify", "--json", GEMMA4_TURBO="0").exit_code == 3


def test_missing_sglang_is_one_line(environment, tmp_path):
    """A Python that has only the package: no traceback."""
    script = (
        "import sys, importlib.metadata as m, importlib.util as u\n"
        "version, find = m.version, u.find_spec\n"
        "def gone(name):\n"
        "    if name == 'sglang': raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = gone\n"
        "sys.argv = ['gemma4_turbo', 'demo']\n"
        "from gemma4_turbo.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "SGLang is not installed" in done.stderr


def test_a_busy_port_is_one_line():
    from rich.console import Console

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(CannotRunError, match="busy"):
            demo.on_gpu(Console(), 6, busy.getsockname()[1])


def test_demo_refuses_an_impossible_number_of_layers():
    from rich.console import Console

    with pytest.raises(CannotRunError, match="layers must be a multiple of 6"):
        demo.on_gpu(Console(), 7, 0)


def test_serve_refuses_to_start_a_stock_server(monkeypatch: pytest.MonkeyPatch):
    """If nothing would carry the patches into the server's processes, serve says so."""
    monkeypatch.setattr(serve, "bootstrap_routes", list)
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("started"))
    with pytest.raises(CannotRunError, match="would stay stock"):
        serve.run(["--model-path", "x"])


def test_serve_hands_the_arguments_on(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(serve, "bootstrap_routes", lambda: ["entry point"])
    monkeypatch.setattr("os.execv", lambda _, arguments: seen.append(arguments))
    result = CliRunner().invoke(app, ["serve", "--", "--model-path", "x", "--port", "1"])
    assert result.exit_code == 0
    assert seen[0][1:] == ["-m", "sglang.launch_server", "--model-path", "x", "--port", "1"]


@pytest.mark.parametrize("name", list(geometry.GEOMETRIES))
def test_geometries_are_gemma_4_configs(name, tmp_path: Path):
    """transformers accepts every generated folder as a Gemma 4 text model."""
    from transformers import AutoConfig

    made = AutoConfig.from_pretrained(geometry.write_model(tmp_path / name, name))
    assert type(made).__name__ == "Gemma4TextConfig"
    assert len(made.layer_types) == made.num_hidden_layers == geometry.GEOMETRIES[name].layers
    assert made.layer_types[-1] == "full_attention"
    assert bool(made.num_experts) == bool(geometry.GEOMETRIES[name].experts)


def test_geometry_names_the_argument():
    with pytest.raises(ValueError, match="name must be one of 26b-a4b"):
        geometry.config("27b")
    with pytest.raises(ValueError, match="layers must be a multiple of 6"):
        geometry.config("26b-a4b", layers=4)
