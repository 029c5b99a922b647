"""What comes from data is printed as it is, whatever the terminal's markup makes of brackets."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from gemma4_turbo.cli import demo, doctor, report, trials, verify
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.engine.states import PatchStatus

TEXTS = (
    "gcc failed [/usr/bin/ld: cannot find -lcuda]",
    "[red]",
    "[/]",
    "weight must be [multiple of 16, multiple of 64]",
    "[link=x]here",
    "back\\",
    "\\[red]",
    ":warning: :key:",
)


def printed(*renderables: Any) -> str:
    """As a wide terminal shows them."""
    console = Console(file=io.StringIO(), width=400)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("text", TEXTS)
def test_the_table_of_patches(text: str) -> None:
    """In every cell that holds text, and in the title."""
    rows = [PatchStatus("router", text, text, (), 1)]
    other = {"name": text, "state": "active", "reason": "", "engaged": 0, "captured": text}
    assert printed(report.table([*rows, other], text)).count(text) == 5


@pytest.mark.parametrize("text", TEXTS)
def test_the_table_of_checks(text: str) -> None:
    """Of ``verify`` and ``demo``."""
    checks = [Check(text, text, text, 1, 0, text, passed) for passed in (True, False)]
    shown = printed(verify.check_table(checks))
    assert shown.count(text) == 8
    assert "equal" in shown
    assert "DIFFERENT" in shown


@pytest.mark.parametrize("text", TEXTS)
def test_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """The exit status is that of what it found."""
    patch = {"name": "router", "state": "failed", "reason": text, "engaged": 0}
    found = {
        "versions": {text: text},
        "device": text,
        "patches": [patch],
        "problems": [text],
        "notes": [text],
        "bootstrap": [text],
        "state_folder": None,
        "servers": [{"pid": 1, "command": text, "patches": [patch]}],
    }
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(doctor, "examine", lambda: found)
    assert doctor.run(as_json=False) == 2
    assert capsys.readouterr().out.count(text) == 9


@pytest.mark.parametrize("text", TEXTS)
def test_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """On a GPU: the server's command line, the device, the patches."""
    row = PatchStatus(text, "active", text, (), 0)
    process = SimpleNamespace(pid=1, command=text, patches=[row._asdict()])
    monkeypatch.setattr(demo, "_server", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(demo, "_wait_until_healthy", lambda *args: None)
    monkeypatch.setattr(demo, "_send_requests", lambda port: (10, 1.0))
    monkeypatch.setattr(demo, "ENGINE", SimpleNamespace(status=lambda: [row]))
    monkeypatch.setattr(demo, "descendants", lambda: [process])
    monkeypatch.setattr(report, "device", lambda: text)
    assert demo.on_gpu(Console(width=300), 6, 0) == 1
    assert capsys.readouterr().out.count(text) == 7


@pytest.mark.parametrize("text", TEXTS)
def test_bisect_says(text: str) -> None:
    """A failing run's last lines come from the user's command."""
    console = Console(file=io.StringIO(), width=20)
    trials.say(console, f"  stderr: {text}", "red")
    assert console.file.getvalue() == f"  stderr: {text}\n"  # type: ignore[attr-defined]


def test_half_characters() -> None:
    """An environment holds bytes that no encoding takes: they are printed as an escape."""
    assert report.plain("GEMMA4_TURBO_\udcff").plain == "GEMMA4_TURBO_\\udcff"


def test_nothing_else_is_printed_with_markup() -> None:
    """In the package no text that is put together goes to the console but through `plain`."""
    for path in Path(report.__file__).parent.rglob("*.py"):
        for call in ("console.print(f", "add_row(f", "status(f", "markup.escape"):
            assert call not in path.read_text(), (path, call)
