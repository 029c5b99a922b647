"""The two gates, on a stand-in tree named sglang that has only what they stand in.

Each process is a fork that has torch and other libraries, and neither SGLang's name nor ours.
On the real server: ``test_server.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.conftest import REPOSITORY, Python

ENGINE = """\
class Engine:
    @classmethod
    def _launch_subprocesses(cls, server_args, port_args=None):
        print("LAUNCHED")
        return cls.__name__, server_args, port_args


class RayEngine(Engine):
    pass
"""
RUNNER = """\
class ModelRunner:
    def load_model(self):
        print("LOADED")
        return "model"
"""
# Anything but what the patch was written for.
MODELS = "class Gemma4MoE:\n    def __init__(self):\n        pass\n"
TOPK = "class TopK:\n    def forward_cuda(self):\n        pass\n"

START = """
import json, logging, sys
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(levelname)s %(message)s")
import gemma4_turbo
from gemma4_turbo import instance
def engine():
    from sglang.srt.entrypoints import engine
    return engine
def runner():
    from sglang.srt.model_executor import model_runner
    return model_runner
def gates():
    return {
        "launch": type(vars(engine().Engine)["_launch_subprocesses"].__func__).__name__,
        "load": type(vars(runner().ModelRunner)["load_model"]).__name__,
    }
"""
STOCK = {"launch": "function", "load": "function"}
OURS = {"launch": "FunctionWrapper", "load": "FunctionWrapper"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The stand-in, in a folder for PYTHONPATH."""
    root = tmp_path / "tree"
    files = {
        "entrypoints/engine.py": ENGINE,
        "model_executor/model_runner.py": RUNNER,
        "models/gemma4_causal.py": MODELS,
        "layers/moe/topk.py": TOPK,
    }
    for name, text in files.items():
        path = root / "sglang" / "srt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in ("", "srt", "srt/entrypoints", "srt/model_executor", "srt/models"):
        (root / "sglang" / folder / "__init__.py").write_text("")
    for folder in ("srt/layers", "srt/layers/moe"):
        (root / "sglang" / folder / "__init__.py").write_text("")
    return root


def ran(warm_python: Python, tree: Path, code: str, **variables: str) -> Any:
    """The finished process; the code runs after `START`."""
    return warm_python(START + code, PYTHONPATH=f"{tree}:{REPOSITORY}", **variables)


def last(done: Any) -> Any:
    """The JSON on the last line of the output."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_installed_transparently_and_removed(warm_python: Python, tree: Path) -> None:
    """Arguments, class and result pass through; revert puts the very same objects back."""
    code = """
e, r = engine(), runner()
stock = vars(e.Engine)["_launch_subprocesses"], vars(r.ModelRunner)["load_model"]
gemma4_turbo.apply()
found = gates()
calls = [e.Engine._launch_subprocesses(1, port_args=2), e.RayEngine._launch_subprocesses(3)]
calls.append(r.ModelRunner().load_model())
gemma4_turbo.revert()
same = [vars(e.Engine)["_launch_subprocesses"] is stock[0],
        vars(r.ModelRunner)["load_model"] is stock[1]]
gemma4_turbo.apply()
print(json.dumps([found, calls, same, gates()]))
"""
    found, calls, same, again = last(ran(warm_python, tree, code))
    assert found == again == OURS
    assert calls == [["Engine", 1, 2], ["RayEngine", 3, None], "model"]
    assert same == [True, True]


def test_the_summary_is_one_line_when_the_model_stands(warm_python: Python, tree: Path) -> None:
    """What runs and what stands aside and why, by the process that knows."""
    code = "gemma4_turbo.apply()\nimport sglang.srt.models.gemma4_causal, sglang.srt.layers.moe.topk\nrunner().ModelRunner().load_model()"
    done = ran(warm_python, tree, code)
    assert done.returncode == 0, done.stderr
    *_, loaded, summary = done.stdout.splitlines()
    assert loaded == "LOADED"
    assert summary.startswith(
        f"INFO gemma4_turbo {__import__('gemma4_turbo').__version__}: installed: none; "
        "standing aside: router drifted (SGLang "
    )


@pytest.mark.parametrize(
    "code",
    [
        "gemma4_turbo.apply(); gemma4_turbo.revert()",
        "gemma4_turbo.apply(); engine(); gemma4_turbo.revert()",
        "import sglang; gemma4_turbo.apply(); gemma4_turbo.revert()",
    ],
)
def test_none_after_revert(warm_python: Python, tree: Path, code: str) -> None:
    """Also where SGLang is imported only then: stock again means all of it."""
    assert last(ran(warm_python, tree, code + "\nprint(json.dumps(gates()))")) == STOCK


def test_none_in_the_children_of_a_reverted_process(warm_python: Python, tree: Path) -> None:
    """They inherit the revert and bootstrap through the entry point."""
    code = """
