"""bench/mtp.py: its agreeing pair on SGLang's model classes, its sums, and a run with stand-ins."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from bench import mtp
from bench.common import engines
from bench.inside.agreeing import Agreement, fill_assistant, fill_target
from bench.models import assistant
from bench.speculation import comparing
from bench.workers import mtp as mtp_worker
from gemma4_turbo.models import geometry
from tests.cpu import forward_batch, small_mtp
from tests.cpu.conftest import REPOSITORY, warm

# -- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", geometry.GEOMETRIES)
def test_an_assistant_reads_the_targets_kv(name: str, tmp_path: Path):
    target, draft = assistant.write_pair(tmp_path, name, None)
    one = json.loads((target / "config.json").read_text())
    other = json.loads((draft / "config.json").read_text())
    text = other["text_config"]
    assert other["backbone_hidden_size"] == one["hidden_size"]
    assert text["sliding_window"] == one["sliding_window"]
    # A generated target stands renamed as SGLang does it; an assistant is renamed by SGLang.
    assert text["num_global_key_value_heads"] == one["num_key_value_heads"]
    assert text["num_key_value_heads"] == one["swa_num_key_value_heads"]
    assert text["num_attention_heads"] % text["num_key_value_heads"] == 0
    assert text["num_attention_heads"] % text["num_global_key_value_heads"] == 0
    assert set(text["layer_types"]) == set(one["layer_types"][-2:])


def test_sglang_reads_the_folders(tmp_path: Path):
    """The assistant's only with a transformers that knows it; the release's own pin does not."""
    from sglang.srt.configs.model_config import ModelConfig

    target, draft = assistant.write_pair(tmp_path, "e4b", 6, centroids=True, agreeing=True)
    assert ModelConfig(str(target)).hf_text_config.tie_word_embeddings is False
    if not find_spec("transformers.models.gemma4_assistant"):
        with pytest.raises(Exception, match="gemma4_assistant"):
            ModelConfig(str(draft), is_draft_model=True)
        return
    read = ModelConfig(str(draft), is_draft_model=True)
    text = read.hf_text_config
    assert read.hf_config.use_ordered_embeddings is True
    assert (read.head_dim, read.swa_head_dim) == (512, 256)
    assert (text.num_key_value_heads, text.swa_num_key_value_heads) == (2, 2)


# -- the agreeing pair ----------------------------------------------------------------------------

VOCAB, HIDDEN, WIDTH = 128, 192, 256


def blind(model: Any) -> Any:
    """Attention sees random values: an agreeing pair does not listen to it."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.rotary_emb = lambda positions, q, k, **_: (q, k)
        attention.attn.forward = lambda q, *_, **__: torch.randn_like(q.flatten(1))
    return model.bfloat16()


@pytest.fixture(scope="module")
def agreement() -> Agreement:
    return Agreement(VOCAB, 0.7, 3)


