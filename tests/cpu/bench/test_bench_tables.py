"""bench/tables.py on made-up measurements: medians, ratios, the newest run, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench import kernels as bench
from bench import tables, tune_moe
from bench.common.results import append
from bench.rendering import catalogue as catalogue_tables
from bench.rendering import kernels as kernel_tables
from bench.rendering import steps, text
from gemma4_turbo.catalogue import BITWISE, CATALOGUE, DEFECTS, PATCHES, by_name
from gemma4_turbo.kernels import moe_tables

OLD, NEW = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
VERSIONS = {"sglang": "1.0", "torch": "2.0", "triton": "3.0"}
EXACT = [patch.name for patch in CATALOGUE if patch.numerics == BITWISE]
MOST, LABEL = "+".join(EXACT), f"{len(EXACT)} `bitwise`"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of bench/results."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def cells(table: str) -> list[list[str]]:
    """The lines below a table's header."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


# -- engines --------------------------------------------------------------------------------------------


def engine_csv(path: Path, timestamp: str = NEW, scale: float = 1.0, **base: Any) -> None:
    """Appends a run of three rounds."""
    rows: list[tuple[str, str, int, int, float, str]] = []
    for round_, noise in enumerate((0.0, 9.0, 0.5)):
        for variant, value in (("stock", 8.0), ("patched", 4.0)):
            for size in (1, 8, 32):
                rows.append((variant, "decode step", size, round_, scale * (value + noise), "ms"))
            rows.append(
                (variant, "prefill of 4096", 8, round_, scale * (value * 100 + noise), "ms")
            )
    rows += [
        ("stock", "launches per layer", 30, 0, 35.3, "launches"),
        ("patched", "launches per layer", 30, 0, 20.3, "launches"),
    ]
    for name, value in (("token", 3.0), ("logprob", 5.0)):
        rows.append(("stock vs patched", f"{name}_diffs", 64, 0, value, "count"))
        rows.append(("stock vs patched", f"{name}s", 64, 0, 4096.0, "count"))
        rows.append(("stock vs stock again", f"{name}_diffs", 64, 0, 77.0, "count"))
        rows.append(("stock vs stock again", f"{name}s", 64, 0, 4096.0, "count"))
    frame = pd.DataFrame(rows, columns=["variant", "quantity", "x", "round", "value", "unit"])
    base = {
        "gpu": "NVIDIA H9",
        **VERSIONS,
        "model": "26b-a4b",
        "layers": 30,
        "patches": MOST,
        **base,
    }
    for name, value in {"timestamp": timestamp, **base}.items():
        frame[name] = value
    frame.to_csv(path, mode="a", header=not path.exists(), index=False)


def test_an_engine_table(results):
    """Medians of the rounds, and of the newest run in the file only."""
    engine_csv(results / "decode-e9b-engine.csv", OLD, scale=10)
    engine_csv(results / "decode-e9b-engine.csv")
    table = steps.decode_engine(tables.RESULTS)
    assert table is not None
    step = "8.50 -> 4.50 (0.529)"
    (line,) = cells(table)
    assert line[:7] == ["1.0", "26b-a4b", "H9", LABEL, step, step, step]
    prefill = "8 x 4096: 800 -> 400 (0.500)"
    assert line[7:] == ["35.3 -> 20.3", prefill, "3 of 4,096", "5 of 4,096", "-", "3"]
    assert table.endswith("NVIDIA H9, SGLang 1.0, torch 2.0, Triton 3.0, 2026-01-02.")


