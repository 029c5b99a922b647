"""The generated multimodal folder: HF's processor, SGLang's own on top of it, and the tokenizer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma4_turbo.models import geometry, geometry_mm

IMAGE = geometry_mm.SPECIAL_TOKENS[geometry_mm.IMAGE_TOKEN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return geometry_mm.write_model(tmp_path_factory.mktemp("model") / "mm", "26b-a4b", 6)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    from sglang.srt.utils.hf_transformers_utils import get_processor

    return get_processor(str(folder))


def picture(width: int, height: int) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 9)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def known(name: str) -> None:
    """Skips where transformers does not know the model: of 0.5.12.post1 the 12B."""
    if name in geometry_mm.UNIFIED:
        pytest.importorskip("transformers.models.gemma4_unified")


@pytest.mark.parametrize("name", geometry_mm.MODELS)
def test_sglang_reads_the_geometry(tmp_path: Path, name: str):
    """Through its own reader, which swaps the attention's fields: as the text-only config has it."""
    known(name)
    from sglang.srt.utils.hf_transformers_utils import get_config

    model = geometry_mm.write_model(tmp_path, name)
    read = get_config(str(model), trust_remote_code=False)
    expected = geometry.config(name)
    for field in (
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "v_head_dim",
        "swa_num_key_value_heads",
        "swa_head_dim",
        "swa_v_head_dim",
        "num_kv_shared_layers",
        "sliding_window",
        "layer_types",
        "hidden_size",
    ):
        assert getattr(read.text_config, field) == expected[field], field
    assert bool(read.text_config.num_experts) == bool(geometry.GEOMETRIES[name].experts)
    assert read.audio_config is None
    assert read.image_token_id == IMAGE
    if name in geometry_mm.UNIFIED:
        assert read.architectures == ["Gemma4UnifiedForConditionalGeneration"]
        return
    assert read.architectures == ["Gemma4ForConditionalGeneration"]
    vision = geometry_mm.VISION[name]
    assert read.vision_config.hidden_size == vision.hidden == vision.heads * vision.head_dim


def test_sglang_projects_patches_as_wide_as_the_12bs(tmp_path: Path):
    """Its own module, made of what it read of the folder, on what its image processor makes."""
    known("12b")
    import torch
    from PIL import Image
    from sglang.srt.models.gemma4_unified import Gemma4UnifiedVisionEmbedder
    from sglang.srt.utils.hf_transformers_utils import get_config, get_processor

    model = geometry_mm.write_model(tmp_path, "12b")
    read, processor = get_config(str(model), trust_remote_code=False), get_processor(str(model))
    image = Image.new("RGB", (480, 480), (200, 9, 9))
    made = processor.image_processor([image], return_tensors="pt")
    places = made["image_position_ids"]
    with torch.no_grad():
        out = Gemma4UnifiedVisionEmbedder(read.vision_config)(made["pixel_values"], places)
    assert out.shape == (1, 280, geometry.GEOMETRIES["12b"].hidden)
    assert int((places >= 0).all(dim=-1).sum()) == 256  # of at most 280 tokens, a square's
    assert int(places.max()) < geometry_mm.UNIFIED["12b"].positions
    text = processor(text="see <|image|>", images=[image], return_tensors="pt")
    assert int((text.input_ids == IMAGE).sum()) == 256


def test_sizes_are_named():
    assert set(geometry_mm.MODELS) == set(geometry.GEOMETRIES)
    with pytest.raises(ValueError, match="name must be one of 26b-a4b"):
        geometry_mm.config("27b")


def test_the_vocabulary_has_no_gap_and_no_token_twice():
    vocabulary = geometry_mm.vocabulary()
    assert sorted(vocabulary.values()) == list(range(geometry.VOCABULARY))


def test_the_tokenizer(processor: Any):
    tokenizer = processor.tokenizer
    assert len(tokenizer) == geometry.VOCABULARY
    for token, number in geometry_mm.SPECIAL_TOKENS.items():
        assert tokenizer.convert_tokens_to_ids(token) == number
        assert tokenizer(token).input_ids == [number]
    text = "Which of these two is older?\nThe \u00e9tude, 1835."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([5, 4321]) == " t5 t4321"