@pytest.fixture(scope="module", params=[0, 16], ids=["plain", "per-layer inputs"])
def target(request: pytest.FixtureRequest, agreement: Agreement) -> Any:
    """A stock target of random weights, made to agree."""
    torch.manual_seed(0)
    model = blind(
        small_mtp.target(
            vocab_size=VOCAB,
            vocab_size_per_layer_input=VOCAB,
            hidden_size=HIDDEN,
            hidden_size_per_layer_input=request.param,
            tie_word_embeddings=False,
        )
    )
    for tensor in model.state_dict().values():
        tensor.uniform_(-0.03, 0.03)
    fill_target(model, agreement, WIDTH // 2)
    return model


@pytest.fixture(scope="module")
def draft(agreement: Agreement) -> Any:
    """A stock assistant, made to agree."""
    from sglang.srt.models.gemma4_mtp import Gemma4AssistantForCausalLM

    torch.manual_seed(1)
    config = SimpleNamespace(
        text_config=small_mtp.text_config(
            2, 0, vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=WIDTH
        ),
        backbone_hidden_size=HIDDEN,
        use_ordered_embeddings=False,
    )
    with small_mtp.ready():
        model = blind(Gemma4AssistantForCausalLM(config))
    for tensor in model.state_dict().values():
        tensor.uniform_(-0.03, 0.03)
    fill_assistant(model, agreement)
    model.logits_processor.forward = lambda ids, hidden, head, batch, hidden_states_before_norm: (
        hidden.float() @ head.weight.float().T,
        hidden_states_before_norm,
    )
    return model


def targets_turn(target: Any, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens and hidden states."""
    ids = torch.tensor(tokens)
    with torch.no_grad():
        hidden = target.model(ids, torch.arange(len(ids)), forward_batch.prefill())
    logits = hidden @ target.lm_head.weight[:VOCAB].T
    return logits.argmax(-1), hidden


def drafts_turn(
    draft: Any, tokens: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = forward_batch.prefill(spec_info=SimpleNamespace(hidden_states=state))
    logits, hidden = draft(tokens, torch.zeros(len(tokens), dtype=torch.long), batch)
    return logits.argmax(-1), hidden


def test_the_target_says_the_word_that_follows(target: Any, agreement: Agreement):
    words = list(range(0, VOCAB, 2))
    said, _ = targets_turn(target, words)
    assert said.tolist() == [agreement.tokens(word, 1)[0] for word in words]
    assert len(set(agreement.tokens(0, VOCAB // 2))) == VOCAB // 2  # one cycle


def test_the_assistant_agrees_where_it_shall(target: Any, draft: Any, agreement: Agreement):
    """Three proposals from each word; each is right as long as all words before it agree."""
    draft.set_embed_and_head(*target.get_embed_and_head())
    before = torch.arange(0, VOCAB, 2)
    last, state = targets_turn(target, before.tolist())
    token, right = last, torch.ones(len(last), dtype=torch.bool)
    for step in range(mtp.DRAFT_STEPS):
        proposed, state = drafts_turn(draft, token, state)
        truth = torch.tensor([agreement.tokens(word, step + 1)[-1] for word in last.tolist()])
        right &= agreement.agrees[token // 2]
        assert torch.equal((proposed == truth)[right], torch.ones(int(right.sum()), dtype=bool))
        if step == 0:
            wrong = ~agreement.agrees[token // 2]
            assert torch.equal(proposed[wrong], token[wrong] + 1)  # the decoy
        token = torch.where(right, proposed, truth)
    assert 0.1 < float(right.float().mean()) < 0.7


def test_a_wrong_hidden_state_shows(target: Any, draft: Any, agreement: Agreement):
    """Another request's: the decoys win."""
    draft.set_embed_and_head(*target.get_embed_and_head())
    last, state = targets_turn(target, list(range(0, VOCAB, 2)))
    proposed, _ = drafts_turn(draft, last, state.roll(1, 0))
    assert float((proposed % 2 == 1).float().mean()) > 0.95


def test_verify_steps_that_are_expected():
    """Against acceptance played through token by token."""
    agreement = Agreement(64, 0.6, 1)
    for last in range(0, 64, 2):
        for new in (1, 2, 9, 40):
            truth = [last, *agreement.tokens(last, new + 8)]
            at, count = 1, 0  # the prompt's first token is there
            while at < new:
                accepted = 0
                while accepted < 3 and agreement.agrees[truth[at + accepted] // 2]:
                    accepted += 1
                at, count = at + accepted + 1, count + 1
            assert agreement.verifications(last, new, 3) == count
    assert Agreement(64, 1.0, 1).verifications(0, 41, 3) == 10
    assert Agreement(64, 0.0, 1).verifications(0, 41, 3) == 40


# -- sums -----------------------------------------------------------------------------------------


def test_the_same_is_drawn_whatever_the_default_dtype():
    """SGLang makes models with bfloat16 as the default."""
    one = Agreement(64, 0.6, 1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = Agreement(64, 0.6, 1)
        seen = other.seen(16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(one.agrees, other.agrees)
    assert torch.equal(one.seen(16), seen)


def test_tokens_that_differ():
    truth = [
        {"ids": [1, 2, 3], "margins": [5.0, 0.25, 4.0], "seconds": [8, 9, 8], "verified": 0},
        {"ids": [4, 5, 6], "margins": [5.0, 5.0, 5.0], "seconds": [8, 8, 8], "verified": 0},
    ]
    other = [{"ids": [1, 9, 7], "verified": 2}, {"ids": [4, 5, 6], "verified": 1}]
    found = comparing.compare(truth, other)
    assert (found["token_diffs"], found["tokens"]) == (2, 6)
    first = {"sequence": 0, "position": 1, "margin": 0.25, "second best": True}
    assert found["first"] == [first]
    assert "first at 1; margins there up to 0.2500 nats; the second best in 1" in comparing.told(
        found
    )
    assert "margins" not in comparing.told(comparing.compare(other, truth))
    assert comparing.accept_length(truth) is None
    assert comparing.accept_length(other) == 4 / 3


def test_a_trace_by_part():
    def event(cat: str, ts: float, dur: float, name: str = "k", correlation: int = 0) -> Any:
        args = {"correlation": correlation}
        return {"cat": cat, "ts": ts, "dur": dur, "name": name, "args": args}

    events = [
        event("user_annotation", 0, 10, "mtp draft"),
        event("user_annotation", 20, 10, "mtp verify"),
        event("user_annotation", 20, 10, "something else"),
        event("gpu_user_annotation", 0, 90, "mtp draft"),
        event("cuda_runtime", 5, 1, "cudaGraphLaunch", 1),
        event("cuda_runtime", 25, 1, "cudaLaunchKernel", 2),
        event("cuda_runtime", 26, 1, "cudaStreamSynchronize", 3),
        event("cuda_driver", 50, 1, "cuLaunchKernelEx", 4),
        event("kernel", 22, 7, correlation=1),  # runs while the host is in another part
        event("kernel", 27, 4, correlation=1),  # starts before the one before it has ended
        event("gpu_memcpy", 40, 3, correlation=2),
        event("kernel", 60, 4, correlation=4),
        {"ph": "M", "name": "process_name"},
    ]
    found = mtp_worker.parts(events)
    assert found["mtp draft"] == {
        "steps": 1,
        "gpu_us": 9,
        "kernels": 2,
        "launches": 1,
        "host_us": 10,
    }
    assert (found["mtp verify"]["gpu_us"], found["mtp verify"]["launches"]) == (3, 1)
    assert (found["other"]["gpu_us"], found["other"]["kernels"]) == (4, 1)
    assert found["mtp seed"]["steps"] == 0


def test_cause_of_death(tmp_path: Path):
    log = tmp_path / "log"
    assert engines.cause_of_death(log) == "no exception in the log"
    log.write_text("start\nTraceback (most recent call last):\nAttributeError: no 'x'\nkilled\n")
    assert engines.cause_of_death(log) == "AttributeError: no 'x'"
    with log.open("a") as file:
        file.write("[now] Scheduler hit an exception: Traceback\n\nKeyError: 1\nOSError: later\n")
    assert engines.cause_of_death(log) == "KeyError: 1"


class Crowd:
    """Stands in for an engine whose requests end by themselves, by an abort, or never."""

    def __init__(self, never: int = -1, delta: bool = False) -> None:
        self.loop = asyncio.new_event_loop()
        self.tokenizer_manager = self
        self.aborted: set[str] = set()
        self.never, self.delta, self.asked = never, delta, []

    def abort_request(self, name: str) -> None:
        self.aborted.add(name)

    async def async_generate(self, input_ids: Any, sampling_params: Any, rid: str, **_: Any) -> Any:
        new = sampling_params["max_new_tokens"]
        self.asked.append((len(input_ids), new))

        async def chunks() -> Any:
            for made in range(1, new + 1):
                await asyncio.sleep(60 if rid.endswith(f"-{self.never}") else 0.001)
                done = {"type": "length"} if made == new else None
                if rid in self.aborted:
                    done = {"type": "abort"}
                meta = {"finish_reason": done, "completion_tokens": made}
                yield {"meta_info": meta, "output_ids": [7] * (1 if self.delta else made)}
                if done:
                    return

        return chunks()


def test_a_stress_test():
    worker = object.__new__(mtp_worker.MtpWorker)
    worker.engine = Crowd()
    answer = worker.stress(count=104, limit_s=20, seed=1, words=False)
    assert answer["ended"] == {"length": 88, "abort": 16}
    asked = worker.engine.asked
    assert {length for length, _ in asked} == {3, 40, 200, 900}
    assert {new for _, new in asked} == {*range(2, 9), 400}
    worker.engine = Crowd(delta=True)
    pieces = worker.stress(count=104, limit_s=20, seed=1, words=False)["rows"]
    whole = [i for i in range(104) if i % 13 not in (5, 9)]  # the others are aborted
    for rows in (answer["rows"], pieces):
        assert [len(rows[i]["tokens"]) for i in whole] == [2 + i // 8 % 7 for i in whole]
    worker.engine = Crowd(never=3)
    answer = worker.stress(count=16, limit_s=1, seed=1, words=True)
    assert answer["ended"] == {"length": 13, "abort": 2, "late": 1}


# -- a run ----------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, types
sys.modules["torch"] = types.ModuleType("torch")  # seconds of import; what it would draw is in a file
from bench.inside.agreeing import Agreement

patched = os.environ["BENCH_PATCHED"] == "1"
arguments = json.loads(sys.argv[2])
speculative = "speculative_algorithm" in arguments
if "ASKED" in os.environ:
    with open(os.environ["ASKED"], "a") as file:
        kept = ["kv_cache_dtype", "disable_piecewise_cuda_graph"]
        told = [*(arguments[name] for name in kept), os.environ["BENCH_KV_SCALES"]]
        file.write(json.dumps(told) + "\\n")
fraction, seed, width = os.environ["BENCH_AGREEING"].split(":")
drawn = json.load(open(os.environ["DRAWN"]))
assert drawn["of"] == [float(fraction), int(seed)]
agreement = object.__new__(Agreement)
agreement._lists = drawn["lists"]
dies = os.environ.get("DIES", "").split(",")
if patched and "start" in dies:
    open(sys.argv[1], "a").write("RuntimeError: no memory\\n")
    os._exit(1)
print(json.dumps({"ready_s": 1.0}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    answer = {}
    if patched and command["do"] in dies:
        open(sys.argv[1], "a").write("KeyError: 7\\n")
        os._exit(1)
    if command["do"] == "step":
        answer = {"seconds": 0.5 if patched else 1.0, "steps": 100, "tokens": 150}
    if command["do"] == "greedy":
        rows = []
        for ids in command["ids"]:
            new = command["new"]
            row = {"ids": agreement.tokens(ids[-1], new), "verified": 0}
            if speculative:
                row["verified"] = agreement.verifications(ids[-1], new, 3)
            if command["margins"]:
                row |= {"margins": [1.0] * new, "seconds": [0] * new}
            rows.append(row)
        answer = {"rows": rows}
    if command["do"] == "split":
        part = {"steps": 4, "gpu_us": 4000, "kernels": 40, "launches": 8, "host_us": 4}
        answer = {"parts": {"mtp verify": part, "other": part}}
    if command["do"] == "stress":
        if not patched:
            log = open(sys.argv[1], "a")
            log.write("AttributeError: no merge_batch\\n")
            log.flush()
            os._exit(1)
        rows = [{"last": 2 * i, "tokens": agreement.tokens(2 * i, 3 + i)} for i in range(4)]
        rows[2]["tokens"][-1] += 2
        answer = {"ended": {"length": 30, "abort": 2}, "seconds": 1.0, "rows": rows}
    if command["do"] == "status":
        ran = {"name": "mtp_chain", "state": "inactive", "reason": "", "engaged": 1}
        answer = {"processes": [{"pid": 1, "command": "x", "patches": [ran]}]}
    print(json.dumps(answer), flush=True)
"""
RUN = """
import sys
from pathlib import Path

import typer

from bench import mtp
from bench.common import engines

engines.BENCH = Path(sys.argv.pop(1))
typer.run(mtp.main)
"""


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pair of the runs below agrees on."""
    file = tmp_path_factory.mktemp("drawn") / "drawn.json"
    lists = Agreement(geometry.VOCABULARY, 0.7, mtp.AGREEMENT_SEED)._lists
    file.write_text(json.dumps({"of": [0.7, mtp.AGREEMENT_SEED], "lists": lists}))
    return file


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str], drawn: Path) -> Run:
    """The command with stand-ins for its engines; stderr is with stdout."""

    def ran(*options: str, dies: str = "") -> subprocess.CompletedProcess[str]:
        (tmp_path / "workers").mkdir(exist_ok=True)
        (tmp_path / "workers" / "mtp.py").write_text(WORKER)
        ours = {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "DRAWN": str(drawn), "DIES": dies}
        done = warm(environment).run(
            code=RUN,
            arguments=[str(tmp_path), *options, "--out", str(tmp_path / "out.csv")],
            env={**os.environ, **ours},
            cwd=str(REPOSITORY),
            timeout=240,
        )
        done.stdout += done.stderr
        return done

    return ran


@pytest.mark.parametrize("together", [True, False])
def test_a_run(run: Run, tmp_path: Path, together: bool):
    options = ["--agreeing", "0.7", "--stress", "32", "--rounds", "2", "--equality", "8"]
    done = run(*options, *(["--together"] if together else []))
    assert done.returncode == 0, done.stdout
    frame = pd.read_csv(tmp_path / "out.csv")

    def value(variant: str, quantity: str, x: int | None = None) -> float:
        chosen = frame[(frame["variant"] == variant) & (frame["quantity"] == quantity)]
        if x is not None:
            chosen = chosen[chosen["x"] == x]
        return float(chosen["value"].median())

    assert value("stock", "step", 1) == 10.0
    assert value("patched", "step", 8) == 5.0
    assert value("patched", "verify: GPU", 8) == 1.0
    assert value("patched", "step without a kernel", 8) == 3.0
    assert value("expected", "accept length") == value("stock", "accept length, alone") > 2
    assert value("expected vs patched alone", "token_diffs") == 0
    assert value("expected vs stock in batches of 8", "verify steps differ") == 0
    assert value("no speculation alone vs patched alone", "token_diffs") == 0
    assert (value("stock", "stress: died"), value("patched", "stress: died")) == (1, 0)
    assert value("patched", "stress: abort") == 2
    assert value("patched", "stress: a wrong token") == 1
    assert "died after 0 s: AttributeError: no merge_batch" in done.stdout


@pytest.mark.parametrize(
    ("dies", "told"),
    [
        ("start", "patched: did not start: RuntimeError: no memory"),
        ("greedy", "patched: died in tokens: KeyError: 7"),
    ],
)
def test_an_engine_that_dies_leaves_the_others(run: Run, tmp_path: Path, dies: str, told: str):
    options = ["--agreeing", "0.7", "--rounds", "1", "--equality", "8", "--together"]
    done = run(*options, dies=dies)
    assert done.returncode == 0, done.stdout
    assert told in done.stdout
    frame = pd.read_csv(tmp_path / "out.csv")
    found = frame[frame["quantity"] == "accept length, alone"]["variant"].tolist()
    assert found == ["stock"]
    assert ("patched" in frame[frame["quantity"] == "step"]["variant"].tolist()) == (
        dies != "start"
    )


def test_caches_and_graphs_of_all_engines(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same in the three of them, and named by every row."""
    asked = tmp_path / "asked"
    monkeypatch.setenv("ASKED", str(asked))
    few = [
        "--agreeing",
        "0.7",
        "--rounds",
        "1",
        "--batches",
        "1",
        "--equality",
        "0",
        "--split",
        "0",
    ]
    for options, told in (
        ([], ["auto", True, ""]),
        (["--kv-cache-dtype", "fp8_e4m3", "--kv-scales", "0.5:2"], ["fp8_e4m3", True, "0.5:2"]),
        (["--prefill-graphs"], ["auto", False, ""]),
        (["--prefill-graphs", "--no-graphs"], ["auto", True, ""]),
    ):
        done = run(*few, *options)
        assert done.returncode == 0, done.stdout
        assert [json.loads(line) for line in asked.read_text().splitlines()] == [told] * 3
        frame = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
        for name, value in (
            ("kv", told[0]),
            ("kv_scales", told[2]),
            ("prefill_graphs", not told[1]),
        ):
            assert set(frame[name]) == {value}
        asked.unlink()
        (tmp_path / "out.csv").unlink()


def test_what_cannot_be(run: Run):
    for options in (["--variants", "fast"], ["--agreeing", "0.5", "--centroids"]):
        assert run(*options).returncode == 2
    fp8 = ["--kv-cache-dtype", "fp8_e4m3", "--kv-scales"]
    for scales in ("0.5", "0.5:0", "a:b", "1:2:3", "1:"):
        done = run(*fp8, scales)
        assert done.returncode == 2
        assert "--kv-scales must be K:V" in done.stdout
    done = run("--kv-scales", "0.5:2")
    assert done.returncode == 2
    assert "needs an 8-bit --kv-cache-dtype" in done.stdout
