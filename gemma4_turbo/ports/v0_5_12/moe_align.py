"""`moe_align`: small batches are grouped by expert with `gemma4_turbo.kernels.moe_align`.

The function is a module's own, called inside SGLang's opaque fused-experts operators, which
torch.compile does not look into. Should a trace reach it all the same, it sees stock's function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.kernels import moe_align as kernel
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

TARGET = "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size:moe_align_block_size"
Align = Callable[[torch.Tensor, int, int], kernel.Alignment]

_verdicts = Verdicts()  # per device and compiled kernel


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernel where it fits and has passed its check, else stock."""
    align: Align = stock[TARGET]

    @functools.wraps(align)
    def moe_align_block_size(
        topk_ids: torch.Tensor, block_size: int, num_experts: int
    ) -> kernel.Alignment:
        if torch.compiler.is_compiling():
            return align(topk_ids, block_size, num_experts)
        reason = kernel.unfit(topk_ids, block_size, num_experts)
        if reason is None:
            capturing = custom_ops.capturing()
            reason = _unproven(run, align, topk_ids, block_size, num_experts, capturing)
            if reason is None:
                run.engaged(capturing)
                return kernel.launch_align(topk_ids, block_size, num_experts)
        run.declined(reason)
        return align(topk_ids, block_size, num_experts)

    return {TARGET: moe_align_block_size}


def _unproven(
    run: PatchRun,
    align: Align,
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    capturing: bool,
) -> str | None:
    """Why this compiled kernel may not run here, or None. Without a GPU there is no stock."""
    key = (topk_ids.device, kernel.variant(topk_ids), block_size, num_experts)
    waiting = None
    if capturing:
        waiting = f"{topk_ids.numel()} slots were not compared with stock before the capture"
    return _verdicts.unfit(
        run, key, waiting, lambda: _compare(align, *key) if topk_ids.is_cuda else None
    )


def _compare(
    align: Align, device: torch.device, slots: int, block_size: int, num_experts: int
) -> str | None:
    generator = torch.Generator(device).manual_seed(0)  # the global state stays as it is
    for what, topk_ids in samples(slots, num_experts, generator):
        expected = align(topk_ids, block_size, num_experts)
        got = kernel.launch_align(topk_ids, block_size, num_experts)
        wrong = kernel.difference(got, expected, block_size)
        if wrong is not None:
            return (
                f"self-check: {slots} slots, {what}, blocks of {block_size}: {wrong}, on "
                f"{torch.cuda.get_device_name(device)} with torch {torch.__version__}"
            )
    return None


def samples(
    slots: int, num_experts: int, generator: torch.Generator
) -> list[tuple[str, torch.Tensor]]:
    """Expert ids ``[slots, 1]`` or a little fewer, by kind."""

    def drawn(low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(
            low,
            high,
            (count, 1),
            generator=generator,
            device=generator.device,
            dtype=torch.int32,
        )

    return [
        ("any expert", drawn(0, num_experts, slots)),
        ("any expert, some on another rank", drawn(-1, num_experts, slots - slots // 8)),
        ("few experts", drawn(-1, min(3, num_experts), slots)),
        ("one expert", drawn(num_experts - 1, num_experts, slots)),
    ]


def verify(run: PatchRun, device: str) -> list[Check]:
    """One launch against stock's function (on a GPU) or plain torch (without)."""
    align: Align = run.swaps[0].function if device == "cuda" else kernel.reference_align
    against = "stock's function on this GPU" if device == "cuda" else "plain torch"
    generator = torch.Generator(device).manual_seed(1)
    found: dict[str, list[tuple[int, bool]]] = {}
    for slots in (8, 32, 64, 256, 512) if device == "cuda" else (8, 64):
        for block_size in (16, 64):
            for what, topk_ids in samples(slots, 128, generator):
                expected = align(topk_ids, block_size, 128)
                got = kernel.moe_align(topk_ids, block_size, 128)
                equal = kernel.difference(got, expected, block_size) is None
                found.setdefault(what, []).append((topk_ids.numel(), equal))
    return [
        Check(
            "moe_align",
            what,
            against,
            sum(slots for slots, _ in results),
            sum(slots for slots, equal in results if not equal),
            "the order inside an expert",
            all(equal for _, equal in results),
        )
        for what, results in found.items()
    ]
