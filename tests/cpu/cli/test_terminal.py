"""What comes from data is printed as it is, whatever the terminal's markup makes of brackets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from gemma4_turbo.catalogue import CATALOGUE, DEFECTS, PATCHES, by_name
from gemma4_turbo.cli import demo, doctor, report, trials, verify
from gemma4_turbo.engine import run, states
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.engine.counters import live_processes
from gemma4_turbo.engine.states import PatchStatus
from gemma4_turbo.engine.switches import STATE_DIR
from tests.cpu.conftest import REPOSITORY

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
    """As state, cause and name, and in the title."""
    rows = [PatchStatus("router", text, text, (), 1)]
    other = {"name": text, "state": "active", "reason": "", "engaged": 3, "captured": text}
    assert printed(report.table([*rows, other], text)).count(text) == 5


@pytest.mark.parametrize("text", TEXTS)
def test_the_table_of_checks(text: str) -> None:
    """Of ``verify`` and ``demo``: what differs is told in full, the rest on demand."""
    checks = [Check(text, text, text, 1, 0, text, passed) for passed in (True, False)]
    assert printed(verify.check_table(checks)).count(text) == 4
    assert printed(verify.check_table(checks, everything=True)).count(text) == 7


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
    monkeypatch.setattr(doctor, "examine", lambda imported: iter(found.items()))
    assert doctor.run(as_json=False) == 2
    shown = capsys.readouterr().out
    assert shown.count(text) == 9
    assert shown.splitlines()[-1] == "1 failed"


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
    assert demo.on_gpu(Console(), 6, 0) == 1
    assert capsys.readouterr().out.count(text) == 7


ROWS = [
    *(PatchStatus(patch.name, "active", "installed", (), 0) for patch in CATALOGUE[:30]),
    PatchStatus(
        CATALOGUE[30].name, "active", "installed; some calls take stock's path: why", (), 2
    ),
    *(PatchStatus(patch.name, "off", "GEMMA4_TURBO_X=0", (), 0) for patch in CATALOGUE[31:39]),
    PatchStatus(CATALOGUE[39].name, "drifted", "source of " + "a.long:name, " * 12, (), 0),
]


def terminal(width: int) -> Console:
    """One of that width."""
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def lines_of(console: Console) -> list[str]:
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def test_eighty_columns() -> None:
    """No word is broken, no line is longer, a patch without a long cause is one line."""
    console = terminal(80)
    report.show(console, report.table(ROWS))
    lines = lines_of(console)
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    for row in ROWS:
        assert words.count(row.name) == 1
    assert words.count("a.long:name,") == 12
    assert "GEMMA4_TURBO_ROUTER" not in words
    assert len(lines) <= len(ROWS) + 4 + 3  # the headings, and what follows of the long cause


def test_a_cause_that_patches_share_is_told_once() -> None:
    """And what is no cause at all is not told."""
    console = terminal(200)
    report.show(console, report.table(ROWS))
    told = "\n".join(lines_of(console))
    assert told.count("GEMMA4_TURBO_X=0") == 1
    assert "installed" not in told
    assert "2 calls; some calls take stock's path: why" in told
    assert told.count("not exercised here") == 30


def test_a_pipe_has_a_line_a_patch() -> None:
    """However long; the note on other processes once."""
    console = Console(file=io.StringIO())
    note = "; only this process is counted: the folder is a file"
    report.show(console, report.table([row._replace(reason=row.reason + note) for row in ROWS]))
    lines = lines_of(console)
    assert len(lines) == len(ROWS) + 4 + 1
    assert "".join(lines).count("the folder is a file") == 1


def test_upstreamed_patches_are_a_line_each() -> None:
    """What SGLang has, and since when; that it has it is told once. One that says something else is apart."""
    has = "SGLang 0.5.23 has it itself: "
    names = {"router": "gemma4_fused_routing", "mtp_metadata": "needs_forward_metadata_init"}
    rows = [
        *(PatchStatus(n, "upstreamed", f"{has}{w}, since 0.5.14", (), 0) for n, w in names.items()),
        PatchStatus("qkv_norm", "upstreamed", "another: reason", (), 0),
    ]
    console = terminal(80)
    report.show(console, report.table(rows))
    assert lines_of(console) == [
        "upstreamed (2): SGLang 0.5.23 has it itself",
        "  router            bitwise    gemma4_fused_routing, since 0.5.14",
        "  mtp_metadata      behaviour  needs_forward_metadata_init, since 0.5.14",
        "upstreamed (1)",
        "  qkv_norm          bitwise    another: reason",
    ]


def test_patches_that_a_run_does_not_reach_are_a_list() -> None:
    """With the cause once; one that says why it declined has its row."""
    reason = "installed; some calls take stock's path: no [such] layer"
    declined = PatchStatus("kv_scales", "active", reason, (), 0)
    console = terminal(80)
    rows = [*ROWS[:30], declined, ROWS[0]._replace(name="swa_ratio", engaged=1)]
    report.show(console, report.table(rows, idle="no GPU"))
    lines = lines_of(console)
    assert max(map(len, lines)) <= 80
    assert lines[:3] == [
        "active (1)",
        "  swa_ratio         behaviour  1 call",
        "active, not exercised here (31): no GPU",
    ]
    listed = " ".join(line.strip() for line in lines[3:-1])
    assert listed == ", ".join(row.name for row in ROWS[:30])
    assert lines[-1] == "  kv_scales         behaviour  no [such] layer"


ALL = len(CATALOGUE)
WAITING = [
    {"name": patch.name, "state": "waiting", "reason": run.WAITING, "engaged": 0, "captured": 0}
    for patch in CATALOGUE
]


def doctored(monkeypatch: pytest.MonkeyPatch, width: int | None = 80, **options: bool) -> list[str]:
    """What `doctor` says of the other processes, on a terminal of that width or in a pipe."""
    console = Console(file=io.StringIO()) if width is None else terminal(width)
    monkeypatch.setattr(doctor, "Console", lambda: console)
    doctor.run(as_json=False, **options)
    return lines_of(console)[:-1]  # without the verdict on this process


def running(monkeypatch: pytest.MonkeyPatch, *processes: list[dict[str, Any]]) -> dict[str, Any]:
    """Nothing to say but that these processes run, each with its patches."""
    servers = [
        {"pid": 1234 + number, "command": "sglang::scheduler", "patches": patches}
        for number, patches in enumerate(processes)
    ]
    found: dict[str, Any] = {"patches": [], "problems": [], "servers": servers}
    monkeypatch.setattr(doctor, "examine", lambda imported: iter(found.items()))
    return found


def test_a_process_whose_patches_are_alike_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has its own; a reason that is longer than the terminal is broken between words."""
    reason = "switched off [by/hand]: " + "a.long:name, " * 8
    failed = [{**one, "state": "failed", "reason": reason.strip()} for one in WAITING]
    installed = [{**one, "state": "active", "reason": "installed"} for one in WAITING]
    bare = [{**one, "state": "off", "reason": ""} for one in WAITING[:2]]
    running(monkeypatch, WAITING, WAITING, failed, installed, bare)
    lines = doctored(monkeypatch)
    assert max(map(len, lines)) <= 80
    told = "Running: pid {}: sglang::scheduler: {}"
    unbroken = [
        told.format(1234, f"waiting for SGLang's import, {ALL} patches"),
        told.format(1235, f"waiting for SGLang's import, {ALL} patches"),
        told.format(1236, f"failed: {reason.strip()}, {ALL} patches"),
        told.format(1237, f"active, not exercised here, {ALL} patches"),
        told.format(1238, "off, 2 patches"),
    ]
    assert doctored(monkeypatch, None) == unbroken
    assert " ".join(line.strip() for line in lines) == " ".join(unbroken)
    assert lines[:2] == unbroken[:2]


