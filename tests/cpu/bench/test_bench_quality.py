"""bench/quality.py, whole, on a tiny model: transformers' classes stand in for SGLang's engine."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from bench import quality, train_small
from bench.answers import statistics
from bench.models import small_models, small_tasks
from bench.workers import quality as quality_worker
from bench.workers.quality import QualityWorker
from tests.cpu.conftest import warm

REPOSITORY = Path(__file__).resolve().parents[3]
LENGTH, TAIL, NEW = 40, 6, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights."""
    out = tmp_path_factory.mktemp("quality") / "ple"
    # As little as still has all kinds of layers: nothing here is about the model.
    size = train_small.TINY_SIZES["ple"]._replace(
        hidden=32, mlp=32, kinds="sff", per_layer=16, shared=1, head_sliding=16, head_full=32
    )
    model = small_models.build(small_models.published(size), "eager")
    small_models.initialise(model, 0)
    notes = {"model": "ple", "length": 64, "steps": 7, "seed": 0, "corpus": "none"}
    small_models.save(out, model, small_models.published(size), notes)
    (out / train_small.HELD_OUT).write_bytes(b"def f(x):\n    return x + 1\n" * 40)
    return out


class SGLang:
    """Answers in the shape of ``sglang.Engine``; ``noise`` on the logits, or none."""

    known: ClassVar[dict[tuple[int, ...], torch.Tensor]] = {}  # logits, the same in every engine

    def __init__(self, folder: Path, noise: float = 0.0) -> None:
        self.folder = folder
        self.generator = torch.Generator().manual_seed(1)
        self.noise = noise

    @cached_property
    def model(self) -> Any:
        return small_models.load(self.folder, torch.float32, "cpu", "eager")

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = small_models.logits(self.model, torch.tensor([ids]))[0]
        found = self.known[key]
        if self.noise:
            found = found + self.noise * torch.randn(found.shape, generator=self.generator)
        return found.log_softmax(-1)

    def one(self, ids: list[int], sampling: Any, start: int, wanted: list[int] | None) -> Any:
        made: list[int] = []
        steps = []
        reason = "length"
        before = self.logprobs(ids) if start >= 0 else None
        for _ in range(sampling["max_new_tokens"]):
            last = self.logprobs(ids + made)[-1]
            steps.append(last)
            made.append(int(last.argmax()))
            if made[-1] in sampling.get("stop_token_ids", []):
                reason = "stop"
                break

        def listed(step: torch.Tensor) -> list[Any]:
            return [(step[token].item(), token, None) for token in wanted or []]

        start = len(ids) if start < 0 else start
        inputs = range(start, len(ids))
        meta = {
            "finish_reason": {"type": reason},
            "input_token_logprobs": [
                (
                    None if before is None or i == start else before[i - 1, ids[i]].item(),
                    ids[i],
                    None,
                )
                for i in inputs
            ],
            "input_token_ids_logprobs": [
                None if before is None or i == start else listed(before[i - 1]) for i in inputs
            ],
            "output_token_ids_logprobs": [listed(step) for step in steps],
        }
        return {"output_ids": made, "meta_info": meta}

    def generate(
        self,
        input_ids: list[list[int]],
        sampling_params: Any,
        return_logprob: bool = False,
        logprob_start_len: Any = -1,
        token_ids_logprob: Any = None,
    ) -> list[Any]:
        count = len(input_ids)

        def each(given: Any) -> list[Any]:
            return given if isinstance(given, list) else [given] * count

        wanted = token_ids_logprob or [None] * count
        rows = zip(input_ids, each(sampling_params), each(logprob_start_len), wanted, strict=True)
        return [self.one(*row) for row in rows]


