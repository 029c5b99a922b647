"""`yoco_graph`: the KV-shared layers in CUDA graphs, on the tail of `yoco`.

They run on a few rows, one launch after the other, and the host is slower than the GPU there. One
graph per number of rows, up to the next of `SIZES`: the first batch of a size runs eagerly on the
graph's buffers, which compiles the kernels and lets them check themselves, the second one records
the graph, and from there on the inputs are copied into the buffers and the graph runs.

What a graph has recorded as numbers of the host is the same for all batches of a size: the number
of rows, the most keys that a row can have, the most splits. Rows beyond the batch's are zeros that
see one key, of the pools' slot 0, which belongs to nobody: as in SGLang's graphs. Every operation of
a layer keeps to its row, so they reach no other; nobody reads their results.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.fusions.fusion import Step
from gemma4_turbo.ports.any.prefill import yoco_cut
from gemma4_turbo.ports.any.prefill.yoco_cut import Cut, Tail
from gemma4_turbo.runtime import graphs, hooks
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, TextModel

YOCO_GRAPH = Step()
yoco_cut.BEHIND.append(YOCO_GRAPH)

SIZES = (1, 2, 4, 8, 16)
DEVICES = ("cuda",)
ROOM = 2**26  # bytes for the slots of all keys of a batch

_GRAPHS = "_gemma4_turbo_tail_graphs"  # on a model
_models: weakref.WeakSet[TextModel] = weakref.WeakSet()  # those that have graphs

Layers = Callable[[Tail], torch.Tensor]
Key = tuple[int, bool, bool]
"""Rows, whether the first layer's input is there normed, whether there are per-layer inputs."""

FIRST = "the first batch of a size runs eagerly, before its graph is recorded"
RECORDED, REPLAYED = "recorded", "replayed"

OFF = {
    "disable_cuda_graph": "CUDA graphs are switched off",
    "debug_cuda_graph": "SGLang debugs its CUDA graphs",
    "enable_torch_compile": "torch.compile",
    "enable_memory_saver": "the memory saver takes memory away from graphs",
    "enable_pdmux": "prefill and decode run on two streams",
}
"""Arguments of the server, and what each of them means."""


def run(model: TextModel, cut: Cut, tail: Tail, batch: ForwardBatch) -> torch.Tensor:
    """The KV-shared layers and the last norm over ``tail``, cut from ``batch``: ``[rows, hidden]``.

    The result may lie in a graph's memory, which the next call overwrites. Both run on one stream,
    so whatever was launched on it in between has read it by then: the caller puts the rows into a
    tensor of its own at once, and neither logits nor a next step that SGLang prepares ahead see this one.
    """
    layers = functools.partial(yoco_cut.line().run, model, cut.first)
    patch = YOCO_GRAPH.run
    if patch is None:
        return layers(tail)
    mine = None
    try:
        reason = unfit(tail, batch)
        if reason is None:
            mine = _graphs(model, cut, tail, batch)
            reason = mine.unfit(tail, batch)
        if reason is None:
            found, how = mine.run(tail, batch, layers)  # type: ignore[union-attr]
            if how is None:
                patch.declined(FIRST)
            else:
                patch.engaged(how is RECORDED)
            return found
    except Exception as error:  # the server lives, on the tail that nobody has touched
        reason = one_line(error)
        if mine is not None:
            mine.failed[_key(tail)] = reason
        patch.set(states.FAILED, f"{len(tail.hidden_states)} rows: {reason}")
    patch.declined(reason)
    return layers(tail)


def whole(
    model: TextModel,
    cut: Cut,
    batch: ForwardBatch,
    positions: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    per_layer_inputs: torch.Tensor | None,
) -> torch.Tensor:
    """What the last norm gives, ``[tokens, hidden]``: the tail's rows in their places among zeros."""
    tail = yoco_cut.tail(cut, batch, positions, *state, per_layer_inputs)
    found = run(model, cut, tail, batch)
    made = found.new_zeros((cut.tokens, found.shape[-1]))
    made[tail.rows] = found
    return made


def drop_all() -> None:
    """Every graph and buffer."""
    for model in list(_models):
        _drop(model)


def _drop(model: TextModel) -> None:
    _models.discard(model)
    found = vars(model).pop(_GRAPHS, None)
    if found is not None and found.captured and torch.cuda.is_available():
        torch.cuda.synchronize()  # one may be running, also on another stream


def _graphs(model: TextModel, cut: Cut, tail: Tail, batch: ForwardBatch) -> Graphs:
    """The model's graphs; new ones where anything has moved that the old ones point to."""
    made_for = _made_for(model, cut, tail, batch)
    found: Graphs | None = vars(model).get(_GRAPHS)
    failed: dict[Key, str] = {}
    if found is not None and (found.made_for != made_for or found.watched.moved()):
        failed = found.failed
        _drop(model)
        found = None
    if found is None:
        found = vars(model)[_GRAPHS] = Graphs(model, cut, made_for, failed)
        _models.add(model)
    return found


