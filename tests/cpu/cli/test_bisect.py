"""``bisect``: the search itself for any culprit, and the command with tiny real commands."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from gemma4_turbo.__main__ import app
from gemma4_turbo.catalogue import CATALOGUE, TOLERANCE, Patch
from gemma4_turbo.cli import bisect
from gemma4_turbo.cli.minimise import minimise
from gemma4_turbo.cli.trials import Trials, standing
from tests.cpu import synthetic
from tests.cpu.conftest import REPOSITORY, state_by_default
from tests.cpu.synthetic import alias, clean_environment

NAMES = ("alpha", "beta", "gamma", "delta")
Predicate = Callable[[frozenset[str]], bool]


def record(name: str, **fields: Any) -> Patch:
    """A patch; no code of any is run here."""
    return synthetic.record(name, **fields).patch


class Remembering:
    """A predicate that is asked once for each set."""

    def __init__(self, fails: Predicate) -> None:
        self.fails, self.answers = fails, dict[frozenset[str], bool]()

    def __call__(self, on: frozenset[str]) -> bool:
        if on not in self.answers:
            self.answers[on] = self.fails(on)
        return self.answers[on]


class Imagined(Trials):
    """Trials whose verdicts come from a predicate, not from a command."""

    def __init__(self, names: list[str], fails: Predicate) -> None:
        super().__init__([], [record(name) for name in names], Path(), Console())
        self._fails = fails  # type: ignore[method-assign]


def names_of(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


@st.composite
def culprits(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Patches, and those of them that fail together."""
    names = names_of(draw(st.integers(1, 24)))
    chosen = draw(st.sets(st.sampled_from(names), min_size=1))
    return names, [name for name in names if name in chosen]


@st.composite
def any_predicates(draw: st.DrawFn) -> tuple[list[str], Predicate]:
    """Patches, and any sets of them that fail, with all of them and without the empty one."""
    names = names_of(draw(st.integers(1, 6)))
    some = st.frozensets(st.sampled_from(names), min_size=1)
    failing = draw(st.sets(some, max_size=8)) | {frozenset(names)}
    return names, failing.__contains__


@given(culprits())
def test_exactly_the_culprit_is_found(case):
    names, culprit = case
    fails = Remembering(lambda on: on.issuperset(culprit))
    assert minimise(names, fails) == culprit
    assert len(fails.answers) <= len(names) ** 2 + 3 * len(names)
    if len(culprit) == 1:
        assert len(fails.answers) <= math.ceil(math.log2(len(names))) + 3  # the most for up to 40


@given(any_predicates())
def test_every_name_of_the_answer_is_needed(case):
    """Also where a patch hides the failure of another one."""
    names, fails = case
    found = frozenset(minimise(names, fails))
    assert found <= frozenset(names)
    assert fails(found)
    assert not any(fails(found - {name}) for name in found)


@pytest.mark.parametrize(("together", "most"), [(1, 11), (2, 16), (3, 25)])
def test_runs_among_forty_patches(together, most):
    """Of the whole search, with none on, with all, and the check of the workaround."""
    names = names_of(40)
    for chosen in itertools.islice(itertools.combinations(names, together), 0, None, together**3):
        trials = Imagined(names, frozenset(chosen).issubset)
        found = bisect.Findings()
        bisect.search(trials, names, found)
        assert found.culprits == [list(chosen)]
        assert len(trials.verdicts) <= most, chosen


@given(any_predicates())
def test_the_workaround_passes(case):
    """However many culprits there are, and each of them fails by itself."""
    names, fails = case
    found = bisect.Findings()
    bisect.search(Imagined(names, fails), names, found)
    assert found.result == bisect.CULPRIT
    assert all(fails(frozenset(culprit)) for culprit in found.culprits)
    assert not fails(frozenset(names) - set(found.workaround))
    assert len(found.workaround) == len(found.culprits)


def test_a_patch_stands_on_those_that_it_requires():
    patches = [record("a"), record("b", requires=("a",)), record("c", requires=("b",))]
    assert standing({"b", "c"}, patches) == frozenset()
    assert standing({"a", "c"}, patches) == {"a"}
    assert standing({"a", "b", "c"}, patches) == {"a", "b", "c"}


# -- the command --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def four_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue of four patches and no variable set."""
    clean_environment(monkeypatch)
    use(monkeypatch, *(record(name) for name in NAMES))


def use(monkeypatch: pytest.MonkeyPatch, *patches: Patch) -> None:
    monkeypatch.setattr(bisect, "catalogue", lambda: patches)


def python(code: str) -> list[str]:
    """A command; its code has ``on(name)``."""
    start = "import os, sys\non = lambda n: os.environ['GEMMA4_TURBO_' + n.upper()] == '1'\n"
    return [sys.executable, "-S", "-c", start + code]


