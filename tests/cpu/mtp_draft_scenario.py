"""Seeds and drafts of SGLang's real ``FrozenKVMTPWorker`` and its graph runner on the CPU.

Run in a process of its own, as `mtp_worker_scenario`. What cannot exist without a GPU is stood in
for: the assistant and its attention, the CUDA graphs (a graph runs its function again, into the
tensors of its capture), and the kernel that builds the tree for the verification. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.cpu.mtp_worker_scenario import load_driver_stub

PATCHES = ("mtp_chain", "mtp_seed_graph")
ALL = (*PATCHES, "mtp_metadata")
SIZES = [1, 2, 4]  # batch sizes of the graphs


class Assistant:
    """A recurrent model whose output depends on token, state, position and the KV it is shown."""

    def __init__(self, pool: Any, backend: Any, vocab: int, hidden: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.embed, self.mix = randn(vocab, hidden), randn(hidden, hidden)
        self.head, self.reading = randn(hidden, vocab) * 3, randn(hidden) * 5
        self.pool, self.backend = pool, backend
        self.summed: Callable[[torch.Tensor], torch.Tensor] = lambda x: x  # over the GPUs
        self.eager = 0
        self.replaying = False

    def forward(self, batch: Any, skip_attn_backend_init: bool) -> Any:
        """As ``ModelRunner.forward``."""
        assert skip_attn_backend_init
        assert batch.token_to_kv_pool is self.pool
        self.eager += not self.replaying
        state = batch.spec_info.hidden_states
        assert len(batch.input_ids) == len(batch.positions) == len(state) == batch.batch_size
        x = self.embed[batch.input_ids] + state @ self.mix
        seen = torch.sin(batch.positions.double() * 3 + self.backend.metadata)
        x = self.summed(x + seen[:, None] * self.reading)
        hidden = torch.tanh(x)
        output = SimpleNamespace(next_token_logits=hidden @ self.head, hidden_states=hidden)
        return SimpleNamespace(logits_output=output)


class TritonAttnBackend:
    """Stands in for it: shows the sum of a request's slots. One buffer for everything, as there."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.buffer = torch.zeros(8, dtype=torch.float64)
        self.metadata = self.buffer
        self.lengths: list[int] = []
        self.filled = 0  # times that a graph's buffer was

    def _read(self, requests: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        columns = torch.arange(self.table.shape[1])
        rows = self.table[requests].double()
        return (rows * (columns < lengths[:, None])).sum(1) / 7

    def _fill(self, requests: torch.Tensor, lengths: torch.Tensor) -> None:
        self.metadata = self.buffer[: len(requests)]
        self.metadata.copy_(self._read(requests, lengths))

    def init_forward_metadata(self, batch: Any) -> None:
        """Eager."""
        assert batch.spec_info is None
        assert batch.seq_lens_sum == int(batch.seq_lens.sum())
        self._fill(batch.req_pool_indices, batch.seq_lens)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: the buffer is there."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_capture_cuda_graph(
        self, bs: int, tokens: int, requests: torch.Tensor, lengths: torch.Tensor, **_: Any
    ) -> None:
        self._fill(requests, lengths)

    def init_forward_metadata_replay_cuda_graph(
        self,
        bs: int,
        requests: torch.Tensor,
        lengths: torch.Tensor,
        total: int,
        seq_lens_cpu: torch.Tensor,
        **_: Any,
    ) -> None:
        assert total == int(lengths.sum()) == int(seq_lens_cpu.sum())
        assert len(requests) == len(lengths) == bs
        self.lengths = lengths.tolist()
        self.filled += 1
        self._fill(requests, lengths)


class Graph:
    """Stands in for a CUDA graph: it reads the metadata's tensor that it was captured with."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.metadata = torch.zeros(0)
        self.run_once: Callable[[], tuple[torch.Tensor, ...]] = tuple
        self.outputs: tuple[torch.Tensor, ...] = ()

    def pool(self) -> None:
        """No memory pool."""

    def replay(self) -> None:
        self.assistant.replaying = True
        self.assistant.backend.metadata = self.metadata
        for output, value in zip(self.outputs, self.run_once(), strict=True):
            output.copy_(value)
        self.assistant.replaying = False


def capture_all(runner: Any) -> None:
    """As ``CudaGraphRunner.capture``, which stock's runner calls."""
    runner.stream = None
    for size in reversed(runner.capture_bs):
        captured = runner.capture_one_batch_size(size, None)
        runner.graphs[size], runner.output_buffers[size] = captured


