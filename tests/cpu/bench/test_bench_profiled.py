"""bench/profiled.py with a stand-in for the engines: which package and profile each has, and what it concludes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from bench import profiled
from gemma4_turbo.engine.gpu_profile import Key, Profile, save
from tests.cpu.conftest import REPOSITORY, warm

WORKER = """
import json, os, sys
from importlib.util import find_spec
from pathlib import Path

profile = os.environ["GEMMA4_TURBO_GPU_PROFILE"]
kernels = Path(find_spec("gemma4_turbo").origin).with_name("kernels")
known = "\\nKNOWN = (9,)\\n" in (kernels / "measured.py").read_text()
tables = any((kernels / "moe_configs").glob("triton_*"))
assert known == tables, "half a copy"

from gemma4_turbo.engine import gpu_profile, nvml

folder = kernels.with_name("profiles")
assert Path(str(gpu_profile.PROFILES)) == folder
gpu_profile.versions = lambda: {"sglang": "2", "torch": "3", "triton": "4", "gemma4_turbo": "5"}
nvml.look = lambda: nvml.Machine("1", ("g",))
if os.environ["REPOSITORY"] in str(folder):  # it is as if it had one
    gpu_profile.PROFILES = Path(os.environ["PROFILES"])
gpu_profile.forget()  # the site looked for it already, as a server does
own, its = gpu_profile.lookup(), gpu_profile.packaged("g")
kind = "bare" if profile == "0" else "profiled" if own.profile else "shipped"
if kind == "shipped" and os.environ["REPOSITORY"] not in str(folder):
    kind = "packaged"
assert known == (kind in ("shipped", "packaged")), kind
used = own.profile and own.path, its and its.path
assert used == {
    "shipped": (None, os.environ["PROFILES"] + "/g.json"),
    "packaged": (None, f"{folder}/measured.json"),
    "profiled": (profile, None),
    "bare": (None, None),
}[kind], (kind, used)
with open(sys.argv[1], "a") as log:
    if os.environ.get("IGNORED") == kind:
        word = "ignored" if kind == "profiled" else "skipped"
        log.write(f"gemma4_turbo: the package's GPU profile is {word}: for a test\\n")
print(json.dumps({"ready_s": 1.0}), flush=True)
calls = 0
for line in sys.stdin:
    command = json.loads(line)
    calls += 1
    ms = {"shipped": 2.0, "bare": 3.0}.get(kind, float(os.environ["MS"]))
    print(json.dumps({"value": ms * (100 if calls == 1 else 1)}), flush=True)
"""
RUN = """
import sys
from pathlib import Path

import typer

from bench import profiled
from bench.common import engines

worker, stale = Path(sys.argv.pop(1)), sys.argv.pop(1)
profiled.gpu_profile.stale = lambda key: stale or None
engines.Engine.script = str(worker)  # an absolute path stays one
typer.run(profiled.main)
"""


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Run:
    """The command: its exit status and what was said."""
    profile = tmp_path / "profile.json"
    for where in (profile, tmp_path / "profiles" / "g.json"):
        save(str(where), Profile(Key("g", "1", "2", "3", "4", "5"), {}, ()))
    (tmp_path / "worker.py").write_text(WORKER)

    def ran(ms: float, *options: str, stale: str = "", **variables: str) -> tuple[int, str]:
        told = ["--rounds", "2", "--batches", "1,8", "--prefill", "2x64", *options]
        told += ["--profile", str(profile), "--out", str(tmp_path / "out.csv")]
        done = warm(environment).run(
            code=RUN,
            arguments=[str(tmp_path / "worker.py"), stale, *told],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "MS": str(ms)}
            | {"PROFILES": str(tmp_path / "profiles"), "REPOSITORY": str(REPOSITORY)}
            | variables,
            cwd=str(REPOSITORY),
            timeout=400,
        )
        return done.returncode, done.stdout + done.stderr

    return ran


def test_a_profile_that_is_as_fast(run, tmp_path):
    status, said = run(2.02, "--bare")
    assert status == 0, said
    assert "at most 1.010 of the shipped package's time, 1.02 is allowed" in said
    frame = pd.read_csv(tmp_path / "out.csv")
    assert frame.groupby("variant")["value"].agg(["min", "max"]).T.to_dict("list") == {
        "shipped": [2.0, 2.0], "profile, unseen GPU": [2.02, 2.02], "unseen GPU": [3.0, 3.0],
    }  # fmt: skip
    assert set(zip(frame["quantity"], frame["x"], strict=True)) == {
        ("decode step", 1), ("decode step", 8), ("prefill of 64", 2),
    }  # fmt: skip


def test_a_profile_that_is_slower(run):
    status, said = run(2.1)
    assert status == 1, said
    assert "at most 1.050" in said


def test_a_profile_that_would_come_with_the_package(run, tmp_path):
    """In the place of the one that does, beside the package's own tiles."""
    status, said = run(1.9, "--packaged")
    assert status == 0, said
    frame = pd.read_csv(tmp_path / "out.csv")
    assert frame.groupby("variant")["value"].agg(set).to_dict() == {
        "shipped": {2.0},
        "profile, packaged": {1.9},
    }
    status, said = run(2.1, "--packaged")
    assert status == 1, said
    assert "at most 1.050" in said


@pytest.mark.parametrize(
    ("kind", "word", "options"),
    [("profiled", "ignored", []), ("packaged", "skipped", ["--packaged"])],
)
def test_a_profile_that_is_not_used_proves_nothing(run, kind, word, options):
    status, said = run(2.0, *options, IGNORED=kind)
    assert status == 1
    assert f"is {word}: for a test" in said


def test_a_profile_of_another_machine_is_refused_at_once(run):
    status, said = run(2.0, stale="it was measured on an L4")
    assert status == 2
    assert "is not for this machine: it was measured on an L4" in said


def test_there_must_be_a_profile(tmp_path, environment):
    done = warm(environment).run(
        script=str(REPOSITORY / "bench" / "profiled.py"),
        arguments=["--profile", str(tmp_path / "none")],
        env={**os.environ, "COLUMNS": "200"},
        cwd=str(REPOSITORY),
        timeout=400,
    )
    assert done.returncode == 2
    assert "--profile: there is no profile at" in done.stderr


def test_the_copy_has_no_profile_of_the_packages(tmp_path, monkeypatch):
    package = tmp_path / "here" / "gemma4_turbo"
    for name in ("kernels/moe_configs/triton_3_6/a.json", "profiles/a.json", "profiles/README.md"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / "kernels" / "measured.py").write_text(profiled.KNOWN)
    monkeypatch.setattr(profiled, "HERE", tmp_path / "here" / "bench")
    copy = profiled.unseen(tmp_path / "copy") / "gemma4_turbo"
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert files == {"kernels/measured.py", "profiles/README.md"}


def test_a_package_that_knows_gpus_otherwise_is_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(profiled, "KNOWN", "KNOWN = (8,)")
    with pytest.raises(ValueError, match=r"measured\.py must have 'KNOWN = \(8,\)' once"):
        profiled.unseen(tmp_path / "copy")
