"""What every command has in common: help, exit codes and JSON where it cannot do its work."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from gemma4_turbo.__main__ import app
from gemma4_turbo.cli import bisect, doctor, modules, verify

WRONG = "GEMMA4_TURBO_PROFILE='quatsch' is not one of all, exact"
COMMANDS = {  # arguments, and where the command is
    "verify": ([], "verify.run"),
    "tune": ([], "tune.run"),
    "bisect": (["--", "true"], "bisect.search"),
    "demo": ([], "demo.run"),
    "serve": (["--", "--port", "1"], "serve.run"),
    "record": (["a.whl"], "releases.record"),
    "release": (["a.whl"], "releases.release"),
}
NAMES = [*COMMANDS, "doctor", "sitecustomize"]
FOUND: dict[str, Any] = {
    **{key: [] for key in ("patches", "servers", "notes", "problems", "bootstrap", "obstacles")},
    **{"versions": {}, "device": None, "state_folder": None},
}


def call(*arguments: str, **variables: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env=variables)


# -- exit codes and JSON --------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_variable_is_told_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    arguments, where = COMMANDS[name]
    module, _, function = where.partition(".")
    implementation = importlib.import_module(f"gemma4_turbo.cli.{module}")
    monkeypatch.setattr(implementation, function, lambda *_: pytest.fail("it was run"))
    done = call(name, *arguments, GEMMA4_TURBO_PROFILE="quatsch")
    assert (done.exit_code, done.stderr) == (2, f"gemma4_turbo: {WRONG}\n")
    if "--json" in call(name, "-h").output:
        done = call(name, "--json", *arguments, GEMMA4_TURBO_PROFILE="quatsch")
        assert (done.exit_code, json.loads(done.stdout)) == (2, {"error": WRONG})


def test_the_folder_is_printed_all_the_same() -> None:
    """Else PYTHONPATH=$(gemma4-turbo sitecustomize) would start a stock server."""
    done = call("sitecustomize", GEMMA4_TURBO_PROFILE="quatsch")
    assert (done.exit_code, done.stdout) == (0, call("sitecustomize").stdout)


@pytest.mark.parametrize(
    ("found", "status", "error"),
    [
        ({"problems": ["a", "b"]}, 2, "a; b"),
        ({"obstacles": ["c"], "problems": ["a"]}, 3, "c"),
        ({}, 0, None),
    ],
)
def test_doctor_has_an_error_where_it_fails(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], status: int, error: str | None
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda imported: iter({**FOUND, **found}.items()))
    done = call("doctor", "--json")
    assert (done.exit_code, json.loads(done.stdout).get("error")) == (status, error)


def test_verify_has_an_error_where_nothing_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "prepare_device", lambda: "cpu")
    monkeypatch.setattr(verify, "require_targets", lambda progress: None)
    monkeypatch.setattr(verify.ENGINE, "bootstrap", lambda: None)
    monkeypatch.setattr(verify, "check_all", lambda device, begin: [])
    done = call("verify", "--json")
    assert (done.exit_code, json.loads(done.stdout)["error"]) == (3, "verify: nothing compared")


@pytest.mark.parametrize("arguments", [("doctor", "--nosuch", "--json"), ("--json", "nosuch")])
def test_a_wrong_option_is_json_too(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert "o such" in json.loads(done.stdout)["error"]
    assert "Usage" in done.stderr


def test_a_word_of_the_command_is_no_option_of_ours() -> None:
    done = call("bisect", "--nosuch", "--", "echo", "--json")
    assert (done.exit_code, done.stdout) == (2, "")


def test_what_is_missing_can_be_had() -> None:
    """There is no package of that name to install."""
    assert "gemma4-turbo[" not in modules.NOT_INSTALLED
    assert "'.[sglang]'" in modules.NOT_INSTALLED
    assert "whl[sglang]" in modules.NOT_INSTALLED


# -- a closed pipe --------------------------------------------------------------------------------

DOCTOR = """
import sys
from gemma4_turbo.__main__ import main
from gemma4_turbo.cli import doctor
doctor.examine = lambda imported: iter({found!r}.items())
sys.argv = ["gemma4-turbo", "doctor", *{options!r}]
main()
"""


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe_is_no_verdict(options: list[str]) -> None:
    """``doctor | head -2``: 1 would say that a patch has drifted."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", DOCTOR.format(found=FOUND, options=options)],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_pipe_is_no_mistake_of_bisect(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(patches: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(bisect, "_decide", closed)
    assert call("bisect", "--", "true").exit_code == 141


# -- help -----------------------------------------------------------------------------------------


def help_of(*command: str) -> list[str]:
    done = call(*command, "-h", COLUMNS="80", TERM="dumb")
    assert done.exit_code == 0
    return [line.rstrip() for line in done.output.splitlines()]


@pytest.mark.parametrize("name", [None, *NAMES])
def test_help_is_wrapped_once(name: str | None) -> None:
    """At 80 columns a line ends where the next word has no room, or the paragraph ends."""
    lines = help_of(*([name] if name else []))
    end = next(number for number, line in enumerate(lines) if line.startswith("╭"))
    for line, following in itertools.pairwise(lines[:end]):
        assert len(line) <= 80
        if line and following:
            assert len(f"{line} {following.split()[0]}") > 79, line


@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_flag_has_no_type(name: str | None) -> None:
    told = "\n".join(help_of(*([name] if name else [])))
    assert "--help" in told
    assert not re.search(r"<bool>|BOOLEAN", told)


def test_bisect_shows_where_the_command_begins() -> None:
    assert re.search(r"Usage: .* bisect \[OPTIONS\] -- .*COMMAND", "\n".join(help_of("bisect")))


def test_completion_is_of_the_script() -> None:
    """A shell completes ``gemma4-turbo``; ``_PYTHON _M GEMMA4_TURBO_COMPLETE=`` would be no variable."""
    command = [sys.executable, "-m", "gemma4_turbo", "--show-completion", "bash"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "\n                   _GEMMA4_TURBO_COMPLETE=complete_bash $1 " in told
    assert "complete -o default -F _gemma4_turbo_completion gemma4-turbo" in told
    told = CliRunner().invoke(app, ["doctor", "-h"], prog_name="python -m gemma4_turbo").output
    assert "python -m gemma4_turbo doctor" in told


def test_without_typer_the_machine_lacks_something() -> None:
    code = "import sys; sys.modules['typer'] = None; import runpy; " + (
        "runpy.run_module('gemma4_turbo', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"] in done.stderr
    assert "Traceback" not in done.stderr
