"""What a process of `gemma4_turbo.cli.tuning.compiling` is made into before its first job.

One that compiles launches nothing: a kernel of its own would run into a measurement. One for our kernels
does not even know the GPU. Triton asks its driver for the compute capability alone until a kernel is
loaded, and tensors only for the alignment of their address, so tensors of the host stand for the GPU's, and
what would be drawn into them is not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import parent_process
from typing import Any

OURS, STOCK, CALLS = "ours", "stock", "calls"


def begin(kind: str) -> None:
    """The initializer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if kind == CALLS:
        _import_sglang()
        return
    os.environ["GEMMA4_TURBO"] = "0"
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    draw_nothing()
    if kind == OURS:
        with contextlib.suppress(Exception):  # it is imported again where it is needed
            from gemma4_turbo.cli.tuning import decode, experts, extend, linear  # noqa: F401
    else:
        _import_sglang()


def _import_sglang() -> None:
    """Its sources that a line needs; it is imported again where that failed."""
    from gemma4_turbo.cli import lines

    with contextlib.suppress(Exception):
        lines.stock()
        lines.rules()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def draw_nothing() -> None:
    """Random tensors are as the memory is."""
    import torch

    def empty(*size: Any, generator: Any = None, **options: Any) -> torch.Tensor:
        return torch.empty(*size, **options)

    def as_it_is(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self

    torch.randn = empty
    torch.Tensor.normal_ = as_it_is  # type: ignore[assignment, method-assign]


class StandIn:
    """A driver that knows what it compiles for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> Any:
        """For which GPU."""
        return self.target

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None."""
        return 0


def stand_in(gpu: tuple[Any, ...], early: bool) -> None:
    """The host's tensors as if they were on a GPU.

    Args:
        gpu: a `gemma4_turbo.kernels.gpu.Gpu`.
        early: `gemma4_turbo.kernels.pdl.wanted`.
    """
    import torch
    import triton.language as tl
    from triton.runtime import driver

    from gemma4_turbo.kernels import gpu as gpus
    from gemma4_turbo.kernels import pdl

    here = gpus.Gpu(*gpu)
    if here != gpus.INTERPRETER or not isinstance(driver.active, StandIn):
        gpus.INTERPRETER = here
        gpus.gpu.cache_clear()
        driver.set_active(StandIn(here.capability))
    pdl.wanted = early
    has = here.capability >= (9, 0) and hasattr(tl.extra.cuda, "gdc_wait")
    pdl._supported[torch.device("cpu")] = has


def ours(
    compile_: Callable[[Any, Any, str], None], subject: Any, tile: Any, gpu: Any, early: bool
) -> None:
    """Compile a tile of ours for a GPU."""
    stand_in(gpu, early)
    compile_(subject, tile, "cpu")


def nothing() -> None:
    """To have a process start."""


def run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A job, its result. What does not compile, out of shared memory above all, is met again where it is tried."""
    import torch

    try:
        with torch.no_grad():
            return function(*arguments)
    except Exception as error:
        return Failed(f"{type(error).__name__}: {error}"[:300])
    finally:
        if torch.cuda.is_initialized():
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()


class Failed(str):
    """What a job has said at its end."""
