"""bench/rendering/quality.py on made-up measurements."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench.rendering import quality as tables
from tests.cpu.bench.test_bench_tables import NEW, OLD, VERSIONS, cells

Row = tuple[str, str, int, float]


def write(
    path: Path, rows: list[Row], timestamp: str = NEW, model: str = "moe", running: int = 64
) -> None:
    frame = pd.DataFrame(rows, columns=["variant", "quantity", "x", "value"])
    frame = frame.assign(timestamp=timestamp, gpu="NVIDIA H9", **VERSIONS, model=model)
    frame = frame.assign(trained_steps=4321, running=running)
    frame.to_csv(path, mode="a", header=not path.exists(), index=False)


def far(variant: str, beyond: float | None) -> list[Row]:
    rows: list[Row] = []
    for where, mean in (("prompt", 2e-4), ("generated", 3e-4)):
        name = f"KL divergence from fp32, {where}"
        rows += [(variant, name, 6144, mean), (variant, f"{name}, standard error", 6144, 1e-5)]
        if beyond is not None:
            name = f"KL divergence beyond stock's, {where}"
            rows += [
                (variant, name, 6144, beyond),
                (variant, f"{name}, standard error", 6144, 2e-6),
            ]
    return rows


STOCK: list[Row] = [
    ("stock", "answered exactly", 4002, 3000),
    ("stock", "perplexity", 98000, 3.1234),
    *far("stock", None),
]
ALONE: list[Row] = [
    ("skinny_gemm", "answered exactly", 4002, 3001),
    ("skinny_gemm", "right where stock is wrong", 4002, 5),
    ("skinny_gemm", "wrong where stock is right", 4002, 4),
    ("skinny_gemm", "McNemar's p", 9, 0.75),
    ("skinny_gemm", "answers that differ from stock's", 4002, 20),
    *far("skinny_gemm", -1e-6),
]


def test_nothing_is_measured(tmp_path: Path):
    assert tables.quality(tmp_path) is None


def test_a_run_with_few_at_once_stands_beside_the_other(tmp_path: Path):
    """It is newer, of other patches' numbers of tokens, and of fewer questions."""
    default = [("default", *row[1:]) for row in ALONE]
    write(tmp_path / "quality.csv", STOCK + default, OLD)
    few = [(*row[:2], 1002, row[3]) for row in STOCK + default]
    write(tmp_path / "quality.csv", few, NEW, running=4)
    write(tmp_path / "quality.csv", STOCK + default, OLD, model="ple")
    made = tables.quality(tmp_path) or ""
    models = [row[1] for row in cells(made)]
    assert models == ["moe", "moe", "moe, 4 at once", "moe, 4 at once", "ple", "ple"]
    line = tables.headline(tmp_path) or ""
    assert "1,002" not in line
    assert line.count("`moe`") == 1


def test_the_line_compares_default_with_stock(tmp_path: Path):
    assert tables.headline(tmp_path) is None
    default = [("default", *row[1:]) for row in ALONE]
    write(tmp_path / "quality.csv", STOCK + default)
    write(tmp_path / "quality.csv", STOCK + default, model="ple")
    made = tables.headline(tmp_path) or ""
    counts = "stock 3,000, patched 3,001 of 4,002 (p 0.75)"
    assert made.endswith(f": `moe` on 1.0 {counts}; `ple` on 1.0 {counts}.")


def test_newest_run_of_each_model(tmp_path: Path):
    path = tmp_path / "quality.csv"
    write(path, [("stock", "answered exactly", 4002, 1)], OLD)
    write(path, STOCK + ALONE)
    write(path, STOCK, model="ple")
    made = tables.quality(tmp_path) or ""
    stock = ["3,000 of 4,002", "-", "-", "-", "3.1234", "200 ± 10", "300 ± 10", "-", "-"]
    alone = [
        "3,001 of 4,002",
        "5, 4",
        "0.75",
        "20",
        "-",
        "200 ± 10",
        "300 ± 10",
        "-1 ± 2",
        "-1 ± 2",
    ]
    assert cells(made) == [
        ["1.0", "moe", "stock", *stock],
        ["1.0", "moe", "`skinny_gemm` alone", *alone],
        ["1.0", "ple", "stock", *stock],
    ]
    assert "moe 4,321, ple 4,321" in made


def test_a_run_without_stock_says_so(tmp_path: Path):
    """It was cut off before stock had answered: nothing of it is compared, and README's line leaves it out."""
    path = tmp_path / "quality.csv"
    write(path, [("default", "answered exactly", 4002, 3001), *far("default", None)])
    made = cells(tables.quality(tmp_path) or "")
    assert made[0] == ["1.0", "moe", "stock", "not measured", *["-"] * 8]
    assert made[1][2:6] == ["default", "3,001 of 4,002", "-", "-"]
    assert tables.headline(tmp_path) is None


