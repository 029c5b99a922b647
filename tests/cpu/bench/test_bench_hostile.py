"""The checkpoints of bench/hostile.py as stock loads them, and what it concludes from what it sees."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pandas", reason="the bench's own packages are not installed")
from bench.models import checkpoints
from bench.proof import comparing, doctor, foreign, run, server, watching
from tests.cpu.conftest import REPOSITORY, warm

SMALL = checkpoints.Size(
    hidden=128,
    mlp=192,
    layers=2,
    experts=16,
    expert_width=64,
    heads=4,
    kv_sliding=2,
    kv_full=1,
    head_sliding=32,
    head_full=64,
    vocabulary=512,
)
SMALL_DENSE = SMALL._replace(experts=0)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def load(folder: Path, dtype: torch.dtype, quantisation: Any = None) -> tuple[Any, set[str]]:
    """Stock's model on the CPU with the checkpoint in it, and the parameters that it filled."""
    from sglang.srt.models.gemma4_causal import Gemma4ForCausalLM
    from sglang.srt.utils.hf_transformers import get_config

    from gemma4_turbo.cli import sglang_process

    sglang_process.prepare_sglang()
    config = get_config(str(folder), trust_remote_code=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # SGLang takes a CPU for one of its own only with AMX, and otherwise wants vLLM's kernel.
            patch.setattr("sglang.srt.layers.rotary_embedding.base._is_cpu", True)
            model = Gemma4ForCausalLM(config, quantisation)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan") if parameter.is_floating_point() else -1)
    return model, model.load_weights(iter(stored(folder).items()))


def test_stock_fills_every_parameter_of_the_moe_model(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        model, loaded = load(checkpoints.write_gemma(tmp_path, SMALL), torch.bfloat16)
    assert {name for name, _ in model.named_parameters()} <= loaded
    assert "not initialized" not in caplog.text
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    full = model.model.layers[-1].self_attn
    keys, values = full.qkv_proj.weight[-2 * full.kv_size :].split(full.kv_size)
    assert torch.equal(keys, values)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """AWQ's 4-bit numbers of a row, in order."""
    parts = torch.stack([(packed >> (4 * place)) & 15 for place in range(8)], dim=-1)
    order = torch.tensor(checkpoints.PACKED).argsort()
    return parts[..., order].reshape(len(packed), -1)


def test_awq_numbers_come_out_as_they_went_in():
    numbers = torch.randint(16, (64, 32), dtype=torch.int32)
    packed = checkpoints.pack_awq(numbers)
    assert packed.shape == (64, 4)
    assert packed.dtype == torch.int32
    assert torch.equal(unpacked(packed), numbers)


@pytest.mark.parametrize(
    ("size", "dtype"), [(SMALL, torch.float16), (SMALL_DENSE, torch.bfloat16)], ids=["moe", "dense"]
)
def test_stock_fills_every_parameter_of_the_awq_model(
    tmp_path: Path, size: checkpoints.Size, dtype: torch.dtype
) -> None:
    from sglang.srt.layers.quantization.awq.awq import AWQConfig

    folder = checkpoints.write_awq(tmp_path, size, str(dtype).removeprefix("torch."))
    quantisation = AWQConfig(4, checkpoints.GROUP, True)
    model, loaded = load(folder, dtype, quantisation)
    named = dict(model.named_parameters())
    assert set(named) <= loaded
    attention = model.model.layers[0].self_attn
    assert not hasattr(attention.qkv_proj, "weight")
    weights = stored(folder)
    name = "model.layers.0.self_attn.q_proj."
    inputs = weights[name + "qweight"].shape[0]
    zeros, scales = unpacked(weights[name + "qzeros"]), weights[name + "scales"]
    numbers = unpacked(weights[name + "qweight"]).float()
    grouped = numbers.view(len(scales), checkpoints.GROUP, -1) - zeros[:, None]
    dequantised = (grouped * scales[:, None].float()).view(inputs, -1)
    assert dequantised.std().item() == pytest.approx(inputs**-0.5, rel=0.1)
    assert torch.equal(attention.qkv_proj.qweight[:, :16], weights[name + "qweight"])


def test_the_real_sizes_are_what_stock_asks_for():
    config = checkpoints.gemma_config(checkpoints.MOE)
    assert (config["head_dim"], config["swa_head_dim"]) == (512, 256)
    assert config["layer_types"][-1] == "full_attention"
    for size in (checkpoints.MOE, checkpoints.DENSE):
        for outputs, inputs in checkpoints.gemma_linears(size).values():
            assert inputs % checkpoints.GROUP == outputs % 8 == 0
    for outputs, inputs in checkpoints.gemma_linears(checkpoints.DENSE).values():
        assert outputs % 64 == inputs % 128 == 0  # Marlin's


def answer(ids: list[int], gap: float = 1.0, shift: float = 0.0) -> dict[str, Any]:
    return {
        "ids": ids,
        "output": [float(-1 + shift).hex() for _ in ids],
        "top": [
            [[float(-1 + shift).hex(), token], [float(-1 + shift - gap).hex(), 99]] for token in ids
        ],
    }


def test_equal_answers_are_equal_bit_for_bit():
    found, told = comparing.compare([answer([1, 2, 3])], [answer([1, 2, 3])], 0.1)
    assert (found.tokens, found.equal, found.ties, found.wrong, found.bits) == (3, 3, 0, 0, True)
    assert (found.distance, told, str(found)) == (0.0, [], "3/3")


def test_logprobs_that_differ_are_told_by_their_distance():
    found, _ = comparing.compare([answer([1, 2])], [answer([1, 2], shift=0.25)], 0.1)
    assert (found.equal, found.wrong, found.bits, found.distance) == (2, 0, False, 0.25)


@pytest.mark.parametrize(("gap", "ties", "wrong"), [(0.05, 1, 0), (0.5, 0, 1)])
def test_a_difference_is_excused_only_where_stock_finds_both_as_good(
    gap: float, ties: int, wrong: int
) -> None:
    found, told = comparing.compare([answer([1, 2, 3], gap)], [answer([1, 99, 7])], 0.1)
    assert (found.tokens, found.equal, found.ties, found.wrong) == (3, 1, ties, wrong)
    assert "token 1 differs" in told[0]


def test_a_token_that_stock_does_not_think_of_is_wrong():
    assert comparing.compare([answer([1, 2], 0.0)], [answer([1, 5])], 9.0)[0].wrong == 1


def test_missing_answers_tokens_and_numbers_are_wrong():
    assert comparing.compare([answer([1]), answer([2])], [answer([1])], 0.1)[0].wrong == 1
    assert comparing.compare([answer([1, 2])], [answer([1])], 0.1)[0].wrong == 1
    assert comparing.compare([answer([1])], [answer([1], shift=float("nan"))], 0.1)[0].wrong == 1


def test_the_floor_is_the_farthest_batch():
    alone = [answer([1, 2]), answer([3, 4])]
    near, far = (
        [answer([1, 2]), answer([3, 4], shift=0.125)],
        [answer([1, 2], shift=0.5), answer([3, 9])],
    )
    found = comparing.farthest(alone, [*alone, *near, *far], 0.1)
    assert (found.distance, found.equal, found.bits) == (0.5, 3, False)
    assert found.mean == comparing.compare(alone, far, 0.1)[0].mean > 0.125
    assert found.wrong == comparing.compare(alone, far, 0.1)[0].wrong
    assert comparing.farthest(alone, alone, 0.1).bits


def test_the_batches_of_the_floor_are_those_of_other_graphs(monkeypatch):
    sent = []

    class Asked(server.TestedServer):
        def __init__(self):
            pass

        def at_once(self, prompts):
            sent.append(len(prompts))
            return [len(prompt) for prompt in prompts]

    assert Asked().crowds(1000) == list(server.LENGTHS) * len(server.CROWDS)
    assert sent == [2, 2, 2, 4, 4, 8, 12, 24]


def test_a_snapshot_sees_what_changed_and_opens_no_pipe(tmp_path: Path) -> None:
    folder, victim = tmp_path / "state", tmp_path / "victim"
    victim.write_text("mine")
    foreign.foreign_files(folder, victim, pids=20)
    before = watching.snapshot([folder])
    assert len(before) > 40
    (folder / "new.json").write_text("{}")
    assert watching.changes(before, watching.snapshot([folder])) == []
    (folder / "config.json").write_text("{}")
    (folder / "pipe.json").unlink()
    os.utime(folder / "notes.txt", ns=(1, 1))
    found = watching.changes(before, watching.snapshot([folder]))
    assert sorted(Path(line.split(":")[0]).name for line in found) == [
        "config.json",
        "notes.txt",
        "pipe.json",
    ]
    assert str(folder / "pipe.json") + ": gone" in found


def row(name: str, state: str, reason: str = "", engaged: int = 0) -> dict[str, Any]:
    return {"name": name, "state": state, "reason": reason, "engaged": engaged}


def test_the_process_that_runs_a_patch_speaks_for_it():
    found = doctor.merged(
        [
            {
                "command": "python -m sglang.launch_server",
                "patches": [row("a", "active"), row("b", "waiting")],
            },
            {
                "command": "sglang::scheduler",
                "patches": [row("a", "active", "", 7), row("b", "off", "x")],
            },
        ]
    )
    assert {r["name"]: (r["state"], r["engaged"]) for r in found} == {
        "a": ("active", 7),
        "b": ("off", 0),
    }


def test_reasons_are_told_once_and_short():
    rows = [row(name, "unsupported", "r" * 200) for name in "abcd"] + [row("e", "active")]
    assert doctor.by_state(rows) == "unsupported 4, active 1"
    (line,) = doctor.reasons(rows)
    assert line.startswith("unsupported: 4 patches: rrr")
    assert len(line) < 150


def test_patches_that_do_not_stand_aside_for_a_model_are_named():
    reason = "the model is a LlamaForCausalLM"
    rows = [
        row("a", "unsupported", reason),
        row("b", "off"),
        row("c", "active"),
        row("d", "unsupported"),
    ]
    assert [line[0] for line in doctor.not_aside(rows, "LlamaForCausalLM")] == ["c", "d"]


def test_slots_never_hold_more_than_there_are():
    slots = run.Slots(2)
    with slots.taken(5):
        assert slots.free == 0
    assert slots.free == 2


# Stands in for SGLang: answers at once, does what its plugins say, and lives as long as it is told.
FAKE = """
import hashlib, json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points

found = [entry.value for entry in entry_points(group="sglang.srt.plugins")]
assert "gemma4_turbo.plugin:register" in found, found
patched = os.environ.get("GEMMA4_TURBO") != "0"
if patched:
    print("[now] gemma4_turbo 0.1.0: installed: router; standing aside: none", flush=True)
spoil = os.environ.get("FAKE_SPOILS", "")
state = os.environ.get("GEMMA4_TURBO_STATE_DIR", "")


def answer(ids, new):
    digest = hashlib.sha256(str(ids).encode()).digest()
    tokens = [digest[i % 32] for i in range(new)]
    if patched and spoil == "tokens":
        tokens[3] += 1000
    best = [[-0.5, t, None] for t in tokens]
    return {
        "output_ids": tokens,
        "meta_info": {
            "prompt_tokens": len(ids),
            "output_token_logprobs": best,
            "output_top_logprobs": [[one, [-2.5, 7, None]] for one in best],
        },
    }


class Handler(BaseHTTPRequestHandler):
    def reply(self, found):
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        notes = os.path.join(state, "notes.txt")
        if patched and spoil == "files" and os.path.exists(notes):
            os.unlink(notes)
        self.reply({})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids, new = asked["input_ids"], asked["sampling_params"]["max_new_tokens"]
        self.reply(answer(ids, new) if isinstance(ids[0], int) else [answer(i, new) for i in ids])

    def log_message(self, *words):
        pass


if patched and spoil == "start":
    raise RuntimeError("no start")
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
RUN = """
import os
from bench import hostile
from bench.proof import run, server

run.write_models = lambda name, folder: folder.mkdir() or folder
hostile.SCENARIOS = (hostile.SCENARIOS[0]._replace(runs=os.environ["FAKE_RUNS"].split(",")),)
server.TestedServer.doctor = lambda server: {"servers": [], "problems": [], "exit_code": 0}
hostile.typer.run(hostile.main)
"""


@pytest.mark.server
# Every kind of run where all is well; of what is spoilt the one run that must say so.
@pytest.mark.parametrize(
    ("spoils", "runs", "said"),
    [
        ("", ["patched", "hostile folder", "taken folder"], "PASS: 0 of 3 failed"),
        ("tokens", ["patched"], "12 answer(s) differ from stock"),
        ("files", ["hostile folder"], "notes.txt: gone"),
        ("start", ["patched"], "RuntimeError: no start"),
    ],
)
def test_a_whole_run_with_a_stand_in_for_the_server(
    environment: dict[str, str], tmp_path: Path, spoils: str, runs: list[str], said: str
) -> None:
    package = tmp_path / "fake" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(FAKE)
    (tmp_path / "run.py").write_text(RUN)
    path = os.pathsep.join([str(package.parent), str(REPOSITORY)])
    out = tmp_path / "out"
    fake = {"FAKE_SPOILS": spoils, "FAKE_RUNS": ",".join(runs)}
    done = warm(environment).run(
        script=str(tmp_path / "run.py"),
        arguments=["--start-limit", "120", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **fake},
        cwd=str(tmp_path),
        timeout=300,
    )
    assert done.returncode == int(bool(spoils)), done.stdout + done.stderr
    assert said in done.stdout
    assert done.stdout.splitlines()[-1].startswith("FAIL" if spoils else "PASS")
    rows = json.loads((out / "rows.json").read_text())
    assert [row["run"] for row in rows] == runs
    if not spoils:
        assert [row["alone"]["equal"] for row in rows] == [192] * 3
        assert {row["verdict"] for row in rows} == {"PASS"}
    assert len(list(out.iterdir())) == 4
