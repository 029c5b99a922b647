"""A small Gemma 4 whose last layers share KV, over this line's pools and Triton attention, on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cpu import shared_kv
from tests.cpu.ports.v0_5_23.triton_world import World

REQUESTS, LONGEST = 6, shared_kv.CONTEXT


def build(**options: Any) -> Any:
    """SGLang's text model; see `shared_kv.build`."""
    return shared_kv.build(**options)


class Memory(World):
    """KV pools, translator and attention backend of one engine, for the layers of `build`."""

    def __init__(self, kernels: bool = False) -> None:
        """``kernels``: SGLang's own, through Triton's interpreter, which takes seconds a batch."""
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        self.generator = torch.Generator().manual_seed(0)
        kinds, head = shared_kv.TYPES, shared_kv.HEAD
        full, sliding = head["full_attention"], head["sliding_attention"]
        size = REQUESTS * LONGEST + 20
        self.pool = SWAKVPool(
            size=size,
            size_swa=size,
            page_size=1,
            dtype=shared_kv.DTYPE,
            head_num=1,
            head_dim=full,
            swa_attention_layer_ids=[i for i, t in enumerate(kinds) if t == "sliding_attention"],
            full_attention_layer_ids=[i for i, t in enumerate(kinds) if t == "full_attention"],
            device="cpu",
            swa_head_num=1,
            swa_head_dim=sliding,
            swa_v_head_dim=sliding,
            v_head_dim=full,
        )
        for buffer in self.buffers():
            buffer.zero_()
        self.map_slots(size, size, shared_kv.DTYPE, REQUESTS)
        self.backend = self.make_backend(shared_kv.WINDOW - 1)
        for name, value in {
            "num_head": 2,
            "num_kv_head": 1,
            "v_head_dim": full,
            "swa_v_head_dim": sliding,
            "max_context_len": LONGEST,
        }.items():
            setattr(self.backend, name, value)
        if not kernels:
            self.backend.extend_attention_fwd = _extend
            self.backend.decode_attention_fwd = _decode

    def fill(self) -> Memory:
        """Random keys and values in all slots but nobody's, so that any prefix is there."""
        generator = torch.Generator().manual_seed(1)
        for buffer in self.buffers():
            buffer.normal_(generator=generator)
            buffer[0] = 0
        return self

    def some_slots(self) -> torch.Tensor:
        count = REQUESTS * LONGEST
        return torch.randperm(count + 10, generator=self.generator)[:count] + 1

    def prefill(self, lengths: dict[int, int], prefixes: dict[int, int], **changes: Any) -> Any:
        """SGLang's batch that extends request ``r`` by ``lengths[r]`` tokens after ``prefixes[r]``.

        The backend's metadata are made, as a model runner does before the model's forward.
        """
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        order = list(lengths)
        before = [prefixes.get(request, 0) for request in order]
        new = [lengths[request] for request in order]
        spans = list(zip(order, new, before, strict=True))
        totals = [a + b for a, b in zip(before, new, strict=True)]
        fields = {
            "forward_mode": ForwardMode.EXTEND,
            "batch_size": len(order),
            "input_ids": torch.cat(
                [(torch.arange(n) * 7 + r * 11 + s) % shared_kv.VOCAB for r, n, s in spans]
            ),
            "req_pool_indices": torch.tensor(order),
            "seq_lens": torch.tensor(totals),
            "seq_lens_cpu": torch.tensor(totals),
            "seq_lens_sum": sum(totals),
            "out_cache_loc": torch.cat([self.table[r, s : s + n] for r, n, s in spans]).long(),
            "positions": torch.cat([torch.arange(s, s + n) for _, n, s in spans]),
            "extend_num_tokens": sum(new),
            "extend_seq_lens": torch.tensor(new),
            "extend_prefix_lens": torch.tensor(before),
            "extend_seq_lens_cpu": new,
            "extend_prefix_lens_cpu": before,
            "global_num_token_non_padded_cpu": sum(new),
            "spec_algorithm": None,
        }
        batch = ForwardBatch(**fields)
        self.translator.own_plan(batch).bind(batch, self.translator)
        for name, value in changes.items():
            setattr(batch, name, value)
        self.backend.init_forward_metadata(batch)
        return batch

    def run(self, model: Any, batch: Any, **given: Any) -> torch.Tensor:
        """The model's forward, as a model runner calls it: hidden states of all rows."""
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        inputs = {"input_ids": batch.input_ids, **given}
        context = ForwardContext(attn_backend=self.backend)
        with forward_context(context, forward_batch=batch):
            found: torch.Tensor = model(positions=batch.positions, forward_batch=batch, **inputs)
        return found


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Of ``[rows, heads, dim]`` over the one KV head of `build`'s layers."""
    scores = torch.einsum("rhd,kgd->rhk", q.float(), k.float()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return torch.einsum("rhk,kgd->rhd", scores.softmax(-1), v.float()).to(q.dtype)


def _extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    *given: Any,
    sliding_window_size: int = -1,
    **options: Any,
) -> None:
    """In the place of ``extend_attention_fwd``, to the token what the kernel sees: causal, or by a mask.

    A mask has a row for each new token over all keys of its request; a sliding layer is handed the last.
    """
    custom, _, mask_indptr, *_, scale = given[:7]
    for i in range(len(qo_indptr) - 1):
        new = slice(int(qo_indptr[i]), int(qo_indptr[i + 1]))
        slots = kv_indices[int(kv_indptr[i]) : int(kv_indptr[i + 1])]
        keys = torch.cat([k_buffer[slots], k[new].view(-1, *k_buffer.shape[1:])])
        values = torch.cat([v_buffer[slots], v[new].view(-1, *v_buffer.shape[1:])])
        at = torch.arange(len(keys))
        back = at[len(slots) :, None] - at
        mask = back >= 0
        if custom is not None:
            rows = custom[int(mask_indptr[i]) : int(mask_indptr[i + 1])]
            mask = rows.view(len(at) - len(slots), -1)[:, -len(at) :].bool()
        if sliding_window_size > -1:
            mask &= back <= sliding_window_size
        o[new] = _attend(q[new], keys, values, mask, scale)