class StandIn:
    """In the place of the engine's process: the worker's commands on the stand-in."""

    noise: Callable[[str], float] = staticmethod(lambda variant: 0.0)
    dies: str = ""
    status: ClassVar[list[Any]] = []

    def __init__(self, variant: str, patches: Any, arguments: dict[str, Any], log: Path) -> None:
        self.variant, self.patches, self.log = variant, patches, log
        self.arguments = arguments
        self.worker: Any = QualityWorker.__new__(QualityWorker)
        self.worker.engine = SGLang(Path(arguments["model_path"]), self.noise(variant))
        self.process = SimpleNamespace(kill=lambda: None)

    def wait_ready(self) -> None:
        if self.dies == f"{self.variant} at start":
            raise SystemExit("the engine died")

    def __call__(self, do: str, **arguments: Any) -> Any:
        if self.dies == f"{self.variant} at {do}":
            raise SystemExit("the engine died")
        if do == "status":
            return {"processes": self.status}
        return json.loads(json.dumps(getattr(self.worker, do)(**arguments)))

    def stop(self) -> None:
        pass


GIVEN: dict[str, Any] = {
    "patches": "qkv_proj",
    "count": 6,
    "seed": 28,  # questions whose answers are short: each of their tokens is a forward
    "pieces": 2,
    "prompts": 3,
    "length": LENGTH,
    "tail": TAIL,
    "new": NEW,
    "group": 4,
    "floor": 0,
    "chunk": 16,
    "running": 4,
    "together": 2,
    "prefill_graphs": True,
}