def test_the_headline_is_the_newest_run_with_more_than_bitwise_patches(results):
    assert steps.headline(tables.RESULTS) is None
    engine_csv(results / "decode-a-engine.csv", patches="router+moe_align")
    assert steps.headline(tables.RESULTS) is None
    engine_csv(results / "decode-b-engine.csv", OLD, patches="router+skinny_gemm", norms="cuda")
    engine_csv(results / "decode-c-engine.csv", patches="all", scale=2)
    engine_csv(results / "decode-d-engine.csv", OLD, patches="all", gpu="NVIDIA H8", norms="cuda")
    engine_csv(results / "decode-e-engine.csv", patches="all", tp=2, gpu="NVIDIA H7")
    save(results / "decode-f-engine.csv", UNTIMED, gpu="NVIDIA H6")
    table = steps.headline(tables.RESULTS)
    assert table is not None
    once, twice = "8.50 -> 4.50 (0.529)", "17.00 -> 9.00 (0.529)"
    assert cells(table) == [
        ["1.0", "26b-a4b", "H8", once, once, once, "8 x 4096: 800 -> 400 (0.500)"],
        ["1.0", "26b-a4b", "H9", twice, twice, twice, "8 x 4096: 1601 -> 801 (0.500)"],
    ]


def test_the_newest_sglang_stands_first(results):
    """By its number, not as text: each release has rows of its own."""
    for release in ("1.9.1.post1", "1.10.0", "1.2.0"):
        engine_csv(results / f"decode-{release}-engine.csv", patches="all", sglang=release)
    for table in (steps.headline(tables.RESULTS), steps.decode_engine(tables.RESULTS)):
        assert table is not None
        assert [line[0] for line in cells(table)] == ["1.10.0", "1.9.1.post1", "1.2.0"]


def test_the_bitwise_patches_alone_stand_beside_all(results):
    path = results / "decode-a-engine.csv"
    engine_csv(path, patches="all")
    frame = pd.read_csv(path)
    bits = frame[frame["variant"] == "stock vs patched"].assign(variant="stock vs patched, bitwise")
    bits.loc[bits["quantity"].str.endswith("_diffs"), "value"] = 0
    append(bits, path)
    (line,) = cells(steps.decode_engine(tables.RESULTS) or "")
    assert line[9:11] == [
        "3 of 4,096; `bitwise` alone: 0 of 4,096",
        "5 of 4,096; `bitwise` alone: 0 of 4,096",
    ]


def test_shares_of_a_step(results):
    path = results / "decode-a-engine.csv"
    engine_csv(path, patches="all", tp=2)
    assert steps.step_shares(tables.RESULTS) is None
    base = pd.read_csv(path).iloc[:1].assign(x=30, unit="%")
    for step, kind, stock, patched in (
        ("decode", "norms", 12.0, 5.04),
        ("decode", "sums over GPUs", 8.0, 9.0),
        ("prefill", "norms", 3.0, 1.0),
    ):
        for variant, value in (("stock", stock), ("patched", patched)):
            quantity = f"{kind}, share of a {step} step"
            append(base.assign(variant=variant, quantity=quantity, value=value), path)
    common = ["1.0", "26b-a4b", "2 x H9", "all"]
    assert cells(steps.step_shares(tables.RESULTS) or "") == [
        [*common, "decode", "12.0 -> 5.0", "8.0 -> 9.0"],
        [*common, "prefill", "3.0 -> 1.0", "-"],
    ]
    more = pd.read_csv(path).assign(quantization="fp8")
    append(more, results / "decode-b-engine.csv")
    assert len(cells(steps.step_shares(tables.RESULTS) or "")) == 4


def test_rows_with_quantised_weights_stand_apart(results):
    """Never the newest run of bf16, in a file with it or alone; of each format the newest."""
    path = results / "decode-a-engine.csv"
    engine_csv(path, OLD, patches="all")
    without = [make(tables.RESULTS) for make in (steps.headline, steps.decode_engine)]
    frame = pd.read_csv(path).assign(quantization="none")
    for name, timestamp, scale in (("fp8", OLD, 5.0), ("fp8", NEW, 2.0), ("w8a8_fp8", OLD, 3.0)):
        more = frame.assign(timestamp=timestamp, quantization=name, value=frame["value"] * scale)
        append(more, path)
        append(more, results / "decode-b-engine.csv")
    assert [make(tables.RESULTS) for make in (steps.headline, steps.decode_engine)] == without
    table = steps.quantised_engine(tables.RESULTS)
    assert table is not None
    (results / "decode-b-engine.csv").unlink()
    assert [line[:6] for line in cells(steps.quantised_engine(tables.RESULTS) or "")] == [
        ["`fp8`", "1.0", "26b-a4b", "H9", "all", "17.00 -> 9.00 (0.529)"],
        ["`w8a8_fp8`", "1.0", "26b-a4b", "H9", "all", "25.50 -> 13.50 (0.529)"],
    ]
    path.unlink()
    assert steps.quantised_engine(tables.RESULTS) is None


