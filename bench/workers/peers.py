"""One engine of ``peers.py`` in its own interpreter: SGLang, SGLang with the patches, or vLLM.

Imports the standard library and that engine's packages, nothing else: its environment need not have what
the benchmarks use. Told what to run by lines of JSON on stdin, answers with a line for each on the original
stdout; whatever the engine prints goes to the log file.

    {"do": "run", "requests": [{"ids": [...], "new": 100}, {"text": "...", "images": [...], "new": 16}]}
    {"do": "report"}
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import importlib.metadata
import inspect
import io
import json
import os
import sys
import time
import traceback
from collections.abc import AsyncIterator
from typing import Any

DECIDING = (  # of what an engine resolved its arguments to
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "mm_attention_backend",
    "sampling_backend",
    "moe_runner_backend",
    "chunked_prefill_size",
    "mem_fraction_static",
    "max_running_requests",
    "max_total_num_tokens",
    "disable_radix_cache",
    "cuda_graph_backend_prefill",
    "cuda_graph_backend_decode",
    "disable_piecewise_cuda_graph",
    "disable_prefill_cuda_graph",
    "speculative_algorithm",
)
OF_VLLM = (
    ("scheduler_config", "max_num_batched_tokens"),
    ("scheduler_config", "max_num_seqs"),
    ("cache_config", "gpu_memory_utilization"),
    ("cache_config", "enable_prefix_caching"),
    ("cache_config", "num_gpu_blocks"),
    ("compilation_config", "cudagraph_mode"),
)
DRAFTS = "vllm:spec_decode_num_drafts"


class SGLang:
    """``sglang.Engine``. Its streams tell how many tokens there are so far."""

    def __init__(self, arguments: dict[str, Any], renamed: dict[str, str]) -> None:
        import sglang
        from sglang.srt.server_args import ServerArgs

        known = inspect.signature(ServerArgs).parameters
        self.engine = sglang.Engine(**named_here(arguments, known, renamed))
        self.loop = self.engine.loop
        self.version = sglang.__version__

    def resolved(self) -> dict[str, Any]:
        """What the engine made of its arguments."""
        found = self.engine.get_server_info()
        return {name: found[name] for name in DECIDING if found.get(name) is not None}

    async def stream(self, request: dict[str, Any], number: int) -> AsyncIterator[dict[str, int]]:
        """Tokens so far, those of the prompt, and verify steps, as often as the engine tells."""
        given: dict[str, Any] = {"input_ids": request.get("ids"), "prompt": request.get("text")}
        if request.get("images"):
            given["image_data"] = request["images"]
        sampling = {"temperature": 0, "max_new_tokens": request["new"], "ignore_eos": True}
        given = {name: value for name, value in given.items() if value is not None}
        chunks = await self.engine.async_generate(sampling_params=sampling, stream=True, **given)
        async for chunk in chunks:
            meta = chunk["meta_info"]
            reason = meta.get("finish_reason") or {}
            if reason.get("type") == "abort":
                raise RuntimeError(f"request aborted: {reason.get('message')}")
            yield {
                "tokens": meta["completion_tokens"],
                "prompt": meta["prompt_tokens"],
                "steps": meta.get("spec_verify_ct") or 0,
            }

    def steps(self) -> int:
        """Verify steps of all requests so far; the streams tell them."""
        return 0

    def stop(self) -> None:
        """End the engine's processes."""
        self.engine.shutdown()


class Vllm:
    """``AsyncLLM``, as vLLM's own server makes it."""

    def __init__(self, arguments: dict[str, Any], renamed: dict[str, str]) -> None:
        import vllm
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        self.sampling, self.delta = SamplingParams, RequestOutputKind.DELTA
        self.loop = new_loop()
        # Without this context vLLM takes chunks of 2048 tokens, which no user of its server has.
        context = UsageContext.OPENAI_API_SERVER
        known = inspect.signature(AsyncEngineArgs).parameters
        found = AsyncEngineArgs(**named_here(arguments, known, renamed))

        async def made() -> Any:
            return AsyncLLM.from_engine_args(found, usage_context=context)

        self.engine = self.loop.run_until_complete(made())
        self.version = vllm.__version__
        self.given = 0

    def resolved(self) -> dict[str, Any]:
        """What the engine made of its arguments."""
        found, config = {}, getattr(self.engine, "vllm_config", None)
        for part, name in OF_VLLM:
            value = getattr(getattr(config, part, None), name, None)
            if value is not None:
                plain = isinstance(value, (bool, int, float, str))
                found[name] = value if plain else str(value)
        return found

    async def stream(self, request: dict[str, Any], number: int) -> AsyncIterator[dict[str, int]]:
        """Tokens so far and those of the prompt, as often as the engine tells."""
        if "ids" in request:
            prompt: dict[str, Any] = {"prompt_token_ids": request["ids"]}
        else:
            prompt = {"prompt": request["text"]}
        if request.get("images"):
            # In threads, as both servers do: the requests after this one wait for nothing.
            images = [asyncio.to_thread(opened, url) for url in request["images"]]
            prompt["multi_modal_data"] = {"image": await asyncio.gather(*images)}
        sampling = self.sampling(
            temperature=0,
            max_tokens=request["new"],
            ignore_eos=True,
            detokenize="ids" not in request,
            output_kind=self.delta,
        )
        self.given += 1
        tokens, length = 0, len(request.get("ids", ()))
        async for answer in self.engine.generate(prompt, sampling, str(self.given)):
            tokens += len(answer.outputs[0].token_ids)
            length = len(answer.prompt_token_ids or ()) or length
            yield {"tokens": tokens, "prompt": length, "steps": 0}

    def steps(self) -> int:
        """Verify steps of all requests so far, 0 where vLLM does not tell."""
        try:
            metrics = importlib.import_module("vllm.v1.metrics.reader").get_metrics_snapshot()
        except Exception:  # another release, or no statistics
            return 0
        return sum(int(metric.value) for metric in metrics if metric.name == DRAFTS)

    def stop(self) -> None:
        """End the engine's processes."""
        self.engine.shutdown()


