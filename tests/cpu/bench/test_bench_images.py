"""What the bench of pictures sends, compares, and does to random weights."""

from __future__ import annotations

import base64
import io
import math
import runpy
from typing import Any

import pytest
import torch

from gemma4_turbo.models import geometry_mm
from tests.cpu.conftest import REPOSITORY

images = pytest.importorskip("bench.images", reason="the bench's own packages are not installed")
pictures = pytest.importorskip("bench.common.pictures")


def test_a_picture_is_a_png_of_its_own():
    from PIL import Image

    urls = [pictures.picture(96, seed) for seed in range(3)]
    assert len(set(urls)) == 3
    assert pictures.picture(96, 1) == urls[1]
    header, _, data = urls[0].partition(",")
    assert header == "data:image/png;base64"
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (decoded.format, decoded.mode, decoded.size) == ("PNG", "RGB", (96, 96))


@pytest.mark.parametrize("count", [0, 1, 6])
def test_a_prompt_has_a_placeholder_for_each_of_its_images(count: int):
    body = images.prompt(count, 48, 7)
    assert body["text"].count(geometry_mm.IMAGE_TOKEN) == count
    assert len(set(body.get("image_data", []))) == count
    assert body == images.prompt(count, 48, 7)
    assert body["text"] != images.prompt(count, 48, 8)["text"]


def test_words_between_images():
    body = images.prompt(3, 48, 7, between=2)
    parts = body["text"].split(geometry_mm.IMAGE_TOKEN)
    assert [len(part.split()) for part in parts[1:-1]] == [2, 2]
    assert body["image_data"] == images.prompt(3, 48, 7)["image_data"]
    assert body["text"].split()[:32] == images.prompt(3, 48, 7)["text"].split()[:32]


def test_texts_of_all_lengths():
    bodies = pictures.letters(64, 4, 3000, 12)
    lengths = [len(body["text"]) for body in bodies]
    assert len(lengths) == 64
    assert (min(lengths), max(lengths)) == (4, 3000)
    assert all(set(body) == {"text"} for body in bodies)


@pytest.mark.parametrize(
    ("model", "layers", "patches", "added"),
    [
        ("e4b", 0, ["mm_prefill_graph"], True),
        ("e2b", 0, ["mm_prefill_graph"], True),
        ("e4b", 6, ["mm_prefill_graph"], False),  # the first layers alone share nothing
        ("26b-a4b", 0, ["mm_prefill_graph"], False),
        ("e4b", 0, ["optional_kv", "mm_prefill_graph"], False),
        ("e4b", 0, ["vision_rope"], False),
        ("e4b", 0, [], False),  # all that are on by default
    ],
)
def test_graphs_of_layers_that_share_kv_come_with_what_they_need(
    model: str, layers: int, patches: list[str], added: bool
):
    expected = [*patches, "optional_kv"] if added else patches
    assert images.with_needed(patches, model, layers) == expected


def answer(ids: list[int], logprobs: list[float]) -> dict[str, Any]:
    return {"ids": ids, "output": [value.hex() for value in logprobs]}


def test_distances_end_at_the_first_other_token():
    stock = [answer([1, 2, 3], [-1.0, -2.0, -3.0])]
    assert images.farthest(stock, stock) == 0.0
    assert images.farthest(stock, [answer([1, 2, 3], [-1.5, -2.0, -3.25])]) == 0.5
    assert images.farthest(stock, [answer([1, 9, 3], [-1.25, -9.0, -9.0])]) == 0.25


def test_random_weights_let_images_through(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BENCH_PATCHED", raising=False)
    site = runpy.run_path(str(REPOSITORY / "bench" / "site" / "sitecustomize.py"))
    expected = {
        "vision_tower.encoder.layers.0.mlp.gate_up.input_min": -math.inf,
        "vision_tower.encoder.layers.0.self_attn.qkv.q_output_max": math.inf,
        "language_model.layers.0.self_attn.q_norm.weight": 0.5 + 256**-0.25,
        "language_model.layers.0.input_layernorm.weight": 1.5,
        "language_model.layers.0.layer_scalar": 1.5,
        "vision_tower.std_scale": 1.5,
        "vision_tower.std_bias": 0.5,
        "language_model.layers.0.mlp.down_proj.weight": 0.5,
    }
    for name, value in expected.items():
        tensor = torch.full((256,), 0.5)
        site["_let_images_through"](name, tensor)
        assert torch.equal(tensor, torch.full((256,), value)), name