import os, subprocess
gemma4_turbo.apply(); gemma4_turbo.revert()
child = sys.argv[1] + "gemma4_turbo.bootstrap(); print(json.dumps(gates()))"
subprocess.run([sys.executable, "-c", child], check=True)
"""
    done = warm_python(START + code, START, PYTHONPATH=f"{tree}:{REPOSITORY}")
    assert last(done) == STOCK


def test_none_with_everything_off(warm_python: Python, tree: Path) -> None:
    """``GEMMA4_TURBO=0`` is stock: no patch is on that strict mode could watch."""
    code = "gemma4_turbo.apply()\nprint(json.dumps(gates()))"
    assert last(ran(warm_python, tree, code, GEMMA4_TURBO="0")) == STOCK
    assert last(ran(warm_python, tree, code)) == OURS
    assert last(ran(warm_python, tree, code, GEMMA4_TURBO="0", GEMMA4_TURBO_STRICT="1")) == STOCK
    # A value that cannot be read switches off too, but that must be told.
    assert last(ran(warm_python, tree, code, GEMMA4_TURBO="banana")) == OURS
    assert last(ran(warm_python, tree, code, GEMMA4_TURBO_ROUTER="0")) == OURS


LAUNCH = "gemma4_turbo.apply()\nengine().Engine._launch_subprocesses(1)"
LOAD = "gemma4_turbo.apply()\nrunner().ModelRunner().load_model()"


def test_strict_refuses_a_drifted_patch_before_anything_is_launched(
    warm_python: Python, tree: Path
) -> None:
    """Told from the sources: the models are not imported in this process."""
    done = ran(warm_python, tree, LAUNCH, GEMMA4_TURBO_STRICT="1")
    assert done.returncode == 1
    assert "LAUNCHED" not in done.stdout
    error = done.stderr.splitlines()[-1]
    assert error.startswith(
        "gemma4_turbo.engine.gates.StrictModeError: GEMMA4_TURBO_STRICT=1: router is drifted: SGLang "
    )
    assert "Gemma4MoE.__init__" in error


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"GEMMA4_TURBO_STRICT": "0"},
        {"GEMMA4_TURBO_STRICT": "1", "GEMMA4_TURBO_ROUTER": "0"},
        {"GEMMA4_TURBO_STRICT": "1", "GEMMA4_TURBO": "0"},
    ],
)
def test_launches_where_strict_has_no_say(
    warm_python: Python, tree: Path, variables: dict[str, str]
) -> None:
    """Not strict, or the drifted patch is switched off."""
    for code, word in ((LAUNCH, "LAUNCHED"), (LOAD, "LOADED")):
        done = ran(warm_python, tree, code, **variables)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout


def test_strict_passes_an_unsupported_patch(warm_python: Python, tree: Path) -> None:
    """A release without Gemma 4 has nothing to speed up, and nothing is wrong."""
    (tree / "sglang/srt/models/gemma4_causal.py").unlink()
    done = ran(warm_python, tree, LAUNCH, GEMMA4_TURBO_STRICT="1")
    assert done.returncode == 0, done.stderr
    assert "LAUNCHED" in done.stdout


@pytest.mark.parametrize("state", ["drifted", "conflict", "failed"])
def test_strict_refuses_after_loading_what_shows_only_then(
    warm_python: Python, tree: Path, state: str
) -> None:
    """In a scheduler: the model stands, but a patch that is on does not do its work."""
    code = f"gemma4_turbo.apply()\nrun = instance.ENGINE.runs['router']\nrun.set({state!r}, 'as found')\nrunner().ModelRunner().load_model()"
    done = ran(warm_python, tree, code, GEMMA4_TURBO_STRICT="1")
    assert done.returncode == 1
    assert "LOADED" in done.stdout
    assert done.stderr.splitlines()[-1].endswith(
        f"StrictModeError: GEMMA4_TURBO_STRICT=1: router is {state}: as found"
    )
    assert ran(warm_python, tree, code).returncode == 0


@pytest.mark.parametrize("code", [LAUNCH, LOAD])
def test_strict_refuses_a_value_that_cannot_be_read(
    warm_python: Python, tree: Path, code: str
) -> None:
    """At both gates, with the sentence that names variable and choices."""
    done = ran(warm_python, tree, code, GEMMA4_TURBO_STRICT="yes")
    assert done.returncode == 1
    assert "GEMMA4_TURBO_STRICT='yes' is not one of 0, 1" in done.stderr.splitlines()[-1]
    assert "LAUNCHED" not in done.stdout


def test_spawned_processes_that_would_stay_stock(warm_python: Python, tree: Path) -> None:
    """No entry point allowed, no sitecustomize: a warning, or with strict a refusal."""
    (tree / "sglang/srt/models/gemma4_causal.py").unlink()
    lenient = ran(warm_python, tree, LAUNCH, SGLANG_PLUGINS="other")
    assert lenient.returncode == 0, lenient.stderr
    assert "WARNING gemma4_turbo: spawned processes would stay stock" in lenient.stdout
    assert "LAUNCHED" in lenient.stdout
    strict = ran(warm_python, tree, LAUNCH, SGLANG_PLUGINS="other", GEMMA4_TURBO_STRICT="1")
    assert strict.returncode == 1
    assert "StrictModeError" in strict.stderr.splitlines()[-1]
    assert "SGLANG_PLUGINS" in strict.stderr.splitlines()[-1]
    assert "LAUNCHED" not in strict.stdout


def test_without_its_gate_strict_ends_the_process(warm_python: Python, tree: Path) -> None:
    """A release that renamed the function: strict mode could not keep its word."""
    path = tree / "sglang/srt/entrypoints/engine.py"
    path.write_text(ENGINE.replace("_launch_subprocesses", "_launch_workers"))
    code = "gemma4_turbo.apply()\ntry:\n    engine()\nexcept Exception:\n    print('SWALLOWED')\nprint('WENT ON')"
    strict = ran(warm_python, tree, code, GEMMA4_TURBO_STRICT="1")
    assert strict.returncode == 1
    assert "strict mode has no hold on sglang.srt.entrypoints.engine" in strict.stderr
    assert "WENT ON" not in strict.stdout
    lenient = ran(warm_python, tree, code)
    assert lenient.returncode == 0, lenient.stderr
    assert "WARNING gemma4_turbo: no summary will be logged" in lenient.stdout
    assert lenient.stdout.splitlines()[-1] == "WENT ON"
    assert "SWALLOWED" not in lenient.stdout


# -- launches by other ways -----------------------------------------------------------------------

# As SGLang's: it loads the plugins of a program that has not done so only here.
PLUGINS_LATE = """\
class Engine:
    @classmethod
    def _launch_subprocesses(cls, server_args):
        import gemma4_turbo
        gemma4_turbo.bootstrap()
        return cls._launch_scheduler_processes(server_args, None, None)

    @classmethod
    def _launch_scheduler_processes(cls, server_args, port_args, run_scheduler_process_func):
        print("LAUNCHED")
        return server_args
