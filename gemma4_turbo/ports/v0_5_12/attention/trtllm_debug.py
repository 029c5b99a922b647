"""`trtllm_debug`: what the TRT-LLM attention kernel is about to read is looked at first.

The kernel takes page numbers and lengths on trust; a wrong one is an illegal address somewhere
later. With this patch the numbers are compared with the size of the KV cache on the way in: before
each eager call, and before each replay of a CUDA graph, whose metadata is built outside of it. So
are the slots that the sliding-window allocator hands out. What is wrong raises `TrapError` and is
kept in a file. Every look waits for the GPU: for finding a fault, not for serving.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.engine import processes, state_folder
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, RadixAttention
    from gemma4_turbo.ports.v0_5_12.protocols import SWAAllocator, TRTLLMBackend

BACKEND = "sglang.srt.layers.attention.trtllm_mha_backend:TRTLLMHAAttnBackend"
ALLOCATOR = "sglang.srt.mem_cache.swa_memory_pool:SWATokenToKVPoolAllocator"
FORWARDS = (f"{BACKEND}.forward_decode", f"{BACKEND}.forward_extend")
REPLAY = f"{BACKEND}.init_forward_metadata_replay_cuda_graph"
ALLOCATIONS = tuple(f"{ALLOCATOR}.{name}" for name in ("alloc", "alloc_extend", "alloc_decode"))

_dumps = itertools.count(1)


class TrapError(RuntimeError):
    """A page number, length or slot that does not exist; names the file with all of them."""


class Table(NamedTuple):
    """Pages that the kernel would read."""

    page_table: torch.Tensor  # [requests, pages]
    lengths: torch.Tensor  # [requests], tokens in the cache
    page_size: int
    pages: int  # in the cache
    longest: int  # tokens that a request may have


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Every target with a look before or behind it."""
    return {
        **{target: _forward(run, stock[target]) for target in FORWARDS},
        REPLAY: _replay(run, stock[REPLAY]),
        **{target: _allocation(run, stock[target]) for target in ALLOCATIONS},
    }


def _forward(run: PatchRun, forward: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(forward)
    def checked(
        self: TRTLLMBackend,
        q: object,
        k: object,
        v: object,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        *args: object,
        **kwargs: object,
    ) -> object:
        if custom_ops.capturing():
            run.declined("a capture forbids looking; what a graph reads is looked at per replay")
        else:
            keys = forward_batch.token_to_kv_pool.get_kv_buffer(layer.layer_id)[0]
            table = Table(
                self._get_layer_page_table(layer, forward_batch),
                self.forward_metadata.cache_seqlens_int32,
                self.page_size,
                keys.shape[0] // self.page_size,
                _longest(self),
            )
            look(run, table, f"{forward.__name__}, layer {layer.layer_id}")
        return forward(self, q, k, v, layer, forward_batch, *args, **kwargs)

    return checked


def _replay(run: PatchRun, replay: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(replay)
    def init_forward_metadata_replay_cuda_graph(
        self: TRTLLMBackend, *args: object, **kwargs: object
    ) -> None:
        replay(self, *args, **kwargs)
        pool = self._swa_kv_pool
        if pool is None:
            run.declined("without a sliding-window pool the backend does not know the cache's size")
            return
        metadata = self.forward_metadata
        for page_table, part, name in (
            (metadata.page_table, pool.full_kv_pool, "full"),
            (metadata.swa_page_table, pool.swa_kv_pool, "sliding"),
        ):
            if page_table is not None:
                pages = part.k_buffer[0].shape[0] // self.page_size
                lengths = metadata.cache_seqlens_int32
                table = Table(page_table, lengths, self.page_size, pages, _longest(self))
                look(run, table, f"CUDA graph of {len(lengths)} requests, {name} layers")

    return init_forward_metadata_replay_cuda_graph


def _longest(backend: TRTLLMBackend) -> int:
    return int(backend.max_context_len) + int(backend.speculative_num_draft_tokens or 0)


def _allocation(
    run: PatchRun, allocate: Callable[..., torch.Tensor | None]
) -> Callable[..., torch.Tensor | None]:
    @functools.wraps(allocate)
    def checked(self: SWAAllocator, *args: object, **kwargs: object) -> torch.Tensor | None:
        slots = allocate(self, *args, **kwargs)
        if slots is not None:
            sliding = self.full_to_swa_index_mapping[slots.long()]
            look_at_slots(run, allocate.__name__, self, slots, sliding)
        return slots

    return checked


def look(run: PatchRun, table: Table, where: str) -> None:
    """Raise `TrapError` if the kernel would read a page that the cache does not have.

    Args:
        run: counts the looks.
        table: pages and lengths.
        where: the call, for the message.
    """
    run.engaged(False)
    page_table, lengths = table.page_table.long(), table.lengths.long()
    used = (lengths + table.page_size - 1) // table.page_size
    columns = torch.arange(page_table.shape[1], device=page_table.device)
    read = columns[None, :] < used[:, None]
    outside = read & ((page_table < 0) | (page_table >= table.pages))
    wrong = outside.any(1) | (lengths < 0) | (lengths > table.longest) | (used > len(columns))
    if bool(wrong.any()):
        _trap(
            f"{where}: {int(wrong.sum())} of {len(lengths)} requests are wrong: "
            f"{int(outside.sum())} page numbers outside 0..{table.pages - 1}, "
            f"lengths {int(lengths.min())}..{int(lengths.max())} of at most {table.longest}",
            {**table._asdict(), "wrong_requests": wrong},
        )


def look_at_slots(
    run: PatchRun, what: str, allocator: SWAAllocator, slots: torch.Tensor, sliding: torch.Tensor
) -> None:
    """Raise `TrapError` if a slot does not exist, or two tokens got the same one.

    Args:
        run: counts the looks.
        what: the allocator's method, for the message.
        allocator: stock's ``SWATokenToKVPoolAllocator``.
        slots: of the full pool.
        sliding: the same tokens' slots of the sliding-window pool.
    """
    run.engaged(False)
    problems = []
    for name, given, size in (
        ("full", slots, allocator.size_full),
        ("sliding-window", sliding, allocator.size_swa),
    ):
        last = size + allocator.page_size - 1  # slots below 1 are padding
        outside = int(((given < 1) | (given > last)).sum())
        if outside:
            problems.append(f"{outside} {name} slots outside 1..{last}")
        twice = given.numel() - len(set(given.tolist()))
        if twice:
            problems.append(f"{twice} {name} slots given twice")
    if problems:
        _trap(
            f"{what}: of {slots.numel()} slots: {'; '.join(problems)}",
            {
                "full_slots": slots,
                "sliding_window_slots": sliding,
                "size_full": allocator.size_full,
                "size_swa": allocator.size_swa,
                "page_size": allocator.page_size,
            },
        )


def _trap(message: str, values: dict[str, object]) -> None:
    kept = {
        name: value.detach().cpu() if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }
    try:
        path = _dump({"message": message, **kept})
    except (OSError, RuntimeError) as error:
        raise TrapError(f"{message}; not kept: {error}") from None
    raise TrapError(f"{message}; torch.load({path!r}) has them all")


def _dump(values: dict[str, object]) -> str:
    """Keep ``values`` in a new file of the state folder."""
    with state_folder.opened(create=True) as folder:
        name = f"trtllm_debug-{processes.own()}-{next(_dumps)}.pt"
        descriptor = folder.new(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save(values, file)
        except BaseException:
            folder.discard(name)
            raise
        return os.path.join(folder.where, name)