def test_the_headline_of_a_run_without_prefills(results):
    path = results / "decode-a-engine.csv"
    engine_csv(path, patches="all")
    frame = pd.read_csv(path)
    frame[~frame["quantity"].str.startswith("prefill")].to_csv(path, index=False)
    table = steps.headline(tables.RESULTS)
    assert table is not None
    assert [line[-1] for line in cells(table)] == ["-"]


def test_the_headline_has_the_prefill_that_all_have(results):
    path = results / "decode-a-engine.csv"
    engine_csv(path, patches="all")
    frame = pd.read_csv(path)
    longer = frame[frame["quantity"].str.startswith("prefill")].assign(quantity="prefill of 7000")
    pd.concat([frame, longer.assign(x=30)]).to_csv(path, index=False)
    table = steps.headline(tables.RESULTS)
    assert table is not None
    assert [line[-1].split(":")[0] for line in cells(table)] == ["8 x 4096"]
    longer.to_csv(path, index=False)
    pd.concat([pd.read_csv(path), frame[frame["quantity"] == "decode step"]]).to_csv(path)
    assert [line[-1].split(":")[0] for line in cells(steps.headline(tables.RESULTS) or "")] == [
        "8 x 7000"
    ]


def test_engines_of_several_files(results):
    engine_csv(results / "decode-a-engine.csv")
    changed: dict[str, Any] = {"patches": "router+moe_align", "tp": 2, "norms": "cute", "layers": 6}
    changed["gpu"] = "NVIDIA H8 80GB HBM3"
    engine_csv(results / "decode-b-engine.csv", OLD, **changed)
    engine_csv(results / "router-engine.csv")
    table = steps.decode_engine(tables.RESULTS)
    assert table is not None
    found = [line[:4] for line in cells(table)]
    assert found == [
        ["1.0", "26b-a4b", "H9", LABEL],
        ["1.0", "26b-a4b, 6 layers", "2 x H8, cute norms", "`router`, `moe_align`"],
    ]
    assert "NVIDIA H8 80GB HBM3, SGLang 1.0, torch 2.0, Triton 3.0, 2026-01-01; NVIDIA H9" in table


def test_the_divergence_and_what_stock_has_of_its_own(results):
    path = results / "decode-e9b-engine.csv"
    engine_csv(path)
    frame = pd.read_csv(path)
    for variant, value in (("stock vs patched", 2e-9), ("stock vs stock, one at a time", 3e-9)):
        row = {**frame.iloc[0], "variant": variant, "quantity": "KL divergence", "x": 12}
        frame.loc[len(frame)] = row | {"value": value, "unit": "nats"}
    frame.to_csv(path, index=False)
    table = steps.decode_engine(tables.RESULTS)
    assert table is not None
    assert cells(table)[0][-2:] == ["2.0e-09 (3.0e-09)", "3"]


def save(path: Path, *rows: dict[str, Any], gpu: str = "NVIDIA H9") -> None:
    """A run as the benches of single kernels write it."""
    base = {"timestamp": NEW, "gpu": gpu, **VERSIONS}
    pd.DataFrame([base | row for row in rows]).to_csv(path, index=False)


UNTIMED = {
    **{"model": "26b-a4b", "layers": 6, "patches": "all", "variant": "stock vs patched"},
    **{"quantity": "token_diffs", "x": 64, "round": 0, "value": 0.0, "unit": "count"},
}
SHAPE = {"shape": "full", "stock_us": 100.0, "ours_us": 25.0, "ours_tflops": 300.4}
POINT = {"shape": "a/full", "batch": 8, "length": 512, "stock_us": 10.0, "us": 5.0}
TILE = {"width": 704, "tokens": 8, "us": 6.0, "chosen": 0, "stock": 0, "projection": "up"}