"""
RAY = """\
from sglang.srt.entrypoints.engine import Engine

class RayEngine(Engine):
    @classmethod
    def _launch_scheduler_processes(cls, server_args, port_args, run_scheduler_process_func):
        print("LAUNCHED")
        return server_args
"""


@pytest.fixture
def supported(tree: Path) -> Path:
    """The stand-in of a release that no patch is for, with SGLang's two steps of a launch."""
    (tree / "sglang/srt/models/gemma4_causal.py").unlink()
    (tree / "sglang/srt/entrypoints/engine.py").write_text(PLUGINS_LATE)
    return tree


@pytest.mark.parametrize("first", ["", "gemma4_turbo.apply()\n"])
def test_a_launch_that_loads_us_only_as_it_goes(
    warm_python: Python, supported: Path, first: str
) -> None:
    """As `http_server.launch_server` from Python; looked at once, whether we came before or not."""
    code = f"{first}engine().Engine._launch_subprocesses(1000)"
    lenient = ran(warm_python, supported, code, SGLANG_PLUGINS="other")
    assert lenient.returncode == 0, lenient.stderr
    assert lenient.stdout.count("spawned processes would stay stock") == 1
    assert "LAUNCHED" in lenient.stdout
    strict = ran(warm_python, supported, code, SGLANG_PLUGINS="other", GEMMA4_TURBO_STRICT="1")
    assert strict.returncode == 1
    last_line = strict.stderr.splitlines()[-1]
    assert last_line.startswith(
        "gemma4_turbo.engine.gates.StrictModeError: GEMMA4_TURBO_STRICT=1: spawned"
    )
    assert last_line.count("GEMMA4_TURBO_STRICT") == 1
    assert "LAUNCHED" not in strict.stdout


