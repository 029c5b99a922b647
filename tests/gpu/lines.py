"""What GPU tests need of the installed release line, beside `gemma4_turbo.cli.lines`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import server_args
from sglang.srt.layers.attention import triton_backend

from gemma4_turbo.cli import lines, sglang_process

Window = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def need(name: str) -> None:
    """Leave out what asks, a test or a whole module, where this SGLang takes no port of the patch."""
    reason = lines.patch_unfit(name)
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)


def patch(name: str) -> ModuleType:
    """The module with the patch's port; see `need`."""
    need(name)
    return lines.patch(name)


def give_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fused experts read of the server's arguments."""
    if not hasattr(server_args, "_global_server_args"):
        sglang_process.prepare_sglang()
        return
    arguments = SimpleNamespace(
        enable_deterministic_inference=False, enable_fused_moe_sum_all_reduce=False
    )
    monkeypatch.setattr(server_args, "_global_server_args", arguments)


def stocks_window(
    table: torch.Tensor, mapping: torch.Tensor | None
) -> Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], Window]:
    """Stock's function for a window's slots over a request's rows, with its own translation of slots.

    It is called with the window's starts, which it fills, the window, lengths and requests.
    """
    gather: Any = triton_backend.update_sliding_window_buffer
    gather = getattr(gather, "__wrapped__", gather)
    device = str(table.device)
    if "translator" not in inspect.signature(gather).parameters:

        class Allocator:
            def translate_loc_from_full_to_swa(self, x: torch.Tensor) -> torch.Tensor:
                assert mapping is not None
                return mapping[x].to(torch.int32)

        allocator = None if mapping is None else Allocator()

        def from_table(indptr: Any, window: int, lens: Any, rows: Any) -> Window:
            found: Window = gather(indptr, table, window, lens, rows, len(lens), device, allocator)
            return found

        return from_table

    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pool = None
    if mapping is not None:
        pool = SWAKVPool.__new__(SWAKVPool)
        pool.full_to_swa_index_mapping = mapping
    translator = KVIndexTranslator(
        req_to_token=table,
        token_to_kv_pool_allocator=None,
        token_to_kv_pool=pool,
        page_size=1,
        device=device,
    )

    def from_translator(indptr: Any, window: int, lens: Any, rows: Any) -> Window:
        found: Window = gather(
            indptr, translator, None, rows, window, lens, len(lens), device, pool
        )
        return found

    return from_translator
