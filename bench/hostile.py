"""Proof on a GPU that the package never changes answers, loses files or ends servers.

    python bench/hostile.py                          # all scenarios, under nine minutes on one GPU
    python bench/hostile.py --scenarios llama,hooks --at-once 4

Starts SGLang's real server on small checkpoints with random weights, stock (``GEMMA4_TURBO=0``) and
patched (nothing set, found through the entry point), several at once, sends all of them the same
greedy requests and compares tokens and logprobs:

* ``moe``: a Gemma 4 with real head sizes and 128 experts. Patched as it comes, with
  ``GEMMA4_TURBO_PROFILE=exact`` (must be equal bit for bit), and so in hostile surroundings: with a state
  folder that is open to everybody and full of pipes, sockets, links and foreign JSON, or whose default
  place another user has taken, with folders on PYTHONPATH that cannot be searched, are none, or are
  zips, and with a ``sitecustomize`` that raises. Nothing of that may be touched.
* ``hooks``: the same model with ``--forward-hooks``, which must be called and must change answers.
* ``fp8``, ``awq``, ``marlin``: quantised by SGLang at start; an AWQ checkpoint in fp16; one in bf16
  that SGLang runs by Marlin.
* ``llama``: no Gemma 4. Equal bit for bit, and every patch says why it stands aside.

With `tolerance` patches tokens may differ where stock's own two best are within ``--tie`` nats, or where
stock itself differs with its prompts in one batch (the floor, in the notes): counted, never hidden. While a patched server runs,
``gemma4_turbo doctor --json`` is asked in its environment. All that was seen goes to ``$OUT``:
``rows.json``, ``doctor.json``, ``answers.json.gz``, ``logs.tar.gz``. Exit 1 on FAIL.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402
from rich.table import Table  # noqa: E402

from bench.common.comparing import distances  # noqa: E402
from bench.common.engines import end_on_sigterm  # noqa: E402
from bench.common.pictures import ImageServer, as_row, sampling  # noqa: E402
from bench.common.servers import console, free_port, launch_arguments  # noqa: E402
from bench.common.variants import PATCHED, STOCK  # noqa: E402
from bench.workers.engine import prompts  # noqa: E402
from gemma4_turbo.cli.arguments import flag  # noqa: E402

EXACT, HOSTILE, SQUATTED = "exact", "hostile folder", "taken folder"
NEW_TOKENS = 32
LENGTHS = (5, 17, 40, 130, 300, 700)  # of the prompts sent one at a time; longer than a chunk: 700
BATCH = 6  # prompts sent together
# Batch sizes that show what stock's own batches change. 2, 4 and 8 are graphs of three sizes, the others
# run eagerly: batches that are padded to one size give the same bits and are one draw.
CROWDS = (2, 4, 8, 12, 24)
HEALTH, DOCTOR_LIMIT_S = 20, 120
MEAN_DISTANCE = 0.02  # nats between logprobs on average that need no floor
OTHER_USER = 1000
REASONS = 14  # lines of reasons in a table
STARTED = time.monotonic()


class StartError(Exception):
    """A server that did not start, with the line of its log that says why."""


# -- what is compared ---------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Two servers' answers to the same requests."""

    tokens: int = 0
    equal: int = 0
    ties: int = 0  # answers whose first difference is between tokens that stock finds as good
    wrong: int = 0  # answers that differ otherwise
    distance: float = 0.0  # of logprobs, before the first difference: the farthest
    mean: float = 0.0  # of the same logprobs
    bits: bool = True  # tokens and logprobs are equal bit for bit

    def __str__(self) -> str:
        told = f"{self.equal}/{self.tokens}"
        if self.ties or self.wrong:
            told += f", {self.ties} tie(s), {self.wrong} wrong"
        return told


def compare(
    stock: list[dict[str, Any]], other: list[dict[str, Any]], tie: float
) -> tuple[Comparison, list[str]]:
    """The comparison and a line for each answer that differs.

    Args:
        tie: nats between stock's two best tokens up to which either may be the answer.
    """
    tokens = equal = ties = wrong = 0
    apart: list[float] = []
    bits, told = len(stock) == len(other), []
    for number, (one, two) in enumerate(zip(stock, other, strict=False)):
        tokens += len(one["ids"])
        bits &= all(one[key] == two[key] for key in ("ids", "output", "top"))
        same = [x == y for x, y in zip(one["ids"], two["ids"], strict=False)]
        equal += sum(same)
        apart += distances(one, two, strict=False)
        if not all(math.isfinite(float.fromhex(value)) for value in two["output"]):
            wrong += 1
            told.append(f"answer {number}: a logprob is not finite")
        elif len(one["ids"]) != len(two["ids"]):
            wrong += 1
            told.append(f"answer {number}: {len(two['ids'])} tokens, not {len(one['ids'])}")
        elif not all(same):
            first = same.index(False)
            best = {token: float.fromhex(value) for value, token in one["top"][first]}
            gap = best[one["ids"][first]] - best.get(two["ids"][first], -math.inf)
            ties, wrong = (ties + 1, wrong) if gap <= tie else (ties, wrong + 1)
            told.append(f"answer {number}: token {first} differs, {gap:.4f} nats apart for stock")
    wrong += abs(len(stock) - len(other))
    mean = sum(apart) / len(apart) if apart else 0.0
    return Comparison(tokens, equal, ties, wrong, max(apart, default=0.0), mean, bits), told


