"""The real server on its real start path, on a CPU: what the patches say and what strict mode stops.

Nothing here is about arithmetic, all about processes. A small Gemma 4 with random weights is loaded,
which is when the patches say what they did; a small GPT-2 also answers, as its forward needs no GPU.
Three processes import SGLang for each server, two minutes of a core: all but one server are forks of
a process that has imported the libraries under it, and what they spawn is too. Models that neither the
patches nor the tests name are switched off, by SGLang's own variable: two of the three import them all.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import pkgutil
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from bench.models import checkpoints
from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.instance import PORTS
from tests import releases
from tests.cpu.conftest import REPOSITORY, state_by_default, warm
from tests.cpu.warm import Child, Warm

pytestmark = pytest.mark.server

# The newest release takes no backend for Gemma 4 but a GPU's; 0.5.12 captures graphs unless told.
GEMMAS_BACKEND = "triton" if releases.is_another() else "torch_native"
OPTIONS = [] if releases.is_another() else ["--disable-piecewise-cuda-graph"]
START_LIMIT = 400.0  # seconds; it takes a fraction of that
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 1000,
    "n_positions": 512,
    "n_ctx": 512,
    "activation_function": "gelu_new",
}
GEMMA4 = checkpoints.gemma_config(
    checkpoints.Size(
        **{"hidden": 128, "mlp": 64, "layers": 2, "experts": 8, "expert_width": 32, "heads": 2},
        **{"kv_sliding": 2, "kv_full": 1, "head_sliding": 32, "head_full": 64, "vocabulary": 512},
    )
)
# Rotary embeddings import it on a CPU when they are made; it is never called.
ROTARY = "def rotary_embedding(*args):\n    raise NotImplementedError\n"
# What sgl_kernel wants of the driver when it is loaded; it is never called on a CPU.
DRIVER = (
    "cuGetErrorString",
    "cuMemAddressFree",
    "cuMemGetAddressRange_v2",
    "cuMemRelease",
    "cuMemRetainAllocationHandle",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuPointerGetAttribute",
)
DRIVERS_NAME = "libcuda.so.1"
BAD_VALUE = "GEMMA4_TURBO_{}='maybe' is not one of 0, 1"
SPAWNED = "Load weight begin"  # only a scheduler process says that


class Server:
    """A started server, its output in a file, its whole process group ours to end."""

    def __init__(
        self, arguments: list[str], environ: dict[str, str], log: Path, of: Warm | None
    ) -> None:
        """``of``: the process that it is a fork of; else a Python is started for it."""
        self._log = log
        log.touch()
        self.process: subprocess.Popen[bytes] | Child
        if of is not None:
            folders = environ.get("LD_LIBRARY_PATH", "").split(":")
            drivers = [Path(folder, DRIVERS_NAME) for folder in folders if folder]
            self.process = of.start(
                **{"module": "sglang.launch_server", "arguments": arguments, "env": environ},
                **{"cwd": str(log.parent), "files": [str(log)] * 2, "spawns": True},
                libraries=[str(driver) for driver in drivers if driver.exists()][:1],
                timeout=2 * START_LIMIT,
            )
            return
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "sglang.launch_server", *arguments],
                env=environ,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return self._log.read_text(errors="replace")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_LIMIT
        while not holds():
            assert time.monotonic() < deadline, f"never {what}:\n{self.output[-4000:]}"
            time.sleep(0.25)

    def line(self, pattern: str) -> str:
        """The first line that holds ``pattern``, as soon as it is there."""

        def there() -> bool:
            ended = self.process.poll() is not None
            if re.search(pattern, self.output):
                return True
            assert not ended, f"ended early:\n{self.output[-4000:]}"
            return False

        self.until(there, f"printed {pattern}")
        return next(line for line in self.output.splitlines() if re.search(pattern, line))

    def exit_code(self) -> int:
        """Wait until the server has ended by itself."""
        self.until(lambda: self.process.poll() is not None, "ended")
        assert self.process.returncode is not None
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL to every process of the group, whatever state they are in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


Launch = Callable[..., Server]


def other_models() -> str:
    """SGLang's modules of models in which nothing is patched, but the one that is served here."""
    models = "sglang.srt.models."
    named = {module for ports in PORTS.values() for port in ports for module in port.modules}
    named |= {f"{models}{name}" for name in ("gpt2", "registry", "utils")}
    (folder,) = importlib.util.find_spec("sglang").submodule_search_locations  # type: ignore[union-attr,misc]
    found = pkgutil.iter_modules([str(Path(folder, "srt", "models"))])
    return ",".join(one.name for one in found if f"{models}{one.name}" not in named)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """LD_LIBRARY_PATH to a stand-in for the CUDA driver where the machine has none."""
    try:
        ctypes.CDLL(DRIVERS_NAME)
    except OSError:
        pass
    else:
        return {}
    folder = tmp_path_factory.mktemp("driver")
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in DRIVER))
    library = str(folder / DRIVERS_NAME)
    options = ["-shared", "-fPIC", f"-Wl,-soname,{DRIVERS_NAME}", "-o", library]
    subprocess.run(["gcc", *options, str(source)], check=True, timeout=60)
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": ":".join(filter(None, (str(folder), inherited)))}


