"""Where the cached keys of a sliding window lie, for a whole batch in one launch.

With lengths ``s[i]`` and window W, of sequence i the last ``w[i] = min(s[i], W)`` tokens are wanted::

    window_lens[i]  = w[i]                 window_starts[i] = s[i] - w[i]
    window_indptr[i + 1] = w[0] + ... + w[i]
    window_indices[window_indptr[i] + n] = slot(req_to_token[req_pool_indices[i], s[i] - w[i] + n])

``slot`` is the identity, or ``mapping[x]``, x < 0 counting from the mapping's end as in torch. No
value is read on the host: window_indices has room for ``B * W`` entries, and what lies beyond
``window_indptr[B]`` is not written. Equal to SGLang's integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch", "window", "mapping_size", "req_to_token_stride"])
def _window_kernel(
    req_to_token_ptr,
    req_pool_indices_ptr,
    seq_lens_ptr,
    mapping_ptr,
    window_indptr_ptr,
    window_indices_ptr,
    window_lens_ptr,
    window_starts_ptr,
    batch,
    window,
    mapping_size,
    req_to_token_stride,
    MAPPED: tl.constexpr,
    BATCH: tl.constexpr,  # power of two >= batch
    BLOCK: tl.constexpr,
):
    """One program per sequence and block of its window; each sums the lengths before its own."""
    sequence = tl.program_id(0)
    every = tl.arange(0, BATCH)
    lengths = tl.load(seq_lens_ptr + every, mask=every < sequence, other=0).to(tl.int64)
    before = tl.sum(tl.minimum(lengths, window), 0)
    length = tl.load(seq_lens_ptr + sequence).to(tl.int64)
    kept = tl.minimum(length, window)
    if tl.program_id(1) == 0:
        tl.store(window_indptr_ptr + sequence + 1, before + kept)
        tl.store(window_lens_ptr + sequence, kept)
        tl.store(window_starts_ptr + sequence, length - kept)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(req_pool_indices_ptr + sequence).to(tl.int64) * req_to_token_stride
    source = req_to_token_ptr + row + (length - kept) + n
    slot = tl.load(source, mask=n < kept, other=0).to(tl.int64)
    if MAPPED:
        slot = tl.where(slot < 0, slot + mapping_size, slot)
        slot = tl.load(mapping_ptr + slot, mask=n < kept, other=0).to(tl.int64)
    tl.store(window_indices_ptr + before + n, slot, mask=n < kept)


INTERPRETED = not isinstance(_window_kernel, triton.JITFunction)
"""True when this module was imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""
MAX_BATCH = 4096

Window = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def unfit(
    window_indptr: torch.Tensor,
    req_to_token: torch.Tensor,
    window: int,
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    mapping: torch.Tensor | None,
) -> str | None:
    """Why `window_indices` does not take these arguments, or None. Host checks only."""
    if not (INTERPRETED or (seq_lens.is_cuda and torch.version.hip is None)):
        return f"seq_lens must be on a CUDA device, got {seq_lens.device}"
    if not 0 < seq_lens.numel() <= MAX_BATCH:
        return f"seq_lens must have 1 to {MAX_BATCH} elements, got {seq_lens.numel()}"
    if window < 1:
        return f"window must be positive, got {window}"
    integers = {
        "window_indptr": window_indptr,
        "seq_lens": seq_lens,
        "req_pool_indices": req_pool_indices,
    }
    if mapping is not None:
        integers["mapping"] = mapping
    for name, tensor in integers.items():
        if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
            return f"{name} must be 1-D int32 or int64, got {tensor.dim()}-D {tensor.dtype}"
        if tensor.stride(0) != 1:
            return f"{name} must be contiguous, got stride {tensor.stride(0)}"
    if req_to_token.dim() != 2 or req_to_token.stride(1) != 1:
        return f"req_to_token must be 2-D with contiguous rows, got {req_to_token.stride()}"
    if window_indptr.shape[0] <= seq_lens.shape[0]:
        return f"window_indptr must have a place for {seq_lens.shape[0]} sequences and one more"
    return None


def window_indices(
    window_indptr: torch.Tensor,
    req_to_token: torch.Tensor,
    window: int,
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    mapping: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
) -> Window:
    """The last ``window`` tokens of each sequence. See the module for equations.

    Args:
        window_indptr: ``[>= B + 1]`` int32 or int64, its first element 0; written from the second on.
        req_to_token: ``[requests, positions]`` int32 or int64.
        window: W, positive.
        seq_lens: ``[B]`` int32 or int64.
        req_pool_indices: ``[>= B]`` int32 or int64, rows of req_to_token.
        mapping: from slots to slots, or None.
        indices: int64 with room for all windows, as of a CUDA graph; allocated if None.

    Returns:
        ``window_indptr[:B + 1]``, the indices, ``window_lens`` and ``window_starts``, ``[B]`` as
        seq_lens.

    Raises:
        ValueError: naming the argument, for anything `unfit` declines.
    """
    reason = unfit(window_indptr, req_to_token, window, seq_lens, req_pool_indices, mapping)
    if reason is not None:
        raise ValueError(reason)
    return launch_window(
        window_indptr, req_to_token, window, seq_lens, req_pool_indices, mapping, indices
    )


def launch_window(
    window_indptr: torch.Tensor,
    req_to_token: torch.Tensor,
    window: int,
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    mapping: torch.Tensor | None,
    indices: torch.Tensor | None,
) -> Window:
    """`window_indices` without its checks, for callers that have asked `unfit`."""
    batch = seq_lens.shape[0]
    if indices is None:
        indices = torch.empty(batch * window, dtype=torch.int64, device=seq_lens.device)
    lens, starts = torch.empty_like(seq_lens), torch.empty_like(seq_lens)
    block = min(1024, triton.next_power_of_2(window))
    _window_kernel[(batch, triton.cdiv(window, block))](
        req_to_token,
        req_pool_indices,
        seq_lens,
        req_to_token if mapping is None else mapping,
        window_indptr,
        indices,
        lens,
        starts,
        batch,
        window,
        0 if mapping is None else mapping.shape[0],
        req_to_token.stride(0),
        MAPPED=mapping is not None,
        BATCH=triton.next_power_of_2(batch),
        BLOCK=block,
        num_warps=4,
    )
    return window_indptr[: batch + 1], indices, lens, starts


def reference_window(
    req_to_token: torch.Tensor,
    window: int,
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    mapping: torch.Tensor | None = None,
) -> Window:
    """The module's equations in plain torch; window_indptr int64, the indices without a rest."""
    lens = seq_lens.clamp(max=window)
    starts = seq_lens - lens
    indptr = torch.nn.functional.pad(lens.long().cumsum(0), (1, 0))
    parts = [
        req_to_token[int(req), int(start) : int(start) + int(length)].long()
        for req, start, length in zip(req_pool_indices, starts, lens, strict=False)
    ]
    indices = torch.cat(parts)
    return indptr, indices if mapping is None else mapping[indices].long(), lens, starts