def test_attention_and_experts(results):
    assert (
        kernel_tables.extend_attention(tables.RESULTS)
        is kernel_tables.decode_attention(tables.RESULTS)
        is kernel_tables.moe(tables.RESULTS)
        is None
    )
    save(results / "extend-attention-h9.csv", SHAPE, SHAPE | {"timestamp": OLD})
    table = kernel_tables.extend_attention(tables.RESULTS)
    assert table is not None
    assert table.startswith("| shape | H9: us | TFLOP/s |\n")
    assert cells(table) == [["full", "100 -> 25 (0.250)", "300"]]
    assert table.endswith(" call. NVIDIA H9, SGLang 1.0, torch 2.0, Triton 3.0, 2026-01-02.")

    # One shape measured again leaves the others as they were.
    before = {"timestamp": OLD, "stock_us": 200.0}
    save(
        results / "extend-attention-h9.csv", SHAPE | before, SHAPE | before | {"shape": "b"}, SHAPE
    )
    table = kernel_tables.extend_attention(tables.RESULTS)
    assert table is not None
    assert sorted(cells(table)) == [
        ["b", "200 -> 25 (0.125)", "300"],
        ["full", "100 -> 25 (0.250)", "300"],
    ]
    assert "3.0, 2026-01-01; NVIDIA H9" in table
    assert table.endswith("2026-01-02.")

    save(results / "decode-attention-h9.csv", POINT, POINT | {"length": 64, "us": 20.0})
    table = kernel_tables.decode_attention(tables.RESULTS)
    assert table is not None
    assert cells(table) == [["a/full", "8", "H9", "10.0 -> 20.0 (2.000)", "10.0 -> 5.0 (0.500)"]]

    save(
        results / "moe-h9.csv",
        TILE | {"stock": 1},
        TILE | {"projection": "down", "stock": 1, "chosen": 1},
        TILE | {"chosen": 1, "us": 3.0},
    )
    table = kernel_tables.moe(tables.RESULTS)
    assert table is not None
    assert cells(table) == [["8", "12 -> 9 (0.750)"]]


def test_gpus_side_by_side(results):
    """What only one of them measured is "-" or no row; the foot names both, each with its newest run."""
    other = "NVIDIA H8 80GB HBM3"
    both = "NVIDIA H8 80GB HBM3, SGLang 1.0, torch 2.0, Triton 3.0, 2026-01-01; NVIDIA H9, SGLang"
    old = {"timestamp": OLD}
    first, last = SHAPE | {"shape": "first"}, SHAPE | {"shape": "last", "ours_us": 50.0}
    save(results / "extend-attention-h8.csv", last | old, gpu=other)
    save(results / "extend-attention-h9.csv", first, last)
    table = kernel_tables.extend_attention(tables.RESULTS)
    assert table is not None
    assert table.startswith("| shape | H8: us | TFLOP/s | H9: us | TFLOP/s |\n")
    assert cells(table) == [
        ["first", "-", "-", "100 -> 25 (0.250)", "300"],
        ["last", "100 -> 50 (0.500)", "300", "100 -> 50 (0.500)", "300"],
    ]
    assert both in table

    small = POINT | {"batch": 1, "length": 64}
    save(results / "decode-attention-h8.csv", small | old, gpu=other)
    save(results / "decode-attention-h9.csv", POINT, small)
    table = kernel_tables.decode_attention(tables.RESULTS)
    assert table is not None
    half = "10.0 -> 5.0 (0.500)"
    assert cells(table) == [
        ["a/full", "8", "H9", "-", half],
        ["a/full", "1", "H8", half, "-"],
        ["a/full", "1", "H9", half, "-"],
    ]
    assert both in table

    tile = TILE | {"stock": 1, "chosen": 1}
    narrow, more = tile | {"width": 352, "us": 3.0}, tile | {"tokens": 16}
    save(results / "moe-h8.csv", more | old, tile | old, gpu=other)
    save(results / "moe-h9.csv", tile, narrow, narrow | {"tokens": 32})
    table = kernel_tables.moe(tables.RESULTS)
    assert table is not None
    assert table.startswith("| tokens | H8: N = 704, us | H9: N = 704, us | N = 352, us |\n")
    wide, thin = "6 -> 6 (1.000)", "3 -> 3 (1.000)"
    assert cells(table) == [
        ["8", wide, wide, thin],
        ["16", wide, "-", "-"],
        ["32", "-", "-", thin],
    ]
    assert both in table