def farthest(alone: list[dict[str, Any]], crowds: list[dict[str, Any]], tie: float) -> Comparison:
    """How far other batches take stock from itself: of all of them, the farthest in each respect.

    Not their average: a batch that happens to give the same bits says nothing about rounding.

    Args:
        crowds: the same prompts in each batch, one batch after another.
    """
    draws = [
        compare(alone, crowds[start : start + len(alone)], tie)[0]
        for start in range(0, len(crowds), len(alone))
    ]
    return Comparison(
        tokens=max(draw.tokens for draw in draws),
        equal=min(draw.equal for draw in draws),
        ties=max(draw.ties for draw in draws),
        wrong=max(draw.wrong for draw in draws),
        distance=max(draw.distance for draw in draws),
        mean=max(draw.mean for draw in draws),
        bits=all(draw.bits for draw in draws),
    )


def look(path: Path) -> list[Any]:
    """What must not change of a file, pipe, link or folder, without opening what blocks."""
    found = path.lstat()
    kind = stat.S_IFMT(found.st_mode)
    seen: list[Any] = [found.st_ino, found.st_mode, found.st_uid]
    if kind == stat.S_IFLNK:
        return [*seen, os.readlink(path), found.st_mtime_ns]
    if kind == stat.S_IFREG:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return [*seen, found.st_size, digest, found.st_mtime_ns]
    # A folder's own time changes with files that are not foreign.
    return seen if kind == stat.S_IFDIR else [*seen, found.st_mtime_ns]


def snapshot(folders: list[Path]) -> dict[str, list[Any]]:
    """Everything below the folders; links are not followed."""
    found = {}
    for folder in folders:
        for where, names, files in os.walk(folder):
            for name in ["", *names, *files]:
                path = Path(where, name)
                with contextlib.suppress(FileNotFoundError):
                    found[str(path)] = look(path)
    return found


def changes(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> list[str]:
    """A line for each that is gone or not as it was; what is new is not foreign."""
    return [
        f"{path}: {'gone' if path not in after else 'changed'}"
        for path, seen in before.items()
        if after.get(path) != seen
    ]


# -- what doctor says ---------------------------------------------------------------------------


def merged(servers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each patch over a server's processes: of that which has most to say of it."""
    rows: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for process in servers:
        for row in process["patches"]:
            weight = (
                row["state"] == "failed",
                row["engaged"],
                "scheduler" in process["command"],
                row["state"] == "active",
            )
            if row["name"] not in rows or weight > rows[row["name"]][0]:
                rows[row["name"]] = (weight, row)
    return [row for _, row in rows.values()]


def by_state(rows: list[dict[str, Any]]) -> str:
    """``active 20, off 3``: how many patches are in each state."""
    counts = Counter(row["state"] for row in rows)
    return ", ".join(f"{state} {count}" for state, count in counts.most_common()) or "none"


def reasons(rows: list[dict[str, Any]], width: int = 110) -> list[str]:
    """Why patches stand aside, those with one reason together."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["state"] != "active":
            names.setdefault((row["state"], row["reason"]), []).append(row["name"])
    lines = []
    for (state, reason), who in names.items():
        them = ", ".join(who) if len(who) < 4 else f"{len(who)} patches"
        short = " ".join(reason.split())
        lines.append(
            f"{state}: {them}: {short if len(short) <= width else short[: width - 3] + '...'}"
        )
    return lines


def not_aside(rows: list[dict[str, Any]], architecture: str) -> list[str]:
    """Patches that do not stand aside for this model, off and waiting ones left out."""
    expected = re.compile(rf"the model is (a )?{architecture}\b")
    return [
        f"{row['name']} is {row['state']}: {row['reason'][:80]}"
        for row in rows
        if row["state"] not in ("off", "waiting")
        and not (row["state"] == "unsupported" and expected.search(row["reason"]))
    ]


# -- surroundings -------------------------------------------------------------------------------


@dataclass
class Surroundings:
    """What a server finds when it starts."""

    environment: dict[str, str] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)  # in front of PYTHONPATH
    watched: list[Path] = field(default_factory=list)  # nothing in these may change
    prefix: list[str] = field(default_factory=list)  # in front of the command
    notes: list[str] = field(default_factory=list)


def entry_point(scratch: Path) -> Path:
    """A folder that makes the package look installed: SGLang finds its entry point there."""
    folder = scratch / "entry"
    metadata = folder / "gemma4_turbo-0.1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: gemma4-turbo\nVersion: 0.1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ngemma4_turbo = gemma4_turbo.plugin:register\n"
    )
    return folder


def foreign_files(folder: Path, victim: Path, pids: int = 1500) -> None:
    """Fill a folder with what others may have left in it.

    Args:
        victim: a file elsewhere that links in the folder lead to.
        pids: links are named after so many processes that will be started next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes] = {
        "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "pid": "x"}).encode(),
        "deep.json": b"[" * 100_000 + b"]" * 100_000,
        "deeper.json": b'{"pid":' * 50_000 + b"1" + b"}" * 50_000,
        "infinite.json": b'{"pid": Infinity, "start": null, "patches": []}',
        "long.json": b'{"pid": ' + b"9" * 5000 + b', "start": "1", "patches": []}',
        "list.json": b"[1, 2, 3]",
        "null.json": b"null",
        "bytes.json": bytes(range(128, 256)) * 8,
        "empty.json": b"",
        "rows.json": b'{"pid": 1, "start": "0", "patches": "none", "counters": {}}',
        "notes.txt": b"keep me\n",
        "data.counters": b"\0\1\2" * 100,
        "config.tmp": b"half written",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name in ("pipe.json", "pipe.counters", "pipe.tmp", "9.json"):
        os.mkfifo(folder / name)
    (folder / "folder.json").mkdir()
    (folder / "folder.json" / "inner.json").write_text("{}")
    (folder / "dangling.json").symlink_to(folder / "nowhere")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "out.json").symlink_to(victim)
    (folder / "up.json").symlink_to(folder.parent)
    # A socket's path is short: bound from inside its folder, by another process.
    code = "import socket; socket.socket(socket.AF_UNIX).bind('socket.json')"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=folder)
    child.wait()
    for pid in range(child.pid, child.pid + pids):
        (folder / f"{pid}.counters").symlink_to(victim)
        if pid % 10 == 0:
            (folder / f"{pid}.json").symlink_to(victim)