def runner_class(stock: Any) -> Any:
    """Stock's graph runner, but for what is CUDA's."""

    class Runner(stock):
        def _create_graph(self) -> Graph:
            return Graph(self.model_runner.assistant)

        def _capture_init(self, run_once: Any) -> None:
            for _ in range(2):
                if self.tp_size > 1:
                    self.model_runner.tp_group.barrier()
                run_once()

        def _capture_graph(self, graph: Graph, pool: Any, stream: Any, run_once: Any) -> Any:
            graph.metadata = self.draft_attn_backend.metadata
            graph.run_once, graph.outputs = run_once, tuple(t.clone() for t in run_once())
            return graph.outputs

    return Runner


def make_worker(graphs: bool, **changed: Any) -> Any:
    """A stock worker; with ``graphs``, a stock graph runner is made as the worker makes it."""
    from sglang.srt.speculative import frozen_kv_mtp_cuda_graph_runner as runners
    from sglang.srt.speculative import frozen_kv_mtp_worker as stock
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPContext
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from tests.cpu import mtp_batches as made

    settings = {"topk": 1, "steps": made.STEPS, "draft_tokens": made.DRAFT_TOKENS, **changed}
    table = torch.arange(8 * 32, dtype=torch.int32).view(8, 32)
    pool, attention = SimpleNamespace(), TritonAttnBackend(table)
    arguments = SimpleNamespace(
        enable_torch_compile=False,
        disable_cuda_graph_padding=settings.get("disable_padding", False),
        enable_profile_cuda_graph=False,
        enable_dp_attention=False,
        enable_lora=settings.get("lora", False),
        speculative_num_steps=settings["steps"],
        speculative_eagle_topk=settings["topk"],
        disable_cuda_graph=False,
    )
    assistant = Assistant(pool, attention, made.VOCAB, made.HIDDEN)
    assistant.summed = getattr(settings.get("tp_group"), "all_reduce", assistant.summed)
    model = settings.get("model", SimpleNamespace())
    model.backbone_hidden_size = made.HIDDEN
    model_runner = SimpleNamespace(
        assistant=assistant,
        forward=assistant.forward,
        model=model,
        server_args=arguments,
        tp_size=2 if "tp_group" in settings else 1,
        tp_group=settings.get("tp_group"),
        dp_size=1,
        device="cpu",
        dtype=torch.float64,
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=4),
        token_to_kv_pool="the draft's own pool",
        attn_backend=attention,
        spec_algorithm=SpeculativeAlgorithm.from_string("FROZEN_KV_MTP"),
        use_ngram_embedding=False,
        model_is_mrope=False,
        is_hybrid_swa=False,
    )
    worker = object.__new__(stock.FrozenKVMTPWorker)
    vars(worker).update(
        server_args=arguments,
        target_worker=SimpleNamespace(device="cuda"),
        topk=settings["topk"],
        device="cpu",
        speculative_num_steps=settings["steps"],
        speculative_num_draft_tokens=settings["draft_tokens"],
        draft_attn_backend=attention,
        kv_context=FrozenKVMTPContext(pool, {0: 0}),
        cuda_graph_runner=None,
        _model_runner=model_runner,
        model_config=SimpleNamespace(dtype=torch.float64),
    )
    if graphs:
        kind = runner_class(runners.FrozenKVMTPCudaGraphRunner)
        with (
            mock.patch.object(runners, "FrozenKVMTPCudaGraphRunner", kind),
            mock.patch.object(runners, "CudaGraphRunner", SimpleNamespace(capture=capture_all)),
            mock.patch.object(
                runners, "get_batch_sizes_to_capture", return_value=(list(SIZES), [])
            ),
        ):
            worker.init_cuda_graphs()
    assistant.eager = 0
    return worker


