"""`mtp_seed_graph`: the MTP draft's seed step in CUDA graphs.

After every prefill and every verification the assistant runs once more, to seed the next draft.
Stock runs that step eagerly, one launch after the other, though the draft itself is in a graph.
Here a graph of it is captured right after each of the draft's, for the same batch size, over the
same input buffers and the same metadata; positions and the choice of the token are in it.

What a graph leaves is copied: a batch keeps its seed while another batch is seeded. A step that
does not fit runs stock's way: pictures' embeddings, more requests than the largest graph has, data
parallel attention, LoRA, more than one candidate per step, and as long as a module of the assistant
has a hook. Weights that were put elsewhere end the graphs.

Several GPUs of tensor parallelism seed eagerly. A capture warms up between SGLang's barriers and sums over
the GPUs: one that fails there leaves the others waiting, and cannot tell them. A hook or a replay that
fails on one GPU alone would leave it with sums of fewer rows than the padded ones of a graph.
"""

from __future__ import annotations

import bisect
import functools
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.runtime import graphs, hooks
from gemma4_turbo.runtime.attempts import attempt, one_line
from gemma4_turbo.runtime.fallback import DeclinedError, Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import DraftInput, ScheduleBatch
    from gemma4_turbo.ports.v0_5_12.protocols import (
        CapturedDraftBatch,
        DraftGraphRunner,
        DraftWorker,
    )

CAPTURE = (
    "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
    ":FrozenKVMTPCudaGraphRunner.capture_one_batch_size"
)
METHOD = "_run_assistant_seed_step"  # of the worker
SEVERAL = "several GPUs: a capture may fail on one of them alone"


class Captured(NamedTuple):
    """One graph: its batch, whose tensors are the runner's buffers, and what it writes."""

    graph: torch.cuda.CUDAGraph
    batch: CapturedDraftBatch
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # topk_p, topk_index, hidden_states


class Seeds:
    """The graphs of one worker."""

    def __init__(self, runner: DraftGraphRunner) -> None:
        self.runner = runner
        self.by_size: dict[int, Captured] = {}
        size = runner.max_bs
        device = runner.buffers.seq_lens.device
        self.input_ids = torch.zeros(size, dtype=torch.int64, device=device)

        model = runner.model_runner.model
        whole = [model] if isinstance(model, torch.nn.Module) else []
        self.hooks = hooks.Watched(whole)
        layers = list(getattr(getattr(model, "model", None), "layers", ()))
        self.weights = graphs.Watched([*layers[:1], *layers[-1:]])  # they tell of all