def test_the_experts_times_are_those_of_the_shipped_tables():
    for _, run in kernel_tables.newest(tables.RESULTS, "moe-*.csv"):
        device = run.iloc[0]["gpu"].replace(" ", "_")
        folder = moe_tables.tuned_under(moe_tables.named(run.iloc[0]["triton"]))
        for width, rows in run[run["chosen"] == 1].groupby("width"):
            measured: dict[str, Any] = {"up": {}, "down": {}}
            for row in rows.to_dict("records"):
                tile = tune_moe.Tile(*(row[name] for name in tune_moe.Tile._fields))
                measured[row["projection"]][row["tokens"]] = tile.config()
            key = moe_tables.Key(tune_moe.EXPERTS, int(width), device)
            assert moe_tables.load(key, folder) == moe_tables.Pair(**measured)


def test_an_engine_that_measured_little(results):
    path = results / "decode-e9b-engine.csv"
    engine_csv(path)
    frame = pd.read_csv(path)
    frame[(frame["quantity"] == "decode step") & (frame["x"] == 8)].to_csv(path, index=False)
    table = steps.decode_engine(tables.RESULTS)
    assert table is not None
    step = "8.50 -> 4.50 (0.529)"
    assert cells(table)[0][4:] == ["-", step, "-", "-", "-", "-", "-", "-", "3"]


@pytest.mark.parametrize(
    ("patches", "label"),
    [
        ("all", "all"),
        (MOST, LABEL),
        (f"{MOST}+qkv_proj", f"{LABEL}, `qkv_proj`"),
        ("router+qkv_proj", "`router`, `qkv_proj`"),
        ("router", "`router`"),
    ],
)
def test_the_patches_of_a_run(patches, label):
    assert text.chosen(patches) == label


# -- kernels --------------------------------------------------------------------------------------------


def kernel_csv(path: Path, timestamp: str, kernels: list[str], stock_us: float = 8.0) -> None:
    """Appends a run as bench/kernels.py writes it."""
    base = {"timestamp": timestamp, "gpu": "NVIDIA H9", **VERSIONS, "norms": "cute"}
    rows: list[dict[str, Any]] = [
        {"kernel": "copy", "case": "1 GiB", "stock_us": 1e3, "bytes": 2**31, "gb_per_s": 2000.0}
    ]
    for kernel in kernels:
        for tokens in (1, 8, 32, 64, 4096):
            rows.append(
                {
                    "kernel": kernel,
                    "case": "e9b",
                    "tokens": tokens,
                    "fused_us": 2.0,
                    "stock_us": stock_us,
                    "fused_launches": 1,
                    "stock_launches": 5,
                    "fused_graph_us": 2.5,
                    "stock_graph_us": 9.0,
                    "ratio": 2.0 / stock_us,
                    "bytes": 1500 * tokens,
                    "gb_per_s": 0.75 * tokens,
                }
            )
    bench.append(rows, base, path)


