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


def of_config(config: dict[str, Any]) -> Geometry:
    """The geometry that a config.json describes, as published or with SGLang's names.

    Raises:
        ValueError: if it is no Gemma 4's, in one line.
    """
    text = config.get("text_config", config)
    kind = config.get("model_type")
    if not isinstance(text, dict) or not isinstance(kind, str) or not kind.startswith("gemma4"):
        shown = _shown(kind) if kind else "model without a model_type"
        raise ValueError(f"config.json is of a {shown}, no Gemma 4")

    def number(*names: str, otherwise: int | None = None, least: int = 0) -> int:
        for name in names:
            value = text.get(name)
            if value is None:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value < 1 << 31:
                wanted = f"a whole number from {least}" if least else "a whole number"
                raise ValueError(f"{name} in config.json must be {wanted}, got {_shown(value)}")
            return int(value)
        if otherwise is None:
            raise ValueError(f"config.json has no {names[0]}: it is no Gemma 4's")
        return otherwise

    renamed = "swa_num_key_value_heads" in text
    sizes = number("swa_head_dim", "head_dim"), number("global_head_dim")
    if sizes != (HEAD_DIM_SLIDING, HEAD_DIM_FULL):
        raise ValueError(f"config.json has heads of {sizes[0]} and {sizes[1]}: it is no Gemma 4's")
    sliding = number("swa_num_key_value_heads", "num_key_value_heads")
    full = number(
        "num_key_value_heads" if renamed else "num_global_key_value_heads", otherwise=sliding
    )
    heads = number("num_attention_heads")
    if not sliding or not full or not heads or heads % sliding or heads % full:
        raise ValueError(f"config.json has {heads} heads for {sliding} and {full} KV heads")
    types = text.get("layer_types") or []
    if not isinstance(types, list):
        raise ValueError(f"layer_types in config.json must be a list, got {_shown(types)}")
    experts = number("num_experts", otherwise=0) if text.get("enable_moe_block") else 0
    return Geometry(
        number("hidden_size", least=1),
        number("intermediate_size", least=1),
        number("num_hidden_layers", least=1),
        types.index("full_attention") + 1 if "full_attention" in types else 1,
        heads,
        sliding,
        full,
        number("sliding_window"),
        bool(text.get("attention_k_eq_v")),
        number("num_kv_shared_layers", otherwise=0),
        number("hidden_size_per_layer_input", otherwise=0),
        bool(text.get("use_double_wide_mlp")),
        experts,
        number("top_k_experts", least=1) if experts else 0,
        number("moe_intermediate_size", "expert_intermediate_size", least=1) if experts else 0,
    )


def _shown(value: object) -> str:
    """Of somebody else's file, in one short line."""
    told = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return told if len(told) <= 80 else f"{told[:77]}..."


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
