"""bench/quality_mtp.py, whole, on a tiny model: transformers' classes stand in for SGLang's engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest

from bench import quality_mtp
from bench.models import small_tasks
from bench.speculation.comparing import PLAIN
from bench.workers.quality_mtp import QualityMtpWorker
from tests.cpu.bench import test_bench_quality as plain
from tests.cpu.bench.test_bench_quality import folder  # noqa: F401, a fixture

EOS = small_tasks.EOS


class SGLang(plain.SGLang):
    """With speculation every verify step brings two tokens; the last request of a batch of many is wrong."""

    speculative = wrong_in_batches = False

    def generate(self, input_ids: list[list[int]], sampling_params: Any, **more: Any) -> list[Any]:
        answers = super().generate(input_ids, sampling_params, **more)
        for answer in answers:
            if self.speculative:
                answer["meta_info"]["spec_verify_ct"] = len(answer["output_ids"]) // 2
        if self.wrong_in_batches and len(answers) > 1:
            last = answers[-1]["output_ids"]
            answers[-1]["output_ids"] = [300 + (last[0] + 1) % 2, *last[1:]]
        return answers


class StandIn:
    """In the place of the engine's process."""

    dies: ClassVar[str] = ""
    made: ClassVar[dict[str, StandIn]] = {}

    def __init__(self, variant: str, patches: Any, arguments: dict[str, Any], log: Path) -> None:
        self.variant, self.patches, self.arguments, self.log = variant, patches, arguments, log
        self.worker: Any = QualityMtpWorker.__new__(QualityMtpWorker)
        self.worker.engine = SGLang(Path(arguments["model_path"]))
        self.worker.engine.speculative = "speculative_algorithm" in arguments
        self.worker.engine.wrong_in_batches = variant == "patched"
        self.process = SimpleNamespace(kill=lambda: None)
        self.steps: list[int] = []
        StandIn.made[variant] = self

    def wait_ready(self) -> None:
        if self.dies == self.variant:
            raise SystemExit("the engine died")

    def __call__(self, do: str, **arguments: Any) -> Any:
        if do == "status":
            return {"processes": [{"pid": 1, "patches": [plain.patch_row("mtp_chain", 5)]}]}
        if do == "step":
            self.steps.append(len(arguments["ids"]))
            seconds = [9, 2, 4, 1][(len(self.steps) - 1) // 2] if self.variant == "stock" else 1
            tokens = len(arguments["ids"]) * arguments["new"]
            return {"seconds": seconds, "steps": 4, "tokens": tokens}
        return json.loads(json.dumps(getattr(self.worker, do)(**arguments)))

    def stop(self) -> None:
        pass


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """The program, and what it wrote."""
    draft = tmp_path / "assistant"
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    (draft / "training.json").write_text('{"steps": 5, "seed": 1}')
    monkeypatch.setattr(quality_mtp, "QualityMtpEngine", StandIn)
    monkeypatch.setattr(quality_mtp, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(quality_mtp, "find_spec", lambda name: name)
    given = {"pieces": 8, "length": 20, "new": 4, "count": 9, "seed": 28, "rounds": 3}

    def go(**changed: Any) -> pd.DataFrame:
        out = tmp_path / "q.csv"
        quality_mtp.main(folder, **{"assistant": draft, **given, **changed}, out=out)
        return pd.read_csv(out)

    return go


def values(frame: pd.DataFrame, quantity: str) -> dict[str, float]:
    return frame[frame["quantity"] == quantity].set_index("variant")["value"].to_dict()


def test_a_run(run: Any):
    frame = run()
    assert not frame.duplicated(["variant", "quantity"]).any()
    for how in quality_mtp.BATCHES:
        # Of 4 tokens prefill brings one; the others come in two verify steps.
        lengths = values(frame, f"accept length, text, {how}")
        assert lengths == {"stock": 1.5, "patched": 1.5}
    for kind, tokens in (("text", 4 * 8), ("questions", None)):
        differ = f"tokens that differ, {kind}, "
        pairs = ["stock vs patched", f"{PLAIN} vs stock", f"{PLAIN} vs patched"]
        assert values(frame, f"{differ}alone") == dict.fromkeys(pairs, 0)
        # The last answer of a batch is wrong in one token: one batch of 8 pieces; 9 questions are two.
        assert values(frame, f"{differ}in batches of 8") == dict(zip(pairs, (1, 0, 1), strict=True))
        assert values(frame, f"answers that differ, {kind}, in batches of 8")[pairs[0]] == 1
        for variant, wrong in ((PLAIN, 0), ("stock", 0), ("patched", 1)):
            name = f"{variant}, alone vs in batches of 8"
            assert values(frame, f"tokens that differ, {kind}")[name] == wrong
        if tokens:
            counted = frame[frame["quantity"] == f"{differ}alone"]["x"]
            assert set(counted) == {tokens}
    assert set(values(frame, "answered exactly, alone")) == {PLAIN, "stock", "patched"}
    assert values(frame, "calls of mtp_chain") == {"patched": 5}
    # Stock's rounds take 2, 4 and 1 seconds for 4 tokens of each request, behind a first that is left out.
    assert values(frame, "tokens a second, batch 8")["stock"] == 16
    assert values(frame, "verify step, batch 1") == {"stock": 500, "patched": 250}
    assert values(frame, "decode step, batch 1") == {PLAIN: 250}
    assert set(frame["assistant_steps"]) == {5}


def test_what_engines_are_started_with(run: Any, tmp_path: Path):
    run(batches="")
    made = StandIn.made
    assert list(made) == [PLAIN, "stock", "patched"]
    assert not any(name.startswith("speculative") for name in made[PLAIN].arguments)
    assert made["stock"].arguments == made["patched"].arguments
    assert made["stock"].arguments["speculative_draft_model_path"] == str(tmp_path / "assistant")
    assert made["patched"].patches == []  # all that are on by default
    assert all(engine.steps == [] for engine in made.values())
    assert quality_mtp.QualityMtpEngine is StandIn


def test_an_engine_that_dies(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StandIn, "dies", "stock")
    with pytest.raises(SystemExit, match=r"^quality_mtp.py: .*stock.* died"):
        run()
    frame = pd.read_csv(tmp_path / "q.csv")
    assert f"{PLAIN} vs patched" in set(frame["variant"])
    assert not frame["variant"].str.contains("stock").any()


def test_without_an_assistant(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match=r"holds no assistant; see train_assistant\.py"):
        run(assistant=tmp_path / "none")
    monkeypatch.setattr(quality_mtp, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs transformers 5\.8"):
        run()


def test_answers_that_differ():
    def rows(*ids: list[int]) -> Any:
        return [{"ids": one} for one in ids]

    truth = rows([5, 6, EOS], [7], [8, EOS])
    assert quality_mtp.differing(truth, truth) == (0, 0)
    assert quality_mtp.differing(truth, rows([5, 9, EOS], [7, 7, 7], [8, EOS])) == (3, 2)
    assert quality_mtp.differing(truth, rows([EOS], [7], [8])) == (4, 2)


def test_an_answer_ends_with_eos():
    """Kept whether or not a release returns it; text goes on behind it."""
    said = {"output_ids": [70, 71], "meta_info": {"finish_reason": {"type": "stop"}}}
    seen: list[Any] = []

    class Engine:
        def generate(self, input_ids: Any, sampling_params: Any) -> Any:
            seen.extend(sampling_params)
            return [said for _ in input_ids]

    worker: Any = QualityMtpWorker.__new__(QualityMtpWorker)
    worker.engine = Engine()
    asked = {"ids": [[5], [6], [7]], "new": [1, 2, 3], "batch": 2}
    answers = worker.continued(**asked, to_eos=True)["rows"]
    assert answers == [{"ids": [70, 71, EOS], "verified": 0}] * 3
    assert [one["max_new_tokens"] for one in seen] == [1, 2, 3]
    assert all(one["stop_token_ids"] == [EOS] and "ignore_eos" not in one for one in seen)
    seen.clear()
    assert worker.continued(**asked, to_eos=False)["rows"][0]["ids"] == [70, 71]
    assert all(one["ignore_eos"] and "stop_token_ids" not in one for one in seen)
