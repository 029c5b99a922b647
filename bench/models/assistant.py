"""Folder of an MTP assistant for a generated target, with nothing in it but a config.json.

The assistant reads the target's KV: window, numbers of KV heads and head sizes are the target's.
Width and depth are chosen: four layers, the last of them attending to everything. SGLang needs
transformers 5.8 to read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma4_turbo.models import geometry

LAYERS = 4
CENTROIDS = 2048


def config(name: str, centroids: bool = False) -> dict[str, Any]:
    """The config.json of an assistant for a target of this name.

    Args:
        name: a key of `geometry.GEOMETRIES`.
        centroids: with the head that looks at a part of the vocabulary, as small models have it.
    """
    g = geometry.GEOMETRIES[name]
    small = g.per_layer_width > 0
    made: dict[str, Any] = {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "dtype": "bfloat16",
        "backbone_hidden_size": g.hidden,
        "use_ordered_embeddings": centroids,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "gemma4_text",
            "dtype": "bfloat16",
            "vocab_size": geometry.VOCABULARY,
            "hidden_size": 256 if small else 1024,
            "intermediate_size": 2048 if small else 8192,
            "num_hidden_layers": LAYERS,
            "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
            "num_attention_heads": 4 if small else g.heads,
            # SGLang renames these when it reads an assistant: here they stand as published.
            "num_key_value_heads": g.kv_heads_sliding,
            "num_global_key_value_heads": g.kv_heads_full,
            "head_dim": geometry.HEAD_DIM_SLIDING,
            "global_head_dim": geometry.HEAD_DIM_FULL,
            "sliding_window": g.window,
            "num_kv_shared_layers": LAYERS,
            "attention_k_eq_v": g.k_eq_v,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
            "enable_moe_block": False,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "rope_parameters": geometry.config(name)["rope_parameters"],
        },
    }
    if centroids:
        made |= {"num_centroids": CENTROIDS, "centroid_intermediate_top_k": 32}
    return made


def speculation(draft: Path, tokens: int) -> dict[str, Any]:
    """SGLang's arguments for one candidate of so many drafted tokens a step."""
    return {
        "speculative_algorithm": "FROZEN_KV_MTP",
        "speculative_draft_model_path": str(draft),
        "speculative_num_steps": tokens,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": tokens + 1,
    }


def write_pair(
    folder: Path, name: str, layers: int | None, centroids: bool = False, agreeing: bool = False
) -> tuple[Path, Path]:
    """Folders of a target and its assistant. An ``agreeing`` target has a head of its own."""
    target = geometry.write_model(folder / "target", name, layers)
    if agreeing:
        written = geometry.config(name, layers) | {"tie_word_embeddings": False}
        (target / "config.json").write_text(json.dumps(written, indent=1))
    draft = folder / "assistant"
    draft.mkdir(parents=True, exist_ok=True)
    (draft / "config.json").write_text(json.dumps(config(name, centroids), indent=1))
    return target, draft
