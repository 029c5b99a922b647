"""`yoco`, the cut: a prefill gives the KV-shared layers only the rows whose logits are wanted.

From the first KV-shared layer on, no layer writes KV: a token's row there matters to nothing but
its own logits. So before that layer the rows are cut to the tail, the last row of every request whose
prompt ends in this batch. The layers run as in a decode step of those tokens, and the result goes back
to the rows' places; all other rows are zero.

Which keys a row sees is stock's to the token, also where stock's extend and decode kernels disagree
on the sliding window's edge. The decode kernel adds in another order than the extend kernel.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

import torch

from gemma4_turbo.fusions.fusion import Step
from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.runtime import custom_ops, hooks
from gemma4_turbo.runtime.fallback import Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import (
        DecoderLayer,
        ForwardBatch,
        KVPool,
        Module,
        Prefill,
        TextModel,
        TritonBackend,
    )

YOCO = Step()
BEHIND: list[Step] = []
"""Patches that run on rows that are cut, and on nothing else."""
UNFINISHED = "_gemma4_turbo_unfinished"
"""On a batch's ``seq_lens_cpu``: per request, whether its prompt goes on in a later chunk.

SGLang makes a second batch for a piecewise graph and hands this tensor on to it as it is.
"""

LOGITS = "_gemma4_turbo_logits_processor"
"""On the same tensor: the module that SGLang hands the text model's result to."""

NOTHING_SHARED = "the model has no KV-shared layers at its end"


_fallback = Fallback("the cut")
_watched: weakref.WeakKeyDictionary[TextModel, tuple[list[Module], hooks.Watched]] = (
    weakref.WeakKeyDictionary()
)


class Cut(NamedTuple):
    """What the KV-shared layers are to run on in one batch."""

    first: int  # index of the first KV-shared layer
    tokens: int
    requests: list[int]  # those whose prompt ends here
    rows: list[int]  # the last row of each
    lengths: list[int]  # keys of each, the row's own included
    windows: list[int]  # keys of each in a sliding layer
    sliding: int | None  # index of a sliding KV-shared layer


class Tail(NamedTuple):
    """The rows that the cut keeps, with the batch that decodes them and the backend that attends."""

    batch: ForwardBatch
    backend: TritonBackend
    rows: torch.Tensor
    positions: torch.Tensor
    hidden_states: torch.Tensor
    residual: torch.Tensor | None
    normed: torch.Tensor | None
    per_layer_inputs: torch.Tensor | None


B = TypeVar("B")  # a line's batch
K = TypeVar("K")  # and its Triton backend


class Line(NamedTuple, Generic[B, K]):
    """Where a release line keeps what the cut reads and makes."""

    backend: Callable[[B], K]  # that attends in this forward
    pool: Callable[[B], Any]  # a `KVPool`
    arguments: Callable[[], Any]  # the server's, by the names of `graphs.argument_unfit`
    gpus: Callable[[], int]  # of tensor parallelism
    graph_unfit: Callable[[], str | None]  # whether a prefill graph runs the model, or records it
    layout_unfit: Callable[[B], str | None]  # more than the lines have in common
    slots_unfit: Callable[[B], str | None]  # of keys, which `slots` is to gather
    sets_forward: Callable[[TextModel, Any], bool]  # SGLang itself, on the text model
    decode: Callable[[B, torch.Tensor, K], None]  # the batch's last fields
    slots: Callable[..., torch.Tensor]  # see `_backend`
    metadata: Callable[..., Any]  # the backend's, from the fields that the lines have in common
    made: Callable[..., B]  # a batch of so many rows to decode in a graph
    run: Callable[[Any, int, Tail], torch.Tensor]  # the layers on a tail


_line: list[Line[Any, Any]] = []


def use_line(line: Line[Any, Any]) -> None:
    """The process's release line."""
    _line[:] = [line]


def line() -> Line[Any, Any]:
    """It; IndexError before `use_line`."""
    return _line[0]


def cut(
    model: TextModel, batch: ForwardBatch, positions: torch.Tensor, kwargs: dict[str, object]
) -> Cut | None:
    """What to cut in this batch; None where all rows go through all layers, the reason reported."""
    run = YOCO.run
    if run is None or torch.compiler.is_compiling() or not batch.forward_mode.is_extend():
        return None
    broken = _fallback.unfit()
    if broken is not None:
        all_rows(run, broken)
        return None
    try:
        first = first_shared(model)
        if first is None:
            all_rows(run, NOTHING_SHARED)
            return None
        return counted(run, model, first, batch, unfit(model, batch, positions, kwargs))
    except Exception as error:  # as stock
        all_rows(run, _fallback.failed(run, None, error))
        return None