def batch(*names: str, first_slot: int = 0, longer: int = 0) -> Any:
    """A stock batch; each request is one token longer than the one before."""
    from tests.cpu import mtp_batches as made

    built = made.batch(*names, first_slot=first_slot)
    built.seq_lens = built.seq_lens + torch.arange(len(names)) + longer
    built.seq_lens_cpu = built.seq_lens.clone()
    for row, request in enumerate(built.reqs, first_slot):
        request.req_pool_idx = row
    built.out_cache_loc = None
    built.tree_cache = SimpleNamespace(supports_swa=lambda: False)
    return built


def seed(worker: Any, running: Any, **extra: Any) -> None:
    """The seed step after a prefill: the last hidden state and the first token of each request."""
    from tests.cpu import mtp_batches as made

    rows = len(running.reqs)
    hidden = torch.sin(torch.arange(rows * made.HIDDEN).double() + int(running.seq_lens.sum()))
    worker.forward_draft_extend(
        running, hidden.view(rows, -1), torch.arange(rows) + 2, running.seq_lens_cpu, **extra
    )


def seed_of(running: Any) -> dict[str, Any]:
    """What the seed step left, rounded: a gemm of more rows may add in another order."""
    left = running.spec_info
    return {
        "type": type(left).__name__,
        "bonus": left.bonus_tokens.tolist(),
        "token": left.topk_index.tolist(),
        "hidden": [[round(x, 9) for x in row] for row in left.hidden_states.tolist()],
        "shapes": [list(left.topk_p.shape), str(left.topk_index.dtype)],
        "mode": left.capture_hidden_mode.name,
        "per request": [left.num_tokens_per_req, left.num_tokens_for_logprob_per_req],
    }


def draft(worker: Any, running: Any) -> list[Any]:
    """A draft: what the tree is built from."""
    from sglang.srt.speculative import frozen_kv_mtp_worker as stock

    given: list[Any] = []

    def build(bonus: Any, parents: Any, places: Any, tokens: Any, *rest: Any) -> Any:
        given.extend((bonus, parents, places, tokens))
        return (None,) * 6

    with mock.patch.object(stock, "build_tree_kernel_efficient", build):
        worker.draft(running)
    return [[t.tolist(), str(t.dtype), t.is_contiguous()] for t in given[1:3]] + [
        [given[0].tolist()],
        [given[3].tolist(), str(given[3].dtype)],
    ]


def after_decode(worker: Any, running: Any) -> None:
    """The seed step after a verification of three requests, the middle one of which is done."""
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPDraftExtendInput

    from tests.cpu import mtp_batches as made

    going_on = torch.tensor([0, 2])
    accepted = torch.tensor([3, 1])
    running.seq_lens = running.seq_lens + torch.tensor([3, 2, 1])
    running.seq_lens_cpu = running.seq_lens.clone()
    hidden = torch.cos(torch.arange(4 * made.HIDDEN).double()).view(4, -1)
    running.spec_info = FrozenKVMTPDraftExtendInput(
        hidden_states=hidden,
        input_ids=torch.tensor([9, 8, 7, 6]),
        seq_lens=running.seq_lens[going_on],
        seq_lens_cpu=running.seq_lens_cpu[going_on],
        req_pool_indices=running.req_pool_indices[going_on],
        num_accept_tokens=accepted,
        num_correct_drafts=accepted - 1,
    )
    whole = running.seq_lens, running.req_pool_indices
    worker.forward_draft_extend_after_decode(running)
    assert torch.equal(running.seq_lens, whole[0])
    assert running.req_pool_indices is whole[1]


