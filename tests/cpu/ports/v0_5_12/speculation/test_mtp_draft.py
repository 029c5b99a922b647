"""`mtp_chain`, `mtp_seed_graph` and `mtp_metadata` on SGLang's real worker and graph runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_12.speculation import mtp_chain, mtp_metadata, mtp_seed_graph
from tests.cpu.conftest import patched_sglang, run_scenario

PATCHES = ("mtp_chain", "mtp_seed_graph")
STEPS = ("seed of two", "seed of one", "seed of two later", "draft of three", "seed after decode")


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=PATCHES):
        yield


@pytest.fixture(scope="module")
def found(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `mtp_draft_scenario` printed."""
    folder: Path = tmp_path_factory.mktemp("drafts")
    module = "tests.cpu.mtp_draft_scenario"
    return run_scenario(module, environment, folder, 400)  # type: ignore[no-any-return]


def test_active() -> None:
    """Both fit this release; the worker's source is read without importing it."""
    assert {ENGINE.runs[name].state for name in PATCHES} == {states.ACTIVE}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", ["stock", *PATCHES, "both", "all", "reverted worker"])
def test_seeds_and_drafts_are_stocks(found: dict[str, Any], how: str, step: str) -> None:
    """Whatever is in a graph, padded or not, and also when another batch was seeded meanwhile."""
    assert found[how][step] == found["eager"][step]


def test_the_cases_tell_mistakes_apart(found: dict[str, Any]) -> None:
    """No two rows are alike, and a chain of three has tokens of its own."""
    eager = found["eager"]
    rows = [*eager["seed of two"]["hidden"], *eager["seed of one"]["hidden"]]
    rows += eager["seed after decode"]["hidden"]
    assert len({tuple(row) for row in rows}) == 5
    (parents, kind, _), (places, _, _), _, (tokens, _) = eager["draft of three"]
    assert (parents, places, kind) == ([[-1, 0, 1]] * 3, [[0, 1, 2]] * 3, "torch.int64")
    assert len({tuple(row) for row in tokens}) == 3


def test_no_seed_step_is_eager(found: dict[str, Any]) -> None:
    """Stock runs four of them eagerly, also with its graphs; the patch none, and counts them."""
    assert [found[how]["eager seeds"] for how in ("eager", "stock", "mtp_chain")] == [4, 4, 4]
    for how in ("mtp_seed_graph", "both"):
        assert (found[how]["eager seeds"], found[how]["eager"]) == (0, 0)
        assert found[how]["engaged"]["mtp_seed_graph"] == 4
    assert found["mtp_chain"]["engaged"]["mtp_chain"] > 0
    assert found["mtp_chain"]["engaged"]["mtp_seed_graph"] == 0


def test_probabilities(found: dict[str, Any]) -> None:
    """Stock's where the softmax is stock's, also from a graph; 1 without one."""
    (stock,) = found["mtp_seed_graph"]["scores"]
    assert 0 < stock < 1
    assert found["mtp_chain"]["scores"] == found["both"]["scores"] == [1]


@pytest.mark.parametrize(
    ("what", "eager", "reason"),
    [
        ("fits", 0, ""),
        ("fits with padding", 0, ""),
        ("too many", 1, "no graph of 5 requests"),
        ("images", 1, "embeddings of images"),
        ("no padding, captured", 0, ""),
        ("no padding, not captured", 1, "no graph of 3 requests"),
        ("no hook", 0, ""),
        ("a hook that came later", 1, "the assistant has forward hooks"),
        ("without it again", 0, ""),
        ("weights in place", 0, ""),
        (
            "weights elsewhere",
            1,
            "a weight update put other parameters in the place of those in the graphs",
        ),
        (
            "a replay that raises",
            1,
            "the seed step could not be done: RuntimeError: no such graph",
        ),
    ],
)
def test_what_no_graph_takes_is_seeded_eagerly(
    found: dict[str, Any], what: str, eager: int, reason: str
) -> None:
    """With stock's result in any case."""
    assert found["limits"][what] == [eager, True, reason]


