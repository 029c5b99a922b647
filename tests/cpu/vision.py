"""A small multimodal Gemma 4 of SGLang's own classes on the CPU, and images for it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.models import geometry, geometry_mm

PATCH, POOL, POSITIONS, WIDTH = 4, 2, 32, 96  # WIDTH: of the language model


@functools.cache
def model(backend: str) -> Any:
    """With random weights; ``backend`` of the vision attention: triton_attn or sdpa."""
    from sglang.srt.models.gemma4_mm import Gemma4ForConditionalGeneration
    from sglang.srt.models.gemma4_vision import Gemma4VisionAttention
    from transformers import Gemma4Config, Gemma4TextConfig, Gemma4VisionConfig

    sglang_process.prepare_sglang()
    vision = Gemma4VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        patch_size=PATCH,
        position_embedding_size=POSITIONS,
        pooling_kernel_size=POOL,
    )
    text = Gemma4TextConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        global_head_dim=64,
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        max_position_embeddings=128,
    )
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    config.text_config.swa_head_dim = config.text_config.swa_v_head_dim = 64
    config.text_config.swa_num_key_value_heads = 1
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sglang.srt.layers.rotary_embedding.base._is_cpu", True)
            patch.setattr(Gemma4VisionAttention, "_select_backend", staticmethod(lambda: backend))
            made = Gemma4ForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            low = 0.5 if "norm" in name else -0.2
            parameter.uniform_(low, low + (1.0 if low > 0 else 0.4), generator=generator)
    return made


class ReadBacks(TorchDispatchMode):
    """Counts numbers that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def pixels(height: int, width: int, padding: int = 0, seed: int = 0) -> Any:
    """Patches ``[patches, 3 * PATCH^2]`` and their places, padding at the end."""
    grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    places = torch.stack(grid, dim=-1).reshape(-1, 2)
    places = torch.cat([places, torch.full((padding, 2), -1)])
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(places), 3 * PATCH**2, generator=generator), places


def image(height: int, width: int, padding: int = 0, seed: int = 0) -> Any:
    """An item of one image, in patches."""
    feature, places = pixels(height, width, padding, seed)
    return SimpleNamespace(feature=feature, image_position_ids=places)


def video(frames: int, height: int, width: int, seed: int = 0) -> Any:
    """An item of one video ``[1, frames, patches, ...]``."""
    made = [pixels(height, width, seed=seed + i) for i in range(frames)]
    return SimpleNamespace(
        feature=torch.stack([feature for feature, _ in made])[None],
        video_position_ids=torch.stack([places for _, places in made])[None],
    )


def given(tokens: int, seed: int = 0) -> Any:
    """An item that is embedded already."""
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(feature=torch.randn(tokens, WIDTH, generator=generator).bfloat16())


def folders(root: Path) -> dict[str, Path]:
    """The four models as multimodal folders of a config alone, and a text-only one."""
    made = {name: root / name for name in geometry_mm.VISION}
    for name, folder in made.items():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(geometry_mm.config(name)))
    made["text"] = geometry.write_model(root / "text", "26b-a4b")
    return made