def give_away(folder: Path, notes: list[str]) -> None:
    """Everything below becomes another user's, where this one may do that."""
    if os.geteuid():
        notes.append("not root: the foreign files have this user")
        return
    for where, names, files in os.walk(folder):
        for name in ["", *names, *files]:
            os.chown(Path(where, name), OTHER_USER, OTHER_USER, follow_symlinks=False)


def bad_path(scratch: Path) -> tuple[list[str], Path]:
    """Entries of PYTHONPATH that are no folders with modules, and the one that is locked."""
    folder = scratch / "path"
    folder.mkdir()
    locked, broken = folder / "locked", folder / "broken"
    for made in (locked, broken):
        made.mkdir()
    (locked / "module.py").write_text("value = 1\n")
    (broken / "sitecustomize.py").write_text(
        "# gemma4_turbo is not started here\nraise RuntimeError('this sitecustomize is broken')\n"
    )
    with zipfile.ZipFile(folder / "good.zip", "w") as archive:
        archive.writestr("zipped_module.py", "value = 1\n")
    (folder / "bad.zip").write_bytes(b"PK\3\4 no zip")
    (folder / "file").write_text("no folder\n")
    (folder / "loop").symlink_to("loop")
    entries = [locked, folder / "missing", folder / "loop", folder / "file" / "below"]
    entries += [folder / "good.zip", folder / "bad.zip", Path("/" + "n" * 300), broken]
    locked.chmod(0)
    return [str(entry) for entry in entries], locked


