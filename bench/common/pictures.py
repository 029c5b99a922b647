"""Requests with pictures to SGLang's real server, and its answers."""

from __future__ import annotations

import base64
import io
import json
import random
import string
import time
from typing import Any

from bench.common.servers import Server
from gemma4_turbo.models import geometry_mm

WORDS = 40  # of a prompt, beside its images


def picture(side: int, seed: int) -> str:
    """A PNG of coloured blocks as a data URL."""
    from PIL import Image

    source = random.Random(seed)
    blocks = Image.frombytes("RGB", (12, 12), source.randbytes(12 * 12 * 3))
    file = io.BytesIO()
    blocks.resize((side, side), Image.Resampling.NEAREST).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def prompt(images: int, side: int, seed: int, between: int = 0) -> dict[str, Any]:
    """The body of a request: words, images between them, words.

    Args:
        images: how many.
        side: of an image, in pixels.
        seed: of words and images.
        between: words behind each image; 0: one image follows the other.
    """
    source = random.Random(seed)

    def words(count: int) -> list[str]:
        return [
            "".join(source.choices(string.ascii_lowercase, k=source.randrange(2, 9)))
            for _ in range(count)
        ]

    around = words(WORDS)
    within = "".join(
        " ".join([f"\n{geometry_mm.IMAGE_TOKEN}", *words(between)]) for _ in range(images)
    )
    text = f"{' '.join(around[:-8])}{within} {' '.join(around[-8:])}"
    body: dict[str, Any] = {"text": f"<bos><|turn>user\n{text}<turn|>\n<|turn>model\n"}
    if images:
        body["image_data"] = [picture(side, seed * 1000 + i) for i in range(images)]
    return body


def letters(count: int, shortest: int, longest: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of text alone, of so many letters, the shortest and the longest among them.

    A generated tokenizer makes a token of each.
    """
    source = random.Random(seed)
    lengths = [shortest, longest] + [source.randint(shortest, longest) for _ in range(count)]
    return [
        {"text": "".join(source.choices(string.ascii_lowercase, k=length))}
        for length in lengths[:count]
    ]


def sampling(new: int) -> dict[str, Any]:
    """Greedy, exactly ``new`` tokens."""
    return {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}


def as_row(found: dict[str, Any]) -> dict[str, Any]:
    """The tokens of an answer, with their logprobs as float32 bits."""
    meta = found["meta_info"]
    return {
        "ids": found["output_ids"],
        "prompt": meta["prompt_tokens"],
        "input": [],
        "output": [float(item[0]).hex() for item in meta["output_token_logprobs"]],
        "top": [
            [[float(value).hex(), token] for value, token, *_ in step]
            for step in meta["output_top_logprobs"]
        ],
    }


class ImageServer(Server):
    """With the requests of this benchmark."""

    def first_token(self, body: dict[str, Any], new: int) -> float:
        """Seconds to the first of ``new`` tokens; returns when the last is there."""
        started = time.perf_counter()
        first = 0.0
        with self.post(
            "/generate", {**body, "sampling_params": sampling(new), "stream": True}
        ) as answer:
            for line in answer:
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    if b'"error"' in line:
                        raise RuntimeError(line.decode())
                    first = first or time.perf_counter() - started
        if not first:
            raise RuntimeError(f"the {self.variant} server sent no token: {self.log}")
        return first

    def tokens(self, body: dict[str, Any], new: int) -> dict[str, Any]:
        """Greedy tokens with their logprobs as float32 bits."""
        options = {"return_logprob": True, "top_logprobs_num": 5}
        with self.post(
            "/generate", {**body, "sampling_params": sampling(new), **options}
        ) as answer:
            return as_row(json.loads(answer.read()))

    def chat(self, side: int) -> str:
        """An image through the chat endpoint and the chat template; what came back."""
        content = [
            {"type": "image_url", "image_url": {"url": picture(side, 1)}},
            {"type": "text", "text": "what is this?"},
        ]
        body = {"model": "default", "messages": [{"role": "user", "content": content}]}
        with self.post(
            "/v1/chat/completions", {**body, "max_tokens": 4, "temperature": 0}
        ) as answer:
            found = json.loads(answer.read())
        usage = found["usage"]
        return f"{usage['prompt_tokens']} tokens of prompt, {usage['completion_tokens']} back"
