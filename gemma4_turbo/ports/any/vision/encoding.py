"""Images and video frames through SGLang's vision encoder in chunks, and back in order.

An entry is one image or frame: ``pixels [1, patches, pixels]`` and ``positions [1, patches, 2]``, or
an embedding that somebody else computed. Chunks are planned in `gemma4_turbo.plans.vision_batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# Without the encoder's exclusive use of a GPU's free memory (tensor parallel ranks must cut alike,
# or their all-reduces would not match; a CPU has no such figure).
FIXED_BUDGET = 1 << 30
# Longer GEMMs gain nothing, and kernels of quantised layers count their output's elements in 32 bits:
# a batch this large has some 600 million.
MOST_BUDGET = 4 << 30


class Entry(NamedTuple):
    """One image or frame, or an embedding (then ``positions`` is None)."""

    pixels: torch.Tensor
    positions: torch.Tensor | None


_least_idle: dict[torch.device, int] = {}


def free_budget(device: torch.device, ranks: int) -> int:
    """Bytes that a chunk may need: half of what is free now, at most a tenth of the GPU.

    Of what the allocator holds idle only that counts which came since it was least: the pools of CUDA
    graphs are idle too, and nobody else is given anything of them.
    """
    if device.type != "cuda" or ranks > 1:
        return FIXED_BUDGET
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    least = _least_idle[device] = min(idle, _least_idle.get(device, idle))
    return min((free + idle - least) // 2, total // 10, MOST_BUDGET)


def encode(
    entries: Sequence[Entry],
    chunks: Sequence[Sequence[int]],
    encoder: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    halve: bool,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pooled tokens ``[length, hidden]`` and their mask ``[length]`` of every entry, in order.

    Args:
        entries: without embeddings.
        chunks: of `plan`.
        encoder: SGLang's, from pixels and positions to tokens and mask.
        device: of the encoder.
        dtype: of the encoder.
        halve: a chunk that runs out of memory is tried again as two.
    """
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    pending = [list(chunk) for chunk in reversed(chunks)]
    while pending:
        chunk = pending.pop()
        try:
            # One call for both would convert on the host, which takes longer than the encoder.
            pixels = [entries[i].pixels.to(device=device).to(dtype=dtype) for i in chunk]
            places = [entries[i].positions.to(device=device) for i in chunk]  # type: ignore[union-attr]
            single = len(chunk) == 1
            tokens, mask = encoder(
                pixels[0] if single else torch.cat(pixels),
                places[0] if single else torch.cat(places),
            )
        except torch.OutOfMemoryError:
            if not halve or len(chunk) == 1:
                raise
            middle = len(chunk) // 2
            pending += [chunk[middle:], chunk[:middle]]
            continue
        found.update(zip(chunk, zip(tokens, mask, strict=True), strict=True))
    return [found[index] for index in range(len(entries))]


def project(
    encoded: Sequence[tuple[torch.Tensor, torch.Tensor]],
    embedder: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """All valid tokens through one projection: ``[tokens, width]``, and the masks, one after another.

    One synchronisation, for the number of valid tokens.
    """
    masks = torch.cat([mask for _, mask in encoded])
    tokens = torch.cat([tokens for tokens, _ in encoded])[masks]
    return embedder(tokens.unsqueeze(0)).squeeze(0), masks


def in_order(
    entries: Sequence[Entry],
    encoded: Sequence[tuple[torch.Tensor, torch.Tensor]],
    projected: torch.Tensor | None,
    masks: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Projected tokens and given embeddings in the order of ``entries``."""
    given = [entry.pixels.to(device) for entry in entries if entry.positions is None]
    if projected is None or masks is None:
        return torch.cat(given)
    if not given:
        return projected
    lengths = torch.split(masks, [mask.shape[0] for _, mask in encoded])
    counts = torch.stack([mask.sum() for mask in lengths]).tolist()
    parts = iter(torch.split(projected, counts))
    embeddings = iter(given)
    return torch.cat([next(embeddings if e.positions is None else parts) for e in entries])