def all_rows(run: PatchRun, reason: str) -> None:
    """All rows go through all layers: counted for the patch that would have cut, and those `BEHIND`."""
    run.declined(reason)
    for step in BEHIND:
        step.declined(f"no rows are cut: {reason}")


def cut_failed(error: Exception) -> None:
    """What was cut could not be run on its own, and all rows went on: the patch is `failed`."""
    run = YOCO.run
    if run is not None:
        run.declined(_fallback.failed(run, None, error))


def forget() -> None:
    """What has failed is tried again."""
    _fallback.clear()


def counted(
    run: PatchRun, model: TextModel, first: int, batch: ForwardBatch, reason: str | None
) -> Cut | None:
    """What to cut where there is no ``reason`` against it, counted for the patch; or None."""
    if reason is None:
        found = plan(model, first, cast("Prefill", batch))
        if len(found.rows) < found.tokens:
            run.engaged(False)
            return found
        reason = "every row's logits are wanted"
    all_rows(run, reason)
    return None


def first_shared(model: TextModel) -> int | None:
    """Index of the first of the KV-shared layers; None unless they are the last ones."""
    shared = [_shares(layer) for layer in model.layers]
    count = sum(shared)
    first = len(shared) - count
    whole = len(shared) == model.config.num_hidden_layers
    return first if whole and count and first and all(shared[first:]) else None


def _shares(layer: object) -> bool:
    attention: Any = getattr(layer, "self_attn", None)  # another pipeline stage's layer has none
    return bool(
        getattr(attention, "is_kv_shared_layer", False)
        and attention.kv_shared_layer_index is not None
    )


def unfit(
    model: TextModel, batch: ForwardBatch, positions: torch.Tensor, kwargs: dict[str, object]
) -> str | None:
    """Why another row than the last ones is wanted, or the batch is none to cut; or None."""
    return line().graph_unfit() or batch_unfit(model, batch, positions, kwargs)


def batch_unfit(
    model: TextModel, batch: ForwardBatch, positions: torch.Tensor, kwargs: dict[str, object]
) -> str | None:
    """`unfit`, wherever the prefill runs."""
    return (
        _mode_unfit(batch) or _layout_unfit(batch, positions) or server_unfit(model, batch, kwargs)
    )


def server_unfit(model: TextModel, batch: ForwardBatch, kwargs: dict[str, object]) -> str | None:
    """Those of the reasons that the lengths of the requests have no part in."""
    return (
        _rows_unfit(model, batch, kwargs)
        or backend_unfit(line().backend(batch))
        or line().slots_unfit(batch)
        or _cache_unfit(model, line().pool(batch))
        or _hooks_unfit(model, batch)
    )


def _hooks_unfit(model: TextModel, batch: ForwardBatch) -> str | None:
    """Whether somebody sees rows that the cut leaves out, or zeros in their place."""
    state = model.__dict__
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return hooks.HOOKED.format("the text model")
    if "forward" in state and not line().sets_forward(model, state["forward"]):
        return "somebody has set the text model's forward"
    if behind_the_cut(model).hooked():
        return hooks.HOOKED.format("a KV-shared layer, or the last norm,")
    processor = getattr(batch.seq_lens_cpu, LOGITS, None)
    if processor is not None and hooks.hooked(processor):
        return hooks.HOOKED.format("the logits processor")
    return None


def behind_the_cut(model: TextModel) -> hooks.Watched:
    """The hooks of the KV-shared layers, of the last norm, and of all that is inside them."""
    layers = list(model.layers._modules.values())
    every: list[Module] = [*layers, model.norm]
    kept, watched = _watched.get(model, (None, None))
    if watched is None or kept is None or list(map(id, kept)) != list(map(id, every)):
        first = first_shared(model)
        watched = hooks.Watched(every[len(layers) if first is None else first :])
        _watched[model] = every, watched
    return watched


def _mode_unfit(batch: ForwardBatch) -> str | None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    if custom_ops.capturing():
        return "the prefill is captured into a CUDA graph"
    if batch.forward_mode != ForwardMode.EXTEND:
        return f"the batch is {batch.forward_mode.name}, not a plain prefill"
    if batch.spec_info is not None or not (
        batch.spec_algorithm is None or batch.spec_algorithm.is_none()
    ):
        return "speculative decoding"
    return None