def test_the_chat_template(processor: Any):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "this"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<bos><|turn>user\n<|image|>what?<turn|>\n<|turn>model\nthis<turn|>\n<|turn>model\n"
    )


@contextlib.contextmanager
def server_arguments(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's, as the installed release publishes them."""
    from sglang.srt import server_args

    given = {"device": "cpu", "mm_process_config": {}}
    if hasattr(server_args.ServerArgs, "resolve_once"):  # from 0.5.22 on
        from sglang.srt.runtime_context import get_context

        with get_context().override_server_args(**given) as published:
            yield published
        return
    arguments = server_args.ServerArgs(model_path="dummy", keep_mm_feature_on_device=False, **given)
    patch.setattr(server_args, "_global_server_args", arguments)
    yield arguments


@pytest.fixture(scope="module")
def sglang_processor(folder: Path, processor: Any) -> Iterator[Any]:
    """SGLang's own multimodal processor; nothing of the server but its arguments."""
    from sglang.srt.multimodal.processors import base_processor
    from sglang.srt.multimodal.processors.gemma4 import Gemma4SGLangProcessor
    from sglang.srt.utils.hf_transformers_utils import get_config

    with pytest.MonkeyPatch.context() as patch, server_arguments(patch) as arguments:
        patch.setattr(base_processor, "_is_cpu", True)  # SGLang: on a GPU, or on a CPU with AMX
        made = Gemma4SGLangProcessor(
            get_config(str(folder), trust_remote_code=False), arguments, processor, "default"
        )
        yield made
        made.io_executor.shutdown()
        made.cpu_executor.shutdown()


@pytest.mark.parametrize("sizes", [[(480, 480)] * 6, [(480, 480), (1000, 200), (64, 900)]])
def test_sglang_makes_its_items_of_png_images(sglang_processor: Any, sizes: list[Any]):
    """Placeholders are expanded, and an item's places in the prompt hold image tokens alone."""
    text = "<bos><|turn>user\n" + "see <|image|> " * len(sizes) + "<turn|>\n"
    made = asyncio.run(
        sglang_processor.process_mm_data_async(
            [picture(*size) for size in sizes],
            None,
            text,
            SimpleNamespace(video_data=None),
        )
    )
    assert made.im_token_id == IMAGE
    offsets = [offset for item in made.mm_items for offset in item.offsets]
    assert len(offsets) == len(sizes)
    covered = {place for begin, end in offsets for place in range(begin, end + 1)}
    assert covered == {i for i, token in enumerate(made.input_ids) if token == IMAGE}
    for begin, end in offsets:
        assert made.input_ids[begin - 1] == geometry_mm.SPECIAL_TOKENS["<|image>"]
        assert made.input_ids[end + 1] == geometry_mm.SPECIAL_TOKENS["<image|>"]
        assert 0 < end + 1 - begin <= 280
    if sizes[0] == sizes[-1]:
        assert {end + 1 - begin for begin, end in offsets} == {256}
    patches = 280 * geometry_mm.POOLING**2
    pixels = [pixels for item in made.mm_items for pixels in item.feature]
    places = [places for item in made.mm_items for places in item.image_position_ids]
    assert len(pixels) == len(places) == len(sizes)
    for one, place, (begin, end) in zip(pixels, places, offsets, strict=True):
        assert one.shape == (patches, 3 * geometry_mm.PATCH**2)
        assert place.shape == (patches, 2)
        valid = int((place >= 0).all(dim=-1).sum())
        assert valid == (end + 1 - begin) * geometry_mm.POOLING**2


@pytest.mark.parametrize("soft_tokens", [70, 1120])
def test_the_number_of_an_images_tokens_is_a_choice(tmp_path: Path, soft_tokens: int):
    from transformers import AutoProcessor

    model = geometry_mm.write_model(tmp_path, "e2b", 5, soft_tokens)
    config = json.loads((model / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 5
    assert config["vision_config"]["default_output_length"] == soft_tokens  # which vLLM reads
    made = AutoProcessor.from_pretrained(model)
    from PIL import Image

    ids = made(images=[Image.new("RGB", (480, 480))], text="<|image|>").input_ids[0]
    found = ids.count(IMAGE)
    assert soft_tokens / 2 < found <= soft_tokens