_fallback = Fallback("the seed step")
_SEEDS = "_gemma4_turbo_seeds"  # on a worker
_workers: weakref.WeakSet[DraftWorker] = weakref.WeakSet()  # those that have graphs


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The capture of the draft's graph of one batch size, and then that of the seed's."""
    capture = stock[CAPTURE]

    @functools.wraps(capture)
    def capture_one_batch_size(
        self: DraftGraphRunner, num_seqs: int, forward: object, stream_idx: int = 0
    ) -> tuple[object, object]:
        captured: tuple[object, object] | None = None
        try:
            captured = capture(self, num_seqs, forward, stream_idx)
        except torch.OutOfMemoryError:
            if self.frozen_kv_mtp_worker not in _workers:
                raise
        if captured is None:  # the server is to start wherever it starts without our graphs
            _release(self.frozen_kv_mtp_worker)
            run.set(states.FAILED, "out of memory: the draft's graphs took the seeds' place")
            torch.cuda.empty_cache()
            captured = capture(self, num_seqs, forward, stream_idx)
        reason, problem = attempt(run, "a look at the runner", lambda: runner_unfit(self))
        reason = reason or problem
        if reason is not None:
            run.declined(reason)
        elif run.state != states.FAILED:
            try:
                _capture_seed(run, self, num_seqs)
            except Exception as error:  # stock seeds eagerly
                graphs.settle()
                _release(self.frozen_kv_mtp_worker)
                run.set(states.FAILED, one_line(error))
        return captured

    return {CAPTURE: capture_one_batch_size}


def runner_unfit(runner: DraftGraphRunner) -> str | None:
    """Why no seed step of a ``FrozenKVMTPCudaGraphRunner`` can be in a graph, or None."""
    worker, model_runner = runner.frozen_kv_mtp_worker, runner.model_runner
    if runner.topk != 1:
        return f"{runner.topk} candidates per step"
    if runner.tp_size > 1:
        return SEVERAL
    if runner.require_mlp_sync or runner.require_gathered_buffer:
        return "data parallel attention"
    if model_runner.server_args.enable_lora:
        return "LoRA"
    if model_runner.model_is_mrope:
        return "multimodal rotary positions"
    if METHOD in vars(worker) and worker not in _workers:
        return "the worker has a seed step of its own"
    model = getattr(model_runner, "model", None)
    if isinstance(model, torch.nn.Module) and hooks.Watched([model]).hooked():
        return hooks.HOOKED.format("the assistant")
    return None


# -- capture --------------------------------------------------------------------------------------


def _capture_seed(run: PatchRun, runner: DraftGraphRunner, size: int) -> None:
    from sglang.srt.layers.dp_attention import set_dp_buffer_len
    from sglang.srt.model_executor.cuda_graph_runner import (
        get_global_graph_memory_pool,
        set_global_graph_memory_pool,
        set_is_extend_in_batch,
    )
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPDraftInput
    from sglang.srt.speculative.spec_utils import maybe_detect_nan

    worker = runner.frozen_kv_mtp_worker
    seeds: Seeds | None = vars(worker).get(_SEEDS)
    if seeds is None or seeds.runner is not runner:
        seeds = Seeds(runner)
    batch = _batch(runner, seeds, size)  # the backend still has the metadata of the draft's graph

    def run_once() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch.dp_local_start_pos = batch.dp_local_num_tokens = None
        set_dp_buffer_len(None, size, batch.dp_padding_mode.is_max_len())
        set_is_extend_in_batch(False)
        worker._set_positions(batch)
        with worker._target_kv_pool_view(batch):
            output = worker.draft_model_runner.forward(
                batch, skip_attn_backend_init=True
            ).logits_output
        maybe_detect_nan(output.next_token_logits, "frozen_kv_mtp_seed")
        seed = FrozenKVMTPDraftInput()
        worker._capture_for_decode(output, seed)
        return seed.topk_p, seed.topk_index, seed.hidden_states

    graph = runner._create_graph()
    runner._capture_init(run_once)
    outputs = runner._capture_graph(graph, get_global_graph_memory_pool(), runner.stream, run_once)
    set_global_graph_memory_pool(graph.pool())
    seeds.by_size[size] = Captured(graph, batch, outputs)
    vars(worker)[_SEEDS] = seeds
    vars(worker)[METHOD] = functools.partial(seed_step, run, worker)
    _workers.add(worker)


def _batch(runner: DraftGraphRunner, seeds: Seeds, size: int) -> CapturedDraftBatch:
    """A ``ForwardBatch`` over the runner's buffers, as stock makes one for the draft's graph."""
    from sglang.srt.layers.dp_attention import DpPaddingMode
    from sglang.srt.model_executor.forward_batch_info import (
        CaptureHiddenMode,
        ForwardBatch,
        ForwardMode,
    )
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPDraftInput

    buffers, worker = runner.buffers, runner.frozen_kv_mtp_worker
    draft_input = FrozenKVMTPDraftInput(
        hidden_states=buffers.hidden_states[:size], capture_hidden_mode=CaptureHiddenMode.LAST
    )
    draft_input.num_tokens_per_req = draft_input.num_tokens_for_logprob_per_req = 1
    draft_input.positions = buffers.positions[:size]
    made: CapturedDraftBatch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=size,
        input_ids=seeds.input_ids[:size],
        req_pool_indices=buffers.req_pool_indices[:size],
        seq_lens=buffers.seq_lens[:size],
        seq_lens_cpu=buffers.seq_lens_cpu[:size],
        req_to_token_pool=runner.model_runner.req_to_token_pool,
        token_to_kv_pool=worker.kv_context.target_token_to_kv_pool,
        attn_backend=runner.draft_attn_backend,
        out_cache_loc=None,
        seq_lens_sum=int(buffers.seq_lens_cpu[:size].sum()),
        return_logprob=False,
        positions=buffers.positions[:size],
        mrope_positions=buffers.mrope_positions[:, :size],
        dp_padding_mode=DpPaddingMode.get_default_mode_in_cuda_graph(),
        spec_algorithm=runner.model_runner.spec_algorithm,
        spec_info=draft_input,
        capture_hidden_mode=CaptureHiddenMode.LAST,
    )
    return made


# -- the step -------------------------------------------------------------------------------------


def seed_step(
    run: PatchRun,
    worker: DraftWorker,
    batch: ScheduleBatch,
    last_token_ids: torch.Tensor,
    last_hidden_states: torch.Tensor,
    seq_lens_cpu: torch.Tensor | None = None,
    mm_input_embeds: torch.Tensor | None = None,
    draft_input: DraftInput | None = None,
) -> None:
    """Stock's seed step: leaves the input of the next draft in ``batch.spec_info``."""
    rows = last_token_ids.numel()

    def stocks() -> None:
        getattr(type(worker), METHOD)(
            worker,
            batch,
            last_token_ids,
            last_hidden_states,
            seq_lens_cpu=seq_lens_cpu,
            mm_input_embeds=mm_input_embeds,
            draft_input=draft_input,
        )

    def ours() -> None:
        lengths = batch.seq_lens_cpu if seq_lens_cpu is None else seq_lens_cpu
        reason = unfit(worker, batch, rows, last_hidden_states, lengths, mm_input_embeds)
        if reason is not None or lengths is None:
            raise DeclinedError(str(reason))
        _seed(worker, batch, last_token_ids, last_hidden_states, lengths, draft_input)

    if batch.forward_mode.is_idle() or rows == 0:
        stocks()  # nothing to run; stock leaves an empty input
        return
    _fallback.call(run, ours, stocks)
    if _fallback.unfit() is not None or vars(worker)[_SEEDS].weights.moved():
        _release(worker)