def _rows_unfit(model: TextModel, batch: ForwardBatch, kwargs: dict[str, object]) -> str | None:
    arguments = line().arguments()
    if model.layers_to_capture:
        return "hidden states of layers are captured"
    if kwargs:
        return f"the caller passes {', '.join(sorted(kwargs))}"
    if arguments.is_embedding or batch.is_prefill_only or batch.dimensions is not None:
        return "embeddings or scores, no generation"
    if batch.capture_hidden_mode is not None and batch.capture_hidden_mode.need_capture():
        return "hidden states are returned"
    if batch.return_hidden_states_before_norm or batch.return_pooled_hidden_states:
        return "hidden states are returned"
    if batch.multi_item_delimiter_indices is not None:
        return "multi-item scoring"
    if batch.return_logprob:
        starts, lengths = batch.extend_logprob_start_lens_cpu, batch.extend_seq_lens_cpu
        if (
            starts is None
            or lengths is None
            or any(a < b for a, b in zip(starts, lengths, strict=True))
        ):
            return "logprobs of the prompt are wanted"
    if arguments.enable_lora or any(name is not None for name in batch.lora_ids or ()):
        return "LoRA"
    if arguments.forward_hooks or arguments.debug_tensor_dump_output_folder is not None:
        return "hooks see what the layers compute"
    return None


def _layout_unfit(batch: ForwardBatch, positions: torch.Tensor) -> str | None:
    if batch.global_num_tokens_cpu is not None:
        return "data-parallel attention pads the batch"
    if batch.tbo_split_seq_index is not None or batch.tbo_children:
        return "two-batch overlap"
    if batch.attn_cp_metadata is not None:
        return "context parallelism"
    reason = line().layout_unfit(batch)
    if reason is not None:
        return reason
    lengths, prefixes = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
    if lengths is None or prefixes is None or batch.seq_lens_cpu is None:
        return "the lengths are not on the host"
    if not lengths or min(lengths) < 1:
        return "a request without new tokens"
    tokens = sum(lengths)
    if not tokens == positions.shape[-1] == batch.out_cache_loc.shape[0] or positions.dim() != 1:
        return f"{tuple(positions.shape)} positions are not the {tokens} tokens of the requests"
    totals = [a + b for a, b in zip(lengths, prefixes, strict=True)]
    if totals != batch.seq_lens_cpu.tolist():
        return "prefixes and new tokens are not the sequences"
    return None


def backend_unfit(backend: TritonBackend) -> str | None:
    """Why this attention backend's metadata are not ours to make, or None."""
    if not sglang_types.is_triton_backend(backend):
        return f"the attention backend is {type(backend).__name__}"
    if backend.enable_deterministic:
        return "deterministic inference has an attention of its own"
    if backend.use_mla:
        return "multi-head latent attention"
    return None


def _cache_unfit(model: TextModel, pool: KVPool) -> str | None:
    """With an 8-bit cache stock's extend kernel does not compile for KV-shared layers.

    It is to fail at the first prompt, not at the first one that is not cut.
    """
    computed = model.norm.weight.dtype
    if pool.dtype != computed:
        return f"the KV cache is {pool.dtype}, the model {computed}"
    return None


def plan(model: TextModel, first: int, batch: Prefill) -> Cut:
    """Rows and keys of each request whose prompt ends in this batch, from what the host knows."""
    sliding = next(
        (
            index
            for index in range(first, len(model.layers))
            if window(model.layers[index]) is not None
        ),
        None,
    )
    layer_window = None if sliding is None else window(model.layers[sliding])
    buffered = line().backend(batch).sliding_window_size
    lengths, prefixes = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
    unfinished = getattr(batch.seq_lens_cpu, UNFINISHED, None) or [False] * len(lengths)
    found = Cut(first, sum(lengths), [], [], [], [], sliding)
    end = 0
    for request, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        end += length
        if unfinished[request]:
            continue
        found.requests.append(request)
        found.rows.append(end - 1)
        found.lengths.append(prefix + length)
        found.windows.append(window_keys(length, prefix, layer_window, buffered))
    return found


def window(layer: DecoderLayer) -> int | None:
    """Keys before a token's own that a sliding layer sees; None for a layer that sees all."""
    size = layer.self_attn.attn.sliding_window_size
    return int(size) if size is not None and size > -1 else None


