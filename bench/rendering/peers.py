"""Tables of ``peers.py``'s newest run for README and docs; None where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from bench.peer.results import FIELDS, HEADER, lines, summary
from bench.rendering.text import markdown, newest_rows

CSV, PLOT = "peers.csv", "peers.png"
GIVEN = ("model", "model_path", "load_format", "skip_tokenizer_init", "log_level")  # to all


def read(results: Path) -> pd.DataFrame | None:
    """The newest run."""
    path = results / CSV
    if not path.exists():
        return None
    frame = pd.read_csv(path)
    return newest_rows(frame.reindex(columns=FIELDS)) if len(frame) else None


def engines(frame: pd.DataFrame) -> str:
    """A row for every engine: versions, attention backend, flags, patches."""
    rows = []
    for name, own in frame.groupby("engine", sort=False):
        kind = own["kind"].iloc[0]
        package = "vllm" if kind == "vllm" else "sglang"
        patches = {name for text in own["patches"].dropna() for name in str(text).split("+")}
        flags = [json.loads(text) for text in own["flags"].dropna().unique()]
        apart = {
            f"`{key}={json.dumps(value) if not isinstance(value, str) else value}`"
            for one in flags
            for key, value in one.items()
            if key not in GIVEN
        }
        rows.append(
            [
                str(name),
                f"{'vLLM' if kind == 'vllm' else 'SGLang'} {only(own[package])}",
                f"torch {only(own['torch'])}, Triton {only(own['triton'])}",
                only(own["attention_backend"]),
                ", ".join(sorted(apart)) or "-",
                f"{len(patches)} engaged" if patches else "-",
            ]
        )
    header = ["engine", "release", "versions", "attention", "flags", "patches"]
    return markdown(header, rows)


def only(values: pd.Series) -> str:
    """All different ones; mostly one."""
    return ", ".join(map(str, values.dropna().unique())) or "-"


def peers(results: Path) -> str | None:
    """All measurements, a row per setting, workload and engine."""
    frame = read(results)
    if frame is None:
        return None
    table = markdown(list(HEADER), lines(summary(frame)))
    first = frame.iloc[0]
    return (
        f"## Measured\n\n{table}\n\n{engines(frame)}\n\nMedians of {frame['round'].nunique()} rounds, "
        "engines one after the other, the second round in reverse order; an engine that does not start "
        "or answer is a row that says why. Flags are those that one of its starts had; model folder, random weights "
        f"and token prompts are every engine's. `python bench/peers.py`. {first['gpu']}, "
        f"{first['timestamp'][:10]}."
    )


def plot(results: Path) -> str | None:
    """For README: the picture and where its numbers are."""
    if read(results) is None or not (results / PLOT).exists():
        return None
    return (
        "## Against stock SGLang and vLLM\n\n"
        f"![Time of every engine, the best without the patches is 1](bench/results/{PLOT})\n\n"
        "Same models, prompts and sampling, one GPU; versions, flags and what was not representative: "
        "[against the field](docs/results/peers.md)."
    )