@pytest.mark.parametrize("first", ["", "gemma4_turbo.apply()\n"])
def test_ray(warm_python: Python, supported: Path, first: str) -> None:
    """Its actors load no plugins: said, and refused by strict mode."""
    package = supported / "sglang/srt/ray"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "engine.py").write_text(RAY)
    code = (
        f"from sglang.srt.ray.engine import RayEngine\n{first}RayEngine._launch_subprocesses(1000)"
    )
    code = (
        code if first else code.replace("from sglang", "import sglang.srt.entrypoints\nfrom sglang")
    )
    lenient = ran(warm_python, supported, code)
    assert lenient.returncode == 0, lenient.stderr
    assert (
        lenient.stdout.count("WARNING gemma4_turbo: --use-ray: the schedulers would be stock") == 1
    )
    assert "LAUNCHED" in lenient.stdout
    strict = ran(warm_python, supported, code, GEMMA4_TURBO_STRICT="1")
    assert strict.returncode == 1
    assert "StrictModeError: GEMMA4_TURBO_STRICT=1: --use-ray" in strict.stderr.splitlines()[-1]
    assert "LAUNCHED" not in strict.stdout


@pytest.mark.parametrize(
    ("file", "old", "call"),
    [
        ("entrypoints/engine.py", "_launch_subprocesses", "engine().Engine.renamed(1000)"),
        ("model_executor/model_runner.py", "load_model", "runner().ModelRunner()"),
    ],
)
def test_where_another_gate_holds_strict_mode_refuses_there(
    warm_python: Python, supported: Path, file: str, old: str, call: str
) -> None:
    """A release that renamed one function: importing it ends nothing, starting a server does."""
    path = supported / "sglang/srt" / file
    text = path.read_text().replace(old, "renamed")
    path.write_text(
        text + ("    def __init__(self):\n        pass\n" if old == "load_model" else "")
    )
    code = f"gemma4_turbo.apply()\nengine(), runner()\nprint('WENT ON')\n{call}\nprint('STARTED')"
    strict = ran(warm_python, supported, code, GEMMA4_TURBO_STRICT="1")
    assert strict.returncode == 1
    assert "WENT ON" in strict.stdout
    assert "STARTED" not in strict.stdout
    assert "StrictModeError" in strict.stderr.splitlines()[-1]
    assert "strict mode has no hold on sglang" in strict.stderr.splitlines()[-1]
    lenient = ran(warm_python, supported, code)
    assert lenient.returncode == 0, lenient.stderr
    assert "STARTED" in lenient.stdout


