"""What ``import gemma4_turbo; gemma4_turbo.apply()`` adds to a bare interpreter, in milliseconds.

python bench/apply.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

ROUNDS = 10


def milliseconds(code: str) -> float:
    """Median wall time of a fresh interpreter that runs ``code``."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append((time.perf_counter() - started) * 1e3)
    return median(times)


if __name__ == "__main__":
    bare = milliseconds("pass")
    applied = milliseconds("import gemma4_turbo; gemma4_turbo.apply()")
    print(f"bare {bare:.1f} ms, with apply() {applied:.1f} ms, added {applied - bare:.1f} ms")
