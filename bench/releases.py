"""Which patch fits which SGLang release, judged on the sources in the releases' wheels.

python bench/releases.py sglang-*.whl           # record the verdicts in bench/results/releases.csv
python bench/releases.py --check sglang-*.whl   # exit 1 if a wheel is recorded otherwise
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.rendering.catalogue import LOOKS
from gemma4_turbo.catalogue import CATALOGUE, Patch
from gemma4_turbo.engine import fingerprints
from gemma4_turbo.instance import PORTS

RECORD = Path(__file__).resolve().parent / "results" / "releases.csv"


def judged(wheel: Path) -> list[dict[str, str]]:
    """A row per patch: its state on the release in ``wheel``."""
    release = wheel.name.split("-")[1]
    definitions = fingerprints.Definitions(fingerprints.wheel_source(wheel))

    def state(patch: Patch) -> str:
        verdict = fingerprints.judge(PORTS[patch.name], release, definitions)
        looks = verdict.port is not None and verdict.port.finds_defect
        return LOOKS if looks else verdict.state

    return [{"release": release, "patch": patch.name, "state": state(patch)} for patch in CATALOGUE]


def main(
    wheels: list[Path], check: Annotated[bool, typer.Option(help="Only compare")] = False
) -> None:
    """Record what the wheels say, the other releases as they are; or compare."""
    found = pd.DataFrame([row for wheel in wheels for row in judged(wheel)])
    recorded = pd.read_csv(RECORD, dtype=str) if RECORD.exists() else found.head(0)
    same = recorded["release"].isin(found["release"])
    if check:
        keys = ["release", "patch", "state"]
        before, now = (
            set(frame[keys].itertuples(index=False, name=None)) for frame in (recorded[same], found)
        )
        for row in sorted(before ^ now):
            print(*row, "recorded" if row in before else "found")
        sys.exit(before != now)
    order = list(fingerprints.known_releases())  # oldest first
    merged = pd.concat([recorded[~same], found])
    merged = merged.sort_values(
        "release", key=lambda column: column.map(order.index), kind="stable"
    )
    merged.to_csv(RECORD, index=False)


if __name__ == "__main__":
    typer.run(main)