def window_keys(length: int, prefix: int, layer_window: int | None, buffered: int | None) -> int:
    """Keys that the last of ``length`` new tokens sees in a sliding layer of stock's extend kernel.

    That masks keys farther away than ``layer_window``; of the prefix it is handed ``buffered`` keys.
    """
    if layer_window is None:
        return 0
    new = min(length, layer_window + 1)
    handed = prefix if buffered is None or buffered <= 0 else min(prefix, buffered)
    return new + min(handed, layer_window + 1 - new)


def tail(
    found: Cut,
    batch: ForwardBatch,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    normed: torch.Tensor | None,
    per_layer_inputs: torch.Tensor | None,
) -> Tail:
    """The rows that are kept, and a batch that decodes them. The batch itself stays as it is.

    One copy from the host, no synchronisation.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    device = hidden_states.device
    count = len(found.rows)
    numbers = torch.tensor([found.requests, found.rows], dtype=torch.int64)
    starts = torch.tensor([_starts(found.lengths), _starts(found.windows)], dtype=torch.int32)
    if device.type == "cuda":
        numbers, starts = numbers.pin_memory(), starts.pin_memory()
    requests, rows = numbers.to(device, non_blocking=True)
    indptr, window_indptr = starts.to(device, non_blocking=True)

    made = copy.copy(batch)
    made.forward_mode = ForwardMode.DECODE
    made.batch_size = count
    made.input_ids = None
    made.req_pool_indices = batch.req_pool_indices[requests]
    made.seq_lens = batch.seq_lens[requests]
    made.seq_lens_cpu = cast("torch.Tensor", batch.seq_lens_cpu)[found.requests]
    made.seq_lens_sum = sum(found.lengths)
    made.out_cache_loc = batch.out_cache_loc[rows]
    made.positions = positions[rows]
    made.extend_num_tokens = made.extend_seq_lens = made.extend_prefix_lens = None
    made.extend_seq_lens_cpu = made.extend_prefix_lens_cpu = made.extend_start_loc = None
    made.mm_inputs = None
    backend = _backend(found, line().backend(batch), made, rows, indptr, window_indptr)
    line().decode(made, rows, backend)
    return Tail(
        made,
        backend,
        rows,
        made.positions,
        hidden_states[rows],
        None if residual is None else residual[rows],
        None if normed is None else normed[rows],
        None if per_layer_inputs is None else per_layer_inputs[rows],
    )


def _starts(lengths: list[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _backend(
    found: Cut,
    backend: TritonBackend,
    batch: ForwardBatch,
    rows: torch.Tensor,
    indptr: torch.Tensor,
    window_indptr: torch.Tensor,
) -> TritonBackend:
    """A shallow copy of the attention backend with metadata of its own: stock's stays as it is."""
    of = line()
    count, heads, splits = len(found.rows), backend.num_head, backend.max_kv_splits
    device = indptr.device

    def logits(width: int) -> torch.Tensor:
        return torch.empty((count, heads, splits, width), dtype=torch.float32, device=device)

    indices = of.slots(backend, batch, batch.seq_lens, None, indptr, sum(found.lengths), False)
    kv_splits = torch.empty((count,), dtype=torch.int32, device=device)
    backend.get_num_kv_splits(kv_splits, batch.seq_lens)
    window_indices = window_splits = None
    if found.sliding is not None:
        keys = window_indptr[1:] - window_indptr[:-1]
        first = batch.seq_lens - keys
        window_indices = of.slots(
            backend, batch, keys, first, window_indptr, sum(found.windows), True
        )
        window_splits = torch.empty((count,), dtype=torch.int32, device=device)
        backend.get_num_kv_splits(window_splits, keys)
    made = copy.copy(backend)
    if found.sliding is not None:
        # A decode kernel may take this for the most keys of a row; stock's extend step has two more.
        made.sliding_window_size = max(found.windows)
    made.forward_metadata = of.metadata(
        backend.forward_metadata,
        rows,
        attn_logits=logits(backend.v_head_dim),
        attn_lse=torch.empty((count, heads, splits), dtype=torch.float32, device=device),
        max_extend_len=None,
        num_kv_splits=kv_splits,
        kv_indptr=indptr,
        kv_indices=indices,
        qo_indptr=None,
        custom_mask=None,
        mask_indptr=None,
        window_kv_indptr=window_indptr,
        window_kv_indices=window_indices,
        window_num_kv_splits=window_splits,
        window_kv_offsets=None,
        swa_attn_logits=None if backend.swa_v_head_dim is None else logits(backend.swa_v_head_dim),
    )
    return made