def failing_if(condition: str) -> list[str]:
    return python(f"sys.exit(bool({condition}))")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bisect", *arguments])


def found_by(*arguments: str) -> dict[str, Any]:
    """The JSON, which is all of stdout."""
    found: dict[str, Any] = json.loads(call("--json", *arguments).stdout)
    return found


def sets_run(found: dict[str, Any]) -> list[frozenset[str]]:
    return [frozenset(run["on"]) for run in found["runs"]]


@pytest.mark.parametrize("culprit", NAMES)
def test_a_single_culprit(culprit):
    done = call("--", *failing_if(f"on('{culprit}')"))
    assert done.exit_code == 0
    assert done.stdout == f"Culprit: {culprit}. The command passes with {env(culprit)}=0\n"
    assert f"Minimal: {culprit}: with it alone the command failed" in done.stderr


def env(name: str) -> str:
    return f"GEMMA4_TURBO_{name.upper()}"


def test_a_pair_that_fails_only_together():
    done = call("--", *failing_if("on('alpha') and on('gamma')"))
    assert done.exit_code == 0
    assert done.stdout == (
        "Culprit: alpha and gamma together. The command passes with GEMMA4_TURBO_GAMMA=0\n"
    )


def test_two_culprits_and_one_workaround_for_both():
    found = found_by("--", *failing_if("on('beta') or on('delta')"))
    assert found["culprits"] == [["beta"], ["delta"]]
    assert found["workaround"] == {"GEMMA4_TURBO_BETA": "0", "GEMMA4_TURBO_DELTA": "0"}


def test_the_catalogue_of_the_package(monkeypatch):
    monkeypatch.undo()
    clean_environment(monkeypatch)
    monkeypatch.setenv("GEMMA4_TURBO_PDL", "0")
    # rope_store requires qkv_norm, which newer releases have themselves.
    done = call("--json", "--", *failing_if("on('rope_store')"))
    found = json.loads(done.stdout)
    assert found["culprits"] == [["rope_store"]]
    on = {patch.name for patch in CATALOGUE if state_by_default(patch) == "active"} - {"pdl"}
    assert set(found["took_part"]) == on
    assert sets_run(found)[1] == on
    idle = {patch.name for patch in CATALOGUE if state_by_default(patch) == "upstreamed"}
    assert all(found["left_out"][name].startswith("upstreamed: ") for name in idle)
    (told,) = [line for line in done.stderr.splitlines() if "take part" in line]
    assert told.startswith(f"{len(on)} patches take part; left out, always off: ")
    release = metadata.version("sglang")
    assert told.count(f"; cannot be active with SGLang {release}: ") == 1
    listed = told.partition("cannot be active")[2]
    assert all(name in listed for name in idle)
    assert found["left_out"]["pdl"] == "GEMMA4_TURBO_PDL=0"


def test_what_cannot_be_active_is_on_for_those_that_require_it(monkeypatch, tmp_path):
    """In every run with a patch on; it is in no set, and nothing is asked about it."""
    base = record("base")
    trials = Trials(
        [], [record("top", requires=("base",)), base], tmp_path, Console(), idle=["base"]
    )
    assert trials.standing({"top"}) == {"top"}
    assert standing({"top"}, trials.patches) == frozenset()
    environment = trials.environment(frozenset({"top"}))
    assert (environment[env("top")], environment[env("base")]) == ("1", "1")
    assert trials.environment(frozenset())["GEMMA4_TURBO"] == "0"
    monkeypatch.setattr(trials, "_fails", lambda on: "top" in on)
    found = bisect.Findings()
    bisect.search(trials, ["top"], found)
    assert found.culprits == [["top"]]
    assert set(trials.verdicts) == {frozenset(), frozenset({"top"})}


def test_json_has_every_run_and_no_set_twice():
    found = found_by("--", *failing_if("on('alpha') and on('delta')"))
    assert found["result"] == "culprit"
    assert found["culprits"] == [["alpha", "delta"]]
    assert found["took_part"] == list(NAMES)
    assert found["doubts"] == []
    sets = sets_run(found)
    assert sets[:2] == [frozenset(), frozenset(NAMES)]
    assert len(sets) == len(set(sets))
    assert [run["number"] for run in found["runs"]] == list(range(1, len(sets) + 1))
    assert all(run["passed"] == (not {"alpha", "delta"} <= set(run["on"])) for run in found["runs"])


