"""Rows, table and plot of ``peers.py``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from bench.common.provenance import provenance
from bench.peer.engine import Peer

FIELDS = [
    *("timestamp", "gpu", "engine", "kind", "sglang", "vllm", "gemma4_turbo", "torch", "triton"),
    *("python", "attention_backend", "flags", "resolved", "patches", "setting", "model", "layers"),
    *("workload", "requests", "round", "quantity", "value", "unit", "reason"),
]
DURATION, OUTPUT, TOTAL = "duration", "output tokens a second", "total tokens a second"
FIRST, FIRST_99 = "first token, median", "first token, 99th percentile"
EACH, EACH_99 = "time per token, median", "time per token, 99th percentile"
STEP, READY, FAILED = "verify step", "ready", "failed"
LOWER = (DURATION, FIRST, FIRST_99, EACH, EACH_99, STEP)  # is better
TARGETS = {  # by workload: what is compared, and the ratio of ours to the best other
    "A": (DURATION, 0.85),
    "B": (DURATION, 0.88),
    "C": (DURATION, 0.87),
    "E2B": (DURATION, 0.6),
    "E4B": (DURATION, 0.6),
    "serving, 8 a second": (FIRST, 0.7),
    "MTP": (STEP, 0.9),
    "MTP1": (STEP, 0.9),
}
KEYS = ["setting", "workload", "engine", "kind"]


def duration(answer: dict[str, Any]) -> float:
    """Seconds from the first request that was sent to the last token."""
    rows = answer["requests"]
    return float(max(row["last"] for row in rows) - min(row["sent"] for row in rows))


def figures(answer: dict[str, Any], asked: list[dict[str, Any]]) -> list[tuple[str, float, str]]:
    """Name, value and unit of what a worker measured.

    Raises:
        ValueError: if a request got another number of tokens than it asked for.
    """
    rows = answer["requests"]
    wrong = [
        row["tokens"] for row, one in zip(rows, asked, strict=True) if row["tokens"] != one["new"]
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(rows)} requests got other numbers of tokens")
    seconds = duration(answer)
    made = sum(row["tokens"] for row in rows)
    read = sum(row["prompt"] for row in rows)
    first = [(row["first"] - row["sent"]) * 1e3 for row in rows]
    decoding = [row["last"] - row["first"] for row in rows]
    each = [
        lasted / (row["tokens"] - 1) * 1e3
        for row, lasted in zip(rows, decoding, strict=True)
        if row["tokens"] > 1
    ]
    found = [
        (DURATION, seconds, "s"),
        (OUTPUT, made / seconds, "tokens/s"),
        (TOTAL, (made + read) / seconds, "tokens/s"),
        (FIRST, float(np.percentile(first, 50)), "ms"),
        (FIRST_99, float(np.percentile(first, 99)), "ms"),
    ]
    if each:
        found.append((EACH, float(np.percentile(each, 50)), "ms"))
        found.append((EACH_99, float(np.percentile(each, 99)), "ms"))
    if answer["steps"]:
        found.append((STEP, sum(decoding) / answer["steps"] * 1e3, "ms"))
        found.append(("tokens a verify step", (made - len(rows)) / answer["steps"], "tokens"))
    return found


class Rows:
    """The CSV, which grows with every measurement; what it has of this run is not measured again."""

    def __init__(self, out: Path, resume: bool, again: bool = False) -> None:
        self.out, self.again = out, again
        self.base = {
            name: text for name, text in provenance().items() if name in ("timestamp", "gpu")
        }
        self.rows: list[dict[str, Any]] = []
        if out.exists():
            frame = pd.read_csv(out)
            if list(frame.columns) != FIELDS:
                raise ValueError(f"{out} has other columns; name another file")
            if resume and not frame.empty:
                frame = frame[frame["timestamp"] == frame["timestamp"].max()]
                self.base["timestamp"] = frame["timestamp"].iloc[0]
                self.rows = frame.to_dict("records")

    def has(self, peer: Peer, setting: str, workload: str, round_: int) -> bool:
        """Whether this was measured before, or failed and is not to be tried again."""
        wanted = (peer.name, setting, workload, round_)
        return any(
            (row["engine"], row["setting"], row["workload"], row["round"]) == wanted
            and row["quantity"] != READY
            and not (self.again and row["quantity"] == FAILED)
            for row in self.rows
        )

    def add(
        self,
        peer: Peer,
        about: dict[str, Any],
        place: dict[str, Any],
        found: list[tuple[str, float | None, str]],
        why: str = "",
    ) -> None:
        """Rows of one measurement, written at once.

        Args:
            about: what the engine said of itself, empty where it did not start.
            place: setting, model, layers, workload, requests, round, flags and patches.
        """
        own = "vllm" if peer.kind == "vllm" else "sglang"
        told = {
            **self.base,
            "engine": peer.name,
            "kind": peer.kind,
            own: about.get("version"),
            **{name: about.get(name) for name in ("gemma4_turbo", "torch", "triton", "python")},
            "attention_backend": about.get("attention_backend"),
            "resolved": json.dumps(about.get("resolved", {})),
            **place,
            "reason": why,
        }
        new = [
            {**dict.fromkeys(FIELDS), **told, "quantity": quantity, "value": value, "unit": unit}
            for quantity, value, unit in found
        ]
        self.rows += new
        fresh = not self.out.exists()
        with self.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if fresh:
                writer.writeheader()
            writer.writerows(new)

    def frame(self) -> pd.DataFrame:
        """All rows of this run."""
        return pd.DataFrame(self.rows, columns=FIELDS)


# -- telling --------------------------------------------------------------------------------------


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A line per setting, workload and engine, in the order measured: medians of the rounds."""
    if frame.empty:
        return frame
    order = frame[KEYS].drop_duplicates()
    values = frame[frame["value"].notna()].assign(value=lambda rows: rows["value"].astype(float))
    medians = values.pivot_table(index=KEYS, columns="quantity", values="value", aggfunc="median")
    why = frame[frame["quantity"] == FAILED].groupby(KEYS)["reason"].last()
    found = order.join(medians, on=KEYS).join(why, on=KEYS)
    measured = found[DURATION].notna() if DURATION in found else False
    return found[measured | found["reason"].notna()].reset_index(drop=True)


