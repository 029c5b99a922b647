"""`mtp_metadata`: the MTP draft attends with the metadata that its seed step had made.

A seed step runs on the requests and lengths on which the next draft runs: nothing is decided
between the two. With `mtp_seed_graph` both are CUDA graphs of one attention backend and read the
same buffers: pointers, slots and splits, of all tokens and of the sliding window. Stock's way is to
fill them again. Here the draft leaves them as they are, if nothing can have changed:

* they were filled last by the seed step of a verification, no other step having come between;
* for the same requests in the same order, of the same lengths, in a graph of the same size.

A seed step always fills them. That of a prefill counts for nothing: after it the radix cache gives
a request the slots of another one with the same prompt, and frees its own. From a verification to
the next draft nobody's slots change; who is retracted is prefilled and verified again before that.

The draft's positions, which stock computes twice from the same lengths, are computed once. Together
that is 15 launches and two blocking reads by the host less in each verify step. The verification
lists the same slots a third time, in buffers of the target's backend, which are not these.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_turbo.engine import states
from gemma4_turbo.runtime.attempts import attempt, one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, Request, ScheduleBatch
    from gemma4_turbo.ports.v0_5_12.protocols import DraftGraphRunner, DraftWorker

CAPTURE = (
    "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner:FrozenKVMTPCudaGraphRunner.capture"
)
REPLAY, EAGER = "_init_frozen_kv_metadata_replay_cuda_graph", "_init_frozen_kv_metadata"
METHODS = (
    "draft",
    "forward_draft_extend",
    "forward_draft_extend_after_decode",
    "_set_positions",
    REPLAY,
    EAGER,
)  # of the worker

_workers: weakref.WeakSet[DraftWorker] = weakref.WeakSet()  # those that have our methods


Requests = tuple[tuple[str, int | None], ...]  # id and row of the table of slots: users choose ids


class Filled(NamedTuple):
    """What the buffers of the backend hold."""

    size: int  # of the graph
    requests: Requests
    lengths: tuple[int, ...]  # those of the graph's padding too


class Memory:
    """What is known of one worker's buffers, and the step that is running."""

    def __init__(self, run: PatchRun) -> None:
        self._run = run
        self.seeded: Filled | None = None  # None: no seed step filled them last
        self.requests: Requests | None = None  # of the step; None outside of one
        self.drafting = False

    @contextlib.contextmanager
    def step(self, requests: Callable[[], Iterable[Request]], drafting: bool) -> Iterator[None]:
        """A draft or a seed step of these requests."""
        try:
            self.requests = tuple((request.rid, request.req_pool_idx) for request in requests())
        except Exception as error:  # the buffers are filled then
            self._run.set(states.FAILED, one_line(error))
        self.drafting = drafting
        try:
            yield
        finally:
            self.requests = None


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The capture of the draft's graphs, after which the worker gets its methods."""
    capture_all = stock[CAPTURE]

    @functools.wraps(capture_all)
    def capture(self: DraftGraphRunner) -> None:
        capture_all(self)
        worker = self.frozen_kv_mtp_worker
        reason, problem = attempt(run, "a look at the worker", lambda: unfit(worker))
        reason = reason or problem
        if reason is None:
            install(run, worker)
        else:
            run.declined(reason)

    return {CAPTURE: capture}


def unfit(worker: DraftWorker) -> str | None:
    """Why a ``FrozenKVMTPWorker`` keeps stock's methods, or None."""
    if worker.topk != 1:
        return f"{worker.topk} candidates per step"
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    backend = type(worker.draft_attn_backend)
    if backend is not TritonAttnBackend:
        return f"the draft's attention backend is a {backend.__name__}"
    if any(name in vars(worker) for name in METHODS):
        return "the worker has methods of its own"
    return None


def install(run: PatchRun, worker: DraftWorker) -> None:
    """Our methods before stock's."""
    kind, memory = type(worker), Memory(run)

    def draft(batch: ScheduleBatch) -> object:
        with memory.step(lambda: batch.reqs, True):
            return kind.draft(worker, batch)

    def forward_draft_extend(batch: ScheduleBatch, *args: object, **kwargs: object) -> None:
        with memory.step(lambda: batch.reqs, False):
            kind.forward_draft_extend(worker, batch, *args, **kwargs)
        memory.seeded = None  # the radix cache may now exchange slots

    def forward_draft_extend_after_decode(batch: ScheduleBatch) -> None:
        with memory.step(lambda: [r for r in batch.reqs if not r.finished()], False):
            kind.forward_draft_extend_after_decode(worker, batch)

    def replay(forward_batch: ForwardBatch, bs: int, seq_lens_sum: int) -> None:
        wanted = None
        if memory.requests is not None and forward_batch.seq_lens_cpu is not None:
            try:
                lengths = tuple(forward_batch.seq_lens_cpu[:bs].tolist())
                wanted = Filled(bs, memory.requests, lengths)
            except Exception as error:
                run.set(states.FAILED, one_line(error))
        if memory.drafting and wanted is not None and wanted == memory.seeded:
            forward_batch.attn_backend = worker.draft_attn_backend  # as stock leaves it
            run.engaged(False)
        else:
            if memory.drafting and memory.requests is not None:
                run.declined("the seed step before did not fill the buffers for this draft")
            memory.seeded = None
            getattr(kind, REPLAY)(worker, forward_batch, bs, seq_lens_sum)
            memory.seeded = None if memory.drafting else wanted

    def eager(forward_batch: ForwardBatch) -> None:
        if memory.drafting and memory.requests is not None:
            run.declined("a draft without a graph")
        memory.seeded = None
        getattr(kind, EAGER)(worker, forward_batch)

    def set_positions(forward_batch: ForwardBatch) -> None:
        # In a step the batch came with the positions of its lengths; in a capture with a buffer.
        made = getattr(forward_batch.spec_info, "positions", None)
        if memory.requests is None or made is None or forward_batch.positions is not made:
            kind._set_positions(worker, forward_batch)

    ours = (draft, forward_draft_extend, forward_draft_extend_after_decode, set_positions)
    vars(worker).update(zip(METHODS, (*ours, replay, eager), strict=True))
    _workers.add(worker)


def undo(run: PatchRun) -> None:
    """Live workers fill the buffers every time."""
    for worker in list(_workers):
        _workers.remove(worker)
        for name in METHODS:
            vars(worker).pop(name, None)
