"""bench/peers.py with stand-ins for SGLang and vLLM: the real worker's process, and what becomes of its answers."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

typer = pytest.importorskip("typer")
peers = pytest.importorskip("bench.peers", reason="the bench's own packages are not installed")
import gemma4_turbo  # noqa: E402
from bench.peer import engine as peers_engine  # noqa: E402
from bench.peer import results as peers_results  # noqa: E402
from bench.peer import serving as peers_serving  # noqa: E402
from bench.peer import workloads as peers_workloads  # noqa: E402
from bench.rendering import peers as tables_peers  # noqa: E402
from bench.workers import peers as peers_worker  # noqa: E402
from tests.cpu.conftest import REPOSITORY  # noqa: E402

FILES = {
    "sglang/__init__.py": """
        import asyncio, os, subprocess, time
        __version__ = "9.9.9"
        class Engine:
            def __init__(self, **given):
                mode = os.environ.get("STAND_IN")
                if mode == "no start":
                    raise ValueError("no KV for you")
                if mode == "no graphs" and not given.get("disable_prefill_cuda_graph"):
                    print("Exception: duplicate attention layer_id", flush=True); os._exit(9)
                if mode == "silent":
                    subprocess.Popen(["sleep", "600"])
                    time.sleep(600)
                self.given, self.mode, self.calls = given, mode, 0
                self.loop = asyncio.new_event_loop()
            def get_server_info(self):
                return {"attention_backend": "triton", **self.given, "a secret": 1}
            async def async_generate(self, sampling_params, stream, input_ids=None, prompt=None, image_data=None):
                self.calls += 1
                if self.mode == "half" and self.calls > 3 and len(input_ids) == 9:
                    print("RuntimeError: CUDA error: an illegal access", flush=True); os._exit(9)
                async def chunks():
                    new = sampling_params["max_new_tokens"]
                    for made in range(1, new + 1):
                        await asyncio.sleep(0.002)
                        meta = {"completion_tokens": made, "prompt_tokens": len(input_ids or [0] * 7)}
                        if "speculative_algorithm" in self.given:
                            meta["spec_verify_ct"] = made // 2
                        yield {"meta_info": meta}
                return chunks()
            def shutdown(self): ...
    """,
    "sglang/srt/__init__.py": "",
    "sglang/srt/server_args.py": """
        class ServerArgs:
            def __init__(self, model_path, load_format="auto", skip_tokenizer_init=False, grammar_backend=None,
                log_level="", chunked_prefill_size=None, disable_prefill_cuda_graph=False,
                speculative_algorithm=None, speculative_draft_model_path=None, speculative_num_steps=None,
                speculative_eagle_topk=None, speculative_num_draft_tokens=None, attention_backend=None,
                nccl_port=None): ...
    """,
    "vllm/__init__.py": """
        __version__ = "8.8.8"
        class SamplingParams:
            def __init__(self, **given): self.__dict__ |= given
    """,
    "vllm/engine/arg_utils.py": """
        class AsyncEngineArgs:
            def __init__(self, model, load_format="auto", skip_tokenizer_init=False, speculative_config=None,
                         max_num_batched_tokens=None, kernel_config=None, limit_mm_per_prompt=None):
                self.given = locals()
    """,
    "vllm/sampling_params.py": "class RequestOutputKind: DELTA = 'delta'",
    "vllm/usage/usage_lib.py": "class UsageContext: OPENAI_API_SERVER = 'server'",
    "vllm/v1/engine/async_llm.py": """
        import asyncio
        from types import SimpleNamespace as Is
        drafts = 0
        class AsyncLLM:
            @classmethod
            def from_engine_args(cls, found, usage_context):
                assert usage_context == "server"
                asyncio.get_running_loop()
                print("INFO Using FLASH_ATTN attention backend out of ['FLASH_ATTN']", flush=True)
                self = cls()
                size = found.given["max_num_batched_tokens"] or 4321
                self.vllm_config = Is(scheduler_config=Is(max_num_batched_tokens=size))
                self.speculates = bool(found.given["speculative_config"])
                return self
            async def generate(self, prompt, sampling, name):
                global drafts
                assert sampling.output_kind == "delta" and sampling.ignore_eos
                ids = prompt.get("prompt_token_ids")
                if ids is None:
                    assert [type(image).__name__ for image in prompt["multi_modal_data"]["image"]] == ["Image"] * 6
                    ids = [0] * 7
                left = sampling.max_tokens
                while left:
                    await asyncio.sleep(0.002)
                    some = min(left, 2)
                    left -= some
                    drafts += self.speculates
                    yield Is(outputs=[Is(token_ids=[5] * some)], prompt_token_ids=ids)
            def shutdown(self): ...
    """,
    "vllm/v1/metrics/reader.py": """
        from types import SimpleNamespace as Is
        from vllm.v1.engine import async_llm
        def get_metrics_snapshot():
            return [Is(name="vllm:spec_decode_num_drafts", value=async_llm.drafts), Is(name="vllm:other", value=70)]
    """,
    "vllm/model_executor/model_loader/weight_utils.py": """
        def initialize_dummy_weights(model, model_config, low=-1e-3, high=1e-3, seed=1):
            initialize_single_dummy_weight(model, low, high, seed)
        def initialize_single_dummy_weight(param, low=-1e-3, high=1e-3, seed=1):
            param.append((low, high, seed))
    """,
}
SERVER = """
    import json, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer
    print("Using FLASH_ATTN backend.", flush=True)
    if "--disable-piecewise-cuda-graph" in sys.argv:
        raise SystemExit("error: unrecognized arguments")
    if "--dies" in sys.argv:
        raise SystemExit("ImportError: no kernel image")
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
            self.wfile.write(json.dumps({"attention_backend": "fa4", "other": 1}).encode())
        def log_message(self, *_): ...
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""
BENCH_SERVING = """
    import json, os, sys
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    if given["--request-rate"] == "16.0":
        raise SystemExit(5)
    names = "median_ttft_ms p99_ttft_ms median_tpot_ms p99_tpot_ms output_throughput total_throughput duration"
    line = {"completed": int(given["--num-prompts"])} | {n: i + 1 for i, n in enumerate(names.split())}
    with open(given["--output-file"], "w") as file:
        file.write(json.dumps(line) + "\\n")
"""
FILES |= {
    "sglang/launch_server.py": SERVER,
    "vllm/entrypoints/openai/api_server.py": SERVER,
    "sglang/bench_serving.py": BENCH_SERVING,
}
ABSENT = ("typer", "rich", "pandas", "numpy", "wrapt", "gemma4_turbo")


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, and none of what the benchmarks themselves use."""
    absent = {f"{name}.py": f"raise ImportError({name!r})" for name in ABSENT}
    return put(tmp_path_factory.mktemp("stand_ins"), FILES | absent)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, and no GPU is asked for its name."""
    for name, kind, model in (("A", "text", ""), ("B", "text", ""), ("E2B", "text", "e2b")):
        sizes = (3, 8, 4) if name == "A" else (2, 9, 3)
        workload = peers_workloads.Workload(name, model, kind, *sizes)
        monkeypatch.setitem(peers_workloads.WORKLOADS, name, workload)
    for name, kind in (("images", "pictures"), ("MTP", "mtp")):
        workload = peers_workloads.WORKLOADS[name]._replace(requests=2, new=5)
        monkeypatch.setitem(peers_workloads.WORKLOADS, name, workload._replace(kind=kind))
    where = {"timestamp": "2026-01-01T00:00:00+00:00", "gpu": "NVIDIA H9", "sglang": "this one"}
    monkeypatch.setattr(peers_results, "provenance", lambda: where)
    monkeypatch.setattr(peers, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(peers_workloads, "SIDE", 48)
    monkeypatch.setattr(
        peers_workloads.geometry_mm, "write_model", peers_workloads.geometry.write_model
    )


def of(stand_ins: Path, name: str, kind: str, *options: str) -> str:
    return ";".join([f"{name}={kind}:{sys.executable}:{stand_ins}", *options])


def run(out: Path, engines: list[str], workloads: str, **more: Any) -> pd.DataFrame:
    more = {"settings": "defaults", "start_limit": 60.0, "limit": 60.0, **more}
    peers.main(engine=engines, workloads=workloads, out=out, **more)
    return pd.read_csv(out, keep_default_na=False, na_values=[""])


def alive(group: int) -> bool:
    """Whether a process of the group runs; one that ended may wait for its parent."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                return True
    return False


# -- a run ----------------------------------------------------------------------------------------


def test_a_run(stand_ins: Path, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Both kinds, both settings, two rounds: order, columns, figures, table, plot."""
    engines = [of(stand_ins, "stock", "sglang", "attention_backend=fa4")]
    engines.append(
        of(stand_ins, "field", "vllm", 'kernel_config={"enable_flashinfer_autotune":false}')
    )
    out = tmp_path / "out.csv"
    frame = run(out, engines, "A,B", settings="defaults,chunk", chunk=77)
    assert list(frame.columns) == peers_results.FIELDS
    starts = frame[frame["quantity"] == "ready"]
    assert list(zip(starts["setting"], starts["round"], starts["engine"], strict=True)) == [
        (setting, round_, engine)
        for setting in ("own defaults", "same chunk")
        for round_, order in ((0, ("stock", "field")), (1, ("field", "stock")))
        for engine in order
    ]
    timed = frame[frame["quantity"] == "duration"]
    assert len(timed) == 2 * 2 * 2 * 2
    assert timed["value"].between(0.001, 5).all()
    assert set(timed["requests"]) == {3, 2}
    chunks = {
        (row["engine"], row["setting"]): json.loads(row["resolved"]) for _, row in timed.iterrows()
    }
    assert chunks["field", "own defaults"] == {"max_num_batched_tokens": 4321}
    assert chunks["field", "same chunk"] == {"max_num_batched_tokens": 77}
    assert chunks["stock", "same chunk"]["chunked_prefill_size"] == 77
    assert "chunked_prefill_size" not in chunks["stock", "own defaults"]
    assert "a secret" not in chunks["stock", "same chunk"]
    rows = {engine: timed[timed["engine"] == engine].iloc[0] for engine in ("stock", "field")}
    assert (rows["stock"]["sglang"], rows["field"]["vllm"]) == ("9.9.9", "8.8.8")
    assert pd.isna(rows["field"]["sglang"])
    assert rows["stock"]["attention_backend"] == "fa4"
    assert rows["field"]["attention_backend"] == "FLASH_ATTN"
    given = {name: json.loads(row["flags"]) for name, row in rows.items()}
    assert given["field"] == {
        "model": "26b-a4b-text-vllm",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "kernel_config": {"enable_flashinfer_autotune": False},
    }
    assert given["stock"]["model_path"] == "26b-a4b-text-sglang"
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "to the best other" in capsys.readouterr().out
    # The page and README have it.
    assert tables_peers.peers(tmp_path) is tables_peers.plot(tmp_path) is None
    shutil.copy(out, tmp_path / tables_peers.CSV)
    assert tables_peers.plot(tmp_path) is None
    shutil.copy(out.with_suffix(".png"), tmp_path / tables_peers.PLOT)
    assert "(bench/results/peers.png)" in str(tables_peers.plot(tmp_path))
    page = str(tables_peers.peers(tmp_path))
    assert page.count("\n| own defaults | A | ") == page.count("\n| same chunk | B | ") == 2
    assert "| stock | SGLang 9.9.9 | " in page
    assert "`attention_backend=fa4`, `chunked_prefill_size=77`" in page
    assert "Medians of 2 rounds" in page
    assert page.endswith("NVIDIA H9, 2026-01-01.")
    # Nothing is measured twice.
    assert len(run(out, engines, "A,B", settings="defaults,chunk", resume=True)) == len(frame)


def test_images_and_speculation(stand_ins: Path, small: None, tmp_path: Path):
    engines = [of(stand_ins, "stock", "sglang"), of(stand_ins, "field", "vllm")]
    frame = run(tmp_path / "out.csv", engines, "images,MTP", rounds=1)
    assert not frame["reason"].notna().any(), frame["reason"].dropna().tolist()
    found = frame.set_index(["engine", "workload", "quantity"])["value"]
    # Of 5 tokens vLLM makes two at a time, in 3 steps; SGLang says 2 steps. One is the prefill's.
    assert found["stock", "MTP", "tokens a verify step"] == 4 * 2 / (2 * 2)
    assert found["field", "MTP", "tokens a verify step"] == pytest.approx(4 * 2 / (3 * 2))
    assert (found[:, "MTP", "verify step"] > 0).all()
    assert (
        found[:, "images", "total tokens a second"] > found[:, "images", "output tokens a second"]
    ).all()


def test_the_patches_are_in_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEMMA4_TURBO_ROUTER", "0")
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:/elsewhere")
    found = {
        kind: peers_engine.environment(peers_engine.parse(f"x={kind}:"))
        for kind in peers_engine.KINDS
    }
    for kind, environment in found.items():
        path = environment["PYTHONPATH"].split(":")
        assert path[0] == str(REPOSITORY / "bench" / "site")
        assert path[-1] == "/elsewhere"
        ours = kind == "ours"
        assert (str(REPOSITORY) in path) == ours
        assert environment.get("GEMMA4_TURBO") == (None if ours else "0")
        assert environment["BENCH_PATCHED"] == str(int(ours))
        assert "GEMMA4_TURBO_ROUTER" not in environment


def test_ours_is_the_package_of_this_repository(small: None, tmp_path: Path):
    """Its worker's process has it, and its rows say so."""
    stand_ins = put(tmp_path / "stand_ins", FILES)
    frame = run(tmp_path / "out.csv", [of(stand_ins, "ours", "ours")], "A", rounds=1)
    assert not frame["reason"].notna().any(), frame["reason"].dropna().tolist()
    assert set(frame["gemma4_turbo"]) == {gemma4_turbo.__version__}
    assert set(frame["kind"]) == {"ours"}


def test_what_the_patches_say_of_themselves(monkeypatch: pytest.MonkeyPatch):
    """Over all processes: engaged in one is engaged, failed in one is failed."""

    def process(**rows: tuple[str, int]) -> SimpleNamespace:
        patches = [{"name": n, "state": s, "engaged": count} for n, (s, count) in rows.items()]
        return SimpleNamespace(patches=patches)

    below = [
        process(router=("active", 0), pdl=("active", 3), yoco=("declined", 0)),
        process(router=("active", 5), pdl=("failed", 0), moe_align=("active", 0)),
    ]
    monkeypatch.setattr("gemma4_turbo.engine.counters.descendants", lambda: below)
    found = peers_worker.report()
    assert found == {"engaged": ["pdl", "router"], "silent": ["moe_align"], "failed": ["pdl"]}


# -- what goes wrong ------------------------------------------------------------------------------


def test_engines_that_fail_are_rows_that_say_why(stand_ins: Path, small: None, tmp_path: Path):
    """One does not start, one dies half-way and goes on with the next workload, one never answers."""
    engines = [
        of(stand_ins, "none", "sglang", "STAND_IN=no start"),
        of(stand_ins, "half", "sglang", "STAND_IN=half"),
        of(stand_ins, "wrong", "vllm", "nonsense=1"),
        of(stand_ins, "fine", "vllm"),
    ]
    frame = run(tmp_path / "out.csv", engines, "B,A", rounds=2)
    why = frame[frame["quantity"] == "failed"].groupby("engine")["reason"].agg(list)
    assert why["none"] == ["did not start: ValueError: no KV for you"] * 2  # once for each workload
    assert (
        why["half"] == ["died or did not answer: RuntimeError: CUDA error: an illegal access"] * 2
    )
    assert why["wrong"] == ["did not start: ValueError: this engine has no argument nonsense"] * 2
    timed = frame[frame["quantity"] == "duration"].groupby("engine")["workload"].agg(sorted)
    assert timed.to_dict() == {"fine": ["A", "A", "B", "B"], "half": ["A", "A"]}
    told = peers_results.lines(peers_results.summary(frame))
    assert ["own defaults", "A", "none", why["none"][0]] in [line[:4] for line in told]


def test_an_engine_that_never_answers(
    stand_ins: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is ended, with what it started."""
    groups: list[int] = []

    class Recorded(peers_engine.Worker):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            groups.append(self.process.pid)

    monkeypatch.setattr(peers, "Worker", Recorded)
    begun = time.monotonic()
    engines = [of(stand_ins, "silent", "sglang", "STAND_IN=silent")]
    frame = run(tmp_path / "out.csv", engines, "A", rounds=2, start_limit=1.0)
    assert frame["reason"].tolist() == ["did not start: no answer in 1 s"]
    assert time.monotonic() - begun < 30
    assert len(groups) == 1
    assert not alive(groups[0])


def test_stock_that_cannot_record_graphs_starts_without(
    stand_ins: Path, small: None, tmp_path: Path
):
    """E2B shares KV: both starts are told, the second one's flags stand with the figures."""
    engines = [of(stand_ins, "stock", "sglang", "STAND_IN=no graphs")]
    frame = run(tmp_path / "out.csv", engines, "E2B", rounds=1)
    first, *rest = frame.to_dict("records")
    assert first["reason"] == "did not start: Exception: duplicate attention layer_id"
    assert "disable_piecewise_cuda_graph" not in first["flags"]
    assert all(json.loads(row["flags"])["disable_piecewise_cuda_graph"] for row in rest)
    assert json.loads(rest[-1]["resolved"])["disable_prefill_cuda_graph"] is True
    assert {row["quantity"] for row in rest} >= {"ready", "duration"}


def test_what_is_there_stays_when_it_is_ended(
    stand_ins: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    groups: list[int] = []
    measure = peers.Run.measure

    def until_b(self: Any, worker: Any, about: Any, workload: Any, place: Any) -> None:
        groups.append(worker.process.pid)
        if workload.name == "B":
            raise KeyboardInterrupt
        measure(self, worker, about, workload, place)

    monkeypatch.setattr(peers.Run, "measure", until_b)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.csv", [of(stand_ins, "stock", "sglang")], "A,B")
    frame = pd.read_csv(tmp_path / "out.csv")
    assert set(frame["workload"]) == {"start", "A"}
    assert not alive(groups[-1])


@pytest.mark.parametrize(
    "text",
    ["stock", "stock=", "stock=other:", "=sglang:", "a=sglang:;x", "a=sglang:;x y=1", "a=vllm:/no/such"],
)  # fmt: skip
def test_an_engine_that_cannot_be_read(text: str):
    with pytest.raises(typer.BadParameter, match="--engine"):
        peers_engine.parse(text)


def test_arguments_that_cannot_be(tmp_path: Path):
    out = tmp_path / "out.csv"
    for given, message in (
        ({"workloads": "A,Z"}, "--workloads must be of .* got Z"),
        ({"settings": "x"}, "--settings must be of defaults, chunk"),
        ({"model": "9b"}, "--model must be of"),
        ({"engine": ["a=vllm:", "a=sglang:"]}, "--engine: two engines have one name"),
        ({"serving": True, "rates": "0"}, "--rates.* above 0"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            peers.main(**{"engine": ["a=vllm:"], "out": out, **given})
    out.write_text("other,columns\n1,2\n")
    with pytest.raises(typer.BadParameter, match="has other columns"):
        peers.main(engine=["a=vllm:"], out=out)


def test_the_reason_is_the_cause(tmp_path: Path):
    log = tmp_path / "log"
    assert peers_engine.reason(log) == "no log"
    log.write_text("")
    assert peers_engine.reason(log) == "an empty log"
    log.write_text("one\ntwo\n\n")
    assert peers_engine.reason(log) == "two"
    log.write_text(
        "(EngineCore pid=1) ERROR 01-02 [core.py:9] torch.OutOfMemoryError: CUDA out of memory.\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed: {}\nbye\n"
    )
    assert peers_engine.reason(log) == "torch.OutOfMemoryError: CUDA out of memory."


# -- figures --------------------------------------------------------------------------------------


def test_figures_and_percentiles():
    """Numbers of a hundred requests, by hand."""
    rows = [
        {"sent": 1.0, "first": 1.0 + i / 100, "last": 2.0 + i / 100, "tokens": 11, "prompt": 7}
        for i in range(1, 102)
    ]
    asked = [{"new": 11}] * 101
    found = {
        name: value
        for name, value, _ in peers_results.figures({"requests": rows, "steps": 0}, asked)
    }
    assert found["duration"] == pytest.approx(2.01)
    assert found["output tokens a second"] == pytest.approx(101 * 11 / 2.01)
    assert found["total tokens a second"] == pytest.approx(101 * 18 / 2.01)
    assert found["first token, median"] == pytest.approx(510)
    assert found["first token, 99th percentile"] == pytest.approx(1000)
    assert found["time per token, median"] == pytest.approx(100)
    assert "verify step" not in found
    speculated = {
        name: value
        for name, value, _ in peers_results.figures({"requests": rows, "steps": 202}, asked)
    }
    assert speculated["verify step"] == pytest.approx(500)
    assert speculated["tokens a verify step"] == 5
    with pytest.raises(ValueError, match="1 of 101 requests"):
        peers_results.figures({"requests": rows, "steps": 0}, [*asked[1:], {"new": 12}])


def measured(seconds: dict[str, tuple[str, float]], workload: str = "A") -> pd.DataFrame:
    rows = [
        {"setting": "own defaults", "workload": workload, "engine": engine, "kind": kind}
        | {"quantity": quantity, "value": value * part, "round": round_}
        for engine, (kind, value) in seconds.items()
        for quantity, part in (
            ("duration", 1.0),
            ("verify step", 10.0),
            ("first token, median", 5.0),
        )
        for round_ in (0, 1)
    ]
    return pd.DataFrame(rows, columns=peers_results.FIELDS)


def test_ratios_are_to_the_best_of_the_others():
    found = peers_results.summary(
        measured({"stock": ("sglang", 4.0), "ours": ("ours", 3.0), "field": ("vllm", 3.6)})
    )
    told = {line[2]: line for line in peers_results.lines(found)}
    assert [told[name][4] for name in ("stock", "ours", "field")] == ["1.111", "0.833", "1.000"]
    assert told["ours"][-1] == "duration 0.833, at most 0.85: met"
    assert told["stock"][-1] == ""
    for workload, target in (("E2B", "duration 0.833, at most 0.6: missed"),
                             ("MTP", "verify step 0.833, at most 0.9: met"),
                             ("serving, 8 a second", "first token, median 0.833, at most 0.7: missed"),
                             ("chat", "")):  # fmt: skip
        found = peers_results.summary(
            measured({"ours": ("ours", 3.0), "field": ("vllm", 3.6)}, workload)
        )
        assert peers_results.lines(found)[0][-1] == target
        assert peers_results.lines(found)[1][-2] == "36.00"  # the verify step, of all engines
    alone = peers_results.lines(peers_results.summary(measured({"ours": ("ours", 3.0)})))
    assert alone[0][3:5] == ["3.00", "-"]


class Compiling:
    """A worker whose runs last as long as it is told."""

    def __init__(self, *lasting: float) -> None:
        self.peer = SimpleNamespace(name="it")
        self.left: list[float] = list(lasting)
        self.asked: list[list[dict[str, Any]]] = []

    def __call__(self, question: dict[str, Any], limit: float) -> dict[str, Any]:
        if question["do"] == "report":
            return {}
        self.asked.append(question["requests"])
        times = {"sent": 0.0, "first": 0.01, "last": self.left.pop(0)}
        rows = [times | {"tokens": one["new"], "prompt": 1} for one in question["requests"]]
        return {"requests": rows, "steps": 0}


@pytest.mark.parametrize(
    ("lasting", "warm", "told"),
    [
        ((1.0, 1.05, 7), 2, ""),
        ((3, 1, 0.95, 7), 3, ""),
        ((3, 6.3, 3.1, 7), 3, ""),  # the second run compiled
        ((3, 1, 2, 1, 7), 4, ""),
        ((9, 8, 7, 6, 5, 7), 5, "not warm after 5 runs"),
    ],
)
def test_an_engine_is_warm_when_a_run_is_as_fast_as_the_fastest_before(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lasting: tuple[float, ...],
    warm: int,
    told: str,
):
    """It compiles for a size of batch when one comes: 3.3 s of a run of 9 were that."""
    workload = peers_workloads.WORKLOADS["B"]._replace(requests=2, prompt=5, new=40)
    worker, found = Compiling(*lasting), []
    rows = SimpleNamespace(add=lambda peer, about, where, figures: found.append(figures))
    run_ = peers.Run(rows, tmp_path / "log", peers.Limits(1, 1))
    for round_ in (0, 9):
        worker.left = list(lasting)
        run_.measure(worker, {}, workload, {"round": round_})
        assert worker.left == []
    *before, asked = worker.asked[: warm + 1]
    assert asked == peers_workloads.requests(workload, 0)
    assert {one["new"] for given in before for one in given} == {peers_workloads.WARM_UP_TOKENS}
    begins = [tuple(one["ids"]) for given in worker.asked for one in given]
    assert len(set(begins)) == len(begins) == 2 * 2 * (warm + 1)
    assert [figures[0][1] for figures in found] == [7, 7]
    assert ("not warm" in (out := capsys.readouterr().out)) == bool(told)
    assert told in out


# -- workloads ------------------------------------------------------------------------------------


def test_no_prompt_begins_as_another(monkeypatch: pytest.MonkeyPatch):
    """Both engines keep prefixes: what was sent before would be answered from the cache."""
    beginnings = [(min(prompt, 20), new) for prompt, new in peers_workloads.chat_lengths()]
    monkeypatch.setattr(peers_workloads, "chat_lengths", lambda: beginnings)
    texts = [w for w in peers_workloads.WORKLOADS.values() if w.kind != "pictures"]
    begins = [
        tuple(request["ids"][:5])
        for workload in texts
        for round_ in (-2, -1, 0, 1)
        for request in peers_workloads.requests(
            workload._replace(prompt=min(workload.prompt, 20)), round_
        )
        if len(request["ids"]) >= 5
    ]
    assert len(set(begins)) == len(begins)
    a = peers_workloads.WORKLOADS["A"]
    assert peers_workloads.requests(a, 0) == peers_workloads.requests(a, 0)
    assert {r["new"] for r in peers_workloads.requests(a, -1)} == {peers_workloads.WARM_UP_TOKENS}


def test_the_lengths_of_a_chat_service():
    """As the page about them says."""
    lengths = np.array(peers_workloads.chat_lengths())
    assert lengths.shape == (300, 2)
    assert lengths.min() > 0
    assert lengths.mean(axis=0).round().tolist() == [1164, 218]
    chat = peers_workloads.WORKLOADS["chat"]
    made = peers_workloads.requests(chat, 0)
    assert [(len(one["ids"]), one["new"]) for one in made] == [
        tuple(x) for x in lengths[: chat.requests]
    ]


def test_vllm_reads_the_models_own_names(tmp_path: Path):
    """One model in two folders: what SGLang's text-only loader wants renamed stands as published."""
    for name in ("26b-a4b", "e4b"):
        stock, field = (
            json.loads(
                (
                    peers_workloads.write(tmp_path, name, "text", None, kind) / "config.json"
                ).read_text()
            )
            for kind in ("ours", "vllm")
        )
        assert field["architectures"] == stock["architectures"] == ["Gemma4ForCausalLM"]
        assert (field["head_dim"], field["global_head_dim"]) == (256, 512)
        assert field["num_key_value_heads"] == stock["swa_num_key_value_heads"]
        assert not [key for key in field if key.startswith("swa_")]
        same = ("hidden_size", "layer_types", "intermediate_size", "rope_parameters", "vocab_size")
        assert [field[key] for key in same] == [stock[key] for key in same]


def test_a_word_is_a_token(tmp_path: Path):
    """Any tokens survive being text, so that both servers read as many as were asked for."""
    tokenizers = pytest.importorskip("tokenizers")
    peers_workloads.write_words(tmp_path)
    words = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [*range(20), 77_777, 262_143]
    assert words.encode(words.decode(ids, skip_special_tokens=False)).ids == ids
    assert words.get_vocab_size() == 262_144


# -- random weights -------------------------------------------------------------------------------

WEIGHTS = """
import sys
from vllm.model_executor.model_loader import weight_utils
drawn = []
weight_utils.initialize_dummy_weights(drawn, None)
weight_utils.initialize_single_dummy_weight(drawn, -9.0, seed=7)
print(drawn, "wrapt" in sys.modules)
"""


def ran(peer: peers_engine.Peer, code: str) -> subprocess.CompletedProcess[str]:
    """In an engine's interpreter and environment."""
    return subprocess.run(
        [peer.python, "-c", code],
        env=peers_engine.environment(peer),
        capture_output=True,
        text=True,
    )


def test_weights_of_vllm_are_as_wide(stand_ins: Path, monkeypatch: pytest.MonkeyPatch):
    """Without wrapt, which that environment does not have; the seed stays."""
    monkeypatch.setenv("BENCH_WEIGHT_RANGE", "0.5")
    peer = peers_engine.parse(f"field=vllm:{sys.executable}:{stand_ins}")
    found = ran(peer, WEIGHTS)
    assert found.stdout == "[(-0.5, 0.5, 1), (-0.5, 0.5, 7)] False\n", found.stderr


FIXED = """
    def initialize_dummy_weights(model, model_config):
        for value in model.state_dict().values():
            value.size = 1e-3
"""
READS = """
from vllm.model_executor.model_loader.weight_utils import initialize_dummy_weights
class Tensor:
    def __init__(self, whole): self.data, self.whole = self, whole
    def is_floating_point(self): return not self.whole
    def numel(self): return 1
    def abs(self): return self
    def max(self): return self.size
    def mul_(self, factor): self.size *= factor
class Layer:
    tensors = {"weight": Tensor(False), "index": Tensor(True)}
    def state_dict(self): return self.tensors
initialize_dummy_weights(Layer(), None)
print([round(tensor.size, 6) for tensor in Layer.tensors.values()])
"""


def test_weights_without_bounds_are_widened_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whole numbers stay."""
    monkeypatch.setenv("BENCH_WEIGHT_RANGE", "0.25")
    put(tmp_path, {"vllm/model_executor/model_loader/weight_utils.py": FIXED})
    peer = peers_engine.parse(f"field=vllm:{sys.executable}:{tmp_path}")
    found = ran(peer, READS)
    assert found.stdout == "[0.25, 0.001]\n", found.stderr


# -- over HTTP ------------------------------------------------------------------------------------


def test_serving(stand_ins: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each server in turn at each rate; a rate that fails and a server that dies are rows that say why."""
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setattr(peers, "write_words", lambda folder: folder)
    engines = [
        of(stand_ins, "stock", "sglang", "disable_piecewise_cuda_graph=true"),
        of(stand_ins, "field", "vllm"),
        of(stand_ins, "dead", "vllm", "dies=true"),
    ]
    frame = run(
        tmp_path / "out.csv", engines, "", serving=True, rates="2,inf,16", prompts=6, rounds=1
    )
    values = frame.set_index(["engine", "workload", "quantity"])["value"].sort_index()
    for engine in ("stock", "field"):
        for workload in ("serving, 2 a second", "serving, unlimited"):
            row = values[engine, workload]
            assert [row[name] for _, name, _ in peers_serving.SERVED] == [1, 2, 3, 4, 5, 6, 7]
    why = frame[frame["quantity"] == "failed"].groupby("engine")["reason"].first()
    assert why["dead"] == "did not start: ImportError: no kernel image"
    assert why["stock"].startswith("no figures: bench_serving failed: exit 5")
    backends = frame[frame["quantity"] == "duration"].groupby("engine")["attention_backend"].first()
    assert backends.to_dict() == {"field": "FLASH_ATTN", "stock": "fa4"}
    calls = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    options = [dict(zip(call[::2], call[1::2], strict=False)) for call in calls]
    assert [one["--backend"] for one in options] == ["sglang"] * 4 + ["vllm"] * 4
    assert [one["--request-rate"] for one in options[:4]] == ["inf", "2.0", "inf", "16.0"]
    assert len({one["--seed"] for one in options[:4]}) == 4
    assert not any("--tokenize-prompt" in call for call in calls)


def test_flags_have_the_names_of_an_engines_own_release(stand_ins: Path, tmp_path: Path):
    """Of the SGLang in its environment, not of ours; vLLM's are its own."""
    older = put(
        tmp_path / "older",
        {
            "sglang/__init__.py": "raise ImportError('nothing of it is imported')",
            "sglang/srt/server_args.py": "disable_piecewise_cuda_graph: bool = False",
        },
    )
    given = {"disable_piecewise_cuda_graph": True, "cuda_graph_max_bs": 8, "skip": False}
    for folder, name in ((older, "piecewise"), (stand_ins, "prefill")):
        peer = peers_engine.parse(of(folder, "x", "sglang"))
        assert peers_serving.flags(given, peers_serving.server_args(peer)) == [
            f"--disable-{name}-cuda-graph",
            "--cuda-graph-max-bs-decode",  # of neither, so of the newest
            "8",
        ]
    assert peers_serving.flags(given, None)[1] == "--cuda-graph-max-bs"
    nowhere = put(tmp_path / "nowhere", {"sglang/__init__.py": ""})
    assert peers_serving.server_args(peers_engine.parse(of(nowhere, "x", "sglang"))) is None


def test_what_failed_is_tried_again_if_asked(stand_ins: Path, tmp_path: Path):
    """Where the time was up, say; what was measured stays."""
    out = tmp_path / "out.csv"
    peer = peers_engine.parse(of(stand_ins, "stock", "sglang"))
    rows = peers_results.Rows(out, False)
    place = {"setting": "own defaults", "round": 0}
    rows.add(peer, {}, {**place, "workload": "A"}, [("failed", None, "")], "no time")
    rows.add(peer, {}, {**place, "workload": "B"}, [("duration", 1.0, "s")])
    for again, had in ((False, [True, True, False]), (True, [False, True, False])):
        kept = peers_results.Rows(out, True, again)
        assert [kept.has(peer, "own defaults", name, 0) for name in "ABC"] == had
