"""One SGLang engine in a process of its own, told what to run by lines of JSON on stdin.

Started by ``engine.py``. Answers with one line of JSON per command on the original stdout; whatever
SGLang prints goes to the log file.
"""

from __future__ import annotations

import collections
import glob
import gzip
import json
import os
import random
import sys
import tempfile
import time
from typing import Any


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, the same for every engine."""
    source = random.Random(seed)
    return [[source.randrange(10, 250_000) for _ in range(length)] for _ in range(count)]


def mixed_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of 4 to 700 tokens."""
    source = random.Random(seed)
    return [prompts(1, source.randrange(4, 700), seed + i)[0] for i in range(count)]


class Worker:
    """The commands. All input ids of a call travel in one message, so batches are always the same."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        import sglang

        self.engine = sglang.Engine(**arguments)
        self.chunk = arguments["chunked_prefill_size"]

    def generate(self, ids: list[list[int]], new: int, **more: Any) -> list[dict[str, Any]]:
        """Greedy generation of exactly ``new`` tokens."""
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        return self.engine.generate(input_ids=ids, sampling_params=sampling, **more)  # type: ignore[no-any-return]

    def timed(self, ids: list[list[int]], new: int) -> float:
        """Seconds for one call."""
        started = time.perf_counter()
        self.generate(ids, new)
        return time.perf_counter() - started

    def decode(self, batch: int, length: int, seed: int) -> dict[str, float]:
        """ms per decode step: (time for 136 tokens - time for 8) / 128."""
        ids = prompts(batch, length, seed)
        short, long = self.timed(ids, 8), self.timed(ids, 136)
        return {"value": (long - short) / 128 * 1e3}

    def prefill(self, batch: int, length: int, seed: int) -> dict[str, float]:
        """ms for the first token of all prompts."""
        return {"value": self.timed(prompts(batch, length, seed), 1) * 1e3}

    def tokens(self, count: int, new: int, seed: int) -> dict[str, Any]:
        """Greedy tokens with every logprob, as float32 bits: prompt tail, output, five best."""
        ids = mixed_prompts(count, seed)
        answers = self.generate(
            ids,
            new,
            return_logprob=True,
            top_logprobs_num=5,
            logprob_start_len=[max(0, len(p) - 16) for p in ids],
        )
        rows = []
        for answer in answers:
            meta = answer["meta_info"]
            rows.append(
                {
                    "ids": answer["output_ids"],
                    "output": [exact(item[0]) for item in meta["output_token_logprobs"]],
                    "input": [exact(item[0]) for item in meta["input_token_logprobs"]],
                    "top": [
                        [[exact(value), token] for value, token, *_ in step]
                        for step in meta["output_top_logprobs"]
                    ],
                }
            )
        return {"rows": rows}

    def distribution(
        self, count: int, sample: int, seed: int, alone: bool
    ) -> dict[str, list[list[float]]]:
        """Logprobs of ``sample`` random tokens after the last 8 positions of prompts up to 6000 long.

        Together the prompts are cut into other chunks than ``alone``, one prompt at a time.
        """
        source = random.Random(seed)
        ids = [prompts(1, source.randrange(16, 6000), seed + i)[0] for i in range(count)]
        wanted = sorted(source.sample(range(10, 250_000), sample))
        answers = []
        for batch in [[one] for one in ids] if alone else [ids]:
            answers += self.generate(
                batch,
                1,
                return_logprob=True,
                token_ids_logprob=[wanted] * len(batch),
                logprob_start_len=[len(one) - 8 for one in batch],
            )
        rows = []
        for answer in answers:
            meta = answer["meta_info"]
            steps = [*meta["input_token_ids_logprobs"], *meta["output_token_ids_logprobs"]]
            # A prompt's first position has no distribution before it.
            rows.append([value for step in steps if step for value, *_ in step])
        return {"rows": rows}

    def update(self, suffix: str, size: int, layers: int, seed: int) -> dict[str, Any]:
        """Random numbers around one into ``model.layers.*.<suffix>`` of the running engine."""
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)
        named = [
            (
                f"model.layers.{layer}.{suffix}",
                (torch.rand(size, generator=generator, device="cuda") + 0.5).bfloat16(),
            )
            for layer in range(layers)
        ]
        done = self.engine.update_weights_from_tensor(named)
        return {"done": str(done)}

    def profile(self, batch: int, length: int, steps: int, seed: int) -> dict[str, Any]:
        """GPU kernels by stage: ``{stage: {"steps": n, "span_us": t, "kernels": {name: [count, us]}}}``.

        The span is from the first kernel's start to the last one's end.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.engine.start_profile(
                output_dir=folder,
                num_steps=steps,
                activities=["GPU"],
                with_stack=False,
                record_shapes=False,
                profile_by_stage=True,
            )
            self.generate(prompts(batch, length, seed), steps + 12)
            found: dict[str, Any] = {}
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and len(found) < 2:
                for path in glob.glob(f"{folder}/*.trace.json.gz"):
                    stage = "decode" if "DECODE" in path else "prefill"
                    try:
                        with gzip.open(path, "rt") as file:
                            events = json.load(file)["traceEvents"]
                    except (EOFError, ValueError, OSError):
                        continue  # still being written
                    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
                    begin, end = float("inf"), 0.0
                    for event in events:
                        if event.get("cat") == "kernel":
                            kernels[event["name"]][0] += 1
                            kernels[event["name"]][1] += event["dur"]
                            begin = min(begin, event["ts"])
                            end = max(end, event["ts"] + event["dur"])
                    chunks = -(-batch * length // self.chunk)
                    ran = steps if stage == "decode" else min(steps, chunks)
                    found[stage] = {"steps": ran, "kernels": kernels, "span_us": end - begin}
                time.sleep(0.5)
        return found

    def status(self) -> dict[str, Any]:
        """What the patches say of themselves in all processes of this engine."""
        from gemma4_turbo.counters import descendants

        return {
            "processes": [
                {"pid": process.pid, "command": process.command, "patches": process.patches}
                for process in descendants()
            ]
        }


def exact(value: float | None) -> str | None:
    """A float without loss."""
    return None if value is None else float(value).hex()


def main(kind: type[Worker] = Worker) -> None:
    """Serve commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    started = time.perf_counter()
    worker = kind(json.loads(sys.argv[2]))
    answers.write(json.dumps({"ready_s": time.perf_counter() - started}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(worker, command.pop("do"))(**command)
        answers.write(json.dumps(result) + "\n")
    worker.engine.shutdown()


if __name__ == "__main__":  # SGLang's spawned processes import this file again
    main()