def best_other(found: pd.DataFrame, setting: str, workload: str, quantity: str) -> float | None:
    """The least of all engines without the patches."""
    here = (found["setting"] == setting) & (found["workload"] == workload)
    if quantity not in found:
        return None
    least = found[here & (found["kind"] != "ours")][quantity].min()
    return None if pd.isna(least) else float(least)


def ratio(found: pd.DataFrame, line: pd.Series, quantity: str) -> float | None:
    """An engine's figure, divided by that of the best other engine."""
    best = best_other(found, line["setting"], line["workload"], quantity)
    value = line.get(quantity)
    return None if best is None or value is None or pd.isna(value) else float(value) / best


def verdict(found: pd.DataFrame, line: pd.Series) -> str:
    """What the target says of a line of ours; nothing of others."""
    if line["kind"] != "ours" or line["workload"] not in TARGETS:
        return ""
    quantity, most = TARGETS[line["workload"]]
    reached = ratio(found, line, quantity)
    if reached is None:
        return ""
    return f"{quantity} {reached:.3f}, at most {most}: {'met' if reached <= most else 'missed'}"


HEADER = (
    *("setting", "workload", "engine", "s", "to the best other", "output/s", "total/s"),
    *("first, ms", "99th", "per token, ms", "99th", "verify step, ms", "target"),
)


def lines(found: pd.DataFrame) -> list[list[str]]:
    """The cells below `HEADER`; what failed says why."""
    told = []
    for _, line in found.iterrows():
        names = [line["setting"], line["workload"], line["engine"]]
        if DURATION not in line or pd.isna(line[DURATION]):
            told.append([*names, str(line["reason"]).replace("|", "/"), *[""] * (len(HEADER) - 4)])
            continue
        times = ratio(found, line, DURATION)
        cells = [f"{line[DURATION]:.2f}", "-" if times is None else f"{times:.3f}"]
        for quantity, digits in (
            (OUTPUT, 0),
            (TOTAL, 0),
            (FIRST, 0),
            (FIRST_99, 0),
            (EACH, 2),
            (EACH_99, 2),
            (STEP, 2),
        ):
            value = line.get(quantity)
            cells.append("-" if value is None or pd.isna(value) else f"{value:.{digits}f}")
        told.append([*names, *cells, verdict(found, line)])
    return told


def table(found: pd.DataFrame) -> Table:
    """For the terminal."""
    made = Table(title="Medians of the rounds", title_justify="left")
    for heading in HEADER:
        made.add_column(heading, overflow="fold")
    for cells in lines(found):
        made.add_row(*cells)
    return made


def plot(found: pd.DataFrame, out: Path) -> None:
    """Duration of every engine divided by that of the best without the patches, a panel per setting."""
    if DURATION not in found:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = found[found[DURATION].notna()]
    settings = list(dict.fromkeys(timed["setting"]))
    figure, panels = plt.subplots(len(settings), 1, figsize=(9, 3.2 * len(settings)), squeeze=False)
    for axes, setting in zip(panels[:, 0], settings, strict=True):
        here = timed[timed["setting"] == setting]
        workloads, engines = (list(dict.fromkeys(here[name])) for name in ("workload", "engine"))
        width = 0.8 / len(engines)
        for number, engine in enumerate(engines):
            own = here[here["engine"] == engine]
            pairs = [
                (workloads.index(line["workload"]), ratio(found, line, DURATION))
                for _, line in own.iterrows()
            ]
            at = [place + number * width for place, value in pairs if value is not None]
            axes.bar(at, [value for _, value in pairs if value is not None], width, label=engine)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks([i + 0.4 - width / 2 for i in range(len(workloads))], workloads)
        axes.set_ylabel("time, best other = 1")
        axes.set_title(setting)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)
