"""bench/rendering/engines.py on made-up measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.common.results import append
from bench.rendering import engines as tables
from tests.cpu.bench.test_bench_tables import NEW, OLD, VERSIONS, cells

PAIR, ALONE = "stock vs patched", "stock vs stock, one at a time"
Row = tuple[str, str, int, float, str]


def write(path: Path, rows: list[Row], timestamp: str = NEW, **base: Any) -> None:
    """Appends a run."""
    frame = pd.DataFrame(rows, columns=["variant", "quantity", "x", "value", "unit"])
    base = {"model": "e2b", "layers": 35, "patches": "yoco", **base}
    frame = frame.assign(timestamp=timestamp, gpu="NVIDIA H9", **VERSIONS, **base)
    frame.to_csv(path, mode="a", header=not path.exists(), index=False)


def timed(quantity: str, size: int, stock: float, patched: float, unit: str = "ms") -> list[Row]:
    return [(v, quantity, size, x, unit) for v, x in (("stock", stock), ("patched", patched))]


@pytest.mark.parametrize(
    "make",
    [
        *(tables.yoco, tables.vision, tables.images, tables.pools, tables.mtp),
        *(tables.divergence, tables.divergence_ratios, tables.serving, tables.short_prompts),
    ],
)
def test_nothing_is_measured(tmp_path: Path, make: Any):
    assert make(tmp_path) is None


def test_long_prompts_newest_run(tmp_path: Path):
    what = "prefill of 7000 and 10 tokens"
    far: list[Row] = [
        (PAIR, "KL divergence", 12, 1e-5, "nats"),
        (ALONE, "KL divergence", 12, 2e-5, "nats"),
    ]
    write(tmp_path / "yoco-engine.csv", timed(what, 30, 9, 9) + far, OLD)
    counts: list[Row] = [(PAIR, "token_diffs", 64, 3, "count"), (PAIR, "tokens", 64, 4096, "count")]
    write(tmp_path / "yoco-engine.csv", timed(what, 30, 400, 100) + far + counts)
    assert cells(tables.yoco(tmp_path) or "") == [
        [
            "1.0",
            "e2b, 35 layers",
            "`yoco`",
            "30 x 7000 and 10 tokens: 400 -> 100 (0.250)",
            "3 of 4,096",
            "1.0e-05 (2.0e-05)",
        ]
    ]


def test_the_encoder_says_what_ran_stocks_code(tmp_path: Path):
    rows = [
        {"variant": variant, "ms": ms, "peak_mib": 10.0, "distance": 0.0, "inactive": inactive}
        for variant, ms, inactive in (
            ("stock", 80, ""),
            ("vision_rope", 40, "vision_rope"),
            ("all", 20, ""),
        )
    ]
    base = {"images": 12, "patches": 900, "attention": "auto", "timestamp": NEW}
    frame = pd.DataFrame(rows).assign(**base, gpu="NVIDIA H9", **VERSIONS)
    both = pd.concat([frame.assign(per_call=6), frame.assign(per_call=1, inactive="")])
    both.to_csv(tmp_path / "vision-h200.csv", index=False)
    assert [line[:3] for line in cells(tables.vision(tmp_path) or "")] == [
        ["6", "stock", "40.0 -> 40.0 (1.000)"],
        ["6", "`vision_rope`, with stock's code for `vision_rope`", "40.0 -> 20.0 (0.500)"],
        ["6", "all", "40.0 -> 10.0 (0.250)"],
        ["1", "stock", "6.7 -> 6.7 (1.000)"],
        ["1", "`vision_rope`", "6.7 -> 3.3 (0.500)"],
        ["1", "all", "6.7 -> 1.7 (0.250)"],
    ]


def test_divergence(tmp_path: Path):
    exact = "stock, attention in fp32"
    rows: list[Row] = []
    for pair, prefill, error in (
        (PAIR, 4e-5, 1e-6),
        (ALONE, 2e-5, None),
        (f"{exact} vs patched", 5e-5, 2e-6),
    ):
        for name, scale in (("KL divergence", 1), ("KL divergence, decode", 2)):
            rows.append((pair, name, 32, prefill * scale, "nats"))
            if error is not None:
                rows.append((pair, f"{name}, standard error", 32, error * scale, "nats"))
    write(tmp_path / "divergence.csv", rows)
    (line,) = cells(tables.divergence(tmp_path) or "")
    assert line[3:] == [
        "4.00 ± 0.10; 8.00 ± 0.20", "2.00; 4.00", "-", "-", "5.00 ± 0.20; 10.00 ± 0.40",
    ]  # fmt: skip

    # A later run with other chunks adds them, and replaces what it measured again.
    later: list[Row] = [(PAIR, "KL divergence", 32, 3e-5, "nats")]
    for size, value in ((128, 6e-5), (256, 7e-5)):
        for name in ("KL divergence", "KL divergence, decode"):
            later.append((f"stock vs stock, chunks of {size}", name, 32, value, "nats"))
    write(tmp_path / "divergence.csv", later, "2026-03-04T00:00:00+00:00")
    (line,) = cells(tables.divergence(tmp_path) or "")
    assert line[3:7] == [
        "3.00 ± 0.10; 8.00 ± 0.20", "2.00; 4.00", "128: 6.00; 6.00, 256: 7.00; 7.00", "-",
    ]  # fmt: skip


def test_divergence_over_stocks_own(tmp_path: Path):
    """By the smallest chunks; "-" for what was not measured."""
    rows: list[Row] = [
        (PAIR, "KL divergence", 32, 4e-5, "nats"),
        (PAIR, "KL divergence, decode", 32, 9e-5, "nats"),
        (ALONE, "KL divergence", 32, 2e-5, "nats"),
    ]
    for size, value in ((1024, 1e-5), (256, 5e-5)):
        for name in ("KL divergence", "KL divergence, decode"):
            rows.append((f"stock vs stock, chunks of {size}", name, 32, value, "nats"))
    write(tmp_path / "divergence.csv", rows)
    write(tmp_path / "divergence.csv", rows[:3], patches="router")
    first, other = cells(tables.divergence_ratios(tmp_path) or "")
    assert first[2:] == ["`yoco`", "2.00", "-", "256", "0.80", "1.80"]
    assert other[2:] == ["`router`", "2.00", "-", "-", "-", "-"]


def test_short_prompts(tmp_path: Path):
    write(tmp_path / "short-engine.csv", timed("prefill of 64", 1, 9, 9), OLD, piecewise="patched")
    rows = timed("prefill of 1024", 4, 80, 60) + timed("prefill of 64", 1, 50, 10)
    write(tmp_path / "short-engine.csv", rows, piecewise="patched")
    write(tmp_path / "short-engine.csv", timed("prefill of 64", 1, 50, 45), piecewise="neither")
    text = tables.short_prompts(tmp_path) or ""
    named = ["1.0", "e2b, 35 layers", "`yoco`"]
    assert cells(text) == [
        [*named, "in the patched engine", "H9", "50.0 -> 10.0 (0.200)", "80.0 -> 60.0 (0.750)"],
        [*named, "none", "H9", "50.0 -> 45.0 (0.900)", "-"],
    ]
    assert "| 1 x 64, ms | 4 x 1024, ms |" in text
    assert "--prefill 1x64,4x1024`" in text


def test_the_server(tmp_path: Path):
    rows = timed("output throughput", 80, 1000, 1500, "tokens/s")
    rows += timed("time to first token, median", 80, 200, 100)
    rows += timed("time to first token, 99th percentile", 80, 400, 300)
    rows += timed("whole request, median", 80, 8000, 6000)
    rows += timed("time per output token, median", 80, 20, 15)
    write(tmp_path / "serving.csv", rows, patches="all+yoco", round=0)
    again = timed("time to first token, median", 80, 300, 120)
    write(tmp_path / "serving.csv", again, patches="all+yoco", round=1)
    write(tmp_path / "serving.csv", again[:1], patches="all+yoco", round=2)
    (line,) = cells(tables.serving(tmp_path) or "")
    assert line == [
        "1.0", "e2b, 35 layers", "all, `yoco`", "H9", "3 / 2", "1000 -> 1500 (1.500)", "300 -> 110 (0.367)",
        "400 -> 300 (0.750)", "8000 -> 6000 (0.750)", "20.0 -> 15.0 (0.750)",
    ]  # fmt: skip


def test_full_pools(tmp_path: Path):
    rows = timed("soak", 96, 1000, 900)
    for kind, stock, patched in (("full", 100, 200), ("sliding", 80, 40)):
        rows += timed(f"pool of {kind} layers", 1, stock, patched, "tokens")
        rows += timed(f"pool of {kind} layers, fullest", 1, 0.5, 1.0, "share")
    rows += timed("times requests were retracted", 1, 0, 7, "times")
    for variant, common in (("stock", 60), ("patched", 55)):
        name = f"{variant} vs stock, one at a time"
        rows += 2 * [(name, "common", 96, common / 2, "count"), (name, "tokens", 96, 50, "count")]
    write(tmp_path / "pools.csv", rows, patches="swa_ratio")
    (line,) = cells(tables.pools(tmp_path) or "")
    assert line == [
        "1.0", "e2b, 35 layers", "`swa_ratio`", "100 -> 200 (2.000)", "80 -> 40 (0.500)", "0.50 -> 1.00",
        "0.50 -> 1.00", "0 -> 7", "1000 -> 900 (0.900)", "60 -> 55 of 100",
    ]  # fmt: skip


def test_speculation(tmp_path: Path):
    rows = timed("step", 1, 10, 5) + timed("step", 8, 20, 15)
    rows += timed("accept length, alone", 16, 2.5, 2.5, "tokens")
    for part in ("draft", "verify", "seed"):
        rows += [("stock", f"{part}: GPU", size, size / 4, "ms") for size in (1, 8)]
    name = "stock alone vs patched alone"
    rows += [(name, "token_diffs", 16, 4, "count"), (name, "tokens", 16, 1024, "count")]
    rows += [
        ("stock", "stress: died", 500, 1, "count"),
        ("patched", "stress: died", 500, 0, "count"),
    ]
    write(tmp_path / "mtp-engine.csv", rows, weights="random", patches="mtp_chain")
    short = timed("step", 8, 20, 5) + timed("accept length, alone", 4, 1, 1, "tokens")
    short += [("stock", "step", 1, 9, "ms"), *(row for row in rows if row[0] == name)]
    write(tmp_path / "mtp-engine.csv", short, weights="agreeing 0.7", patches="mtp_chain")
    line, other = cells(tables.mtp(tmp_path) or "")
    assert line == [
        "1.0", "e2b, 35 layers", "`mtp_chain`", "random", "10.00 -> 5.00 (0.500)",
        "20.00 -> 15.00 (0.750)", "4 of 1,024", "-", "2.500, 2.500",
        "stock: died, patched: all answered", "0.25 + 0.25 + 0.25; 2.00 + 2.00 + 2.00",
    ]  # fmt: skip
    assert other[4:7] == ["-", "20.00 -> 5.00 (0.250)", "4 of 1,024"]
    assert other[-2:] == ["-", "-"]


def test_other_caches_and_graphs_are_rows_of_their_own(tmp_path: Path):
    """Behind rows that do not say; each the newest of its kind."""
    base = {"weights": "random", "patches": "mtp_chain"}
    length = timed("accept length, alone", 16, 1, 1, "tokens")
    path = tmp_path / "mtp-engine.csv"
    write(path, timed("step", 1, 10, 5) + length, OLD, **base)
    for more, ms in (
        ({"kv": "fp8_e4m3", "kv_scales": "0.5:0.25", "prefill_graphs": False}, 7),
        ({"kv": "fp8_e4m3", "kv_scales": "", "prefill_graphs": False}, 6),
        ({"kv": "auto", "kv_scales": "", "prefill_graphs": True}, 8),
    ):
        other = tmp_path / "other.csv"
        write(other, timed("step", 1, 10, ms) + length, NEW, **base, **more)
        append(pd.read_csv(other), path)
        other.unlink()
    found = [line[3:5] for line in cells(tables.mtp(tmp_path) or "")]
    assert found == [
        ["random", "10.00 -> 5.00 (0.500)"],
        ["random; `fp8_e4m3` KV cache, scales 0.5:0.25", "10.00 -> 7.00 (0.700)"],
        ["random; `fp8_e4m3` KV cache", "10.00 -> 6.00 (0.600)"],
        ["random; CUDA graphs of prefill", "10.00 -> 8.00 (0.800)"],
    ]


def test_releases_stand_side_by_side_and_tokens_alone_are_a_row(tmp_path: Path):
    name = "stock alone vs patched alone"
    counts: list[Row] = [(name, "token_diffs", 16, 0, "count"), (name, "tokens", 16, 64, "count")]
    rows = counts + timed("accept length, alone", 16, 2.5, 2.5, "tokens")
    base = {"weights": "random", "patches": "mtp_chain"}
    write(tmp_path / "mtp-engine.csv", rows + timed("step", 1, 10, 5), OLD, **base)
    frame = pd.read_csv(tmp_path / "mtp-engine.csv")
    later = frame[frame["quantity"] != "step"].assign(sglang="2.0", timestamp=NEW)
    later.to_csv(tmp_path / "mtp-engine.csv", mode="a", header=False, index=False)
    found = [[*line[:1], *line[4:7]] for line in cells(tables.mtp(tmp_path) or "")]
    assert found == [
        ["1.0", "10.00 -> 5.00 (0.500)", "-", "0 of 64"],
        ["2.0", "-", "-", "0 of 64"],
    ]