@pytest.fixture
def launch(environment: dict[str, str], driver: dict[str, str], tmp_path: Path) -> Iterator[Launch]:
    """Starts the server with the given environment variables; all of it is killed afterwards.

    ``fresh``: in a Python of its own, as a user does.
    """
    servers: list[Server] = []
    rotary = tmp_path / "rotary"
    (rotary / "vllm").mkdir(parents=True)
    (rotary / "vllm" / "__init__.py").touch()
    (rotary / "vllm" / "_custom_ops.py").write_text(ROTARY)

    def launched(
        config: dict[str, Any],
        port: int | None = None,
        site: str = "",
        fresh: bool = False,
        **variables: str,
    ) -> Server:
        model = tmp_path / f"model{len(servers)}"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
        arguments = ["--model-path", str(model), "--port", str(port or free_port())]
        arguments += ["--device", "cpu"]
        arguments += ["--load-format", "dummy", "--skip-tokenizer-init"]
        backend = GEMMAS_BACKEND if config is GEMMA4 else "torch_native"
        arguments += ["--attention-backend", backend, *OPTIONS]
        arguments += ["--max-total-tokens", "4096"]  # else it takes all of the memory
        variables["PYTHONPATH"] = ":".join(filter(None, (site, str(rotary))))
        state = {"GEMMA4_TURBO_STATE_DIR": str(tmp_path / "state"), "HF_HUB_OFFLINE": "1"}
        state["SGLANG_DISABLED_MODEL_ARCHS"] = other_models()
        environ = environment | driver | state | variables
        log = tmp_path / f"server{len(servers)}.log"
        servers.append(Server(arguments, environ, log, None if fresh else warm(environment)))
        return servers[-1]

    yield launched
    for server in servers:
        server.kill()


def free_port() -> int:
    """A port nobody listens on now, low enough for those that SGLang derives from it."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def site(tmp_path: Path, code: str) -> str:
    """PYTHONPATH with a ``sitecustomize`` that runs ``code`` in every process of the server."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return f"{folder}:{REPOSITORY}"


def healthy(port: int) -> bool:
    """Whether the server says so over HTTP."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def modules_of(patch: str) -> set[str]:
    """Those that the patch's ports for the installed release wait for."""
    ports = [port for port in PORTS[patch] if metadata.version("sglang") in port.written_for]
    return {module for port in ports for module in port.modules}


def installed_by_default() -> list[str]:
    """The patches that a server on a CPU has; those of MTP's worker and of Triton's backend wait."""
    later = (
        "sglang.srt.speculative.frozen_kv_mtp_worker",
        "sglang.srt.speculative.frozen_kv_mtp_worker_v2",
        "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner",
        "sglang.srt.layers.attention.triton_ops.decode_attention",
    )
    return [
        patch.name
        for patch in CATALOGUE
        if state_by_default(patch) == "active" and not modules_of(patch.name).intersection(later)
    ]