def verified(worker: Any, running: Any) -> None:
    """The seed step after a verification: every request goes on with a token, of the same length."""
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPDraftExtendInput

    from tests.cpu import mtp_batches as made

    rows = len(running.reqs)
    hidden = torch.cos(torch.arange(rows * made.HIDDEN).double() + int(running.seq_lens.sum()))
    running.spec_info = FrozenKVMTPDraftExtendInput(
        hidden_states=hidden.view(rows, -1),
        input_ids=torch.arange(rows) + 3,
        seq_lens=running.seq_lens,
        seq_lens_cpu=running.seq_lens_cpu,
        req_pool_indices=running.req_pool_indices,
        num_accept_tokens=torch.ones(rows, dtype=torch.int64),
        num_correct_drafts=torch.zeros(rows, dtype=torch.int64),
    )
    worker.forward_draft_extend_after_decode(running)


def play(worker: Any) -> dict[str, Any]:
    """Two requests are seeded, two others, and a third; three draft; two are seeded again."""
    assistant = worker.draft_model_runner.assistant
    first, second = batch("a", "b"), batch("c", first_slot=2, longer=4)
    found: dict[str, Any] = {}
    seed(worker, first)
    found["seed of two"] = seed_of(first)
    seed(worker, batch("x", "y", first_slot=3, longer=2))  # in the same graph as the first
    seed(worker, second)
    found["seed of one"] = seed_of(second)
    found["seed of two later"] = seed_of(first)
    found["eager seeds"] = assistant.eager
    first.merge_batch(second)
    found["draft of three"] = draft(worker, first)
    before = assistant.eager
    after_decode(worker, first)
    found["seed after decode"] = seed_of(first)
    found["eager seeds"] += assistant.eager - before
    found["eager"] = assistant.eager
    return found


def limits() -> dict[str, Any]:
    """Seed steps that no graph takes; what the engine says of each."""
    from gemma4_turbo.instance import ENGINE

    found: dict[str, Any] = {}
    run = ENGINE.runs["mtp_seed_graph"]

    def told(what: str, worker: Any, running: Any, **extra: Any) -> None:
        run._decline_reason = ""
        before = worker.draft_model_runner.assistant.eager
        seed(worker, running, **extra)
        eager = worker.draft_model_runner.assistant.eager - before
        reference = make_worker(graphs=False)
        other = batch(*(r.rid for r in running.reqs))
        seed(reference, other)
        same = seed_of(other) == seed_of(running)
        found[what] = [eager, same, run._decline_reason]

    worker = make_worker(graphs=True)
    told("fits", worker, batch("a", "b", "c", "d"))
    told("fits with padding", worker, batch("a", "b", "c"))
    found["padded lengths"] = worker.draft_attn_backend.lengths
    told("too many", worker, batch("a", "b", "c", "d", "e"))
    told("images", worker, batch("a"), mm_input_embeds=torch.zeros(1))
    exact = make_worker(graphs=True, disable_padding=True)
    told("no padding, captured", exact, batch("a", "b"))
    told("no padding, not captured", exact, batch("a", "b", "c"))
    run._decline_reason = ""
    lora = make_worker(graphs=True, lora=True)
    found["LoRA"] = ["_run_assistant_seed_step" in vars(lora), run._decline_reason]
    idle = batch("a")
    idle.forward_mode = type(idle.forward_mode).IDLE
    seed(worker, idle)
    found["idle"] = [idle.spec_info.topk_index.tolist(), type(idle.spec_info).__name__]

    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with model.register_forward_hook(lambda *given: None):
        hooked = make_worker(graphs=True, model=model)
        run._decline_reason = ""
        seed(hooked, batch("a"))
        found["hooked when captured"] = "_run_assistant_seed_step" in vars(hooked)
    watched = make_worker(graphs=True, model=model)
    told("no hook", watched, batch("a", "b"))
    with model[0].register_forward_hook(lambda *given: None):
        told("a hook that came later", watched, batch("a", "b"))
    told("without it again", watched, batch("a", "b"))

    state = run.state
    from gemma4_turbo.ports.v0_5_12.speculation import mtp_seed_graph

    worker = make_worker(graphs=True)
    with mock.patch.object(mtp_seed_graph, "_replay", side_effect=RuntimeError("no such graph")):
        told("a replay that raises", worker, batch("a", "b"))
    found["after a replay that raised"] = [
        *(run.state, run.reason, "_run_assistant_seed_step" in vars(worker))
    ]
    run.state = state
    mtp_seed_graph._fallback.clear()
    layers = torch.nn.Module()
    layers.model = torch.nn.Module()
    layers.model.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    worker = make_worker(graphs=True, model=layers)
    told("weights in place", worker, batch("a"))
    layers.model.layers[0].weight = torch.nn.Parameter(torch.ones(1, 1))
    told("weights elsewhere", worker, batch("a"))
    found["after weights elsewhere"] = "_run_assistant_seed_step" in vars(worker)

    with mock.patch.object(Graph, "pool", side_effect=RuntimeError("no memory")) as failing:
        failing.side_effect = [None, RuntimeError("no memory")] + [None] * 9
        broken = make_worker(graphs=True)
    found["failed capture"] = [run.state, run.reason, "_run_assistant_seed_step" in vars(broken)]
    run.state = state
    with mock.patch.object(Graph, "pool") as full:
        full.side_effect = [None, None, torch.OutOfMemoryError("no memory")] + [None] * 9
        crowded = make_worker(graphs=True)
    found["no memory for the draft"] = [
        *(run.state, run.reason, "_run_assistant_seed_step" in vars(crowded)),
        sorted(crowded.cuda_graph_runner.graphs),
    ]
    run.state = state
    chain = ENGINE.runs["mtp_chain"]
    chain._decline_reason = ""
    fewer = make_worker(graphs=True, draft_tokens=3)
    found["fewer draft tokens"] = ["draft_forward" in vars(fewer), chain._decline_reason]
    return found


