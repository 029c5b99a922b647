"""bench/counters.py, as far as a machine without a GPU can run it: its cases, its calls, what it reads of ncu."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from bench import counters as bench
from bench import feed_forward_few, mlp_few
from gemma4_turbo.cli.tuning import linear
from gemma4_turbo.kernels import feed_forward_few as feed_forward_kernel
from gemma4_turbo.kernels import mlp_few as mlp_kernel
from gemma4_turbo.kernels.dataflow import Product
from gemma4_turbo.kernels.skinny_gemm import INTERPRETED
from gemma4_turbo.models.geometry import GEOMETRIES

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")

TIME, MEMORY = "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"
REGISTERS = "launch__registers_per_thread"
REASONS = ("long_scoreboard", "selected", "wait", "barrier", "not_selected")
STALLS = {
    f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio" for reason in REASONS
}
NOT_ISSUED = "smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"
RANGE = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
DENIED = (
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance "
    "Counters on the target device 0.\n"
)
FAILED = "==ERROR== The application returned an error code (1).\n"
NONE = "==WARNING== No kernels were profiled.\n"

# -- cases ------------------------------------------------------------------------------------------


def call(*arguments: str) -> Result:
    """The command."""
    app = typer.Typer()
    app.command()(bench.main)
    return CliRunner().invoke(app, arguments)


def flat(text: str) -> str:
    """Without the box that typer draws."""
    return " ".join(text.replace("│", " ").split())


def test_cases_without_arguments_exist():
    cases = bench.CASES.split(",")
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert callable(bench.prepared(case))
    assert {case.split("/")[0] for case in cases} >= {form.split("/")[0] for form in bench.FORMS}


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("sliding", "must be one of sliding_4096,"),
        ("", "must be one of sliding_4096,"),
        ("prodct/e4b/qkv/1", "product/<model>/<which>/<rows>"),
        ("product/e4b/1", "must be product/<model>/<which>/<rows>"),
        ("product/e4b/qkv/1/2", "must be product/<model>/<which>/<rows>"),
        ("product/e5b/qkv/1", "model must be one of 26b-a4b, 31b, 12b, e4b, e2b, got 'e5b'"),
        ("product/e4b/up/1", "which must be one of qkv, o, gate_up, down, got 'up'"),
        ("product/e4b/qkv/65", "rows must be a whole number from 1 to 64, got '65'"),
        ("product/e4b/qkv/0", "rows must be a whole number from 1 to 64, got '0'"),
        ("product/e4b/qkv/²", "rows must be a whole number from 1 to 64, got '²'"),
        ("product/e4b/qkv/", "rows must be a whole number from 1 to 64, got ''"),
        ("feed_forward/e4b/1", "model must be one of 26b-a4b, got 'e4b'"),
        ("feed_forward/26b-a4b/3", "rows must be a whole number from 1 to 2, got '3'"),
        ("mlp/26b-a4b/1", "model must be one of 31b, 12b, e4b, e2b, got '26b-a4b'"),
        ("mlp/e4b/-1", "rows must be a whole number from 1 to 2, got '-1'"),
        ("decode/e4b/both/1", "model and kind must be one of 26b-a4b/sliding,"),
        ("decode/e4b/full/many", "batch must be a whole number from 1 to 1024, got 'many'"),
    ],
)
def test_a_case_that_does_not_exist_is_told(case: str, why: str):
    with pytest.raises(typer.BadParameter) as caught:
        bench.prepared(case)
    assert caught.value.param_hint == "cases"
    assert caught.value.message.startswith(f"{case!r}: ")
    assert why in caught.value.message


def test_a_bad_name_ends_before_ncu_is_looked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    result = call("mlp/e4b/1", "mlp/e4b/3")
    assert result.exit_code == 2
    assert "cases: 'mlp/e4b/3': rows must be a whole number" in flat(result.output)


@pytest.mark.parametrize("model", GEOMETRIES)
def test_every_product_is_known_by_tune(model: str):
    roles = {layer.role.split(",")[0] for layer in linear.layers(GEOMETRIES[model])}
    assert set(bench.PRODUCTS.values()) <= roles


def test_the_feed_forward_is_that_of_the_model_with_experts():
    (g,) = (g for g in GEOMETRIES.values() if g.experts)
    sizes = feed_forward_few
    found = (sizes.HIDDEN, sizes.WIDTH, sizes.NARROW, sizes.EXPERTS, sizes.TOPK)
    assert found == (g.hidden, g.mlp, g.expert_width, g.experts, g.topk)


# -- calls ------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and cuts that Triton's interpreter can run."""
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    e4b = GEOMETRIES["e4b"]._replace(
        hidden=128, mlp=64, heads=1, kv_heads_sliding=1, kv_heads_full=1
    )
    monkeypatch.setitem(GEOMETRIES, "e4b", e4b._replace(double_wide_mlp=True))
    cut = mlp_kernel.Tiles(Product(2, 1, 64), Product(2, 1, 64))
    for name, value in {"DEVICE": "cpu", "CALLS": 1, "DEFAULT": cut}.items():
        monkeypatch.setattr(mlp_few, name, value)
    changes = {
        "DEVICE": "cpu", "HIDDEN": 256, "WIDTH": 64, "NARROW": 16, "EXPERTS": 4, "TOPK": 2, "CALLS": 1,
        "DEFAULT": feed_forward_kernel.Tiles(*(Product(rows, 1, 64) for rows in (1, 2, 2, 2, 2))),
    }  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(feed_forward_few, name, value)