def _decode(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    o: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    attn_logits: torch.Tensor,
    attn_lse: torch.Tensor,
    num_kv_splits: torch.Tensor,
    max_kv_splits: int,
    sm_scale: float,
    *given: Any,
    **options: Any,
) -> None:
    """In the place of ``decode_attention_fwd``, over the slots that the metadata name."""
    assert len(num_kv_splits) >= len(q)
    assert attn_logits.shape[-1] == v_buffer.shape[-1]
    for i in range(len(q)):
        slots = kv_indices[int(kv_indptr[i]) : int(kv_indptr[i + 1])]
        o[i] = _attend(q[i : i + 1], k_buffer[slots], v_buffer[slots], None, sm_scale)[0]


# -- prefill graphs -----------------------------------------------------------------------------------


class Recorded:
    """Stands in for a CUDA graph: runs again what was called between begin and end, on its tensors."""

    def __init__(self, **options: Any) -> None:
        self.calls: list[Any] = []

    def capture_begin(self, **options: Any) -> None:
        self.mode = _Recording(self.calls)
        self.mode.__enter__()

    def capture_end(self) -> None:
        self.mode.__exit__(None, None, None)

    def replay(self) -> None:
        for function, args, kwargs, outs in self.calls:
            again = function(*args, **kwargs)
            flat = again if isinstance(again, tuple | list) else (again,)
            for old, new in zip(outs, flat, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, tuple | list) else (out,)
        self.calls.append((func, args, kwargs or {}, outs))
        return out


@contextlib.contextmanager
def graphs_on_the_cpu() -> Iterator[None]:
    """SGLang's breakable graphs, of `Recorded` segments."""
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        breakable_cuda_graph,
    )

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

    device = SimpleNamespace(Stream=Stream, current_stream=lambda *args: Stream())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(breakable_cuda_graph, "get_device_module", lambda: device)
        patch.setattr(torch.cuda, "CUDAGraph", Recorded)
        yield


class Graph:
    """A text model's prefill of so many tokens in SGLang's breakable graph, as its runner makes and runs it."""

    def __init__(self, model: Any, tokens: int) -> None:
        """Two runs to warm up, and a capture, on a batch of one made-up request."""
        from sglang.srt.model_executor.runner_backend_utils import breakable_cuda_graph as stock

        self.model, self.tokens = model, tokens
        self.ids, self.positions, self.slots = (
            torch.zeros(tokens, dtype=torch.int64) for _ in range(3)
        )
        memory = Memory()
        dummy = memory.prefill({0: tokens}, {})
        dummy.input_ids, dummy.positions = self.ids, self.positions
        dummy.out_cache_loc = self.slots
        memory.backend.init_forward_metadata(dummy)
        self.graph = stock.BreakableCUDAGraph()
        with graphs_on_the_cpu(), stock.enable_breakable_cuda_graph():
            for _ in range(2):
                self._forward(memory, dummy, None)
            with stock.BreakableCUDAGraphCapture(self.graph):
                self.output = self._forward(memory, dummy, None)

    def _forward(self, memory: Memory, batch: Any, raw: int | None) -> torch.Tensor:
        with self._scope(memory, batch, raw):
            found: torch.Tensor = self.model.forward(
                self.ids, self.positions, batch, input_embeds=None
            )
        return found

    @contextlib.contextmanager
    def _scope(self, memory: Memory, batch: Any, raw: int | None) -> Iterator[None]:
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
        from sglang.srt.model_executor.runner_utils.forward_batch import set_forward_batch
        from sglang.srt.model_executor.runner_utils.prefill_graph import prefill_graph_scope

        context = ForwardContext(attn_backend=memory.backend)
        with (
            set_forward_batch(batch),
            prefill_graph_scope(full_graph=False, raw_num_tokens=raw),
            forward_context(context, forward_batch=batch),
        ):
            yield

    def replay(self, memory: Memory, batch: Any) -> torch.Tensor:
        """Hidden states of the batch's rows and the padding's, in the graph's own memory."""
        import copy

        from sglang.srt.model_executor.runner_backend_utils import breakable_cuda_graph as stock

        count = len(batch.input_ids)
        padded = copy.copy(batch)
        for name, buffer in (
            ("input_ids", self.ids),
            ("positions", self.positions),
            ("out_cache_loc", self.slots),
        ):
            buffer.zero_()
            buffer[:count] = getattr(batch, name)
            setattr(padded, name, buffer)
        with (
            graphs_on_the_cpu(),
            stock.enable_breakable_cuda_graph(),
            self._scope(memory, padded, count),
        ):
            self.graph.replay()
        return self.output
