"""The engine of ``mtp.py`` in a process of its own: `bench.workers.engine` with commands for speculation."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.workers.engine import ON_GPU, Worker, events_of, main, prompts

PARTS = ("mtp draft", "mtp verify", "mtp seed")
OTHER = "other"
LAUNCHES = ("Launch", "Memcpy", "Memset")  # in the names of the host's calls that start something


class MtpWorker(Worker):
    """The commands."""

    def greedy(
        self, ids: list[list[int]], new: int, batch: int, margins: bool = False
    ) -> dict[str, Any]:
        """Greedy tokens in batches of so many prompts, and the verify steps that they took.

        With ``margins`` also how far apart the two best logprobs of each token were, and the second.
        """
        more = {"return_logprob": True, "top_logprobs_num": 2} if margins else {}
        rows = []
        for begin in range(0, len(ids), batch):
            for answer in self.generate(ids[begin : begin + batch], new, **more):
                meta = answer["meta_info"]
                row = {"ids": answer["output_ids"], "verified": meta.get("spec_verify_ct", 0)}
                if margins:
                    best = [step[:2] for step in meta["output_top_logprobs"]]
                    row["margins"] = [one[0] - two[0] for one, two in best]
                    row["seconds"] = [two[1] for _, two in best]
                rows.append(row)
        return {"rows": rows}

    def step(self, ids: list[list[int]], new: int) -> dict[str, float]:
        """Seconds, verify steps and tokens of ``new`` tokens less those of 8: decoding alone."""
        taken = []
        for count in (8, 8 + new):
            started = time.perf_counter()
            answers = self.generate(ids, count)
            seconds = time.perf_counter() - started
            verified = max(answer["meta_info"].get("spec_verify_ct", 0) for answer in answers)
            taken.append((seconds, verified or count))
        (short, few), (long, many) = taken
        return {"seconds": long - short, "steps": many - few, "tokens": new * len(ids)}

    def split(self, ids: list[list[int]], steps: int) -> dict[str, Any]:
        """What a speculative step does in each of its parts, from a profiler's trace."""
        with tempfile.TemporaryDirectory() as folder:
            self.engine.start_profile(
                output_dir=folder,
                num_steps=steps,
                activities=["CPU", "GPU"],
                with_stack=False,
                record_shapes=False,
                profile_by_stage=True,
            )
            self.generate(ids, 4 * (steps + 4))  # a verify step brings up to four tokens
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                for path in Path(folder).glob("*DECODE*.trace.json.gz"):
                    events = events_of(str(path))
                    if events is not None:
                        return {"parts": parts(events)}
                time.sleep(0.5)
        return {"parts": {}}

    def stress(self, count: int, limit_s: float, seed: int, words: bool) -> dict[str, Any]:
        """Many requests at once: mixed lengths, groups that end together, others aborted.

        Of each: the last token of its prompt, and the tokens that came.

        A process whose scheduler dies is ended by SGLang: this call then has no answer.
        """
        source = random.Random(seed)
        manager = self.engine.tokenizer_manager
        rows: list[dict[str, Any]] = []

        async def one(i: int) -> str:
            length = source.choice((3, 40, 200, 900))
            (ids,) = prompts(1, length, seed + i)
            ids = [2 * (token // 2) for token in ids] if words else ids
            left_early, left_at_once = i % 13 == 5, i % 13 == 9
            new = 400 if left_early or left_at_once else 2 + i // 8 % 7
            sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
            name, last = f"stress-{seed}-{i}", {}
            row: dict[str, Any] = {"last": ids[-1], "tokens": []}
            rows.append(row)
            stream = await self.engine.async_generate(
                input_ids=ids, sampling_params=sampling, stream=True, rid=name
            )
            if left_at_once:
                asyncio.get_running_loop().call_later(0.02, manager.abort_request, name)
            async for chunk in stream:
                last, told = chunk["meta_info"], chunk["output_ids"]
                # All so far, or, in some releases and settings, those that are new.
                whole = len(told) == last["completion_tokens"]
                row["tokens"] = list(told) if whole else [*row["tokens"], *told]
                if left_early:
                    manager.abort_request(name)
            reason = (last.get("finish_reason") or {}).get("type", "unfinished")
            complete = reason == "abort" or last.get("completion_tokens") == new
            return str(reason) if complete else "too few tokens"

        async def everything() -> Counter[str]:
            tasks = [asyncio.create_task(one(i)) for i in range(count)]
            done, late = await asyncio.wait(tasks, timeout=limit_s)
            for task in late:
                task.cancel()
            ended = Counter(
                f"{type(task.exception()).__name__}: {task.exception()}"[:200]
                if task.exception()
                else task.result()
                for task in done
            )
            if late:
                ended["late"] = len(late)
            return ended

        started = time.perf_counter()
        ended = self.engine.loop.run_until_complete(everything())
        return {"ended": dict(ended), "seconds": time.perf_counter() - started, "rows": rows}


def parts(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Sums of a trace by part: steps, GPU microseconds, kernels, host calls and microseconds.

    What runs on the GPU belongs to the part in which the host started it. Where kernels overlap (with
    programmatic dependent launch each waits for the one before it, already on the GPU) time counts once.
    """
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("cat") == "user_annotation" and event.get("name") in PARTS
    )
    found = {
        name: {"steps": 0, "gpu_us": 0.0, "kernels": 0, "launches": 0, "host_us": 0.0}
        for name in (*PARTS, OTHER)
    }
    for begin, end, name in ranges:
        found[name]["steps"] += 1
        found[name]["host_us"] += end - begin
    found[OTHER]["steps"] = found[PARTS[1]]["steps"]

    def part_at(moment: float) -> str:
        return next((name for begin, end, name in ranges if begin <= moment <= end), OTHER)

    started: dict[int, str] = {}
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            part = part_at(event["ts"])
            started[event.get("args", {}).get("correlation", -1)] = part
            found[part]["launches"] += any(word in event["name"] for word in LAUNCHES)
    running: dict[str, list[tuple[float, float]]] = {part: [] for part in found}
    for event in events:
        if event.get("cat") in ON_GPU:
            part = started.get(event.get("args", {}).get("correlation", -2), OTHER)
            running[part].append((event["ts"], event["ts"] + event["dur"]))
            found[part]["kernels"] += 1
    for part, intervals in running.items():
        found[part]["gpu_us"] = covered(intervals)
    return found


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":  # SGLang's spawned processes import this file again
    main(MtpWorker)