def close(found: Any, expected: Any) -> None:
    """Within a few roundings of bf16."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-6, atol=2**-6)


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("which", "shapes"),
    [
        ("qkv", ["768x128", "1536x128"]),
        ("o", ["128x256", "128x512"]),
        ("gate_up", ["128x128", "256x128"]),
        ("down", ["128x64", "128x128"]),
    ],
)
def test_products(which: str, shapes: list[str]):
    """Twice, as they are counted: a split leaves counters behind."""
    calls = bench.prepared(f"product/e4b/{which}/2")()
    assert list(calls) == [f"{ours} {shape}" for shape in shapes for ours in ("stock", "patched")]
    for shape in shapes:
        expected: Any = calls[f"stock {shape}"]()
        assert expected.shape[0] == 2
        for _ in range(2):
            close(calls[f"patched {shape}"](), expected)


@interpreted
@pytest.mark.usefixtures("small")
def test_a_products_cut_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    cut = bench.skinny_gemm.cut

    def asked(weight: torch.Tensor, epilogue: Any, rows: int) -> Any:
        seen.append(rows)
        return cut(weight, epilogue, rows)

    monkeypatch.setattr(bench.skinny_gemm, "cut", asked)
    for rows in (16, 17, 33):
        bench.prepared(f"product/e4b/down/{rows}")()
    assert seen == [16, 16, 32, 32, 64, 64]


@interpreted
@pytest.mark.usefixtures("small")
def test_mlp():
    calls = bench.prepared("mlp/e4b/2")()
    assert list(calls) == ["apart 64", "at_once 64", "apart 128", "at_once 128"]
    for width in (64, 128):
        expected: Any = calls[f"apart {width}"]()
        assert expected.shape == (2, 128)
        for _ in range(2):
            close(calls[f"at_once {width}"](), expected)


@interpreted
@pytest.mark.usefixtures("small")
def test_feed_forward():
    calls = bench.prepared("feed_forward/26b-a4b/2")()
    assert list(calls) == ["apart", "at_once"]
    expected: Any = calls["apart"]()
    for _ in range(2):
        found: Any = calls["at_once"]()
        close(found.mlp_output, expected[0])
        close(found.experts_output, expected[1])


def test_each_call_is_made_once_before_it_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And a case that cannot run is no reason to leave the next one out."""
    made: list[str] = []
    variants = ("stock", "patched")

    def prepared(case: str) -> Callable[[], bench.Calls]:
        if case == "b":
            raise RuntimeError("out of memory\nand more")
        return lambda: {name: partial(made.append, f"{case} {name}") for name in variants}

    def named(name: str) -> Any:
        made.append(f"[{name}]")
        return nullcontext()

    monkeypatch.setattr(bench, "prepared", prepared)
    monkeypatch.setattr(bench, "counted", nullcontext)
    monkeypatch.setattr(torch.cuda.nvtx, "range", named)
    with pytest.raises(typer.Exit) as caught:
        bench.work(["a", "b", "c"])
    assert caught.value.exit_code == 1
    assert made == [
        word
        for case in "ac"
        for name in variants
        for word in (f"{case} {name}", f"[{case}:{name}]", f"{case} {name}")
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "counters.py: b: RuntimeError: out of memory"
    bench.work(["a"])


# -- what ncu prints --------------------------------------------------------------------------------


def printed(values: dict[str, list[str]] | None = None) -> str:
    """Of ncu, with its own lines and those of the process inside it: two launches of a case."""
    metrics = {
        TIME: ["5,120", "7,040"],
        MEMORY: ["71.25", "83.5"],
        REGISTERS: ["128", "96"],
        **{name: ["0.5", "0.25"] for name in sorted(STALLS)},
        NOT_ISSUED: ["90", "90"],
        "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ["12.5", "1"],
        "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ["1.0", "1.0"],
        "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ["0.25", "2.75"],
        **(values or {}),
    }
    fields = ("ID", "Process ID", "Process Name", RANGE, "Kernel Name")
    made = io.StringIO()
    writer = csv.writer(made, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow([*fields, *metrics])
    writer.writerow(["", "", "", "", "", "ns", "%", *[""] * (len(metrics) - 2)])
    for i, kernel in enumerate(("_skinny_gemm_kernel", "gemm<float, 128>")):
        place = '7  "<default domain>:mlp/e4b/1:apart 10240:none:none:none:none:none:none"  '
        writer.writerow([str(i), "7", "python", place, kernel, *(v[i] for v in metrics.values())])
    return (
        "==PROF== Connected to process 7 (python)\n"
        "something that the process says\n"
        '==PROF== Profiling "_skinny_gemm_kernel" - 0: 0%....50%....100% - 21 passes\n'
        "==PROF== Disconnected from process 7\n"
        f"{made.getvalue()}"
    )


def cells(text: str) -> dict[str, list[str]]:
    """The table of what ncu printed, by column."""
    raw = bench.read(text)
    assert raw is not None
    return {
        str(column.header): [str(cell) for cell in column.cells]
        for column in bench.table_of(raw).columns
    }


def test_each_kernel_is_a_row():
    table = cells(printed())
    assert table["range"] == ["mlp/e4b/1:apart 10240"] * 2
    assert table["kernel"] == ["_skinny_gemm_kernel", "gemm<float, 128>"]
    assert table["ns"] == ["5120", "7040"]
    assert table["DRAM %"] == ["71.25", "83.5"]
    assert table["L2 %"] == ["", ""]  # not among what was printed


def test_a_warp_that_was_issued_waits_for_nothing():
    assert cells(printed())["waits for"] == [
        "long_scoreboard 12.5, not_selected 0.5, wait 0.5",
        "barrier 2.8, long_scoreboard 1.0, not_selected 0.2",
    ]


def test_a_reason_without_a_value_is_none():
    name = "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
    assert cells(printed({name: ["n/a", "n/a"]}))["waits for"] == [
        "long_scoreboard 12.5, not_selected 0.5, wait 0.5",
        "long_scoreboard 1.0, not_selected 0.2, wait 0.2",
    ]


@pytest.mark.parametrize("text", ["", DENIED, printed().partition('"0"')[0]])
def test_nothing_can_be_read_where_no_kernel_was_counted(text: str):
    assert bench.read(text) is None


def test_nothing_was_read_where_no_counter_has_a_value():
    """Registers are known without access."""
    assert bench.read(printed({TIME: ["n/a", "n/a"], MEMORY: ["", "nan"]})) is None
    assert bench.read(printed({TIME: ["n/a", "n/a"]})) is not None


# -- the command ------------------------------------------------------------------------------------

Ncu = Callable[..., None]


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ncu:
    """Puts one on the PATH that says something and ends."""

    def put(out: str, err: str = "", status: int = 0) -> None:
        (tmp_path / "out").write_text(out)
        (tmp_path / "err").write_text(err)
        program = tmp_path / "ncu"
        program.write_text(
            f'#!/bin/sh\necho "$*" > {tmp_path}/arguments\n'
            f"/bin/cat {tmp_path}/out; /bin/cat {tmp_path}/err >&2; exit {status}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return put


def said(result: Result) -> str:
    """The line at the end of a command that failed."""
    assert result.exit_code == 1
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("bench/counters.py: ")
    return line.removeprefix("bench/counters.py: ")


def test_without_ncu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = call("mlp/e4b/1")
    assert said(result) == "ncu (Nsight Compute) is not on the PATH"
    assert len(result.output.strip().splitlines()) == 1


def test_counters_are_written_and_shown(ncu: Ncu, tmp_path: Path):
    ncu(printed())
    result = call("mlp/e4b/1", "--out", str(tmp_path / "found.csv"))
    assert result.exit_code == 0, result.output
    assert "_skinny_gemm_kernel" in result.output
    assert "long_scoreboard 12.5" in result.output
    assert MEMORY in (tmp_path / "found.csv").read_text()
    assert not (tmp_path / "found.log").exists()
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[-3:] == [bench.__file__, "--worker", "mlp/e4b/1"]
    assert "--cache-control" not in arguments  # which are emptied unless something is said


@pytest.mark.parametrize("where", ["out", "err"])
def test_no_access_to_the_counters(ncu: Ncu, tmp_path: Path, where: str):
    text = "==PROF== Connected to process 7 (python)\n" + 2 * DENIED + NONE
    ncu(**{"out": "", where: text}, status=1)
    result = call("mlp/e4b/1", "--out", str(tmp_path / "found.csv"))
    line = said(result)
    assert line.startswith("ERR_NVGPUCTRPERM - The user does not have permission")
    assert line.count("ERR_NVGPUCTRPERM") == 1
    assert len(result.output.strip().splitlines()) == 1
    assert line.endswith(f"lies in {tmp_path / 'found.log'}")
    assert DENIED in (tmp_path / "found.log").read_text()
    assert not (tmp_path / "found.csv").exists()


def test_what_was_counted_is_shown_where_a_case_failed(ncu: Ncu, tmp_path: Path):
    problem = "product/e4b/gate_up/1: ModuleNotFoundError: No module named 'sglang'"
    ncu(FAILED + printed(), f"counters.py: {problem}\n", 1)
    result = call("mlp/e4b/1", "product/e4b/gate_up/1", "--out", str(tmp_path / "found.csv"))
    assert said(result).startswith(f"{problem}; all that")
    assert "_skinny_gemm_kernel" in result.output
    assert (tmp_path / "found.csv").exists()


def test_a_line_has_two_reasons_at_most(ncu: Ncu, tmp_path: Path):
    """Where no case can run there would be as many as cases."""
    ncu(FAILED, "".join(f"counters.py: {case}: no GPU\n" for case in "abcd"), 1)
    line = said(call("mlp/e4b/1", "--out", str(tmp_path / "found.csv")))
    assert line.startswith("a: no GPU; b: no GPU; 2 more like this; all that")


@pytest.mark.parametrize(
    ("out", "status", "why"),
    [
        (FAILED, 1, "The application returned an error code (1)."),
        ("", 9, "ncu ended with 9"),
        ("", 0, "ncu counted no kernel"),
        (printed({TIME: ["n/a", "n/a"], MEMORY: ["n/a", "n/a"]}), 0, "ncu counted no kernel"),
    ],
)
def test_nothing_was_counted(ncu: Ncu, tmp_path: Path, out: str, status: int, why: str):
    ncu(out, "", status)
    assert said(call("mlp/e4b/1", "--out", str(tmp_path / "found.csv"))).startswith(f"{why}; all")
