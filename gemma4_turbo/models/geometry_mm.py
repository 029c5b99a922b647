"""Multimodal model folders with Gemma 4's geometry, its vision encoder, and no weights.

As `gemma4_turbo.models.geometry`, but with all that SGLang asks of a checkpoint that takes pictures: the
nested config.json, the processor's settings, a chat template and a tokenizer, all made here. The
tokenizer knows single characters and the special tokens at their own ids; the rest of the vocabulary
is filler, so that whatever random weights generate can be printed. No audio encoder.

The 12B has no vision encoder: patches of an image are projected into the language model. SGLang reads it where
transformers knows ``gemma4_unified``: 0.5.23 does, 0.5.12.post1 does not.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any, NamedTuple

from gemma4_turbo.models import geometry

# Ids and spellings that the processor, SGLang and the chat template go by.
SPECIAL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": 255_999,
    "<|audio>": 256_000,
    "<|image|>": 258_880,
    "<|audio|>": 258_881,
    "<image|>": 258_882,
    "<audio|>": 258_883,
    "<|video|>": 258_884,
}
IMAGE_TOKEN = "<|image|>"
PATCH, POOLING = 16, 3  # pixels of a patch's side; patches of a token's side
SOFT_TOKENS = 280
"""Of an image, at most, as published."""
FIRST_BYTE, FIRST_CHARACTER = 200, 1000  # where those tokens begin in the vocabulary
CHARACTERS = "▁\n" + string.ascii_letters + string.digits + string.punctuation


class Vision(NamedTuple):
    """The vision encoder's geometry."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    head_dim: int
    clipped: bool  # the checkpoint holds bounds for activations
    standardize: bool


SMALL = Vision(768, 3072, 16, 12, 64, True, False)
LARGE = Vision(1152, 4304, 27, 16, 72, False, True)
VISION: dict[str, Vision] = {"26b-a4b": LARGE, "31b": LARGE, "e4b": SMALL, "e2b": SMALL}


class Projection(NamedTuple):
    """What takes the place of a vision encoder."""

    hidden: int
    positions: int  # of a patch, along each side


