"""Runs of ``sglang.bench_serving``: what it is asked for, and what it says."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

# Of bench_serving's output: its name, ours, the unit.
MEASURED = (
    ("median_ttft_ms", "time to first token, median", "ms"),
    ("p99_ttft_ms", "time to first token, 99th percentile", "ms"),
    ("median_tpot_ms", "time per output token, median", "ms"),
    ("median_e2e_latency_ms", "whole request, median", "ms"),
    ("output_throughput", "output throughput", "tokens/s"),
    ("total_throughput", "total throughput", "tokens/s"),
    ("duration", "all requests", "s"),
)


def load_arguments(
    port: int, tokenizer: Path, requests: dict[str, Any], out: Path, text: bool = False
) -> list[str]:
    """Of one run of ``sglang.bench_serving``; ``requests`` are its options, ``text`` are its prompts."""
    options = {
        "backend": "sglang",
        "host": "127.0.0.1",
        "port": port,
        "model": tokenizer,
        "tokenizer": tokenizer,
        "dataset-name": "random-ids",
        "random-range-ratio": 1.0,
        "output-file": out,
        **requests,
    }
    flags = ["--disable-tqdm"] if text else ["--tokenize-prompt", "--disable-tqdm"]
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [*pairs, *flags]


def environment(scratch: Path) -> dict[str, str]:
    """For bench_serving, which imports the package of data sets that this workload does not use."""
    found = dict(os.environ)
    return with_stand_in(found, scratch) if importlib.util.find_spec("datasets") is None else found


def with_stand_in(environment: dict[str, str], scratch: Path) -> dict[str, str]:
    """Variables with which that package is found."""
    stand_in = scratch / "stand_in"
    stand_in.mkdir(exist_ok=True)
    (stand_in / "datasets.py").write_text("load_dataset = None\n")
    path = os.pathsep.join([str(stand_in), environment.get("PYTHONPATH", "")])
    return environment | {"PYTHONPATH": path}


def measured(
    line: str, prompts: int, wanted: tuple[tuple[str, str, str], ...] = MEASURED
) -> list[tuple[str, float, str]]:
    """Name, value and unit of what one line of bench_serving's output file says.

    Raises:
        ValueError: if a request failed, or a figure is missing.
    """
    found = json.loads(line)
    if found.get("completed") != prompts:
        raise ValueError(f"{found.get('completed')} of {prompts} requests were completed")
    missing = [name for name, _, _ in wanted if name not in found]
    if missing:
        raise ValueError(f"bench_serving does not tell {', '.join(missing)}")
    return [(label, float(found[name]), unit) for name, label, unit in wanted]
