"""One scenario in two processes, GPU 0 and GPU 1 of tensor parallelism."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch


def both(folder: Path, seen: Callable[[int], Any]) -> NoReturn:
    """Print what both see as JSON, a list of two, and end; the second one is a fork of this process.

    Args:
        folder: for what the second one tells, and for the reports of both.
        seen: by rank; it joins the other one.
    """
    rank = 1 if os.fork() == 0 else 0
    os.environ["GEMMA4_TURBO_STATE_DIR"] = str(folder / f"state{rank}")
    answer = folder / "second.json"
    try:
        torch.set_num_threads(1)
        found = seen(rank)
        if rank:
            answer.write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        if rank:
            sys.stderr.flush()
            os._exit(0 if answer.exists() else 1)
    _, status = os.wait()
    assert status == 0, "the second process has failed"
    print(json.dumps([found, json.loads(answer.read_text())]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads wait for the other one's