def test_what_deviates_in_a_process_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """By state, by reason, or because it has counted calls."""
    patches = [
        {**WAITING[0], "state": "active", "reason": "installed", "engaged": 3, "captured": 2},
        {**WAITING[1], "reason": "another [reason]"},
        {**WAITING[2], "engaged": 1},
        {**WAITING[3], "state": "drifted", "reason": "source"},
        *WAITING[4:],
    ]
    running(monkeypatch, patches)
    names = [f"{patch.name:<18}{patch.numerics:<11}" for patch in CATALOGUE[:4]]
    lines = doctored(monkeypatch)
    assert lines == [
        f"Running: pid 1234: sglang::scheduler: waiting for SGLang's import, {ALL - 4} of {ALL}",
        "  patches",
        "active (1)",
        f"  {names[0]}3 calls (2 into CUDA graphs)",
        "waiting (2)",
        f"  {names[1]}another [reason]",
        f"  {names[2]}SGLang has not imported the target yet",
        "drifted (1)",
        f"  {names[3]}source",
    ]


def test_a_process_with_nothing_in_common_has_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than half alike; or most of them refused by strict mode, where names matter."""
    half = [{**one, "engaged": 1 if index < ALL / 2 else 0} for index, one in enumerate(WAITING)]
    refused = [*({**one, "state": "drifted", "reason": "x"} for one in WAITING[1:]), WAITING[0]]
    running(monkeypatch, half, refused, WAITING[:1], [])
    lines = doctored(monkeypatch, None)
    for patch in CATALOGUE:
        assert sum(line.startswith(f"  {patch.name} ") for line in lines) == 2 + (
            patch is CATALOGUE[0]
        )
    titles = [f"Running: pid {1234 + number}: sglang::scheduler" for number in range(4)]
    assert [line for line in lines if line.startswith("Running")] == titles


def test_all_of_a_process_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row each with ``--all``; the records as they are with ``--json``."""
    found = running(monkeypatch, WAITING)
    lines = doctored(monkeypatch, None, everything=True)
    assert lines[0] == "Running: pid 1234: sglang::scheduler"
    for patch in CATALOGUE:
        assert sum(line.startswith(f"  {patch.name} ") for line in lines) == 1
    servers = [dict(server) for server in found["servers"]]
    doctor.run(as_json=True)
    assert json.loads(capsys.readouterr().out)["servers"] == servers


