"""Model folders with Gemma 4's geometry and nothing in them but a config.json.

For benchmarks and the demonstration: SGLang fills such a model with random weights
(``--load-format dummy``). Text-only. Numbers from public test fixtures of the five models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Geometry(NamedTuple):
    """What distinguishes one Gemma 4 from another."""

    hidden: int
    mlp: int
    layers: int
    full_every: int  # every n-th layer attends to everything, the others to a window
    heads: int
    kv_heads_sliding: int
    kv_heads_full: int
    window: int
    k_eq_v: bool
    kv_shared_layers: int
    per_layer_width: int
    double_wide_mlp: bool
    experts: int
    topk: int
    expert_width: int


GEOMETRIES: dict[str, Geometry] = {
    "26b-a4b": Geometry(2816, 2112, 30, 6, 16, 8, 2, 1024, True, 0, 0, False, 128, 8, 704),
    "31b": Geometry(5376, 21504, 60, 6, 32, 16, 4, 1024, True, 0, 0, False, 0, 0, 0),
    "12b": Geometry(3840, 15360, 48, 6, 16, 8, 1, 1024, True, 0, 0, False, 0, 0, 0),
    "e4b": Geometry(2560, 10240, 42, 6, 8, 2, 2, 512, False, 18, 256, False, 0, 0, 0),
    "e2b": Geometry(1536, 6144, 35, 5, 8, 1, 1, 512, False, 20, 256, True, 0, 0, 0),
}
HEAD_DIM_SLIDING, HEAD_DIM_FULL, VOCABULARY = 256, 512, 262144


def config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a text-only model.

    Args:
        name: a key of `GEOMETRIES`.
        layers: fewer layers than the model has, a multiple of its pattern; None for all.

    Raises:
        ValueError: naming the argument.
    """
    if name not in GEOMETRIES:
        raise ValueError(f"name must be one of {', '.join(GEOMETRIES)}, got {name!r}")
    g = GEOMETRIES[name]
    count = g.layers if layers is None else layers
    if count < g.full_every or count % g.full_every or count > g.layers:
        raise ValueError(
            f"layers must be a multiple of {g.full_every} up to {g.layers}, got {layers}"
        )
    shared = g.kv_shared_layers if count == g.layers else 0
    types = [
        "full_attention" if (i + 1) % g.full_every == 0 else "sliding_attention"
        for i in range(count)
    ]
    made: dict[str, Any] = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": g.hidden,
        "intermediate_size": g.mlp,
        "num_hidden_layers": count,
        "layer_types": types,
        "num_attention_heads": g.heads,
        # SGLang renames these only for the multimodal config: here they stand renamed.
        "num_key_value_heads": g.kv_heads_full,
        "head_dim": HEAD_DIM_FULL,
        "v_head_dim": HEAD_DIM_FULL,
        "global_head_dim": HEAD_DIM_FULL,
        "swa_num_key_value_heads": g.kv_heads_sliding,
        "swa_head_dim": HEAD_DIM_SLIDING,
        "swa_v_head_dim": HEAD_DIM_SLIDING,
        "sliding_window": g.window,
        "attention_k_eq_v": g.k_eq_v,
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": g.per_layer_width,
        "use_double_wide_mlp": g.double_wide_mlp,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
            },
        },
    }
    if g.experts:
        made |= {
            "enable_moe_block": True,
            "num_experts": g.experts,
            "top_k_experts": g.topk,
            "moe_intermediate_size": g.expert_width,
        }
    return made


def write_model(folder: Path, name: str, layers: int | None = None) -> Path:
    """Write the config.json into ``folder``, made if need be; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(name, layers), indent=1))
    return folder
