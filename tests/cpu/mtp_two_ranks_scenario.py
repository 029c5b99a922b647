"""`mtp_seed_graph` and `mtp_chain` in two processes of tensor parallelism over gloo: a fault on GPU 1 alone.

Worker, graph runner and stand-ins are those of `tests.cpu.mtp_draft_scenario`; the assistant's states
are summed over the two, so that whoever makes a sum alone waits for it. What each of them saw is printed
as JSON, a list of two.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.cpu import mtp_draft_scenario as drafts
from tests.cpu.two_processes import both

PATIENCE = datetime.timedelta(seconds=30)
"""For what must never happen: one waits in a sum, the other in none."""


def group() -> Any:
    """As much of SGLang's group of tensor parallelism as is asked for."""

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x / 2

    return SimpleNamespace(all_reduce=all_reduce, barrier=dist.barrier)


def seen(rank: int) -> dict[str, Any]:
    """A seed by stock, with the patch, and with a capture that fails on GPU 1."""
    import gemma4_turbo
    from gemma4_turbo.instance import ENGINE
    from gemma4_turbo.ports.any import ranks
    from gemma4_turbo.ports.v0_5_12.speculation import mtp_seed_graph

    run = ENGINE.runs["mtp_seed_graph"]
    method = mtp_seed_graph.METHOD

    def told() -> dict[str, Any]:
        run._decline_reason = ""
        worker = drafts.make_worker(graphs=True, tp_group=group())
        running = drafts.batch("a", "b", "c")
        drafts.seed(worker, running)
        return {
            "seed": drafts.seed_of(running),
            "ours": method in vars(worker),
            "reason": run._decline_reason,
            "state": run.state,
            "graphs": sorted(worker.cuda_graph_runner.graphs),
        }

    found: dict[str, Any] = {"stock": told()}
    rows = {row.name: row for row in gemma4_turbo.apply(only=["mtp_seed_graph"])}
    assert rows["mtp_seed_graph"].state == "active", rows
    found["none"] = told()
    fault = RuntimeError("out of memory") if rank else None
    batch = mtp_seed_graph._batch
    with mock.patch.object(mtp_seed_graph, "_batch", side_effect=fault, wraps=batch):
        found["capture"] = told()
    gemma4_turbo.apply(only=["mtp_chain"])
    forward = drafts.Assistant.forward
    calls: list[Any] = []

    def fails_once(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if rank and len(calls) == 2:  # the first step's sum is made
            raise RuntimeError("no such kernel")
        return forward(*given, **named)

    with (  # the last thing: a sum stays open. SGLang's own group is of this process alone
        mock.patch.object(drafts.Assistant, "forward", fails_once),
        mock.patch.object(ranks, "gpus", return_value=2),
    ):
        try:
            drafts.make_worker(graphs=True, tp_group=group())
            found["draft"] = {"error": None}
        except Exception as error:
            found["draft"] = {"error": str(error)}
    gemma4_turbo.revert()
    return found


def main(folder: Path) -> None:
    """Both processes; the second one is a fork, so that SGLang is imported once."""
    drafts.import_worker(folder)
    from gemma4_turbo.cli.sglang_process import prepare_sglang

    def found(rank: int) -> dict[str, Any]:
        prepare_sglang()
        dist.destroy_process_group()  # of this process alone
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", meeting, PATIENCE, world_size=2, rank=rank)
        return seen(rank)

    both(folder, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
