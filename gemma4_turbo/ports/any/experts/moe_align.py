"""`moe_align`: small batches are grouped by expert with `gemma4_turbo.kernels.moe_align`.

The function is a module's own, called inside SGLang's opaque fused-experts operators, which
torch.compile does not look into. Should a trace reach it all the same, it sees stock's function.
Here is what does not depend on stock's signature: a line has the replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.kernels import moe_align as kernel
from gemma4_turbo.runtime.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

TARGET = "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size:moe_align_block_size"
Align = Callable[..., kernel.Alignment]  # of the ids, the block and the number of experts

_verdicts = Verdicts()  # per device and compiled kernel


def check_unfit(
    run: PatchRun,
    align: Align,
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    capturing: bool,
    multiple: int = 1,
) -> str | None:
    """Why this compiled kernel may not run here, or None. Without a GPU there is no stock.

    Args:
        run: of the patch.
        align: stock's.
        topk_ids: this and the next two as the kernel's.
        block_size: B.
        num_experts: E.
        capturing: into a CUDA graph.
        multiple: that the line's stock rounds its longest buffer up to.
    """
    key = (topk_ids.device, kernel.variant(topk_ids), block_size, num_experts)
    waiting = None
    if capturing:
        waiting = f"{topk_ids.numel()} slots were not compared with stock before the capture"
    return _verdicts.unfit(
        run, key, waiting, lambda: _compare(align, *key, multiple) if topk_ids.is_cuda else None
    )


def _compare(
    align: Align,
    device: torch.device,
    slots: int,
    block_size: int,
    num_experts: int,
    multiple: int = 1,
) -> str | None:
    generator = torch.Generator(device).manual_seed(0)  # the global state stays as it is
    for what, topk_ids in samples(slots, num_experts, generator):
        expected = align(topk_ids, block_size, num_experts)
        got = kernel.launch_align(topk_ids, block_size, num_experts, multiple)
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


def verify(
    run: PatchRun,
    device: str,
    multiple: int = 1,
    slots: tuple[int, ...] = (8, 32, 64, 256, 512),
    few: tuple[int, ...] = (8, 64),
) -> list[Check]:
    """One launch against stock's function (on a GPU) or plain torch (without).

    Args:
        run: of the patch.
        device: cuda or cpu.
        multiple: as in `check_unfit`.
        slots: that are compared on a GPU.
        few: that are compared without one.
    """
    on_gpu = device == "cuda"
    align: Align = run.swaps[0].function
    against = "stock's function on this GPU" if on_gpu else "plain torch"
    generator = torch.Generator(device).manual_seed(1)
    found: dict[str, list[tuple[int, bool]]] = {}
    for count in slots if on_gpu else few:
        for block_size in (16, 64):
            for what, topk_ids in samples(count, 128, generator):
                given = topk_ids, block_size, 128
                expected = align(*given) if on_gpu else kernel.reference_align(*given, multiple)
                got = kernel.moe_align(*given, multiple)
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
