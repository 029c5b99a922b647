"""`frozen_kv_views`: the draft's attention backend follows the KV pool that is swapped in.

The assistant reads the target's KV pool. Stock swaps that pool in for the length of a ``with``, but
an attention backend that took its sliding-window state from the draft's own pool, when it was
made, keeps that state: it looks up sliding layers with page numbers of the full pool. Here both
views and the capture of the draft's CUDA graphs bring the state in step, and put it back on every
way out. A release whose backend takes its pool from the allocator, which draft and target share,
has nothing to bring in step: there the patch stands aside.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_turbo.engine import states

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

UTILS = "sglang.srt.speculative.frozen_kv_mtp_utils"
RUNNER = "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner:FrozenKVMTPCudaGraphRunner"
VIEWS = (f"{UTILS}:frozen_kv_target_view", f"{UTILS}:target_kv_pool_view")
CONSTRUCT, CAPTURE = f"{RUNNER}.__init__", f"{RUNNER}.capture_one_batch_size"


class WindowState(NamedTuple):
    """What a backend keeps of a sliding-window KV pool."""

    use_sliding_window_kv_pool: bool
    swa_kv_pool: Any  # the pool itself, None without a sliding window


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Both views and the draft's graph runner, each inside `in_step`."""
    return {
        **{target: _view(run, stock[target]) for target in VIEWS},
        CONSTRUCT: _construct(run, stock[CONSTRUCT]),
        CAPTURE: _capture(run, stock[CAPTURE]),
    }


def _view(run: PatchRun, view: Any) -> Any:
    @functools.wraps(view)
    @contextlib.contextmanager
    def kv_view(forward_batch: Any, kv_context: Any, *rest: Any, **named: Any) -> Iterator[Any]:
        # Later sources name the backend; earlier ones mean the one that the batch carries.
        backend = rest[0] if rest else named.get("draft_attn_backend")
        if backend is None:
            backend = getattr(forward_batch, "attn_backend", None)
        with (
            view(forward_batch, kv_context, *rest, **named) as value,
            in_step(run, backend, kv_context),
        ):
            yield value

    return kv_view


def _construct(run: PatchRun, construct: Any) -> Any:
    @functools.wraps(construct)
    def __init__(self: Any, frozen_kv_mtp_worker: Any, *args: Any, **kwargs: Any) -> None:
        # The constructor lets the backend allocate its page tables, then captures.
        with in_step(run, frozen_kv_mtp_worker.draft_attn_backend, frozen_kv_mtp_worker.kv_context):
            construct(self, frozen_kv_mtp_worker, *args, **kwargs)

    return __init__


def _capture(run: PatchRun, capture: Any) -> Any:
    @functools.wraps(capture)
    def capture_one_batch_size(self: Any, *args: Any, **kwargs: Any) -> Any:
        worker = self.frozen_kv_mtp_worker
        with in_step(run, worker.draft_attn_backend, worker.kv_context):
            return capture(self, *args, **kwargs)

    return capture_one_batch_size


@contextlib.contextmanager
def in_step(run: PatchRun, backend: Any, kv_context: Any) -> Iterator[None]:
    """Hold ``backend``'s sliding-window state in step with the target's pool.

    Args:
        run: counts the calls in which something was stale; told when nothing can be.
        backend: the draft's attention backend.
        kv_context: stock's ``FrozenKVMTPContext``; None while the model is not bound.
    """
    pool = getattr(kv_context, "target_token_to_kv_pool", None)
    if pool is None or backend is None:
        yield
        return
    kept, wanted = state_of(backend), state_for(pool)
    fine = _unfit(backend, kept, wanted)
    if fine is not None or kept is None:
        if not run.engaged_count():
            # A backend sets its state once, when it is made: it will not become stale.
            run.stand_aside(states.UPSTREAMED, f"nothing is stale: {fine}")
        yield
        return
    run.engaged(False)
    _set(backend, wanted)
    try:
        yield
    finally:
        _set(backend, kept)


def _unfit(backend: Any, kept: WindowState | None, wanted: WindowState) -> str | None:
    if kept is None:
        return f"{type(backend).__name__} keeps no sliding-window state"
    same = kept.use_sliding_window_kv_pool == wanted.use_sliding_window_kv_pool
    if same and kept.swa_kv_pool is wanted.swa_kv_pool:
        return f"{type(backend).__name__} reads the target's KV pool already"
    return None


def state_of(backend: Any) -> WindowState | None:
    """The state that ``backend`` keeps, None for a kind that keeps none."""
    try:
        return WindowState(backend.use_sliding_window_kv_pool, backend._swa_kv_pool)
    except AttributeError:
        return None


def state_for(pool: Any) -> WindowState:
    """The state that a backend over ``pool`` has to have."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    sliding = isinstance(pool, SWAKVPool)
    return WindowState(sliding, pool if sliding else None)


def _set(backend: Any, state: WindowState) -> None:
    backend.use_sliding_window_kv_pool, backend._swa_kv_pool = state