def run(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> pd.DataFrame:
    monkeypatch.setattr(quality, "QualityEngine", StandIn)
    monkeypatch.setattr(quality, "end_on_sigterm", lambda: None)
    quality.main(folder, **GIVEN | given, out=out)
    return pd.read_csv(out)


def values(frame: pd.DataFrame, quantity: str) -> dict[str, float]:
    return frame[frame["quantity"] == quantity].set_index("variant")["value"].to_dict()


def test_engines_that_are_right_are_no_distance_away(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every position is compared with the right one: an engine in fp32 has the judge's distributions."""
    frame = run(folder, tmp_path / "q.csv", monkeypatch)
    engines = {"stock", "exact", "default", "qkv_proj", "stock, chunks of 16", quality.BATCHES}
    for where in (quality.PROMPT, quality.GENERATED):
        far = values(frame, f"KL divergence from fp32, {where}")
        assert set(far) == engines
        assert max(far.values()) < 1e-9
        assert set(values(frame, f"same token as fp32, {where}").values()) == {1.0}
    nats = values(frame, "held-out text")
    assert set(nats) == engines - {quality.BATCHES} | {quality.JUDGE}
    assert max(nats.values()) - min(nats.values()) < 1e-5
    assert values(frame, "perplexity")["stock"] == pytest.approx(math.exp(nats["stock"]))
    differing = values(frame, "answers that differ from stock's")
    assert set(differing) == engines - {"stock"} | {quality.AGAIN}
    assert set(differing.values()) == {0}
    assert set(values(frame, "McNemar's p").values()) == {1.0}
    assert len(set(values(frame, "answered exactly").values())) == 1
    assert set(frame["trained_steps"]) == {7}


def test_engines_that_are_wrong_show(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    noise = {"default": 0.5, "exact": 0.01}
    monkeypatch.setattr(StandIn, "noise", staticmethod(lambda variant: noise.get(variant, 0.0)))
    frame = run(folder, tmp_path / "q.csv", monkeypatch)
    for where in (quality.PROMPT, quality.GENERATED):
        far = values(frame, f"KL divergence from fp32, {where}")
        # Noise of s on the logits is a divergence of about s squared / 2.
        assert 0.5 < far["default"] / 0.125 < 2
        assert 0.5 < far["exact"] / 5e-5 < 2
        beyond = values(frame, f"KL divergence beyond stock's, {where}")
        assert beyond["default"] == pytest.approx(far["default"] - far["stock"])
    assert values(frame, "answers that differ from stock's")["default"] > 0


def test_stocks_floors_come_when_all_have_answered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its engine lives until the last group has answered, the others of its group do not."""
    told: list[tuple[str, str]] = []

    class Seen(StandIn):
        def __call__(self, do: str, **arguments: Any) -> Any:
            told.append((self.variant, do))
            if do == "answers" and arguments["count"] < 6:
                assert arguments["count"] == 5
                told[-1] = (self.variant, f"first, {arguments['group']}")
                # The floors alone differ, so that they are seen to be compared.
                said = super().__call__(do, **arguments)["rows"]
                return {"rows": [[row[0] + 1, *row[1:]] for row in said]}
            return super().__call__(do, **arguments)

        def stop(self) -> None:
            told.append((self.variant, "stop"))

    monkeypatch.setattr("tests.cpu.bench.test_bench_quality.StandIn", Seen)
    frame = run(folder, tmp_path / "q.csv", monkeypatch, floor=5)
    at = {event: told.index(event) for event in told}
    engines = ["stock", "exact", "default", "qkv_proj", "stock, chunks of 16"]
    answered = max(at[name, "distributions"] for name in engines)
    assert answered < at["stock", "first, 0"] < at["stock", "first, 4"] < at["stock", "stop"]
    assert at["exact", "stop"] < at["default", "answers"]
    right = frame[frame["quantity"] == "answered exactly"].set_index("variant")["x"].to_dict()
    floors = {quality.AGAIN: 5, quality.BATCHES: 5}
    assert right == dict.fromkeys([*engines, quality.JUDGE], 6) | floors
    differing = frame[frame["quantity"] == "answers that differ from stock's"]
    assert differing.set_index("variant").loc[quality.AGAIN, ["value", "x"]].tolist() == [5, 5]


def test_stock_that_dies_in_its_floors(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What others said is compared with what it had said before."""

    class Dies(StandIn):
        def __call__(self, do: str, **arguments: Any) -> Any:
            if do == "answers" and arguments["count"] == 5:
                raise SystemExit("the engine died")
            return super().__call__(do, **arguments)

    monkeypatch.setattr("tests.cpu.bench.test_bench_quality.StandIn", Dies)
    out = tmp_path / "q.csv"
    with pytest.raises(SystemExit, match=r"^quality.py: stock died \("):
        run(folder, out, monkeypatch, floor=5)
    frame = pd.read_csv(out)
    assert set(values(frame, "McNemar's p")) >= {"exact", "default", "qkv_proj", quality.JUDGE}
    assert quality.AGAIN not in set(frame["variant"])


class Judge:
    """Says that every token is as likely as the others."""

    def distributions(self, rows: list[list[int]], first: int) -> np.ndarray:
        shape = (len(rows), len(rows[0]) - first, 10)
        return np.full(shape, -math.log(10), np.float32)


def findings_of(out: Path) -> quality.Findings:
    asked = quality.Asked(4, 1, 64, [[1, 2, 3]], [[1, 2, 3, 4]] * 2, 2, 2)
    results = SimpleNamespace(rows=[])

    def add(variant: str, quantity: str, x: int, round_: int, value: float, unit: str) -> None:
        row = {"variant": variant, "quantity": quantity, "x": x, "value": value, "unit": unit}
        results.rows.append(row)

    results.add = add
    return quality.Findings(results, asked, Judge(), out)  # type: ignore[arg-type]


def test_whoever_answers_before_stock_waits_for_it(tmp_path: Path):
    """Part by part; what needs no comparison is written at once."""
    out = tmp_path / "q.csv"
    found = findings_of(out)
    uniform = np.full((2, 2, 10), -math.log(10), np.float32)
    right = [question.tokens()[1] for question in found.questions]
    found.take("default", quality.Answer(rows=right))
    found.take("default", quality.Answer(prompt=uniform))
    assert not out.exists()
    found.take("default", quality.Answer(nats=np.ones((1, 2), np.float32)))
    assert values(pd.read_csv(out), "held-out text") == {"default": 1.0}
    found.take("stock", quality.Answer(rows=[[], *right[1:]]))
    frame = pd.read_csv(out)
    assert values(frame, "right where stock is wrong") == {"default": 1}
    assert values(frame, "answers that differ from stock's") == {"default": 1}
    assert not values(frame, "KL divergence from fp32, prompt")
    found.without_stock()  # which was cut off before it told of prompts
    frame = pd.read_csv(out)
    assert values(frame, "KL divergence from fp32, prompt")["default"] == pytest.approx(0, abs=1e-9)
    assert not values(frame, "KL divergence beyond stock's, prompt")
    assert len(frame) == len(found.results.rows)


STUCK = """
import sys
from threading import Event
from pathlib import Path
from tests.cpu.bench import test_bench_quality as here

class Stuck(here.StandIn):
    def __init__(self, *given):
        super().__init__(*given)
        self.killed = Event()
        self.process.kill = self.killed.set

    def __call__(self, do, **arguments):
        if self.variant == "stock" and do == "text":
            self.killed.wait()
            raise SystemExit("the engine died")
        return super().__call__(do, **arguments)

here.quality.QualityEngine = Stuck
here.quality.main(Path(sys.argv[1]), **here.GIVEN | {"together": 0}, out=Path(sys.argv[2]))
"""


def told(file: Path) -> set[str]:
    """The lines so far."""
    return {line.strip() for line in file.read_text(errors="replace").splitlines()}


def test_what_is_known_is_saved_when_a_limit_cuts_it_off(
    folder: Path, tmp_path: Path, environment: dict[str, str]
):
    """A process of its own, and SIGTERM: stock had answered its questions and no more."""
    out, said = tmp_path / "q.csv", tmp_path / "said"
    process = warm(environment).start(
        code=STUCK,
        arguments=[str(folder), str(out)],
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        cwd=str(REPOSITORY),
        files=[str(said), str(said)],
        timeout=400,
    )
    wanted = {f"{name}: answered" for name in ("exact", "default", "qkv_proj")}
    while process.poll() is None and not (said.exists() and wanted <= told(said)):
        time.sleep(0.05)
    assert wanted <= told(said)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 143, said.read_text()
    frame = pd.read_csv(out)
    assert set(values(frame, "McNemar's p")) >= {"exact", "default", "qkv_proj"}
    assert set(values(frame, "held-out text")) >= {"exact", "default", "qkv_proj"}
    assert "stock" not in values(frame, "held-out text")
    assert set(values(frame, "KL divergence from fp32, prompt")) >= {"exact", "default"}
    assert not values(frame, "KL divergence beyond stock's, prompt")
    assert not frame.duplicated(["variant", "quantity"]).any()


@pytest.mark.parametrize("when", ["start", "text"])
def test_an_engine_that_dies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    """The others are compared, and the program says who died."""
    monkeypatch.setattr(StandIn, "dies", f"exact at {when}")
    out = tmp_path / "q.csv"
    with pytest.raises(SystemExit, match=r"^quality.py: exact died"):
        run(folder, out, monkeypatch)
    frame = pd.read_csv(out)
    others = {"stock", "default", "qkv_proj"}
    assert others <= set(values(frame, "perplexity"))
    assert "exact" not in values(frame, "perplexity")
    # What it told before counts.
    assert ("exact" in values(frame, "answered exactly")) == (when == "text")


def test_what_engines_are_started_with(folder: Path, tmp_path: Path, monkeypatch: Any):
    seen: dict[str, StandIn] = {}

    class Seen(StandIn):
        def __init__(self, variant: str, *rest: Any) -> None:
            super().__init__(variant, *rest)
            seen[variant] = self

    monkeypatch.setattr("tests.cpu.bench.test_bench_quality.StandIn", Seen)
    run(folder, tmp_path / "q.csv", monkeypatch, patches="rope_store")
    assert seen["stock"].patches is None
    assert seen["default"].patches == []
    assert seen["rope_store"].patches == ["qkv_norm", "rope_store"]
    assert "qkv_proj" not in seen["exact"].patches
    assert "router" in seen["exact"].patches
    sizes = {variant: engine.arguments["chunked_prefill_size"] for variant, engine in seen.items()}
    assert sizes.pop("stock, chunks of 16") == 16
    assert set(sizes.values()) == {4096}
    assert all(engine.arguments["disable_piecewise_cuda_graph"] for engine in seen.values())
    assert "load_format" not in seen["stock"].arguments


def test_environment_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`default` asks for all patches, `stock` for none."""
    started: list[dict[str, str]] = []

    def popen(command: Any, **given: Any) -> Any:
        started.append(given["env"])
        assert command[1].endswith("workers/quality.py")
        return SimpleNamespace()

    monkeypatch.setattr("bench.common.engines.subprocess.Popen", popen)
    for name, patches in (("stock", None), ("default", []), ("alone", ["qkv_proj"])):
        engine = quality.QualityEngine(name, patches, {}, tmp_path / "log")
        assert engine.variant == name
    stock, default, alone = started
    assert stock["GEMMA4_TURBO"] == "0"
    assert default["GEMMA4_TURBO_SELECTION"] == "only=*;skip="
    assert alone["GEMMA4_TURBO_SELECTION"] == "only=qkv_proj;skip="


def test_an_engine_is_stopped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Behind the first time its number can be another process group's."""
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    killed: list[int] = []
    monkeypatch.setattr("bench.common.engines.subprocess.Popen", lambda *_, **__: child)
    monkeypatch.setattr("bench.speculation.engine.os.killpg", lambda group, _: killed.append(group))
    engine = quality.QualityEngine("stock", None, {}, tmp_path / "log")
    engine.stop()
    assert child.poll() is not None
    engine.stop()
    assert killed == [child.pid]


def patch_row(name: str, engaged: int, state: str = "active") -> dict[str, Any]:
    return {"name": name, "state": state, "engaged": engaged, "reason": ""}


def test_calls_of_the_patches(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Summed over an engine's processes; only of patches that are in."""
    processes = [
        {"pid": 1, "command": "", "patches": [patch_row("router", 3), patch_row("qkv_proj", 0)]},
        {"pid": 2, "command": "", "patches": [patch_row("router", 4), patch_row("yoco", 9, "off")]},
    ]
    monkeypatch.setattr(StandIn, "status", processes)
    monkeypatch.setattr(quality.report, "table", lambda patches, title: title)
    frame = run(folder, tmp_path / "q.csv", monkeypatch)
    assert values(frame, "calls of router") == {"default": 7, "exact": 7, "qkv_proj": 7}
    assert values(frame, "calls of qkv_proj")["default"] == 0
    assert values(frame, "calls of yoco") == {}


def test_untimed_commands():
    assert quality.QualityEngine.untimed == {"answers", "text", "distributions", "status"}


# -- the measures ---------------------------------------------------------------------------------


def test_mcnemar():
    one = [True] * 9 + [False] + [True] * 5
    other = [False] * 9 + [True] + [True] * 5
    only_one, only_other, p = statistics.mcnemar(one, other)
    assert (only_one, only_other) == (9, 1)
    assert p == pytest.approx(2 * (1 + 10) / 2**10)  # of ten coins at most one the other way
    assert statistics.mcnemar(one, one) == (0, 0, 1.0)


def test_divergence_is_that_of_its_definition():
    generator = np.random.default_rng(0)
    p, q = (
        torch.from_numpy(generator.normal(size=(2, 3, 50))).log_softmax(-1).numpy()
        for _ in range(2)
    )
    expected = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(statistics.divergences(p, q), expected)
    assert np.abs(statistics.divergences(p, p)).max() == 0
    by_prompt = np.array([[1.0, 3.0], [5.0, 7.0]])
    assert statistics.mean_and_error(by_prompt) == (4.0, pytest.approx(2.0))


@pytest.mark.parametrize(
    ("tokens", "reason", "expected"),
    [
        ([70, 71, small_tasks.EOS], "stop", [70, 71, small_tasks.EOS]),  # the token is kept
        ([70, 71], "stop", [70, 71, small_tasks.EOS]),  # or left out
        ([70, 71], "length", [70, 71]),
    ],
)
def test_ends_of_answers(tokens: list[int], reason: str, expected: list[int]):
    assert quality_worker.ended(tokens, {"type": reason}) == expected


def test_rights_ask_for_the_end():
    asked = [small_tasks.Question("sums", b"sum 1+1=", b"1+1=2")] * 2
    whole = asked[0].tokens()[1]
    assert statistics.rights([whole, whole[:-1]], asked) == [True, False]


def test_a_patch_that_this_sglang_does_not_take_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Its engine would be stock under the patch's name."""
    found = {"skinny_gemm": ("active", ""), "router_few": ("unsupported", "not in this release")}
    monkeypatch.setattr(quality.ENGINE, "outlook", lambda patch: found[patch.name])
    assert quality.that_run(["skinny_gemm", "router_few"]) == ["skinny_gemm"]
    assert "router_few: left out, unsupported: not in this release" in capsys.readouterr().out