def test_installed_in_the_scheduler(launch: Launch) -> None:
    """Stock's own start line, nothing set: the entry point does it."""
    server = launch(GEMMA4)
    told = re.search(r"installed: (.*); standing aside: ", server.line(r"gemma4_turbo \S+: inst"))
    assert told is not None
    assert told[1].split(", ") == installed_by_default()
    assert SPAWNED in server.output
    server.line("Load weight end")
    # load_model came back and its caller went on
    server.line("Using KV cache dtype|KV cache|KV Cache|Memory pool end|max_total_num_tokens")
    assert server.output.count("installed: ") == 1
    assert "Traceback" not in server.output


def test_another_model_is_served_by_stock(launch: Launch) -> None:
    """No patch is in, the log says why once, and the server serves.

    A bad value switches its own patch off, is told as the reason, and stops nothing.
    """
    port = free_port()
    server = launch(GPT2, port, GEMMA4_TURBO_LAYER_NORMS="maybe")
    aside = server.line(r"gemma4_turbo \S+: inst")
    assert "installed: none; standing aside: " in aside
    assert f"layer_norms off ({BAD_VALUE.format('LAYER_NORMS')}); " in aside
    assert aside.count("unsupported (the model is a GPT2LMHeadModel)") == 1
    server.until(lambda: healthy(port) or server.process.poll() is not None, "healthy")
    assert server.process.poll() is None, server.output[-4000:]
    assert "StrictModeError" not in server.output
    assert "Traceback" not in server.output


CONFLICT = """
import wrapt

def replace(module):
    stock = module.Gemma4DecoderLayer.forward
    def forward(self, *args, **kwargs):
        return stock(self, *args, **kwargs)
    module.Gemma4DecoderLayer.forward = forward

wrapt.register_post_import_hook(replace, "sglang.srt.models.gemma4_causal")
"""


def test_a_conflict_in_the_scheduler_with_strict_ends_the_server(
    launch: Launch, tmp_path: Path
) -> None:
    """Another package's patch, seen only where the models are imported: no server stays up."""
    server = launch(GEMMA4, GEMMA4_TURBO_STRICT="1", site=site(tmp_path, CONFLICT))
    assert server.exit_code() != 0
    assert SPAWNED in server.output
    assert "StrictModeError: GEMMA4_TURBO_STRICT=1: layer_norms is conflict" in server.output
    assert "was replaced before us by the function at" in server.output
    assert "The server is fired up" not in server.output


DRIFT = """
from gemma4_turbo.engine import fingerprints

known = fingerprints.known_releases
fingerprints.known_releases = lambda: {
    release: dict.fromkeys(prints, "0" * 16) for release, prints in known().items()
}
"""


def test_a_bad_value_and_drift_with_strict_spawn_nothing(launch: Launch, tmp_path: Path) -> None:
    """What the main process can tell ends it with one sentence: variable and choices, and the source.

    The installed source is none that is known. That each of the two ends a process by itself is
    shown with stand-ins for SGLang.
    """
    drifted = site(tmp_path, DRIFT)
    variables = {"GEMMA4_TURBO_STRICT": "1", "GEMMA4_TURBO_ROPE_STORE": "maybe"}
    server = launch(GPT2, site=drifted, fresh=True, **variables)
    assert server.exit_code() == 1
    (error,) = [line for line in server.output.splitlines() if "StrictModeError:" in line]
    assert BAD_VALUE.format("ROPE_STORE") in error
    assert re.search(
        "StrictModeError: GEMMA4_TURBO_STRICT=1: .*layer_norms is drifted: SGLang", server.output
    )
    assert "Gemma4DecoderLayer.forward" in server.output
    assert "gates.py" in server.output
    assert SPAWNED not in server.output