def test_floors_of_fewer_questions_say_so(tmp_path: Path):
    again = "stock, once more"
    floor: list[Row] = [
        (again, "answered exactly", 1002, 750),
        (again, "answers that differ from stock's", 1002, 7),
    ]
    write(tmp_path / "quality.csv", [*ALONE, *floor, *STOCK])
    made = {row[2]: row for row in cells(tables.quality(tmp_path) or "")}
    assert list(made) == ["stock", again, "`skinny_gemm` alone"]
    assert made[again][3] == "750 of 1,002"
    assert made[again][6] == "7 of 1,002"
    assert made["`skinny_gemm` alone"][6] == "20"


def test_order_of_engines():
    """As they answer is another one in every run."""
    names = ["stock", "stock, once more", "stock, other batches", "exact", "default", "yoco"]
    names += ["stock, chunks of 256", "transformers, fp32"]
    assert tables.in_order([*reversed(names), "yoco"]) == names


def test_numbers_have_no_exponent():
    assert tables.digits(1970.4, ".3g") == "1,970"
    assert tables.digits(-163.0, "+.2g") == "-160"
    assert tables.digits(92.4, "+.2g") == "+92"
    assert tables.digits(0.0244, ".2g") == "0.024"


def test_quantised_models_have_their_own_table(tmp_path: Path):
    path = tmp_path / "quality.csv"
    default = [("default", *row[1:]) for row in ALONE]
    counted: list[Row] = [
        ("default", "calls of rope_store", 3, 1200),
        ("default", "calls of qkv_proj", 3, 0),
        ("exact", "calls of qkv_proj", 3, 5),
    ]
    write(path, STOCK + default)
    assert tables.calls(tmp_path) is None
    assert tables.quality(tmp_path, quantised=True) is None
    write(path, STOCK + default + counted, model="moe-fp8")
    write(path, STOCK + default, model="ple-w4a16")
    assert {row[1] for row in cells(tables.quality(tmp_path) or "")} == {"moe"}
    made = cells(tables.quality(tmp_path, quantised=True) or "")
    assert {row[1] for row in made} == {"moe-fp8", "ple-w4a16"}
    assert (tables.headline(tmp_path) or "").count("patched") == 1
    assert cells(tables.calls(tmp_path) or "") == [["`rope_store`", "1,200", "0"]]


def test_speculation(tmp_path: Path):
    path = tmp_path / "quality-mtp.csv"
    assert tables.speculation(tmp_path) is None
    assert tables.speculation_times(tmp_path) is None
    how = "in batches of 8"
    rows: list[Row] = [
        ("stock", f"accept length, text, {how}", 32, 2.5),
        ("patched", f"accept length, text, {how}", 32, 2.625),
        ("no speculation", f"answered exactly, {how}", 192, 140),
        ("stock vs patched", f"answers that differ, questions, {how}", 192, 3),
        ("stock, alone vs in batches of 8", "answers that differ, questions", 192, 4),
        ("no speculation", "decode step, batch 8", 8, 2.0),
        ("no speculation", "decode step, batch 8, range", 8, 0.5),
        ("stock", "verify step, batch 8", 8, 4.0),
        ("stock", "verify step, batch 8, range", 8, 1.5),
    ]
    write(path, rows)
    made = {(row[2], row[3]): row[4:] for row in cells(tables.speculation(tmp_path) or "")}
    assert made["text", how] == ["2.500", "2.625", *["-"] * 9]
    expected = ["-", "-", "140 of 192", "-", "-", "3 of 192", "-", "-", "-", "4 of 192", "-"]
    assert made["questions", how] == expected
    assert cells(tables.speculation_times(tmp_path) or "") == [
        ["1.0", "moe", "8", "a step, ms", "2.00 (0.50)", "4.00 (1.50)", "-"]
    ]


def test_a_patch_that_never_ran_has_no_answers_of_its_own(tmp_path: Path):
    """They are stock's, under its name."""
    calls: list[Row] = [("skinny_gemm", "calls of skinny_gemm", 2, 0)]
    write(tmp_path / "quality.csv", STOCK + ALONE + calls)
    table = tables.quality(tmp_path)
    assert table is not None
    alone = next(row for row in cells(table) if "skinny_gemm" in row[2])
    assert alone[2:] == ["`skinny_gemm` alone", tables.UNUSED, *8 * ["-"]]
    assert "3,001" not in table
