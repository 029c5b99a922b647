"""Programmatic dependent launch between kernels of this package (Hopper and later).

A kernel launched with it starts while its predecessor still runs, if that one has said that it may
(`launch_dependents`), reads what does not depend on the predecessor, its weights, and then waits until
the predecessor's results are there (`wait`). After a kernel that says nothing it starts as usual.
Every kernel here waits before it reads an activation or writes anything.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

wanted = False
"""Set by the patch `pdl`."""

launches = 0
"""How many kernels were launched this way so far."""


@triton.jit
def wait(PDL: tl.constexpr):
    """Until everything that earlier kernels wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """The next kernel may start as soon as all programs of this one have said so."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(address):
    """Fetch the cache lines of these addresses into the L2 cache: work for the time before `wait`."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def options(like: torch.Tensor) -> dict[str, Any]:
    """Launch options for a kernel that takes ``PDL``; the launch is counted."""
    global launches
    if not (wanted and supported(like.device)):
        return {"PDL": False}
    launches += 1
    return {"PDL": True, "launch_pdl": True}


_supported: dict[torch.device, bool] = {}


def supported(device: torch.device) -> bool:
    """Whether the GPU has it, compute capability 9.0, and Triton: the first ones do not."""
    if device not in _supported:
        _supported[device] = (
            device.type == "cuda"
            and torch.version.hip is None
            and hasattr(tl.extra.cuda, "gdc_wait")
            and torch.cuda.get_device_capability(device) >= (9, 0)
        )
    return _supported[device]
