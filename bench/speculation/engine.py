"""An engine with an MTP assistant, or without."""

from __future__ import annotations

import contextlib
import os
import signal

from bench.common.engines import Engine


class MtpEngine(Engine):
    """With the commands of `workers.mtp`; leaves nothing of its process group behind."""

    script = "workers/mtp.py"

    def stop(self) -> None:
        assert self.process.stdin is not None
        if self.process.stdin.closed:
            return  # stopped before; its number can be another's by now
        super().stop()
        with contextlib.suppress(ProcessLookupError):  # what a scheduler that died left
            os.killpg(self.process.pid, signal.SIGKILL)
