"""The engine of ``steps.py`` in a process of its own: `bench.workers.engine` with commands for graphs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bench.workers.engine import Worker, main, prompts


class StepsWorker(Worker):
    """The commands."""

    def capture(self, patches: list[str], fetched: dict[str, int], profile: str) -> dict[str, Any]:
        """See `bench.inside.steps.capture`."""
        return self.scheduler(do="capture", patches=patches, fetched=fetched, profile=profile)

    def step(self, batch: int, length: int, seed: int, count: int, times: int) -> dict[str, Any]:
        """See `bench.inside.steps.replay`: of so many sequences behind prompts of this length."""
        self.generate(prompts(batch, length, seed), 8)
        return self.scheduler(do="replay", count=count, times=times)

    def scheduler(self, **asked: Any) -> dict[str, Any]:
        """What the scheduler's process answers; ``error``: the exception that it had."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "answer.json")
            try:
                self.engine.collective_rpc("bench_steps", asked=json.dumps(asked), out=str(out))
            except AssertionError as error:  # SGLang's way to say so
                return {"error": str(error) or "the scheduler says nothing"}
            found: dict[str, Any] = json.loads(out.read_text())
        return found


if __name__ == "__main__":  # SGLang's spawned processes import this file again
    main(StepsWorker)
