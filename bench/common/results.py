"""Rows of a CSV with everything that identifies the run, their medians and their picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from bench.common.provenance import provenance
from bench.common.variants import PATCHED, STOCK
from gemma4_turbo.models import geometry


def append(frame: pd.DataFrame, out: Path) -> None:
    """Write rows behind those of a CSV. Where the columns differ the file gets those of both, and no value
    comes under another's name."""
    if out.exists():
        old = pd.read_csv(out, dtype=str, keep_default_na=False)
        if list(old.columns) != list(frame.columns):
            both = pd.concat([old, frame.astype(object)])
            scratch = out.with_name(f"{out.name}.new")
            both.to_csv(scratch, index=False)
            scratch.replace(out)
            return
    frame.to_csv(out, mode="a", header=not out.exists(), index=False)


class Results:
    """Rows for the CSV, with everything that identifies the run."""

    pair = (STOCK, PATCHED)
    """The ratio is of the second to the first."""

    def __init__(self, model: str, layers: int | None, patches: list[str], tp: int = 1) -> None:
        self.rows: list[dict[str, Any]] = []
        self.base: dict[str, Any] = {
            **provenance(),
            # Decides which RMSNorm stock runs; a library that is only on PYTHONPATH counts too.
            "norms": "cute" if find_spec("cutlass") else "cuda",
            "tp": tp,
            "model": model,
            "layers": layers or geometry.GEOMETRIES[model].layers,
            "patches": "+".join(patches) or "all",
        }

    def add(
        self, variant: str, quantity: str, x: int, round_: int, value: float, unit: str
    ) -> None:
        """One measurement."""
        self.rows.append(
            {
                **self.base,
                "variant": variant,
                "quantity": quantity,
                "x": x,
                "round": round_,
                "value": value,
                "unit": unit,
            }
        )

    def frame(self) -> pd.DataFrame:
        """All rows."""
        return pd.DataFrame(self.rows)

    def summary(self) -> pd.DataFrame:
        """Medians per variant and the ratio of the `pair`."""
        frame = self.frame()
        if frame.empty:
            return frame
        table = frame.pivot_table(
            index=["quantity", "x", "unit"], columns="variant", values="value", aggfunc="median"
        )
        if set(self.pair) <= set(table.columns):
            table["ratio"] = table[self.pair[1]] / table[self.pair[0]]
        return table.reset_index()

    def save(self, out: Path) -> None:
        """Append to the CSV and draw the ratios of this run beside it."""
        frame = self.frame()
        if frame.empty:
            return
        append(frame, out)
        summary = self.summary()
        if "ratio" not in summary:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        timed = summary[summary["unit"] == "ms"]
        figure, axes = plt.subplots(figsize=(8, 4))
        labels = [f"{q}\n{x}" for q, x in zip(timed["quantity"], timed["x"], strict=True)]
        axes.bar(labels, timed["ratio"])
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylabel(" / ".join(reversed(self.pair)))
        axes.set_title(f"{self.base['model']}, {self.base['patches']}, {self.base['gpu']}")
        figure.tight_layout()
        figure.savefig(out.with_suffix(".png"), dpi=120)