def test_a_kernel_table(results):
    kernel_csv(results / "decode-kernels-h9.csv", NEW, ["layer_norms"])
    table = kernel_tables.decode_kernels(tables.RESULTS)
    assert table is not None
    assert cells(table) == [
        ["`layer_norms`", "e9b, 1", "5 -> 1", "8.0 -> 2.0 (0.250)", "1.5 kB", "0.0%"],
        ["`layer_norms`", "e9b, 32", "5 -> 1", "8.0 -> 2.0 (0.250)", "48 kB", "1.2%"],
        ["`layer_norms`", "e9b, 4096", "5 -> 1", "8.0 -> 2.0 (0.250)", "6.1 MB", "153.6%"],
    ]
    assert "2,000 GB/s" in table
    assert "norms: cute" in table
    assert table.endswith("NVIDIA H9, SGLang 1.0, torch 2.0, Triton 3.0, 2026-01-02.")


def test_the_newest_run_of_each_patch_counts(results):
    """One patch measured anew by itself does not hide the others; an older file is not read."""
    kernel_csv(results / "decode-kernels-h8.csv", OLD, ["ple_tail"])
    path = results / "decode-kernels-h9.csv"
    kernel_csv(path, OLD, ["layer_norms", "moe_align"])
    kernel_csv(path, NEW, ["moe_align"], stock_us=4.0)
    table = kernel_tables.decode_kernels(tables.RESULTS)
    assert table is not None
    found = {(line[0], line[3]) for line in cells(table)}
    assert found == {
        ("`layer_norms`", "8.0 -> 2.0 (0.250)"),
        ("`moe_align`", "4.0 -> 2.0 (0.500)"),
    }


def test_bytes_in_words():
    found = [text.decimal(count) for count in (2, 999, 1500, 999_000, 1_500_000, 2.5e9)]
    assert found == ["2 B", "999 B", "1.5 kB", "999 kB", "1.5 MB", "2,500.0 MB"]


# -- pages ------------------------------------------------------------------------------------------------


def test_what_is_not_measured_is_said_between_its_markers(results, monkeypatch):
    chosen = {name: tables.TABLES[name] for name in ("decode-engine", "decode-kernels")}
    monkeypatch.setattr(tables, "TABLES", chosen)
    text = "a\n<!-- table: decode-engine -->\n<!-- end -->\nb\n"
    text += "<!-- table: decode-kernels -->\nold\n<!-- end -->\nc\n"
    nothing = "\nNot measured yet.\n\n"
    empty = text.replace("old\n", nothing).replace("engine -->\n", f"engine -->\n{nothing}")
    assert tables.render([text]) == [empty]
    monkeypatch.setattr(tables, "WITHOUT_A_WORD", ("decode-engine",))
    assert tables.render([text]) == [text.replace("old\n", nothing)]
    engine_csv(results / "decode-e9b-engine.csv")
    kernel_csv(results / "decode-kernels-h9.csv", NEW, ["layer_norms"])
    (full,) = tables.render([text])
    assert full.count("| e9b") == 3
    assert full.count("| 26b-a4b |") == 1
    assert full.endswith("\n\n<!-- end -->\nc\n")
    assert tables.render([full]) == [full]


MARKED = "<!-- table: one -->\n{}<!-- end -->\n"