def test_failing_with_everything_off_is_not_ours():
    done = call("--", *python("print('no [b]model[/b]'); sys.exit(3)"))
    assert done.exit_code == 1
    assert done.stdout == (
        "The command fails without any patch (GEMMA4_TURBO=0, exit status 3): it is not gemma4_turbo\n"
    )
    assert "stdout: no [b]model[/b]" in done.stderr
    assert "Runs: 1," in done.stderr


def test_everything_off_is_said_by_the_master_switch():
    done = call("--", *failing_if("os.environ.get('GEMMA4_TURBO') == '0'"))
    assert done.exit_code == 1
    assert "fails without any patch" in done.stdout


def test_passing_with_everything_on_leaves_nothing_to_find():
    found = call("--", *failing_if("False"))
    assert found.exit_code == 1
    assert found.stdout == "The command passes with all patches on: nothing to find\n"
    assert "Runs: 2," in found.stderr


def test_a_switch_of_the_user_is_respected(monkeypatch):
    monkeypatch.setenv("GEMMA4_TURBO_BETA", "0")
    done = call("--json", "--", *failing_if("on('beta') or on('gamma')"))
    found = json.loads(done.stdout)
    assert found["culprits"] == [["gamma"]]
    assert found["took_part"] == ["alpha", "gamma", "delta"]
    assert found["left_out"] == {"beta": "GEMMA4_TURBO_BETA=0"}
    assert not any("beta" in on for on in sets_run(found))
    assert "left out, always off: beta (GEMMA4_TURBO_BETA=0)" in done.stderr


def test_profile_default_and_alias_of_the_user_are_respected(monkeypatch):
    near, other = record("near", numerics=TOLERANCE), record("other", default=False)
    named = record("named", aliases=(alias("STANDIN_DISABLE"),))
    use(monkeypatch, near, other, named, record("exact"))
    monkeypatch.setenv("GEMMA4_TURBO_PROFILE", "exact")
    monkeypatch.setenv("STANDIN_DISABLE", "0")  # "not disabled", whatever bisect switches off
    found = found_by("--", *failing_if("on('named') or on('near') or on('other')"))
    assert found["took_part"] == ["named", "exact"]
    assert found["culprits"] == [["named"]]


def test_a_patch_and_the_one_that_it_requires(monkeypatch):
    """The dependent patch goes, and is never run without the other one."""
    use(monkeypatch, record("top", requires=("base",)), record("base"), record("else_"))
    found = found_by("--", *failing_if("on('top') and on('base')"))
    assert found["culprits"] == [["top", "base"]]
    assert found["workaround"] == {"GEMMA4_TURBO_TOP": "0"}
    assert all("base" in on for on in sets_run(found) if "top" in on)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "GEMMA4_TURBO",
            "0",
            "no patch is on, nothing to bisect: alpha, beta, gamma, delta (GEMMA4_TURBO=0)",
        ),
        ("GEMMA4_TURBO_BETA", "maybe", "GEMMA4_TURBO_BETA='maybe' is not one of 0, 1"),
    ],
)
def test_variables_that_leave_nothing_to_do(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    done = call("--", *python("sys.exit(1)"))
    assert done.exit_code == 2
    assert message in done.stderr
    assert "run 1" not in done.stderr


def test_a_command_that_is_not_there():
    done = call("--", "no-such-command-anywhere", "x")
    assert done.exit_code == 2
    assert "no-such-command-anywhere cannot be started: No such file" in done.stderr
    assert "run 1 fails" not in done.stderr
    assert "Runs:" not in done.stderr


def test_a_command_that_may_not_be_run(tmp_path: Path):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    done = call("--", str(script))
    assert done.exit_code == 2
    assert f"{script} cannot be started: Permission denied" in done.stderr


def test_the_command_is_required():
    done = call()
    assert done.exit_code == 2
    assert "Missing argument 'COMMAND'" in done.stderr


def test_options_of_the_command_are_its_own():
    """With ``--`` or without."""
    code = failing_if("sys.argv[1:] != ['--json', '--timeout']")
    for start in (["--"], []):
        done = call(*start, *code, "--json", "--timeout")
        assert "nothing to find" in done.stdout


def test_a_timeout_fails_and_ends_the_process_group(tmp_path: Path):
    script = 'if [ $GEMMA4_TURBO_BETA = 1 ]; then sleep 60 & echo $! > "$0"; wait; fi'
    done = call("--timeout", "1", "--", "sh", "-c", script, str(tmp_path / "pid"))
    assert done.stdout == "Culprit: beta. The command passes with GEMMA4_TURBO_BETA=0\n"
    assert "fails: timeout of 1 s, process group killed" in done.stderr
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_what_a_run_leaves_behind_is_ended(tmp_path: Path):
    call("--", "sh", "-c", 'sleep 60 & echo $! >> "$0"', str(tmp_path / "pids"))
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)