def _made_for(model: TextModel, cut: Cut, tail: Tail, batch: ForwardBatch) -> tuple[object, ...]:
    """Objects that buffers are made for and memory that graphs point to, the weights apart."""
    pool, hidden = yoco_cut.line().pool(batch), tail.hidden_states
    backend = yoco_cut.line().backend(batch)
    read = sorted({layer.self_attn.attn.layer_id for layer in model.layers[cut.first :]})
    ple = tail.per_layer_inputs
    return (
        *(backend, backend.req_to_token.shape[1], pool),
        *(
            buffer(i).data_ptr()
            for i in read
            for buffer in (pool.get_key_buffer, pool.get_value_buffer)
        ),
        *(hidden.device, hidden.dtype, hidden.shape[1], None if ple is None else ple.shape[1:]),
        # Buffers that a graph still reads on one stream must not be filled on another.
        torch.cuda.current_stream().cuda_stream if hidden.is_cuda else 0,
    )


# -- what takes the eager path ------------------------------------------------------------------------


def unfit(tail: Tail, batch: ForwardBatch) -> str | None:
    """Why no graph runs for this tail in this server, or None."""
    line = yoco_cut.line()
    if tail.hidden_states.device.type not in DEVICES:
        return "not on a GPU"
    reason = graphs.argument_unfit(line.arguments(), OFF)
    if reason is not None:
        return reason
    if line.gpus() > 1:
        return "tensor parallelism: the ranks' reductions are not recorded"
    reason = yoco_cut.backend_unfit(line.backend(batch))
    if reason is not None:
        return reason
    if tail.residual is not None:
        return "a layer hands on a residual"
    if len(tail.hidden_states) > SIZES[-1]:
        return f"more than {SIZES[-1]} rows"
    pool = line.pool(batch)
    for part in (pool, getattr(pool, "full_kv_pool", None), getattr(pool, "swa_kv_pool", None)):
        if getattr(part, "layer_transfer_counter", None) is not None:
            return "the KV cache is filled layer by layer while the model runs"
    return None


# -- what the graphs read ------------------------------------------------------------------------------

# Of the metadata; of sliding layers: window_...
KEYS = ("kv_indptr", "kv_indices", "num_kv_splits")