UNIFIED: dict[str, Projection] = {"12b": Projection(3840, 1120)}
MODELS = (*VISION, *UNIFIED)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|image|>' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<turn|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\n' -}}
{%- endif -%}
"""


def config(name: str, layers: int | None = None, soft_tokens: int = SOFT_TOKENS) -> dict[str, Any]:
    """The config.json of a model that takes pictures.

    Args:
        name: one of `MODELS`.
        layers: fewer layers of the language model, as in `gemma4_turbo.models.geometry.config`.
        soft_tokens: of an image, at most. SGLang and transformers read it in `processor_config`, vLLM here.

    Raises:
        ValueError: naming the argument.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
    text = geometry.config(name, layers)
    g = geometry.GEOMETRIES[name]
    # SGLang renames the attention's fields of this config itself: here they stand as published.
    for field in ("v_head_dim", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim"):
        del text[field]
    del text["architectures"]
    text |= {
        "head_dim": geometry.HEAD_DIM_SLIDING,
        "num_key_value_heads": g.kv_heads_sliding,
        "num_global_key_value_heads": g.kv_heads_full if g.k_eq_v else None,
        "vocab_size_per_layer_input": geometry.VOCABULARY,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": None if g.per_layer_width else "vision",
        "pad_token_id": SPECIAL_TOKENS["<pad>"],
        "eos_token_id": SPECIAL_TOKENS["<eos>"],
        "bos_token_id": SPECIAL_TOKENS["<bos>"],
    }
    unified = name in UNIFIED
    if unified:
        text["model_type"] = "gemma4_unified_text"
    return {
        "architectures": [f"Gemma4{'Unified' if unified else ''}ForConditionalGeneration"],
        "model_type": "gemma4_unified" if unified else "gemma4",
        "dtype": "bfloat16",
        "transformers_version": "5.5.0",  # the first with Gemma 4; without one it warns
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": projection_config(UNIFIED[name]) | {"num_soft_tokens": soft_tokens}
        if unified
        else vision_config(VISION[name]) | {"default_output_length": soft_tokens},
        "audio_config": None,
        "boi_token_id": SPECIAL_TOKENS["<|image>"],
        "eoi_token_id": SPECIAL_TOKENS["<image|>"],
        "image_token_id": SPECIAL_TOKENS[IMAGE_TOKEN],
        "video_token_id": SPECIAL_TOKENS["<|video|>"],
        "boa_token_id": SPECIAL_TOKENS["<|audio>"],
        "eoa_token_id": SPECIAL_TOKENS["<audio|>"],
        "eoa_token_index": SPECIAL_TOKENS["<audio|>"],
        "audio_token_id": SPECIAL_TOKENS["<|audio|>"],
    }


def vision_config(v: Vision) -> dict[str, Any]:
    """Of a vision encoder."""
    return {
        "model_type": "gemma4_vision",
        "hidden_size": v.hidden,
        "intermediate_size": v.mlp,
        "num_hidden_layers": v.layers,
        "num_attention_heads": v.heads,
        "num_key_value_heads": v.heads,
        "head_dim": v.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "patch_size": PATCH,
        "pooling_kernel_size": POOLING,
        "position_embedding_size": 10240,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "use_clipped_linears": v.clipped,
        "standardize": v.standardize,
    }


def projection_config(p: Projection) -> dict[str, Any]:
    """Of a projection in its place."""
    return {
        "model_type": "gemma4_unified_vision",
        "patch_size": PATCH,
        "pooling_kernel_size": POOLING,
        "model_patch_size": PATCH * POOLING,  # SGLang's class for it does not multiply
        "mm_embed_dim": p.hidden,
        "mm_posemb_size": p.positions,
        "output_proj_dims": p.hidden,
        "rms_norm_eps": 1e-6,
    }


def processor_config(soft_tokens: int = SOFT_TOKENS, family: str = "Gemma4") -> dict[str, Any]:
    """The processor_config.json: images become at most ``soft_tokens`` tokens each.

    ``family``: what the names of transformers' classes begin with.
    """
    image = {
        "image_processor_type": f"{family}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,
        "patch_size": PATCH,
        "pooling_kernel_size": POOLING,
        "max_soft_tokens": soft_tokens,
    }
    video = {key: value for key, value in image.items() if key != "image_processor_type"}
    return {
        "processor_class": f"{family}Processor",
        "image_seq_length": soft_tokens,
        "audio_seq_length": 750,
        "audio_ms_per_token": 40,
        "image_processor": image,
        "video_processor": video
        | {
            "video_processor_type": f"{family}VideoProcessor",
            "max_soft_tokens": 70,
            "num_frames": 32,
            "do_sample_frames": True,
        },
        "feature_extractor": {
            "feature_extractor_type": f"{family}AudioFeatureExtractor",
            "feature_size": 128,
            "sampling_rate": 16000,
        },
    }


def tokenizer_config(family: str = "Gemma4") -> dict[str, Any]:
    """The tokenizer_config.json; ``family`` as in `processor_config`."""
    return {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": f"{family}Processor",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "padding_side": "left",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        # Named, so that the tokenizer has image_token, image_token_id and so on.
        "extra_special_tokens": {
            "image_token": IMAGE_TOKEN,
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "sot_token": "<|turn>",
            "eot_token": "<turn|>",
        },
    }


def vocabulary() -> dict[str, int]:
    """Every token with its id, without a gap."""
    known = dict(SPECIAL_TOKENS)
    known |= {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}
    known |= {character: FIRST_CHARACTER + i for i, character in enumerate(CHARACTERS)}
    taken = set(known.values())
    filler = {f"▁t{i}": i for i in range(geometry.VOCABULARY) if i not in taken}
    return known | filler


def tokenizer() -> Any:
    """A ``tokenizers.Tokenizer`` over `vocabulary` that never merges characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    made = Tokenizer(BPE(vocabulary(), [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    return made


def write_model(
    folder: Path, name: str, layers: int | None = None, soft_tokens: int = SOFT_TOKENS
) -> Path:
    """Write all files into ``folder``, made if need be; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    family = "Gemma4Unified" if name in UNIFIED else "Gemma4"
    files = {
        "config.json": config(name, layers, soft_tokens),
        "processor_config.json": processor_config(soft_tokens, family),
        "tokenizer_config.json": tokenizer_config(family),
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0},
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