def is_gone(pid: int) -> bool:
    """Soon: the kernel takes a moment, and nobody may reap an orphan."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_signal_is_named():
    done = call("--", *python("on('alpha') and os.kill(os.getpid(), 11)"))
    assert "fails: killed by SIGSEGV" in done.stderr
    assert done.stdout.startswith("Culprit: alpha.")


def test_repeat_finds_a_flaky_failure_and_says_so(tmp_path: Path):
    """Every second run with the patch on fails."""
    code = python(
        "path = sys.argv[1]\n"
        "on('delta') and open(path, 'a').write('x')\n"
        "sys.exit(on('delta') and os.path.getsize(path) % 2 == 0)"
    )
    done = call("--repeat", "2", "--", *code, str(tmp_path / "count"))
    assert done.stdout == "Culprit: delta. The command passes with GEMMA4_TURBO_DELTA=0\n"
    assert "In doubt: flaky: with delta on, only run 2 of 2 failed" in done.stderr
    assert "run 2 (2 of 2) passes" in done.stderr
    (tmp_path / "count").unlink()
    assert "nothing to find" in call("--", *code, str(tmp_path / "count")).stdout


def test_verdicts_that_contradict_each_other_are_told():
    """beta hides alpha's failure unless all are on."""
    found = found_by("--", *failing_if("on('alpha') and (not on('beta') or on('delta'))"))
    assert found["culprits"] == [["alpha"]]
    (doubt,) = found["doubts"]
    assert doubt.startswith(
        "inconsistent: it fails with alpha on but passes with alpha, beta, gamma on"
    )


def test_logs_are_kept(tmp_path: Path):
    code = python("print('out', on('alpha')); print('err', file=sys.stderr); sys.exit(on('alpha'))")
    found = found_by("--logs", str(tmp_path / "new" / "logs"), "--", *code)
    for run in found["runs"]:
        assert Path(run["stdout"]).read_text() == f"out {'alpha' in run['on']}\n"
        assert Path(run["stderr"]).read_text() == "err\n"
    assert (tmp_path / "new" / "logs" / "run-01.stdout").is_file()


def test_logs_of_another_search_are_not_overwritten(tmp_path: Path):
    (tmp_path / "run-01.stdout").write_text("kept")
    done = call("--logs", str(tmp_path), "--", "true")
    assert done.exit_code == 2
    assert f"--logs: {tmp_path} is not empty: name a new folder" in done.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_each_run_is_announced_with_what_is_left():
    done = call("--", *failing_if("on('alpha')"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("run ")]
    assert lines[0] == ("run 1: no patch on (GEMMA4_TURBO=0); about 6 runs left, this one included")
    for start, end in zip(lines[::2], lines[1::2], strict=True):
        assert start.split(":")[0] == end.split(" passes:")[0].split(" fails:")[0]
    assert all(re.search(r"; about \d runs? left, .*: \d+ s$", line) for line in lines[2::2])
    assert "about 1 run left" in lines[-2]


def test_a_command_that_passes_now_is_run_more_often():
    """The hint, unless that was asked for."""
    assert "If it fails only now and then: --repeat" in call("--", "true").stderr
    assert "now and then" not in call("--repeat", "2", "--", "true").stderr


def test_different_failures_are_a_doubt():
    found = found_by("--", *failing_if("on('beta') and (1 + on('alpha'))"), "")
    assert found["doubts"] == []
    found = found_by("--", *python("sys.exit(on('beta') and 1 + on('alpha'))"))
    (doubt,) = found["doubts"]
    assert "exit status 1" in doubt
    assert "exit status 2" in doubt
    assert "--repeat" in doubt


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = call("--logs", str(tmp_path / "file"), "--", "true")
    assert done.exit_code == 2
    assert str(tmp_path / "file") in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_child_and_tells_what_is_known(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals
):
    """None passes, all four fail, fewer of them hang."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from gemma4_turbo.__main__ import main\n"
        "from gemma4_turbo.cli import bisect\n"
        "from tests.cpu.cli.test_bisect import record\n"
        f"bisect.catalogue = lambda: tuple(record(name) for name in {NAMES})\n"
        "main()\n"
    )
    code = python(
        f"count = sum(map(on, {NAMES}))\n"
        "count in (0, 4) and sys.exit(count)\n"
        "import time; open(sys.argv[1], 'w').write(f'{os.getpid()}.'); time.sleep(60)"
    )
    path = tmp_path / "pid"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "bisect", "--", *code, str(path)],
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith(".")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == "Interrupted; the smallest set that failed: alpha, beta, gamma, delta\n"
    assert "Traceback" not in stderr
    assert is_gone(int(path.read_text()[:-1]))