def metadata() -> dict[str, Any]:
    """Drafts after a seed step: how often each filled the buffers, and whether it is stock's."""
    found: dict[str, Any] = {}

    def told(
        what: str, change: Callable[[Any, Any], Any] = lambda worker, running: running
    ) -> None:
        drafts, counts = [], []
        for worker in (make_worker(graphs=True), make_worker(graphs=False)):
            running = batch("a", "b", "c")
            verified(worker, running)
            running = change(worker, running)
            before = worker.draft_attn_backend.filled
            drafts.append(draft(worker, running))
            counts.append(worker.draft_attn_backend.filled - before)
        found[what] = [counts[0], drafts[0] == drafts[1]]

    def longer(worker: Any, running: Any) -> Any:
        running.seq_lens.add_(1)  # in place, as stock's verification does
        running.seq_lens_cpu.add_(1)
        return running

    def after(*names: str, **kwargs: Any) -> Callable[[Any, Any], Any]:
        def change(worker: Any, running: Any) -> Any:
            seed(worker, batch(*names, **kwargs))
            return running

        return change

    def prefilled(worker: Any, running: Any) -> Any:
        seed(worker, running)
        return running

    def slots_exchanged(worker: Any, running: Any) -> Any:
        seed(worker, running)
        worker.draft_attn_backend.table[1, :4] += 100  # the radix cache had this prompt already
        return running

    def namesakes(worker: Any, running: Any) -> Any:
        verified(worker, batch("a", "b", "c", first_slot=4))
        return running

    def others_slots(worker: Any, running: Any) -> Any:
        later = batch("a", "b", "c", first_slot=4)
        later.spec_info = running.spec_info
        for request in later.reqs:
            request.rid += "'"
        return later

    def merged(worker: Any, running: Any) -> Any:
        later = batch("d", first_slot=5)
        seed(worker, later)
        running.merge_batch(later)
        return running

    told("same")
    told("longer", longer)
    told("another was seeded", after("x", "y", "z", first_slot=4))
    told("another was seeded in another graph", after("x"))
    told("another was seeded eagerly", after("v", "w", "x", "y", "z"))
    told("other requests", others_slots)
    told("merged", merged)
    told("prefilled", prefilled)
    told("slots exchanged after the prefill", slots_exchanged)
    told("others of the same names", namesakes)
    found["any order"] = any_order()
    return found


