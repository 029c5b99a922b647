"""bench/tables_quality.py on made-up measurements."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench import tables_quality as tables
from tests.cpu.bench.test_bench_tables import NEW, OLD, VERSIONS, cells

Row = tuple[str, str, int, float]


def write(path: Path, rows: list[Row], timestamp: str = NEW, model: str = "moe") -> None:
    frame = pd.DataFrame(rows, columns=["variant", "quantity", "x", "value"])
    frame = frame.assign(timestamp=timestamp, gpu="NVIDIA H9", **VERSIONS, model=model)
    frame = frame.assign(trained_steps=4321)
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