def _room(batch: ForwardBatch) -> int:
    """Keys of full layers that a batch can have: 8 bytes each."""
    context: int = yoco_cut.line().backend(batch).req_to_token.shape[1]
    return min(SIZES[-1] * context, ROOM // 8)


class Buffers:
    """Inputs of the graphs of all sizes, and what the attention backend tells their layers."""

    def __init__(self, tail: Tail, batch: ForwardBatch, window: int | None) -> None:
        """For tails like this one; ``window``: the most keys of a row in a sliding layer."""
        rows, device = SIZES[-1], tail.hidden_states.device
        backend = yoco_cut.line().backend(batch)
        theirs = tail.backend.forward_metadata

        def like(given: torch.Tensor | None, length: int = rows) -> Any:
            if given is None:
                return None
            return torch.zeros((length, *given.shape[1:]), dtype=given.dtype, device=device)

        self.steps = torch.arange(rows, dtype=torch.int32, device=device)
        self.positions: torch.Tensor = like(tail.positions)
        self.hidden_states: torch.Tensor = like(tail.hidden_states)
        self.normed: torch.Tensor = like(tail.hidden_states)
        self.per_layer_inputs: torch.Tensor = like(tail.per_layer_inputs)  # None without
        self.metadata = copy.copy(theirs)
        for name in ("attn_logits", "swa_attn_logits", "attn_lse"):
            setattr(self.metadata, name, like(getattr(theirs, name)))
        self.kinds = [("", _room(batch))]
        if window is not None:
            self.kinds.append(("window_", rows * window))
        for prefix, room in self.kinds:
            for name, length in zip(KEYS, (rows + 1, room, rows), strict=True):
                setattr(self.metadata, prefix + name, like(getattr(theirs, prefix + name), length))
        # One backend for all sizes: what a decode kernel of ours keeps there is made in the first
        # run of all, which is eager.
        self.backend = copy.copy(backend)
        self.backend.forward_metadata = self.metadata
        # The buffers of SGLang's own graphs, which makes new ones where it records them again: a
        # layer reads metadata only, and the old ones would stay.
        for name in [name for name in vars(backend) if name.startswith("cuda_graph_")]:
            setattr(self.backend, name, None)
        if window is not None:
            # A decode kernel may take this for the most keys of a row, once for all replays.
            self.backend.sliding_window_size = window

    def tail(self, size: int, like: Tail) -> Tail:
        """The first ``size`` rows, with a batch that knows nothing of the one it was made for.

        What no layer reads in a decode step is None there: to read it shall fail, not be stale.
        """
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        nothing: Any = None
        made = yoco_cut.line().made(
            like.batch,
            self.backend,
            forward_mode=ForwardMode.DECODE,
            batch_size=size,
            input_ids=nothing,
            req_pool_indices=nothing,
            seq_lens=nothing,
            out_cache_loc=nothing,
            seq_lens_sum=nothing,
            positions=self.positions[:size],
        )
        return Tail(
            batch=made,
            backend=self.backend,
            rows=nothing,
            positions=made.positions,
            hidden_states=self.hidden_states[:size],
            residual=None,
            normed=None if like.normed is None else self.normed[:size],
            per_layer_inputs=None
            if like.per_layer_inputs is None
            else self.per_layer_inputs[:size],
        )

    def fill(self, size: int, tail: Tail) -> None:
        """Copy a tail of up to ``size`` rows in; the rows after them are zeros with one key."""
        count = len(tail.hidden_states)
        for buffer, given in (
            (self.positions, tail.positions),
            (self.hidden_states, tail.hidden_states),
            (self.normed, tail.normed),
            (self.per_layer_inputs, tail.per_layer_inputs),
        ):
            if given is not None:
                buffer[:count].copy_(given)
                if count < size:
                    buffer[count:size].zero_()
        theirs = tail.backend.forward_metadata
        for prefix, _ in self.kinds:
            indptr, indices, splits = (getattr(self.metadata, prefix + name) for name in KEYS)
            given_indptr, given_indices, given_splits = (getattr(theirs, prefix + n) for n in KEYS)
            total, more = len(given_indices), size - count
            indptr[: count + 1].copy_(given_indptr)
            indices[:total].copy_(given_indices)
            splits[:count].copy_(given_splits)
            if more:
                torch.add(self.steps[:more], total + 1, out=indptr[count + 1 : size + 1])
                indices[total : total + more].zero_()
                splits[count:size].fill_(1)


# -- the graphs ----------------------------------------------------------------------------------------


class CudaGraph:
    """One run of ``function`` in a CUDA graph, whose tensors are in memory of the graph's own."""

    def __init__(self, function: Callable[[], torch.Tensor], pool: object) -> None:
        """Record it; nothing runs. ``pool``: memory of another graph to share, or None.

        Whatever ``function`` or CUDA raises comes through; nothing is left recording.
        """
        self.graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # what a collection frees may not be freed while a stream is recorded
        try:
            with graphs.recording(self.graph, pool):
                self.output = function()
        except BaseException:
            graphs.settle()
            raise
        finally:
            if collecting:
                gc.enable()
        self.pool = self.graph.pool()

    def replay(self) -> torch.Tensor:
        """Run it. The next replay of a graph that shares the pool overwrites the result."""
        self.graph.replay()
        return self.output


capture: Callable[[Callable[[], torch.Tensor], object], CudaGraph] = CudaGraph
"""From a function and the pool of another graph to an object with ``replay()`` and ``pool``."""


class Graphs:
    """The graphs of one model over one set of pools."""

    def __init__(
        self, model: TextModel, cut: Cut, made_for: tuple[object, ...], failed: dict[Key, str]
    ) -> None:
        self.made_for = made_for
        self.watched = graphs.Watched([*model.layers[cut.first :], model.norm])
        self.elsewhere = self.watched.elsewhere(model.norm.weight.device)
        before = None if cut.sliding is None else yoco_cut.window(model.layers[cut.sliding])
        self.window = None if before is None else before + 1  # the token's own key as well
        self.buffers: Buffers | None = None
        self.tails: dict[Key, Tail] = {}  # those that have run
        self.captured: dict[Key, CudaGraph] = {}
        self.failed = failed

    def unfit(self, tail: Tail, batch: ForwardBatch) -> str | None:
        """Why this tail runs eagerly, or None."""
        if self.watched.hooked():
            return hooks.HOOKED.format("a layer")
        if self.elsewhere:
            return "weights are on another device"
        key = _key(tail)
        keys = len(tail.backend.forward_metadata.kv_indices)
        if keys + key[0] - len(tail.hidden_states) > _room(batch):
            return f"{keys} keys, the graphs have room for {_room(batch)}"
        return self.failed.get(key)

    def run(
        self, tail: Tail, batch: ForwardBatch, layers: Layers
    ) -> tuple[torch.Tensor, str | None]:
        """The tail's result, and what a graph was for it: None without. Raises what goes wrong."""
        key, count = _key(tail), len(tail.hidden_states)
        # Buffers made in inference mode could not be filled outside it.
        with torch.inference_mode(False), torch.no_grad():
            if self.buffers is None:
                self.buffers = Buffers(tail, batch, self.window)
            self.buffers.fill(key[0], tail)
            mine = self.tails.get(key) or self.buffers.tail(key[0], tail)
        if key not in self.tails:
            found = layers(mine)
            self.tails[key] = mine
            return found[:count], None
        how = REPLAYED
        if key not in self.captured:
            how = RECORDED
            pool = next((graph.pool for graph in self.captured.values()), None)
            self.captured[key] = capture(functools.partial(layers, mine), pool)
        return self.captured[key].replay()[:count], how


def _key(tail: Tail) -> Key:
    count = len(tail.hidden_states)
    size = next(size for size in SIZES if size >= count)
    return size, tail.normed is not None, tail.per_layer_inputs is not None