def any_order() -> list[int]:
    """Seeds, drafts and longer requests at random: drafts that differ from stock's, and fills saved."""
    from random import Random

    source = Random(3)
    ours, stock = make_worker(graphs=True), make_worker(graphs=False)
    pairs = [
        tuple(batch(*names, first_slot=slot) for _ in range(2))
        for names, slot in ((("a", "b"), 0), (("c",), 3), (("d", "e", "f"), 4))
    ]
    for pair in pairs:
        for worker, running in zip((ours, stock), pair, strict=True):
            verified(worker, running)
    wrong = drafts = 0
    seeded = [True] * len(pairs)  # a draft takes its seed's hidden states away
    filled = ours.draft_attn_backend.filled
    for _ in range(240):
        number = source.randrange(len(pairs))
        pair = pairs[number]
        what = source.choice(("seed", "prefill", "draft", "draft", "longer"))
        if what == "longer" and int(pair[0].seq_lens.max()) < 24:
            for running in pair:
                running.seq_lens.add_(1)
                running.seq_lens_cpu.add_(1)
        if what in ("seed", "prefill"):
            filled, seeded[number] = filled + 1, True
            for worker, running in zip((ours, stock), pair, strict=True):
                (verified if what == "seed" else seed)(worker, running)
        if "draft" in what and seeded[number]:
            drafts, seeded[number] = drafts + 1, False
            made = [draft(*one) for one in zip((ours, stock), pair, strict=True)]
            wrong += made[0] != made[1]
    return [wrong, drafts - (ours.draft_attn_backend.filled - filled), drafts]


def import_worker(folder: Path) -> None:
    """SGLang's worker and graph runner, what they ask of a server answered."""
    load_driver_stub(folder)
    from sglang.srt.managers import scheduler  # noqa: F401  (imports the worker's module rightly)
    from sglang.srt.speculative import frozen_kv_mtp_cuda_graph_runner as runners
    from sglang.srt.speculative import frozen_kv_mtp_worker

    for name in ("require_gathered_buffer", "require_mlp_tp_gather", "require_mlp_sync"):
        setattr(runners, name, lambda arguments: False)
    runners.require_attn_tp_gather = lambda arguments: False
    frozen_kv_mtp_worker.FrozenKVMTPWorker.model_runner = property(lambda self: self._model_runner)


def main(folder: Path) -> None:
    """Stock eagerly and in graphs, each patch alone, both, and after a revert."""
    import_worker(folder)
    from sglang.srt.layers.attention import triton_backend

    import gemma4_turbo
    from gemma4_turbo.cli.sglang_process import prepare_sglang
    from gemma4_turbo.instance import ENGINE

    prepare_sglang()

    stock_backend = triton_backend.TritonAttnBackend
    triton_backend.TritonAttnBackend = TritonAttnBackend  # SGLang's, here
    found = {"eager": play(make_worker(graphs=False)), "stock": play(make_worker(graphs=True))}
    live = None
    sets = (*((patch, (patch,)) for patch in PATCHES), ("both", PATCHES), ("all", ALL))
    for name, patches in sets:
        triton_backend.TritonAttnBackend = stock_backend  # a stand-in would be a conflict
        rows = {row.name: row for row in gemma4_turbo.apply(only=patches)}
        triton_backend.TritonAttnBackend = TritonAttnBackend
        assert {rows[patch].state for patch in patches} == {"active"}, rows
        before = {patch: ENGINE.runs[patch].engaged_count() for patch in ALL}
        live = make_worker(graphs=True)
        found[name] = play(live)
        found[name]["engaged"] = {
            patch: ENGINE.runs[patch].engaged_count() - before[patch] for patch in ALL
        }
        found[name]["scores"] = seed_scores(live)
    found["limits"] = limits()
    found["metadata"] = metadata()
    gemma4_turbo.revert()
    found["reverted worker"] = play(live)
    found["own methods"] = [
        name for name, value in vars(live).items() if callable(value) or "seed" in name
    ]
    print(json.dumps(found))


def seed_scores(worker: Any) -> list[float]:
    """The probabilities that a seed step leaves."""
    running = batch("z")
    seed(worker, running)
    return [round(p, 6) for p in running.spec_info.topk_p.flatten().tolist()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