KINDS = {"sglang": SGLang, "ours": SGLang, "vllm": Vllm}


def named_here(arguments: dict[str, Any], known: Any, renamed: dict[str, str]) -> dict[str, Any]:
    """The arguments under the names that this release knows; ValueError for one that has none."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        here = name if name in known else renamed.get(name)
        if here is None or here not in known:
            raise ValueError(f"this engine has no argument {name}")
        found[here] = value
    return found


def new_loop() -> asyncio.AbstractEventLoop:
    """As both servers have it, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def opened(url: str) -> Any:
    """The image of a data URL."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


async def one(engine: Any, request: dict[str, Any], number: int, begun: float) -> dict[str, Any]:
    """A request and its times, in seconds since ``begun``."""
    row: dict[str, Any] = {"sent": time.perf_counter() - begun, "first": None, "tokens": 0}
    async for told in engine.stream(request, number):
        now = time.perf_counter() - begun
        if told["tokens"] > row["tokens"]:
            row["first"] = now if row["first"] is None else row["first"]
            row |= {**told, "last": now}
        row["steps"] = told["steps"]
    return row


async def everything(engine: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All requests at once."""
    begun = time.perf_counter()
    tasks = [one(engine, request, number, begun) for number, request in enumerate(requests)]
    return await asyncio.gather(*tasks)


def run(engine: Any, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """The times of each request, and the verify steps of all."""
    before = engine.steps()
    rows = engine.loop.run_until_complete(everything(engine, requests))
    steps = sum(row["steps"] for row in rows) or engine.steps() - before
    return {"requests": rows, "steps": steps}


def report() -> dict[str, Any]:
    """What the patches say of themselves in the processes below this one: names by what they did."""
    from gemma4_turbo.engine.counters import descendants

    found: dict[str, set[str]] = {"engaged": set(), "silent": set(), "failed": set()}
    for process in descendants():
        for row in process.patches:
            if row["state"] == "failed":
                found["failed"].add(row["name"])
            elif row["state"] == "active":
                found["engaged" if row["engaged"] else "silent"].add(row["name"])
    found["silent"] -= found["engaged"] | found["failed"]
    return {name: sorted(names) for name, names in found.items()}


def version(package: str) -> str | None:
    """Of an installed package, or of one that only lies on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def about(engine: Any, kind: str, ready_s: float) -> dict[str, Any]:
    """What a row says of its engine."""
    return {
        "ready_s": ready_s,
        "version": engine.version,
        "torch": version("torch"),
        "triton": version("triton"),
        "python": ".".join(map(str, sys.version_info[:3])),
        "resolved": engine.resolved(),
        "gemma4_turbo": version("gemma4_turbo") if kind == "ours" else None,
    }


def main() -> None:
    """Serve commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    given = json.loads(sys.argv[2])

    def answer(do: Any) -> bool:
        try:
            found = do()
        except Exception as error:  # told to the other end
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(found, default=str) + "\n")
        return "error" not in found

    engine: Any = None

    def start() -> dict[str, Any]:
        nonlocal engine
        started = time.perf_counter()
        engine = KINDS[given["kind"]](given["arguments"], given["renamed"])
        return about(engine, given["kind"], time.perf_counter() - started)

    if answer(start):
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "run":
                answer(lambda asked=command["requests"]: run(engine, asked))
            else:
                answer(report if given["kind"] == "ours" else dict)
        engine.stop()


if __name__ == "__main__":  # spawned processes import this file again
    main()