def _seed(
    worker: DraftWorker,
    batch: ScheduleBatch,
    last_token_ids: torch.Tensor,
    last_hidden_states: torch.Tensor,
    lengths: torch.Tensor,
    draft_input: DraftInput | None,
) -> None:
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPDraftInput

    seed = FrozenKVMTPDraftInput() if draft_input is None else draft_input
    seed.bonus_tokens = last_token_ids.to(torch.int64)
    seed.capture_hidden_mode = CaptureHiddenMode.LAST
    seed.num_tokens_per_req = seed.num_tokens_for_logprob_per_req = 1
    seeds: Seeds = vars(worker)[_SEEDS]
    outputs = _replay(seeds, batch, seed.bonus_tokens, last_hidden_states, lengths)
    seed.topk_p, seed.topk_index, seed.hidden_states = outputs
    seed.positions = None  # the draft sets its own; those of this step were in the graph
    batch.spec_info = seed


def unfit(
    worker: DraftWorker,
    batch: ScheduleBatch,
    rows: int,
    last_hidden_states: torch.Tensor,
    lengths: torch.Tensor | None,
    mm_input_embeds: torch.Tensor | None,
) -> str | None:
    """Why this seed step takes stock's path, or None."""
    seeds: Seeds = vars(worker)[_SEEDS]
    if seeds.hooks.hooked():
        return hooks.HOOKED.format("the assistant")
    if seeds.weights.moved():
        return "a weight update put other parameters in the place of those in the graphs"
    if mm_input_embeds is not None:
        return "embeddings of images"
    if lengths is None or not len(lengths) == len(batch.seq_lens) == rows:
        return f"lengths on the host of all {rows} requests are needed"
    if last_hidden_states.shape != (rows, seeds.runner.buffers.hidden_states.shape[1]):
        return f"hidden states of shape {tuple(last_hidden_states.shape)}"
    if last_hidden_states.dtype != seeds.runner.buffers.hidden_states.dtype:
        return f"{last_hidden_states.dtype} hidden states"
    if _size(seeds, rows) is None:
        return f"no graph of {rows} requests"
    return None


def _size(seeds: Seeds, rows: int) -> int | None:
    """The graph that takes ``rows`` requests: the smallest with room for them."""
    if seeds.runner.disable_padding:
        return rows if rows in seeds.by_size else None
    sizes = sorted(seeds.by_size)
    place = bisect.bisect_left(sizes, rows)
    return sizes[place] if place < len(sizes) else None


def _replay(
    seeds: Seeds,
    batch: ScheduleBatch,
    tokens: torch.Tensor,
    last_hidden_states: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    runner, rows = seeds.runner, len(tokens)
    size = _size(seeds, rows)
    assert size is not None
    captured, buffers = seeds.by_size[size], runner.buffers
    runner.deepep_adapter.replay()
    if size != rows:
        buffers.seq_lens.fill_(runner.seq_len_fill_value)
        buffers.seq_lens_cpu.fill_(runner.seq_len_fill_value)
    buffers.seq_lens[:rows].copy_(batch.seq_lens)
    buffers.seq_lens_cpu[:rows].copy_(lengths)
    buffers.req_pool_indices[:rows].copy_(batch.req_pool_indices)
    buffers.hidden_states[:rows].copy_(last_hidden_states)
    seeds.input_ids[:rows].copy_(tokens)
    runner.frozen_kv_mtp_worker._init_frozen_kv_metadata_replay_cuda_graph(
        captured.batch, size, int(captured.batch.seq_lens_cpu.sum())
    )
    captured.graph.replay()
    return tuple(output[:rows].clone() for output in captured.outputs)


def _release(worker: DraftWorker) -> None:
    """Stock's seed step again, and the graphs' memory back."""
    if worker in _workers:
        _workers.remove(worker)
        del vars(worker)[METHOD], vars(worker)[_SEEDS]


def undo(run: PatchRun) -> None:
    """Live workers seed eagerly again."""
    for worker in list(_workers):
        _release(worker)
    _fallback.clear()