def without_root_rights(locked: Path, path: list[str], notes: list[str]) -> list[str]:
    """A prefix that takes root's right to open everything away, if the server can run without it."""
    if os.geteuid():
        return []
    tool = shutil.which("setpriv")
    if tool is None:
        notes.append("no setpriv: root can search the locked folder")
        return []
    prefix = [tool, "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]
    code = (
        "import os, sys\n"
        "try:\n    os.listdir(sys.argv[1])\n"
        "except PermissionError:\n"
        "    import importlib.util\n    import gemma4_turbo\n"
        "    for name in ('sglang', 'torch'):\n"
        "        open(importlib.util.find_spec(name).origin).read()\n"
        "else:\n    sys.exit('root can search everything')\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path))
    try:
        done = subprocess.run(
            [*prefix, sys.executable, "-c", code, str(locked)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        notes.append(f"root keeps its rights: {error}")
        return []
    if done.returncode:
        notes.append(f"root keeps its rights: {(done.stderr.splitlines() or ['?'])[-1]}")
        return []
    return prefix


EXACTLY = {"GEMMA4_TURBO_PROFILE": "exact"}  # so that every bit must be stock's


def plain(scratch: Path, path: list[str]) -> Surroundings:
    """Nothing but a state folder of the server's own."""
    return Surroundings({"GEMMA4_TURBO_STATE_DIR": str(scratch / "state")})


def exact(scratch: Path, path: list[str]) -> Surroundings:
    """As `plain`, with bitwise patches only."""
    found = plain(scratch, path)
    found.environment |= EXACTLY
    return found


def hostile(scratch: Path, path: list[str]) -> Surroundings:
    """The state folder is everybody's and full; PYTHONPATH is full of what is no folder."""
    state, outside = scratch / "everybody", scratch / "outside"
    outside.mkdir()
    victim = outside / "victim.json"
    victim.write_text('{"mine": true}\n')
    foreign_files(state, victim)
    found = Surroundings({"GEMMA4_TURBO_STATE_DIR": str(state), **EXACTLY})
    give_away(state, found.notes)
    if not os.geteuid():
        os.chown(state, 0, 0)
    state.chmod(0o777)
    found.path, locked = bad_path(scratch)
    found.prefix = without_root_rights(locked, path, found.notes)
    found.watched = [state, outside, scratch / "path"]
    return found


def squatted(scratch: Path, path: list[str]) -> Surroundings:
    """The default state folder is another user's; the package also comes by sitecustomize."""
    temporary, outside = scratch / "t", scratch / "outside"
    for made in (temporary, outside):
        made.mkdir()
    temporary.chmod(0o1777)
    victim = outside / "victim.json"
    victim.write_text('{"mine": true}\n')
    folder = temporary / f"gemma4_turbo-{os.getuid()}"
    foreign_files(folder, victim)
    found = Surroundings({"TMPDIR": str(temporary), **EXACTLY})
    folder.chmod(0o777)
    give_away(folder, found.notes)
    entries, locked = bad_path(scratch)
    found.path = [str(HERE.parent / "sitecustomize_example"), *entries]
    found.prefix = without_root_rights(locked, path, found.notes)
    found.watched = [folder, outside, scratch / "path"]
    return found


SURROUNDINGS: dict[str, Callable[[Path, list[str]], Surroundings]] = {
    PATCHED: plain,
    EXACT: exact,
    HOSTILE: hostile,
    SQUATTED: squatted,
}

HOOK = '''\
"""A forward hook that changes a layer's output and writes down how often it was called."""

import os

import torch

ramps = {}
calls = 0


def make(config):
    def hook(module, args, output):
        global calls
        hidden = output[0] if isinstance(output, tuple) else output
        key = hidden.device, hidden.dtype, hidden.shape[-1]
        if key not in ramps:
            ramps[key] = torch.linspace(
                0, config["size"], hidden.shape[-1], device=hidden.device, dtype=hidden.dtype
            )
        calls += 1
        with open(f"{os.environ['BENCH_HOOK_CALLS']}.{os.getpid()}", "w") as file:
            file.write(str(calls))
        changed = hidden + ramps[key]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
'''


def hook_arguments(scratch: Path) -> tuple[list[str], Path]:
    """For launch_server, and the folder of the hook's module."""
    folder = scratch / "hooks"
    folder.mkdir(exist_ok=True)
    (folder / "bench_ramp_hook.py").write_text(HOOK)
    specification = {
        "name": "ramp",
        "target_modules": ["model.layers.1"],
        "hook_factory": "bench_ramp_hook:make",
        "config": {"size": 16.0},
    }
    # Dynamo, which SGLang sends prefills through to record them, does not take a hook that writes.
    arguments = ["--forward-hooks", json.dumps([specification])]
    arguments.append(flag("disable_piecewise_cuda_graph"))
    return arguments, folder


def hook_calls(base: Path) -> int:
    """How often the hook was called in a server's processes."""
    found = [path.read_text() for path in base.parent.glob(f"{base.name}.*")]
    return sum(int(text) for text in found if text)


# -- the server ---------------------------------------------------------------------------------


class TestedServer(ImageServer):
    """A server in its surroundings; requests as in ``images.py``."""

    def __init__(
        self,
        variant: str,
        arguments: list[str],
        log: Path,
        surroundings: Surroundings,
        path: list[str],
    ) -> None:
        self.variant, self.log, self.port = variant, log, free_port()
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("GEMMA4_TURBO")
        }
        # Not in a server's own temporary folder: compiled once for all.
        shared = Path(tempfile.gettempdir(), f"torchinductor-bench-{os.getuid()}")
        self.environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(shared))
        self.environment |= {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([*surroundings.path, *path]),
            **surroundings.environment,
        }
        if variant == STOCK:
            self.environment["GEMMA4_TURBO"] = "0"
        self.python = [*surroundings.prefix, sys.executable]
        start = [*self.python, "-m", "sglang.launch_server"]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*start, "--port", str(self.port), "--nccl-port", str(free_port()), *arguments],
                env=self.environment,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started = time.perf_counter()

    def healthy(self) -> bool:
        """Whether it answers, by a generated token."""
        if self.process.poll() is not None:
            return False
        with contextlib.suppress(urllib.error.URLError, OSError):
            address = f"http://127.0.0.1:{self.port}/health_generate"
            with urllib.request.urlopen(address, timeout=HEALTH) as answer:
                return bool(answer.status == 200)
        return False

    def wait_healthy(self, limit: float) -> float:
        """Seconds until it answered.

        Raises:
            StartError: if it ended, or has not answered in time.
        """
        while time.perf_counter() - self.started < limit:
            if self.process.poll() is not None:
                raise StartError(f"ended with {self.process.returncode}: {last_error(self.log)}")
            if self.healthy():
                return time.perf_counter() - self.started
            time.sleep(0.5)
        raise StartError(f"no answer in {limit:.0f} s: {last_error(self.log)}")

    def answers(self, vocabulary: int) -> dict[str, list[dict[str, Any]]]:
        """Greedy tokens: prompts one at a time, others together, and the first ones together too."""
        alone = [
            self.tokens({"input_ids": short(length, vocabulary, length)}, NEW_TOKENS)
            for length in LENGTHS
        ]
        together = [short(30 + 25 * i, vocabulary, 1000 + i) for i in range(BATCH)]
        return {
            "alone": alone,
            "together": self.at_once(together),
            "crowd": self.crowds(vocabulary),
        }

    def crowds(self, vocabulary: int) -> list[dict[str, Any]]:
        """The same prompts in batches of another composition: the floor of `tolerance` patches.

        An expert that the router picks by a hair moves a logprob by a nat, so one composition says
        little of the farthest: there are as many as `CROWDS`, one after another in the answer.
        """
        found = []
        for size in CROWDS:
            for start in range(0, len(LENGTHS), size):
                lengths = LENGTHS[start : start + size]
                fillers = size - len(lengths)
                prompts = [short(20 + 30 * i, vocabulary, 2000 + i) for i in range(fillers)]
                prompts += [short(length, vocabulary, length) for length in lengths]
                found += self.at_once(prompts)[fillers:]
        return found

    def at_once(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """Greedy tokens of prompts in one request."""
        body = {
            "input_ids": prompts,
            "sampling_params": sampling(NEW_TOKENS),
            "return_logprob": True,
            "top_logprobs_num": 5,
        }
        with self.post("/generate", body) as answer:
            return [as_row(found) for found in json.loads(answer.read())]

    def doctor(self) -> dict[str, Any]:
        """What ``gemma4_turbo doctor --import --json`` says in the server's environment.

        Raises:
            RuntimeError: if it says nothing in time, or no JSON.
        """
        command = [*self.python, "-m", "gemma4_turbo", "doctor", "--import", "--json"]
        try:
            done = subprocess.run(
                command,
                env=self.environment,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=DOCTOR_LIMIT_S,
            )
            found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"doctor has not ended in {DOCTOR_LIMIT_S} s") from None
        except ValueError:
            tail = (done.stderr.strip().splitlines() or ["nothing printed"])[-1]
            raise RuntimeError(f"doctor ended with {done.returncode}: {tail}") from None
        return found | {"exit_code": done.returncode}


def short(length: int, vocabulary: int, seed: int) -> list[int]:
    """A prompt of token ids that the small vocabulary has."""
    return [10 + token % (vocabulary - 10) for token in prompts(1, length, seed)[0]]


def last_error(log: Path) -> str:
    """The last exception in a log, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[.*\] )?[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["nothing printed"])[-1][:300]


# -- scenarios ----------------------------------------------------------------------------------


class Scenario(NamedTuple):
    """Servers on one model: stock, and patched in so many surroundings."""

    name: str
    model: str
    runs: tuple[str, ...] = (PATCHED,)
    arguments: tuple[str, ...] = ()
    bitwise: tuple[str, ...] = ()  # runs that must equal stock bit for bit
    engages: bool = False  # some patch must have run, or nothing was tested
    architecture: str = ""  # every patch stands aside for it


SCENARIOS = (
    Scenario(
        "moe", "moe", (PATCHED, EXACT, HOSTILE, SQUATTED), (), (EXACT, HOSTILE, SQUATTED), True
    ),
    Scenario("hooks", "moe", (PATCHED, EXACT), (), (EXACT,), True),
    Scenario("fp8", "moe", arguments=("--quantization", "fp8")),
    Scenario("awq", "awq", arguments=("--quantization", "awq", "--dtype", "float16")),
    Scenario("llama", "llama", bitwise=(PATCHED,), architecture="LlamaForCausalLM"),
    Scenario("marlin", "marlin"),
)

# Compiled while the first servers start, instead of while one is waited for.
MARLIN = """
import torch
try:
    from sglang.jit_kernel import awq_marlin_repack, gptq_marlin
except ImportError:  # later releases
    from sglang.kernels.ops.gemm import gptq_marlin
    from sglang.kernels.ops.quantization import awq_marlin_repack
awq_marlin_repack._jit_awq_marlin_repack_module()
gptq_marlin._jit_gptq_marlin_module(torch.bfloat16)
"""


def write_models(name: str, folder: Path) -> Path:
    """The checkpoint of this name; written once."""
    from bench.models import checkpoints

    return {
        "moe": lambda: checkpoints.write_gemma(folder),
        "awq": lambda: checkpoints.write_awq(folder, checkpoints.MOE, "float16"),
        "marlin": lambda: checkpoints.write_awq(folder, checkpoints.DENSE, "bfloat16"),
        "llama": lambda: checkpoints.write_llama(folder),
    }[name]()


@dataclass
class Row:
    """What became of one patched server."""

    scenario: str
    run: str
    alone: Comparison | None = None
    together: Comparison | None = None
    itself: Comparison | None = None  # stock's answers, asked twice
    patches: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # any: FAIL
    notes: list[str] = field(default_factory=list)
    not_shown: bool = False  # stock does not start

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or that there is nothing to compare with."""
        if self.problems:
            return "FAIL"
        return "NOT SHOWN" if self.not_shown else "PASS"


class Slots:
    """So many servers at once."""

    def __init__(self, free: int) -> None:
        self.all = self.free = free
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until so many are free; one that wants more than there are waits for all."""
        count = min(count, self.all)
        with self._changed:
            self._changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            yield
        finally:
            with self._changed:
                self.free += count
                self._changed.notify_all()


class Bench:
    """The scenarios' common state."""

    def __init__(self, out: Path, scratch: Path, at_once: int, limits: dict[str, float]) -> None:
        self.out, self.scratch, self.limits = out, scratch, limits
        self.slots = Slots(at_once)
        self.rows: list[Row] = []
        self.doctor: dict[str, Any] = {}
        self.answers: dict[str, Any] = {}
        self.servers: list[TestedServer] = []
        self.more: list[str] = []
        self.ended = False
        self.prebuilt: subprocess.Popen[bytes] | None = None
        self._models: dict[str, Path] = {}
        self._writing, self._telling = threading.Lock(), threading.Lock()
        inherited = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        self.path = [str(entry_point(scratch)), str(HERE.parent), *inherited]

    def model(self, name: str) -> Path:
        """The model's folder."""
        with self._writing:
            if name not in self._models:
                started = time.monotonic()
                self._models[name] = write_models(name, self.scratch / f"model-{name}")
                self.say(f"model {name}: written in {time.monotonic() - started:.0f} s")
            return self._models[name]

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        console.print(f"{time.monotonic() - STARTED:4.0f} s  {text}", highlight=False, markup=False)

    def start(
        self, name: str, variant: str, arguments: list[str], found: Surroundings, path: list[str]
    ) -> TestedServer:
        """A server that is ended with the others whatever happens."""
        log = self.scratch / "logs" / f"{name}-{variant.replace(' ', '_')}.log"
        log.parent.mkdir(exist_ok=True)
        if self.ended:
            raise StartError("the time is up")
        server = TestedServer(variant, arguments, log, found, path)
        self.servers.append(server)
        return server

    def stop(self) -> None:
        """No process stays."""
        self.ended = True
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(TestedServer.stop, list(self.servers)))
        if self.prebuilt is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.prebuilt.pid, 9)

    def prebuild(self) -> None:
        """Start compiling Marlin."""
        with (self.scratch / "marlin.log").open("wb") as output:
            self.prebuilt = subprocess.Popen(
                [sys.executable, "-c", MARLIN],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def arguments(self, scenario: Scenario) -> tuple[list[str], list[str]]:
        """For launch_server, and folders for PYTHONPATH."""
        folder = self.model(scenario.model)
        more = "--load-format auto --skip-tokenizer-init --chunked-prefill-size 512"
        arguments = launch_arguments(folder, 8, 16_384, self.limits["memory"], more)
        path = self.path
        if scenario.name == "hooks":
            hooks, where = hook_arguments(self.scratch)
            arguments, path = arguments + hooks, [str(where), *path]
        return [*arguments, *scenario.arguments, *self.more], path

    def run(self, scenario: Scenario) -> None:
        """One scenario, whatever happens in it."""
        rows = [Row(scenario.name, run) for run in scenario.runs]
        self.rows += rows
        try:
            arguments, path = self.arguments(scenario)
            if scenario.model == "marlin" and self.prebuilt is not None:
                self.prebuilt.wait()
            with self.slots.taken(1 + len(rows)):
                if self.ended:
                    raise StartError("the time is up")
                self._run(scenario, rows, arguments, path)
        except BaseException as error:
            traceback.print_exc()
            for row in rows:
                row.problems.append(f"{type(error).__name__}: {error}")
        with self._telling:
            for row in rows:
                tell(row)

    def _run(
        self, scenario: Scenario, rows: list[Row], arguments: list[str], path: list[str]
    ) -> None:
        scratch = Path(tempfile.mkdtemp(prefix=f"{scenario.name}-", dir=self.scratch))
        calls = {variant: scratch / f"calls-{variant}" for variant in (STOCK, *scenario.runs)}

        def hooked(variant: str, found: Surroundings) -> Surroundings:
            found.environment["BENCH_HOOK_CALLS"] = str(calls[variant])
            return found

        stock = self.start(scenario.name, STOCK, arguments, hooked(STOCK, Surroundings()), path)
        pairs: list[tuple[Row, TestedServer, Surroundings, dict[str, list[Any]]]] = []
        for row in rows:
            where = scratch / row.run.replace(" ", "-")
            where.mkdir()
            try:
                found = hooked(row.run, SURROUNDINGS[row.run](where, path))
                row.notes += found.notes
                before = snapshot(found.watched)
                server = self.start(scenario.name, row.run, arguments, found, path)
                pairs.append((row, server, found, before))
            except Exception as error:
                row.problems.append(f"not started: {type(error).__name__}: {error}")
        try:
            reference, again = self.asked(scenario, stock), None
        except (StartError, OSError, RuntimeError, ValueError) as error:
            reference, again = None, None
            for row in rows:
                row.not_shown = True
                row.notes.append(f"stock: {error}")
        else:
            again = compare(reference["alone"], self.asked(scenario, stock)["alone"], 0)[0]

        def one(pair: tuple[Row, TestedServer, Surroundings, dict[str, list[Any]]]) -> None:
            row, server, found, before = pair
            row.itself = again
            try:
                self.examine(scenario, row, server, reference)
                if reference is None:
                    row.notes.append("patched starts and answers")
            except (StartError, OSError, RuntimeError, ValueError) as error:
                # Where stock does not start either, the patched server need not.
                (row.notes if reference is None else row.problems).append(f"{row.run}: {error}")
            after = snapshot(found.watched)
            row.problems += changes(before, after)[:8]
            if before:
                new = [path for path in after if path not in before and "__pycache__" not in path]
                row.notes.append(
                    f"{len(before)} foreign files looked at before and after, {len(new)} new beside them"
                )

        with ThreadPoolExecutor(len(rows)) as pool:
            list(pool.map(one, pairs))
        for row in rows:
            if scenario.name == "hooks" and reference is not None:
                counts = [hook_calls(calls[variant]) for variant in (STOCK, row.run)]
                row.notes.append(
                    f"the hook was called {counts[0]} times in stock, {counts[1]} here"
                )
                if not all(counts):
                    row.problems.append("the hook was not called")
        stock.stop()
        for _, server, _, _ in pairs:
            server.stop()

    def asked(self, scenario: Scenario, server: TestedServer) -> dict[str, list[dict[str, Any]]]:
        """The server's answers, as soon as it stands."""
        from bench.models import checkpoints

        first = f"{scenario.name}, {server.variant}"
        if first not in self.answers:
            ready = server.wait_healthy(self.limits["start"])
            self.say(f"{first}: ready after {ready:.0f} s")
        found = server.answers(checkpoints.VOCABULARY)
        self.answers.setdefault(first, found)
        return found

    def examine(
        self,
        scenario: Scenario,
        row: Row,
        server: TestedServer,
        reference: dict[str, list[dict[str, Any]]] | None,
    ) -> None:
        """Ask the patched server, compare, ask doctor, see that it still lives."""
        found = self.asked(scenario, server)
        if reference is not None:
            row.alone, told = compare(reference["alone"], found["alone"], self.limits["tie"])
            row.together, more = compare(
                reference["together"], found["together"], self.limits["tie"]
            )
            row.notes += [*told, *(f"together, {line}" for line in more)][:10]
            floor = farthest(reference["alone"], reference["crowd"], self.limits["tie"])
            row.notes.append(
                f"stock's own floor, the farthest of batches of {CROWDS}: {floor},"
                f" {floor.distance:.3f} at most, {floor.mean:.4f} on average"
            )
            bad = row.alone.wrong + row.together.wrong
            if bad and (row.run in scenario.bitwise or not floor.wrong):
                row.problems.append(f"{bad} answer(s) differ from stock")
            for found in (row.alone, row.together):
                if not found.distance <= max(self.limits["distance"], 2 * floor.distance):
                    row.problems.append(f"logprobs {found.distance:.3f} apart")
                if not found.mean <= max(MEAN_DISTANCE, 2 * floor.mean):
                    row.problems.append(f"logprobs {found.mean:.4f} apart on average")
            if row.run in scenario.bitwise and not row.alone.bits:
                row.problems.append("not equal bit for bit")
        try:
            doctor = server.doctor()
            self.doctor[f"{scenario.name}, {row.run}"] = doctor
            row.patches = merged(doctor["servers"])
            if doctor["problems"]:
                row.notes.append(f"doctor: {'; '.join(doctor['problems'])[:300]}")
        except (RuntimeError, KeyError, OSError) as error:
            row.problems.append(f"doctor: {error}")
        lines = server.log.read_text(errors="replace").splitlines()
        said = [
            found[0] for line in lines if (found := re.search("gemma4_turbo .*installed: .*", line))
        ]
        if not row.patches:
            row.notes.append("doctor sees no process of this server")
            row.notes.append(said[-1][:400] if said else "the log says nothing of patches")
        if not said and not row.patches:
            row.problems.append("the package was not there")
        engaged = sum(patch["engaged"] for patch in row.patches)
        if scenario.engages and row.patches and not engaged:
            row.problems.append("no patch has run: nothing was tested")
        if scenario.architecture:
            row.problems += not_aside(row.patches, scenario.architecture)[:10]
            if not row.patches:
                row.problems.append("doctor does not say why patches stand aside")
        if not server.healthy():
            row.problems.append(f"the server is not alive: {last_error(server.log)}")

    def cross_checks(self) -> None:
        """Between scenarios: the hook changes answers; hostile surroundings change no bit."""
        unhooked, hooked = (self.answers.get(f"{name}, {STOCK}") for name in ("moe", "hooks"))
        if unhooked and hooked and unhooked["alone"] == hooked["alone"]:
            for row in self.rows:
                if row.scenario == "hooks":
                    row.problems.append("the hook changes nothing: nothing was tested")
        for row in self.rows:
            friendly = self.answers.get(f"{row.scenario}, {EXACT}")
            found = self.answers.get(f"{row.scenario}, {row.run}")
            if row.run in (HOSTILE, SQUATTED) and friendly and found:
                same = compare(friendly["alone"], found["alone"], 0)[0].bits
                row.notes.append(
                    f"{'equal' if same else 'NOT equal'} bit for bit to {EXACT} in friendly surroundings"
                )

    def save(self) -> None:
        """At most four files, whatever there is."""
        self.out.mkdir(parents=True, exist_ok=True)
        rows = [
            {"verdict": row.verdict}
            | {
                key: value._asdict() if isinstance(value, Comparison) else value
                for key, value in vars(row).items()
            }
            for row in self.rows
        ]
        (self.out / "rows.json").write_text(json.dumps(rows, indent=1))
        (self.out / "doctor.json").write_text(json.dumps(self.doctor, indent=1))
        with gzip.open(self.out / "answers.json.gz", "wt") as file:
            json.dump(self.answers, file)
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            for log in [*sorted(self.scratch.glob("logs/*.log")), self.scratch / "marlin.log"]:
                if log.exists():
                    archive.add(log, log.name)


def tell(row: Row) -> None:
    """A scenario's table."""
    grid = Table(title=f"{row.scenario}, {row.run}: {row.verdict}", title_justify="left")
    grid.add_column("what")
    grid.add_column("seen", overflow="fold")
    for name, found in (("one at a time", row.alone), ("together", row.together)):
        if found:
            grid.add_row(f"tokens equal, {name}", str(found))
            told = f"{found.distance:.2e} nats at most, {found.mean:.2e} on average"
            grid.add_row("distance of logprobs", told)
    if row.itself:
        told = "bit for bit" if row.itself.bits else str(row.itself)
        grid.add_row("stock asked again", told)
    if row.patches:
        grid.add_row("patches", by_state(row.patches))
        engaged = [f"{p['name']} {p['engaged']}" for p in row.patches if p["engaged"]]
        grid.add_row("engaged", ", ".join(engaged) or "none")
        grid.add_row("aside", "\n".join(reasons(row.patches)[:REASONS]) or "none")
    for heading, lines in (("note", row.notes), ("PROBLEM", row.problems)):
        for line in lines:
            grid.add_row(heading, line)
    console.print(grid, markup=False)


def summary(rows: list[Row]) -> Table:
    """The last table."""
    grid = Table(title="Stock against patched", title_justify="left")
    for heading in ("scenario", "tokens equal", "together", "distance", "patches", "engaged", ""):
        grid.add_column(heading, overflow="fold")
    for row in rows:
        both = [found for found in (row.alone, row.together) if found]
        grid.add_row(
            f"{row.scenario}, {row.run}",
            str(row.alone or "-"),
            str(row.together or "-"),
            f"{max(found.distance for found in both):.1e}" if both else "-",
            by_state(row.patches),
            str(sum(patch["engaged"] for patch in row.patches)),
            row.verdict,
        )
    return grid


def main(
    scenarios: Annotated[
        str, typer.Option(help=f"Comma list of {', '.join(s.name for s in SCENARIOS)}; empty: all")
    ] = "",
    at_once: Annotated[int, typer.Option(min=2, help="Servers at the same time")] = 9,
    limit: Annotated[float, typer.Option(help="Seconds until what still runs is ended")] = 520,
    start_limit: Annotated[float, typer.Option(help="Seconds for a server to start")] = 150,
    tie: Annotated[
        float, typer.Option(help="Nats between stock's best tokens that count as equally good")
    ] = 0.1,
    most_distance: Annotated[float, typer.Option(help="Of logprobs, in nats")] = 0.5,
    mem_fraction: Annotated[
        float, typer.Option(help="SGLang's mem_fraction_static; pools are small all the same")
    ] = 0.7,
    server_arguments: Annotated[
        str, typer.Option(help="More for launch_server, for all, in one string")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for what was seen; default: $OUT, else a new one")
    ] = None,
) -> None:
    """All scenarios, stock against patched."""
    end_on_sigterm()
    names = [name for name in scenarios.split(",") if name]
    unknown = set(names) - {scenario.name for scenario in SCENARIOS}
    if unknown:
        raise typer.BadParameter(f"--scenarios: no scenario is called {', '.join(sorted(unknown))}")
    chosen = [s for s in SCENARIOS if not names or s.name in names]
    out = out or Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gemma4_turbo-hostile-"))
    # Short: SGLang makes sockets below, whose paths are limited.
    scratch = Path(tempfile.mkdtemp(prefix="g4h-", dir="/tmp"))
    limits = {"start": start_limit, "tie": tie, "distance": most_distance, "memory": mem_fraction}
    bench = Bench(out, scratch, at_once, limits)
    bench.more = server_arguments.split()
    pool = ThreadPoolExecutor(len(chosen))
    try:
        if any(scenario.model == "marlin" for scenario in chosen):
            bench.prebuild()
        futures = []
        for scenario in chosen:
            futures.append(pool.submit(bench.run, scenario))
            time.sleep(0.2)  # the models are written in this order
        left = max(1.0, limit - (time.monotonic() - STARTED))
        if wait(futures, timeout=left).not_done:
            bench.say("the time is up: what still runs is ended")
            bench.stop()
            wait(futures, timeout=15)
    finally:
        bench.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        bench.cross_checks()
        bench.save()
        started = {row.scenario for row in bench.rows}
        bench.rows += [
            Row(s.name, run, problems=["not begun"])
            for s in chosen
            if s.name not in started
            for run in s.runs
        ]
        for row in bench.rows:
            for line in row.problems:
                bench.say(f"{row.scenario}, {row.run}: {line}")
        console.print(summary(bench.rows))
        failed = [row for row in bench.rows if row.verdict == "FAIL"]
        unseen = [row for row in bench.rows if row.verdict == "NOT SHOWN"]
        aside = f", {len(unseen)} not shown: stock does not start" if unseen else ""
        shown = len(bench.rows) > len(unseen)
        verdict = "PASS" if shown and not failed else "FAIL"
        print(f"{verdict}: {len(failed)} of {len(bench.rows)} failed{aside}", flush=True)
        shutil.rmtree(scratch, ignore_errors=True)
    # Threads that wait for what no longer comes do not hold the process.
    sys.stdout.flush()
    os._exit(0 if verdict == "PASS" else 1)


if __name__ == "__main__":
    typer.run(main)
