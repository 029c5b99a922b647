"""One SGLang engine in a process of its own, told what to run by lines of JSON on stdin.

Started by ``engine.py``. Answers with one line of JSON per command on the original stdout; whatever
SGLang prints goes to the log file.
"""

from __future__ import annotations

import asyncio
import collections
import glob
import gzip
import inspect
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from typing import Any

from gemma4_turbo.cli.arguments import RENAMED


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, the same for every engine."""
    source = random.Random(seed)
    return [[source.randrange(10, 250_000) for _ in range(length)] for _ in range(count)]


def mixed_prompts(count: int, seed: int, longest: int = 700) -> list[list[int]]:
    """Prompts of 4 to ``longest`` tokens, both among them where there are two."""
    source = random.Random(seed)
    lengths = [source.randrange(4, longest) for _ in range(count)]
    if longest != 700:  # recorded comparisons are of these prompts
        lengths[:2] = [4, longest][:count]
    return [prompts(1, length, seed + i)[0] for i, length in enumerate(lengths)]


def soak_requests(
    count: int, shortest: int, longest: int, new: int, seed: int
) -> list[dict[str, Any]]:
    """Prompts of many lengths, four at a time with the same beginning; every eighth is aborted.

    ``leave`` is the piece of the answer after which the request is aborted, 0: never.
    """
    source = random.Random(seed)
    requests = []
    for index in range(count):
        length = source.randrange(shortest, longest + 1)
        shared = prompts(1, shortest // 2, seed + index // 4)[0]
        requests.append(
            {
                "ids": shared + prompts(1, length - len(shared), seed + 1000 + index)[0],
                "new": source.randrange(new // 2, new + 1),
                "after": source.random() * 2,
                "leave": source.randrange(1, new // 2) if index % 8 == 7 else 0,
                "rid": f"{seed}-{index}-{source.getrandbits(32):x}",
            }
        )
    return requests


def named_here(arguments: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The arguments under the names that this SGLang knows; ValueError for one that has none."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        here = name if name in known else RENAMED.get(name)
        if here is None or here not in known:
            raise ValueError(f"SGLang has no argument {name}")
        found[here] = value
    return found


class Worker:
    """The commands. All input ids of a call travel in one message, so batches are always the same."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        import sglang
        from sglang.srt.server_args import ServerArgs

        known = inspect.signature(ServerArgs).parameters
        self.engine = sglang.Engine(**named_here(arguments, known))
        self.chunk = arguments["chunked_prefill_size"]

    def generate(self, ids: list[list[int]], new: int, **more: Any) -> list[dict[str, Any]]:
        """Greedy generation of exactly ``new`` tokens."""
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        answers: list[dict[str, Any]] = self.engine.generate(
            input_ids=ids, sampling_params=sampling, **more
        )
        return answers

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

    def prefill(self, batch: int, length: int, seed: int, new: int) -> dict[str, float]:
        """ms for the first ``new`` tokens of all prompts."""
        return {"value": self.timed(prompts(batch, length, seed), new) * 1e3}

    def tokens(
        self, count: int, new: int, seed: int, tail: int = 16, longest: int = 700
    ) -> dict[str, Any]:
        """Greedy tokens with every logprob, as float32 bits: ``tail`` of the prompt, output, five best."""
        ids = mixed_prompts(count, seed, longest)
        answers = self.generate(
            ids,
            new,
            return_logprob=True,
            top_logprobs_num=5,
            logprob_start_len=[max(0, len(p) - tail) if tail else -1 for p in ids],
        )
        rows = []
        for answer in answers:
            meta = answer["meta_info"]
            rows.append(
                {
                    "ids": answer["output_ids"],
                    "output": [exact(item[0]) for item in meta["output_token_logprobs"]],
                    "input": [exact(item[0]) for item in meta["input_token_logprobs"] or []],
                    "top": [
                        [[exact(value), token] for value, token, *_ in step]
                        for step in meta["output_top_logprobs"]
                    ],
                }
            )
        return {"rows": rows}

    def distribution(
        self, count: int, sample: int, seed: int, alone: bool, tail: int = 8, new: int = 1
    ) -> dict[str, list[dict[str, Any]]]:
        """Logprobs of ``sample`` random tokens at the end of prompts up to 6000 long.

        Per prompt: those after its last ``tail`` positions but one, of the ``new`` generated tokens, and
        these tokens. Together the prompts are cut into other chunks than ``alone``, one at a time.
        """
        source = random.Random(seed)
        ids = [prompts(1, source.randrange(16, 6000), seed + i)[0] for i in range(count)]
        wanted = sorted(source.sample(range(10, 250_000), sample))
        answers = []
        for batch in [[one] for one in ids] if alone else [ids]:
            answers += self.generate(
                batch,
                new,
                return_logprob=True,
                token_ids_logprob=[wanted] * len(batch),
                logprob_start_len=[len(one) - tail if tail else -1 for one in batch],
            )
        rows = []
        for answer in answers:
            meta = answer["meta_info"]
            # A prompt's first position has no distribution before it.
            before = [step for step in meta.get("input_token_ids_logprobs") or [] if step]
            row = {"ids": answer["output_ids"]}
            for name, steps in (("before", before), ("after", meta["output_token_ids_logprobs"])):
                row[name] = [[value for value, *_ in step] for step in steps]
            rows.append(row)
        return {"rows": rows}

    def soak(self, **asked: int) -> dict[str, Any]:
        """Requests that come and leave at odd times; see ``soak_requests``."""
        requests = soak_requests(**asked)

        async def one(request: dict[str, Any]) -> dict[str, Any]:
            await asyncio.sleep(request["after"])
            sampling = {"temperature": 0, "max_new_tokens": request["new"], "ignore_eos": True}
            stream = await self.engine.async_generate(
                input_ids=request["ids"],
                sampling_params=sampling,
                return_logprob=True,
                stream=True,
                rid=request["rid"],
            )
            answer: dict[str, Any] = {}
            pieces = 0
            async for piece in stream:
                answer, pieces = piece, pieces + 1
                if pieces == request["leave"]:
                    self.engine.tokenizer_manager.abort_request(rid=request["rid"])
            meta = answer["meta_info"]
            output = [exact(item[0]) for item in meta["output_token_logprobs"]]
            left = (meta.get("finish_reason") or {}).get("type") == "abort"
            return {"ids": answer["output_ids"], "output": output, "left": left}

        async def every() -> list[dict[str, Any]]:
            return await asyncio.gather(*(one(request) for request in requests))

        started = time.perf_counter()
        rows = self.engine.loop.run_until_complete(every())
        return {"rows": rows, "seconds": time.perf_counter() - started}

    def soak_alone(self, only: int, **asked: int) -> dict[str, Any]:
        """The first ``only`` of those requests that are not aborted, one at a time."""
        stay = [(i, r) for i, r in enumerate(soak_requests(**asked)) if not r["leave"]]
        rows = {}
        for index, request in stay[:only]:
            (answer,) = self.generate([request["ids"]], request["new"], return_logprob=True)
            output = [exact(item[0]) for item in answer["meta_info"]["output_token_logprobs"]]
            rows[str(index)] = {"ids": answer["output_ids"], "output": output, "left": False}
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
        found: dict[str, Any] = {}
        for stage, events in self.traces(prompts(batch, length, seed), steps):
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
        return found

    def traces(
        self, ids: list[list[int]], steps: int
    ) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Generate with a profiler on: so many steps of each stage; its name and events, once written.

        Of several GPUs the first one's. A sum over them is as long as it waits for the others.
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
            self.generate(ids, steps + 12)
            told: set[str] = set()
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and len(told) < 2:
                for path in glob.glob(f"{folder}/*TP-0*.trace.json.gz"):
                    stage = "decode" if "DECODE" in path else "prefill"
                    events = None if stage in told else events_of(path)
                    if events is not None:
                        told.add(stage)
                        yield stage, events
                time.sleep(0.5)

    def busy(self, batch: int, length: int, seed: int, steps: int = 32) -> dict[str, float | None]:
        """ms that the CUDA graph of a decode step takes on the GPU, the median of so many steps.

        However late the host starts it: from its first kernel to the end of its last. None without a graph.
        """
        for stage, events in self.traces(prompts(batch, length, seed), steps):
            if stage == "decode":
                found = replays(events)
                return {"value": statistics.median(found) / 1e3 if found else None}
        return {"value": None}

    def status(self) -> dict[str, Any]:
        """What the patches say of themselves in all processes of this engine."""
        from gemma4_turbo.engine.counters import descendants

        return {
            "processes": [
                {"pid": process.pid, "command": process.command, "patches": process.patches}
                for process in descendants()
            ]
        }


def events_of(path: str) -> list[dict[str, Any]] | None:
    """Of a profiler's trace; None while it is being written."""
    try:
        with gzip.open(path, "rt") as file:
            events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    except (EOFError, ValueError, OSError):
        return None
    return events


ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def replays(events: list[dict[str, Any]]) -> list[float]:
    """Microseconds of each replay of a trace's largest CUDA graph, first start to last end.

    What one call of the host's has started has that call's number: all of a graph, or a single kernel.
    """
    calls: dict[int, list[tuple[float, float]]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") in ON_GPU:
            span = (event["ts"], event["ts"] + event["dur"])
            calls[event["args"]["correlation"]].append(span)
    most = max(map(len, calls.values()), default=0)
    return [
        max(end for _, end in spans) - min(begin for begin, _ in spans)
        for spans in calls.values()
        if len(spans) == most > 1
    ]


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