def test_applied_while_sglang_is_being_imported(warm_python: Python, supported: Path) -> None:
    """Half a module has no function to replace yet: the gate is put in at the launch."""
    path = supported / "sglang/srt/model_executor/model_runner.py"
    path.write_text("import gemma4_turbo\ngemma4_turbo.apply()\n" + RUNNER)
    code = """
runner()
found = [gates()["load"]]
engine().Engine._launch_subprocesses(1000)
print(json.dumps([*found, gates()["load"]]))
"""
    found = last(ran(warm_python, supported, code, GEMMA4_TURBO_STRICT="1"))
    assert found == ["function", "FunctionWrapper"]


REAL = """
from types import SimpleNamespace
gemma4_turbo.apply()
try:
    from sglang.srt.disaggregation import encode_grpc_server, encode_server
    encoder = encode_server
except ImportError:
    from sglang.srt.disaggregation.encoder import grpc_server as encode_grpc_server
    from sglang.srt.disaggregation.encoder import http_server as encode_server
    from sglang.srt.disaggregation.encoder import server as encoder
from sglang.srt.entrypoints import grpc_server
from sglang.srt import server_args
from gemma4_turbo.engine import gates
told = [type(f).__name__ for f in (
    encode_server.launch_server, encode_grpc_server.serve_grpc_encoder, grpc_server.serve_grpc,
    vars(encoder.MMEncoder)["__init__"], vars(server_args.ServerArgs)["__post_init__"])]
for start in (encode_server.launch_server, encode_grpc_server.serve_grpc_encoder):
    try:
        start(SimpleNamespace(tp_size=2))
    except gates.StrictModeError as error:
        told.append(str(error))
def there(target):
    module, _, name = target.partition(":")
    found = sys.modules.get(module)
    for part in name.split("."):
        found = None if found is None else getattr(found, part, None)
    return found is not None
told.append([t for t in gates._GATES if there(t) and t not in instance.ENGINE.gates])
print(json.dumps(told))
"""


def test_sglangs_own_encoder_and_grpc_servers(warm_python: Python) -> None:
    """The gates are in, and strict mode refuses before anything is started."""
    done = warm_python(
        START + REAL, PYTHONPATH=str(REPOSITORY), GEMMA4_TURBO_STRICT="1", timeout=400
    )
    *types, encoder, encoder_grpc, missing = last(done)
    assert types == ["FunctionWrapper"] * 5
    for error in (encoder, encoder_grpc):
        assert "--encoder-only with 2 ranks: all but the first would be stock" in error
    assert missing == []


@pytest.mark.parametrize(("code", "word"), [(LAUNCH, "LAUNCHED"), (LOAD, "LOADED")])
def test_a_state_folder_that_cannot_be_used(
    warm_python: Python, tree: Path, tmp_path: Path, code: str, word: str
) -> None:
    """Strict mode refuses; otherwise it is said once, and the server goes on."""
    (tree / "sglang/srt/models/gemma4_causal.py").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    state = str(tmp_path / "link")
    count = "\ninstance.ENGINE.runs['router'].set('active', 'as if')\ngemma4_turbo.status()"
    lenient = ran(warm_python, tree, code + count, GEMMA4_TURBO_STATE_DIR=state)
    assert lenient.returncode == 0, lenient.stderr
    assert word in lenient.stdout
    warnings = [line for line in lenient.stdout.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert f"GEMMA4_TURBO_STATE_DIR: {state!r} is a symbolic link" in warnings[0]
    strict = ran(warm_python, tree, code, GEMMA4_TURBO_STRICT="1", GEMMA4_TURBO_STATE_DIR=state)
    assert strict.returncode == 1
    assert "LAUNCHED" not in strict.stdout
    error = strict.stderr.splitlines()[-1]
    assert "StrictModeError: GEMMA4_TURBO_STRICT=1: GEMMA4_TURBO_STATE_DIR: " in error
    assert "is a symbolic link" in error
    assert list((tmp_path / "elsewhere").iterdir()) == []
    good = ran(warm_python, tree, code, GEMMA4_TURBO_STRICT="1")
    assert good.returncode == 0, good.stderr