# Waits for SGLang, but for what a server process sets first; then until it is told to end.
WAITS = """
import sys
from gemma4_turbo.instance import ENGINE
ENGINE.runs["swa_ratio"].set("active", "installed")
ENGINE.runs["swa_ratio"].engaged(False)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_live_process_that_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As its engine publishes it: read from the state folder."""
    monkeypatch.setenv(STATE_DIR, str(tmp_path / "state"))
    with subprocess.Popen(
        [sys.executable, "-c", WAITS],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (other,) = [one for one in live_processes() if one.pid == process.pid]
        running(monkeypatch, other.patches)
        lines = doctored(monkeypatch, None)
        process.communicate()
    row = f"{'swa_ratio':<18}{by_name('swa_ratio').numerics:<11}1 call"
    told = f"waiting for SGLang's import, {ALL - 1} of {ALL} patches"
    assert lines == [f"Running: pid 1234: sglang::scheduler: {told}", "active (1)", f"  {row}"]


def test_the_verdict_is_in_the_order_of_the_groups() -> None:
    assert report.verdict(ROWS) == "31 active, 8 off, 1 drifted"
    assert report.verdict([]) == "no patch"


ABSENT = [
    PatchStatus(patch.name, "upstreamed", f"no {patch.name} here", (), 0) for patch in DEFECTS
]
LOOKED = [*(PatchStatus(patch.name, "active", "installed", (), 0) for patch in PATCHES), *ABSENT]
NAMES = [row.name for row in ABSENT]


def listed(rows: Any, **options: bool) -> list[str]:
    """The lines of a table in a pipe."""
    console = Console(file=io.StringIO())
    report.show(console, report.table(rows, **options))
    return lines_of(console)


def test_defects_that_are_not_found_are_one_line() -> None:
    """The last one of the table; the counts agree with it."""
    lines = listed(LOOKED)
    assert lines[0] == f"active ({len(PATCHES)})"
    assert len(lines) == 1 + len(PATCHES) + 1
    assert lines[-1] == f"3 defects looked for: none found ({', '.join(NAMES)})"
    assert report.closing(LOOKED) == f"{len(PATCHES)} active; 3 defects looked for, none found"
    assert report.closing(ABSENT) == "3 defects looked for, none found"
    assert report.closing(LOOKED[:-2]) == f"{len(PATCHES)} active; 1 defect looked for, none found"
    assert report.closing(ROWS) == report.verdict(ROWS)
    assert report.closing([]) == report.verdict([])
    records = [row._asdict() for row in LOOKED]
    assert (listed(records), report.closing(records)) == (lines, report.closing(LOOKED))


def test_all_there_is_of_a_defect_that_is_not_found() -> None:
    """Why, what it would mend, its switch."""
    lines = listed(LOOKED, everything=True)
    start = lines.index("3 defects looked for: none found")
    assert len(lines[start:]) == 1 + 3 * len(DEFECTS)
    for patch, (row, summary, switch) in zip(
        DEFECTS, zip(*(lines[start + part :: 3] for part in (1, 2, 3)), strict=True), strict=True
    ):
        assert row == f"  {patch.name:<18}behaviour  no {patch.name} here"
        assert summary.strip() == patch.summary
        assert switch.strip().startswith(f"{patch.env}=0 or 1")


@pytest.mark.parametrize("state", [state for state in states.STATES if state != "upstreamed"])
def test_a_defect_that_has_something_to_say_has_a_row(state: str) -> None:
    """Found, failed, switched off, not there to be looked for: as any other patch."""
    said = ABSENT[0]._replace(state=state, reason="why")
    rows = [LOOKED[0]._replace(state="drifted", reason="source"), said, *ABSENT[1:]]
    if state == "drifted":
        rows = rows[1:]
    lines = listed(rows)
    (row,) = [line for line in lines if line.startswith(f"  {said.name} ")]
    assert row.endswith("why")
    assert f"{state} (1)" in lines
    assert lines[-1] == f"2 defects looked for: none found ({', '.join(NAMES[1:])})"
    counted, _, looked = report.closing(rows).partition("; ")
    assert f"1 {state}" in counted
    assert looked == "2 defects looked for, none found"


def test_a_defect_that_was_met_in_another_process_has_a_row() -> None:
    """Calls were mended there, whatever the state of this one; so has one that is no defect."""
    met = ABSENT[0]._replace(engaged=2)
    router = LOOKED[0]._replace(state="upstreamed", reason="SGLang has it")
    lines = listed([router, met, *ABSENT[1:]])
    assert lines[0] == "upstreamed (2)"
    assert [line.split()[0] for line in lines[1:3]] == ["router", met.name]
    assert lines[3:] == [f"2 defects looked for: none found ({', '.join(NAMES[1:])})"]


def test_verify_tells_same_bits_from_within_bounds() -> None:
    """What differs within bounds is not called equal, and nothing compared is no result."""
    checks = [
        Check("router", "one", "stock", 10, 0, "not one bit", True),
        Check("qkv_proj", "two", "stock", 10, 3, "2 ulp", True),
        Check("moe_configs", "no table is shipped yet", "-", 0, 0, "-", True),
    ]
    lines = printed(verify.check_table(checks)).splitlines()
    assert lines == [
        "same bits (1)",
        "  router            1 comparison, 10 values",
        "within bounds (1)",
        "  qkv_proj          1 comparison, bits of 3 of 10 values differ (allowed: 2 ulp)",
        "not exercised here (1)",
        "  moe_configs       no table is shipped yet",
    ]
    assert verify.verdict(checks[:1]) == "verify: 1 comparison, all with the same bits"
    assert verify.verdict(checks) == (
        "verify: 2 comparisons, all within bounds, 1 of them with the same bits"
    )
    bad = [*checks, checks[0]._replace(differing=1, passed=False)]
    assert verify.verdict(bad) == "verify: 3 comparisons, 1 DIFFERENT: router"
    assert verify.verdict(checks[2:]) == "verify: nothing compared"


def test_a_comparison_that_raises_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patches after it are compared all the same."""
    fine = Check("fine", "x", "stock", 1, 0, "not one bit", True)

    def broken(device: str) -> list[Check]:
        raise RuntimeError("no memory")

    runs = {
        "broken": SimpleNamespace(swaps=[1], patch=CATALOGUE[0], verify=broken),
        "fine": SimpleNamespace(swaps=[1], patch=CATALOGUE[1], verify=lambda device: [fine]),
    }
    monkeypatch.setattr(verify, "ENGINE", SimpleNamespace(runs=runs))
    told: list[str] = []
    first, second = verify.check_all("cpu", told.append)
    assert (first.passed, first.allowed) == (False, "RuntimeError: no memory")
    assert second is fine
    assert told == [
        f"comparing {p.name} with stock ({i} of 2)" for i, p in enumerate(CATALOGUE[:2], 1)
    ]


@pytest.mark.filterwarnings("error")
def test_triton_interpreter_warns_of_nothing_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products of infinities are asked for; other modules' warnings are not held back."""

    def verify_in(module: str) -> None:
        def drawn(device: str) -> list[Check]:
            warnings.warn_explicit("overflow in exp", RuntimeWarning, "x.py", 1, module)
            return []

        runs = {"one": SimpleNamespace(swaps=[1], patch=CATALOGUE[0], verify=drawn)}
        monkeypatch.setattr(verify, "ENGINE", SimpleNamespace(runs=runs))

    verify_in("triton.runtime.interpreter")
    assert verify.check_all("cpu") == []
    verify_in("numpy")
    (told,) = verify.check_all("cpu")
    assert told.allowed == "RuntimeWarning: overflow in exp"


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
