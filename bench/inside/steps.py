"""A decode step's CUDA graph in a running engine: captured with some patches and no others, replayed and timed.

`install` gives SGLang's scheduler a method for its `collective_rpc`. The scheduler does nothing else meanwhile.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_last: Any = None
"""The graph that was replayed last: a decode step's, as these engines have no graphs of a prefill."""


def install(module: Any) -> None:
    """Into ``sglang.srt.managers.scheduler``."""
    import torch

    graph: Any = torch.cuda.CUDAGraph
    replay = graph.replay

    def noted(self: Any) -> None:
        global _last
        _last = self
        replay(self)

    graph.replay = noted
    module.Scheduler.bench_steps = answer


def answer(scheduler: Any, asked: str, out: str) -> None:
    """One of `COMMANDS`: its name and arguments as JSON, what it returns into a file.

    The call takes numbers and texts alone, and returns nothing.
    """
    arguments = json.loads(asked)
    found = COMMANDS[arguments.pop("do")](scheduler, **arguments)
    Path(out).write_text(json.dumps(found))


def capture(
    scheduler: Any, patches: list[str], fetched: dict[str, int], profile: str
) -> dict[str, dict[str, Any]]:
    """All decode graphs anew, with these patches alone.

    ``fetched``: by weight, as ``8192x2816``, how many blocks `skinny_gemm` fetches while it waits.
    ``profile``: path of the GPU profile whose tiles are taken; empty: of none.

    Returns:
        by patch: its state, why, and how many calls of the capture ran its code.
    """
    global _last
    from gemma4_turbo.instance import ENGINE

    ENGINE.revert()
    if patches:
        ENGINE.apply(only=patches)
    _fetch(fetched)
    runner = scheduler.tp_worker.model_runner
    _take_tiles(profile, runner.model)
    before = {row.name: row.engaged for row in ENGINE.status(below=False)}
    _last = None  # or its memory would be kept
    # Two names: of 0.5.23, and of 0.5.12.post1.
    again = getattr(runner, "recapture_decode_cuda_graph", None) or runner.init_device_graphs
    again()
    gc.collect()  # the runner before it, whose graphs hold memory, is in a cycle
    return {
        row.name: {
            "state": row.state,
            "reason": row.reason,
            "ran": row.engaged - before[row.name],
        }
        for row in ENGINE.status(below=False)
    }


def replay(scheduler: Any, count: int, times: int) -> dict[str, list[float]]:
    """ms of the last decode step's graph: ``times`` means of ``count`` replays, one right behind the other."""
    import torch

    if _last is None:
        raise RuntimeError("no CUDA graph was replayed since the capture")
    torch.cuda.synchronize()
    graph, found = _last, []
    for _ in range(times + 1):  # once more, first: it is not counted
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / count)
    return {"ms": found[1:]}


COMMANDS: dict[str, Callable[..., Any]] = {"capture": capture, "replay": replay}


def _take_tiles(profile: str, model: Any) -> None:
    """RuntimeError if the profile is not for this machine."""
    from gemma4_turbo.engine import gpu_profile
    from gemma4_turbo.fusions.site import SITE
    from gemma4_turbo.kernels import measured

    os.environ["GEMMA4_TURBO_GPU_PROFILE"] = profile or "0"
    for module in (gpu_profile, measured):
        module.forget()
    for layer in model.modules():
        layer.__dict__.pop(SITE, None)  # they have chosen their tiles
    path, holds, why = gpu_profile.lookup()
    if profile and holds is None:
        raise RuntimeError(f"the GPU profile {path} is not used: {why or 'there is none'}")


def _fetch(blocks: dict[str, int]) -> None:
    from gemma4_turbo.kernels import skinny_gemm

    kernel: Any = skinny_gemm
    launch = getattr(kernel.launch_skinny_gemm, "launch", kernel.launch_skinny_gemm)
    usual = kernel.PREFETCH_BLOCKS

    def launched(x: Any, weight: Any, *more: Any) -> Any:
        kernel.PREFETCH_BLOCKS = blocks.get("x".join(map(str, weight.shape)), usual)
        try:
            return launch(x, weight, *more)
        finally:
            kernel.PREFETCH_BLOCKS = usual

    launched.launch = launch  # type: ignore[attr-defined]
    kernel.launch_skinny_gemm = launched if blocks else launch