def test_who_loses_its_graphs(found: dict[str, Any]) -> None:
    """None where a hook was there first; the rest after an error, or where weights have moved."""
    limits = found["limits"]
    assert limits["hooked when captured"] is False
    assert limits["after weights elsewhere"] is False
    state, reason, ours = limits["after a replay that raised"]
    assert (state, ours) == ("failed", False)
    assert "no such graph" in reason


def test_padded_rows_are_short(found: dict[str, Any]) -> None:
    """They attend to one token, whatever the buffers held before."""
    assert found["limits"]["padded lengths"] == [5, 6, 7, 1]


def test_workers_that_keep_stocks_steps(found: dict[str, Any]) -> None:
    """LoRA, an empty batch, a tree whose tokens are chosen by score, and a capture that fails."""
    limits = found["limits"]
    assert limits["LoRA"] == [False, "LoRA"]
    assert limits["idle"] == [[], "FrozenKVMTPDraftInput"]
    assert limits["fewer draft tokens"] == [False, "3 of the draft's tokens are chosen by score"]
    assert limits["failed capture"] == ["failed", "RuntimeError: no memory", False]


@pytest.fixture(scope="module")
def pair(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two GPUs has seen in `mtp_two_ranks_scenario`."""
    folder: Path = tmp_path_factory.mktemp("pair")
    module = "tests.cpu.mtp_two_ranks_scenario"
    return run_scenario(module, environment, folder, 400)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fault", ["none", "capture"])
def test_several_gpus_seed_eagerly(pair: list[Any], fault: str) -> None:
    """A capture that fails on one of them would leave the other in a sum: there is none."""
    for rank in pair:
        assert rank[fault]["ours"] is False
        assert rank[fault]["reason"] == "several GPUs: a capture may fail on one of them alone"
        assert rank[fault]["state"] == "active"
        assert rank[fault]["graphs"] == [1, 2, 4]
        assert rank[fault]["seed"] == pair[0]["stock"]["seed"]


def test_a_draft_that_raises_on_one_gpu_alone_does_not_begin_anew(pair: list[Any]) -> None:
    """The other would add its second step to this one's first. As under stock, the error is the server's."""
    one, other = (rank["draft"]["error"] for rank in pair)
    assert "no such kernel" in other
    assert one is not None
    assert "no such kernel" not in one


def test_the_drafts_graphs_come_first(found: dict[str, Any]) -> None:
    """Where memory is short for a graph of stock's, those of the seeds make room."""
    state, reason, ours, graphs = found["limits"]["no memory for the draft"]
    assert (state, reason.partition(":")[0], ours) == ("failed", "out of memory", False)
    assert graphs == [1, 2, 4]


def test_a_revert_gives_live_workers_their_methods_back(found: dict[str, Any]) -> None:
    """The seeds of the reverted worker are eager again."""
    assert found["own methods"] == []
    assert found["reverted worker"]["eager seeds"] == 4


# -- the draft's metadata ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "filled"),
    [
        ("same", 0),
        ("longer", 1),
        ("another was seeded", 1),
        ("another was seeded in another graph", 1),
        ("another was seeded eagerly", 1),
        ("other requests", 1),
        ("merged", 1),
        ("prefilled", 1),
        ("slots exchanged after the prefill", 1),
        ("others of the same names", 1),
    ],
)
def test_a_draft_fills_the_buffers_again_where_anything_changed(
    found: dict[str, Any], what: str, filled: int
) -> None:
    """And proposes what stock proposes in any case."""
    assert found["metadata"][what] == [filled, True]


def test_seeds_and_drafts_in_any_order(found: dict[str, Any]) -> None:
    """No draft differs from stock's; some were saved their metadata, others not."""
    wrong, saved, drafts = found["metadata"]["any order"]
    assert wrong == 0
    assert 5 < saved < drafts - 5