@pytest.fixture
def two_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of all others."""
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "1", "two": lambda: "2"})


def test_a_table_on_two_pages(two_tables):
    other = MARKED.replace("one", "two")
    pages = [MARKED.format("") + other.format("old\n"), "text", MARKED.format("")]
    one, two = MARKED.format("\n1\n\n"), other.format("\n2\n\n")
    assert tables.render(pages) == [one + two, "text", one]


def test_a_table_that_no_page_has(two_tables):
    with pytest.raises(SystemExit, match="no page has a marker for two"):
        tables.render(["nothing here", MARKED.format("")])


def test_a_marker_without_a_table(two_tables):
    with pytest.raises(SystemExit, match="unknown table 'three'"):
        tables.render([MARKED.replace("one", "three")])


def test_a_check_writes_nothing_and_fails_where_a_page_differs(
    two_tables, tmp_path, monkeypatch, capsys
):
    (tmp_path / "docs").mkdir()
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    old = MARKED.format("") + MARKED.replace("one", "two").format("")
    page.write_text(old)
    readme.write_text("nothing")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [readme, page])
    with pytest.raises(SystemExit) as ended:
        tables.main(check=True)
    assert ended.value.code == 1
    assert page.read_text() == old
    assert capsys.readouterr().out == "docs/page.md is out of date: make tables\n"
    for check in (False, True):
        with pytest.raises(SystemExit) as ended:
            tables.main(check=check)
        assert ended.value.code == 0
    assert "\n1\n" in page.read_text()


def test_the_pages_are_readme_and_all_of_docs(tmp_path):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    for name in ("README.md", "docs/b.md", "docs/deep/a.md", "docs/c.txt"):
        (tmp_path / name).touch()
    found = [str(page.relative_to(tmp_path)) for page in tables.pages(tmp_path)]
    assert found == ["README.md", "docs/b.md", "docs/deep/a.md"]


# -- patches and releases ---------------------------------------------------------------------------------


def test_runs_of_releases():
    releases = ["1", "2", "3", "4", "5"]
    assert catalogue_tables.spans(["1", "2", "3", "5"], releases) == "1 to 3, 5"
    assert catalogue_tables.spans(["2", "4"], releases) == "2, 4"
    assert catalogue_tables.spans([], releases) == "-"


def test_a_table_of_releases(tmp_path):
    assert catalogue_tables.releases(tmp_path) is catalogue_tables.counts(tmp_path) is None
    assert catalogue_tables.release_defects(tmp_path) is None
    rows = [
        ("0.5.11", "router", "active"),
        ("0.5.12", "router", "active"),
        ("0.5.13", "router", "upstreamed"),
        ("0.5.11", "yoco", "unsupported"),
        ("0.5.12", "yoco", "active"),
        ("0.5.13", "yoco", "unsupported"),
        ("0.5.12", "mtp_launch", "looks"),
        ("0.5.11", "mtp_launch", "unsupported"),
        ("0.5.13", "frozen_kv_views", "upstreamed"),
    ]
    frame = pd.DataFrame(rows, columns=["release", "patch", "state"])
    frame.to_csv(tmp_path / "releases.csv", index=False)
    found = {line[0]: line[1:] for line in cells(catalogue_tables.releases(tmp_path) or "")}
    assert found["`router`"] == ["0.5.11 to 0.5.12", "0.5.13", "-"]
    assert found["`yoco`"] == ["0.5.12", "-", "0.5.11, 0.5.13"]
    assert "`mtp_launch`" not in found
    assert cells(catalogue_tables.release_defects(tmp_path) or "") == [
        ["`frozen_kv_views`", "-", "0.5.13", "-"],
        ["`mtp_launch`", "0.5.12", "-", "0.5.11"],
        ["`mtp_moe_runner`", "-", "-", "-"],
    ]
    assert cells(catalogue_tables.counts(tmp_path) or "") == [
        ["0.5.11", "1", "0", "1"],
        ["0.5.12", "2", "0", "0"],
        ["0.5.13", "0", "1", "1"],
    ]


def test_tables_of_patches():
    lines = {line[0]: line[1:] for line in cells(catalogue_tables.patches())}
    assert len(lines) == len(PATCHES)
    looked_for = [line[0] for line in cells(catalogue_tables.defects())]
    assert looked_for == [f"[`{p.name}`](speculation.md#{p.name})" for p in DEFECTS]
    assert not lines.keys() & set(looked_for)
    here = [line[0] for line in cells(catalogue_tables.defects_here())]
    assert here == [f"[`{p.name}`](#{p.name})" for p in DEFECTS]
    patch = by_name("rope_store")
    assert lines["[`rope_store`](decode-step.md#rope_store)"] == [
        f"{patch.summary}; needs `qkv_norm`", "`bitwise`", "on", "`GEMMA4_TURBO_ROPE_STORE`",
    ]  # fmt: skip
    memory = cells(catalogue_tables.family("memory"))
    assert [(line[0], line[3]) for line in memory] == [
        ("[`shared_kv_pool`](#shared_kv_pool)", "on"),
        ("[`swa_ratio`](#swa_ratio)", "off"),
    ]
    assert "[Experts](docs/patches/experts.md)" in catalogue_tables.families()
