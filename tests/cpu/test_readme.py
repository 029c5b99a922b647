"""README: its figures come from the measurements in bench/results, its names exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.engine import states, switches

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_measurements():
    done = subprocess.run(
        [sys.executable, "bench/tables.py", "--check"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, "README's tables are out of date: make tables"


def test_every_switch_and_state_is_documented():
    for patch in CATALOGUE:
        assert patch.env in TEXT
        assert patch.numerics in TEXT
    for variable in (switches.PROFILE, switches.STRICT, switches.LOG, switches.STATE_DIR):
        assert variable in TEXT
    for state in states.STATES:
        assert f"`{state}`" in TEXT