def test_who_fills_the_buffers_every_time() -> None:
    """More candidates, other backends, methods of another's."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    worker = SimpleNamespace(topk=1, draft_attn_backend=object.__new__(TritonAttnBackend))
    assert mtp_metadata.unfit(worker) is None
    for bases in ((), (TritonAttnBackend,)):  # of the same name only
        renamed = type("TritonAttnBackend", bases, {})
        other = SimpleNamespace(topk=1, draft_attn_backend=object.__new__(renamed))
        assert mtp_metadata.unfit(other) == "the draft's attention backend is a TritonAttnBackend"
    worker.draft = None
    assert mtp_metadata.unfit(worker) == "the worker has methods of its own"
    other = SimpleNamespace(topk=1, draft_attn_backend=SimpleNamespace())
    assert mtp_metadata.unfit(other) == "the draft's attention backend is a SimpleNamespace"
    assert mtp_metadata.unfit(SimpleNamespace(topk=2)) == "2 candidates per step"


def test_a_steps_positions_are_computed_once() -> None:
    """Where the batch came with them; a capture's buffer and a batch of another's are set."""

    class Worker:
        topk, draft_attn_backend = 1, type("TritonAttnBackend", (), {})()

        def __init__(self) -> None:
            self.set: list[Any] = []

        def _set_positions(self, batch: Any) -> None:
            self.set.append(batch.positions)

        def draft(self, batch: Any) -> None:
            for positions in (batch.made, batch.other):
                made = SimpleNamespace(positions=batch.made)
                self._set_positions(SimpleNamespace(positions=positions, spec_info=made))

        forward_draft_extend = forward_draft_extend_after_decode = draft
        _init_frozen_kv_metadata = _init_frozen_kv_metadata_replay_cuda_graph = draft

    worker = Worker()
    mtp_metadata.install(ENGINE.runs["mtp_metadata"], worker)
    request = SimpleNamespace(rid="a", req_pool_idx=0, finished=lambda: False)
    worker.draft(SimpleNamespace(reqs=[request], made="made", other="other"))
    assert worker.set == ["other"]
    Worker.draft(worker, SimpleNamespace(made="made", other="other"))  # in no step
    assert worker.set == ["other", "made", "other"]


# -- the choice of the token ----------------------------------------------------------------------


def stocks_choice(logits: torch.Tensor) -> torch.Tensor:
    """As in stock's draft."""
    from sglang.srt.speculative.spec_utils import fast_topk

    index: torch.Tensor = fast_topk(torch.softmax(logits, dim=-1), 1, dim=-1)[1]
    return index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logit(dtype: torch.dtype) -> None:
    """Stock's token, of equal logits too: the first of them."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(300, 1000, generator=generator) * 8).to(dtype)
    logits[100:200] = logits[100:200].round()  # many equal ones
    logits[200] = 3.0
    logits[201] = float("-inf")
    logits[201, 5] = 0.0
    largest = logits[100:200] == logits[100:200].amax(1, keepdim=True)
    assert int((largest.sum(1) > 1).sum()) > 10
    assert torch.equal(mtp_chain.best(logits), stocks_choice(logits))
    assert int(mtp_chain.best(logits)[200]) == 0


def test_where_a_softmax_hides_the_largest_logit() -> None:
    """The one case in which the tokens differ: two logits of one probability."""
    logits = torch.zeros(1, 8)
    logits[0, 5] = 1e-9
    assert int(stocks_choice(logits)) == 0
    assert int(mtp_chain.best(logits)) == 5


def test_rows_that_are_no_numbers() -> None:
    """A token of the vocabulary all the same."""
    logits = torch.zeros(3, 8)
    logits[0, 3], logits[1], logits[2, 4] = float("nan"), float("nan"), float("inf")
    assert mtp_chain.best(logits).flatten().tolist() == [3, 0, 4]


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_the_tree_of_a_chain(steps: int) -> None:
    """What stock's search finds in a chain, where probabilities order nothing."""
    from sglang.srt.speculative.eagle_utils import organize_draft_results
    from sglang.srt.speculative.spec_utils import select_top_k_tokens

    rows = 3
    generator = torch.Generator().manual_seed(steps)
    tokens = torch.randint(0, 50, (steps, rows, 1), generator=generator)
    scores = torch.rand((steps, rows, 1), generator=generator)
    hidden = torch.randn(rows, 4, generator=generator)
    trees, score = [], None
    with torch.compiler.set_stance("force_eager"):
        for step in range(steps):
            ids, kept, score, tree = select_top_k_tokens(
                step, scores[step], tokens[step], hidden, score, 1
            )
            assert torch.equal(ids, tokens[step].flatten())
            assert torch.equal(kept, hidden)
            trees.append(tree)
    lists = [list(part) for part in zip(*trees, strict=True)]
    stock = organize_draft_results(*lists, steps + 1)
    ours = (*mtp_chain.chain(rows, steps, hidden.device), torch.cat(list(tokens), dim=1))
    for theirs, mine in zip(stock, ours, strict=True):
        assert torch.equal(theirs, mine)
        assert theirs.dtype == mine.dtype


def test_verify() -> None:
    checks = mtp_chain.verify(ENGINE.runs["mtp_chain"], "cpu")
    assert checks
    assert all(check.passed for check in checks)


def test_who_keeps_stock() -> None:
    """More candidates than one; methods of another's."""
    worker = SimpleNamespace(topk=1, speculative_num_steps=3, speculative_num_draft_tokens=4)
    assert mtp_chain.unfit(worker) is None
    worker.topk = 2
    assert mtp_chain.unfit(worker) == "2 candidates per step"
    worker.topk, worker.draft_forward = 1, None
    assert mtp_chain.unfit(worker) == "the worker has methods of its own"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"topk": 4}, "4 candidates per step"),
        ({"require_mlp_sync": True}, "data parallel attention"),
        ({"require_gathered_buffer": True}, "data parallel attention"),
        ({"mrope": True}, "multimodal rotary positions"),
        ({"tp_size": 2}, "several GPUs: a capture may fail on one of them alone"),
    ],
)
def test_runners_without_seed_graphs(changed: dict[str, Any], reason: str | None) -> None:
    arguments = SimpleNamespace(enable_lora=None)
    runner = SimpleNamespace(
        frozen_kv_mtp_worker=SimpleNamespace(),
        model_runner=SimpleNamespace(server_args=arguments),
        topk=1,
        tp_size=1,
        mrope=False,
        require_mlp_sync=False,
        require_gathered_buffer=False,
    )
    vars(runner).update(changed)
    runner.model_runner.model_is_mrope = runner.mrope
    assert mtp_seed_graph.runner_unfit(runner) == reason


# -- what raises ----------------------------------------------------------------------------------


def raised(*given: Any) -> Any:
    raise RuntimeError("no such symbol")


def test_a_draft_that_raises_is_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start: the states that ours has put in are stock's again."""

    class Worker:
        def draft_forward(self, batch: Any, skip: bool) -> Any:
            return batch.input_ids, batch.spec_info.hidden_states, skip

        def _capture_for_decode(self, output: Any, draft_input: Any) -> None:
            draft_input.topk_index = "stock's"

    def fails(worker: Any, batch: Any, skip: bool) -> Any:
        batch.input_ids = batch.spec_info.hidden_states = "ours"
        raised()

    run = ENGINE.runs["mtp_chain"]
    mtp_chain._fallback.clear()
    monkeypatch.setattr(run, "state", run.state)
    monkeypatch.setattr(run, "reason", run.reason)
    monkeypatch.setattr(mtp_chain, "_draft", fails)
    before = run.counters.engaged
    spec = SimpleNamespace(hidden_states="states")
    batch = SimpleNamespace(spec_info=spec, input_ids="ids")
    found = mtp_chain.draft_forward(run, Worker(), batch, True)
    assert found == ("ids", "states", True)  # type: ignore[comparison-overlap]
    assert run.state == states.FAILED
    mtp_chain._fallback.clear()
    monkeypatch.setattr(mtp_chain, "best", raised)
    mtp_chain.capture_for_decode(run, Worker(), SimpleNamespace(next_token_logits=None), spec)
    assert spec.topk_index == "stock's"
    assert run.counters.engaged == before
    mtp_chain._fallback.clear()


def test_requests_that_tell_nothing_fill_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ENGINE.runs["mtp_metadata"]
    monkeypatch.setattr(run, "state", run.state)
    monkeypatch.setattr(run, "reason", run.reason)
    memory = mtp_metadata.Memory(run)
    with memory.step(lambda: [SimpleNamespace(rid="a")], True):
        assert memory.requests is None
    assert run.state == states.FAILED
