"""Small checkpoints with random weights: real files, loaded as SGLang loads published ones.

For benchmarks that need more than ``--load-format dummy``: quantised weights, models besides Gemma 4,
and tokens that depend on every layer. Linear layers keep the scale of their input, norms are around
one, attention's logits are of ordinary size, and what a layer adds outweighs the embedding, which
would otherwise make every token follow itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemma4_turbo.models import geometry

VOCABULARY = 32_768
GROUP = 64  # inputs per scale of an AWQ weight
PACKED = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ's order of eight outputs in an int32


class Size(NamedTuple):
    """Of a small Gemma 4. Head sizes are the real ones unless said otherwise."""

    hidden: int = 2816
    mlp: int = 2112
    layers: int = 4
    experts: int = 128  # 0: dense
    expert_width: int = 128
    heads: int = 16
    kv_sliding: int = 8
    kv_full: int = 2
    head_sliding: int = geometry.HEAD_DIM_SLIDING
    head_full: int = geometry.HEAD_DIM_FULL
    vocabulary: int = VOCABULARY


MOE = Size()
DENSE = Size(experts=0, mlp=2048)


class Draw:
    """Random tensors; on a GPU where there is one, which is faster."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, scale: float) -> torch.Tensor:
        """Around zero, with this standard deviation."""
        made = torch.empty(shape, dtype=torch.float32, device=self.device)
        return made.normal_(0, scale, generator=self.generator).to(self.dtype).cpu()

    def linear(self, outputs: int, inputs: int) -> torch.Tensor:
        """The weight of a linear layer that keeps its input's scale."""
        return self.normal(outputs, inputs, scale=inputs**-0.5)

    def around(self, *shape: int, middle: float = 1.0) -> torch.Tensor:
        """Between half of ``middle`` and one and a half of it."""
        made = torch.empty(shape, dtype=torch.float32, device=self.device)
        made.uniform_(0.5 * middle, 1.5 * middle, generator=self.generator)
        return made.to(self.dtype).cpu()

    def integers(self, *shape: int, below: int) -> torch.Tensor:
        """From 0, as int32."""
        made = torch.randint(
            below, shape, dtype=torch.int32, device=self.device, generator=self.generator
        )
        return made.cpu()


def gemma_config(size: Size, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of a text-only Gemma 4; its last layer attends to everything."""
    made = geometry.config("26b-a4b", 6)
    made |= {
        "dtype": dtype,
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "layer_types": ["sliding_attention"] * (size.layers - 1) + ["full_attention"],
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_full,
        "swa_num_key_value_heads": size.kv_sliding,
        **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim"), size.head_full),
        **dict.fromkeys(("swa_head_dim", "swa_v_head_dim"), size.head_sliding),
        "enable_moe_block": size.experts > 0,
    }
    if size.experts:
        made |= {"num_experts": size.experts, "moe_intermediate_size": size.expert_width}
    else:
        for field in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            del made[field]
    return made


def gemma_linears(size: Size) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear layer of attention and MLP, by its name.

    Layers that attend to everything have one projection for K and V, and the loader fills both.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(size.layers):
        full = layer == size.layers - 1
        head = size.head_full if full else size.head_sliding
        kv = (size.kv_full if full else size.kv_sliding) * head
        name = f"model.layers.{layer}."
        shapes[name + "self_attn.q_proj"] = (size.heads * head, size.hidden)
        shapes[name + "self_attn.k_proj"] = (kv, size.hidden)
        if not full:
            shapes[name + "self_attn.v_proj"] = (kv, size.hidden)
        shapes[name + "self_attn.o_proj"] = (size.hidden, size.heads * head)
        shapes[name + "mlp.gate_proj"] = (size.mlp, size.hidden)
        shapes[name + "mlp.up_proj"] = (size.mlp, size.hidden)
        shapes[name + "mlp.down_proj"] = (size.hidden, size.mlp)
    return shapes


def gemma_rest(size: Size, draw: Draw) -> dict[str, torch.Tensor]:
    """Everything but the linear layers of attention and MLP."""
    made = {
        "model.embed_tokens.weight": draw.normal(size.vocabulary, size.hidden, scale=0.03),
        "model.norm.weight": draw.around(size.hidden, middle=1.5),
    }
    for layer in range(size.layers):
        head = size.head_full if layer == size.layers - 1 else size.head_sliding
        name = f"model.layers.{layer}."
        for norm in ("q_norm", "k_norm"):
            made[f"{name}self_attn.{norm}.weight"] = draw.around(head, middle=head**-0.25)
        norms = ["input_layernorm", "pre_feedforward_layernorm"]
        if size.experts:
            norms += [
                "pre_feedforward_layernorm_2",
                "post_feedforward_layernorm_1",
                "post_feedforward_layernorm_2",
            ]
        for norm in norms:
            made[f"{name}{norm}.weight"] = draw.around(size.hidden)
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            made[f"{name}{norm}.weight"] = draw.around(size.hidden, middle=16.0)
        made[name + "layer_scalar"] = draw.around(1, middle=0.9)
        if size.experts:
            made[name + "router.scale"] = draw.around(size.hidden)
            made[name + "router.proj.weight"] = draw.normal(size.experts, size.hidden, scale=1.0)
            made[name + "router.per_expert_scale"] = draw.around(size.experts)
            width = size.expert_width
            both = draw.linear(size.experts * 2 * width, size.hidden)
            made[name + "experts.gate_up_proj"] = both.view(size.experts, 2 * width, size.hidden)
            down = draw.linear(size.experts * size.hidden, width)
            made[name + "experts.down_proj"] = down.view(size.experts, size.hidden, width)
    return made


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A model folder; returns it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(ready, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gemma(folder: Path, size: Size = MOE, seed: int = 1) -> Path:
    """A Gemma 4 in bf16."""
    draw = Draw(seed, torch.bfloat16)
    tensors = gemma_rest(size, draw)
    for name, shape in gemma_linears(size).items():
        tensors[name + ".weight"] = draw.linear(*shape)
    return write(folder, gemma_config(size), tensors)


def pack_awq(numbers: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit numbers of a row in an int32, in AWQ's order."""
    rows, columns = numbers.shape
    parts = numbers.to(torch.int64).view(rows, columns // 8, 8)
    packed = torch.zeros(rows, columns // 8, dtype=torch.int64)
    for place, column in enumerate(PACKED):
        packed |= parts[:, :, column] << (4 * place)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def awq_linear(name: str, outputs: int, inputs: int, draw: Draw) -> dict[str, torch.Tensor]:
    """A random AWQ weight: every 4-bit number, zero points around the middle, a scale per group."""
    groups = inputs // GROUP
    zeros = 7 + draw.integers(groups, outputs, below=3)
    deviation = 4.7  # of a number drawn from 0 to 15, less its zero point
    return {
        name + ".qweight": pack_awq(draw.integers(inputs, outputs, below=16)),
        name + ".qzeros": pack_awq(zeros),
        name + ".scales": draw.around(groups, outputs, middle=inputs**-0.5 / deviation),
    }


def write_awq(folder: Path, size: Size, dtype: str, seed: int = 2) -> Path:
    """A Gemma 4 whose attention and MLP are AWQ int4; router and experts stay as they are.

    Stock's Gemma 4 loads no quantised experts: with ``--quantization awq`` (fp16) they are left alone,
    with ``awq_marlin``, which SGLang takes by itself, the model must be dense.
    """
    draw = Draw(seed, getattr(torch, dtype))
    tensors = gemma_rest(size, draw)
    for name, shape in gemma_linears(size).items():
        tensors |= awq_linear(name, *shape, draw)
    config = gemma_config(size, dtype) | {
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        }
    }
    return write(folder, config, tensors)


def write_llama(
    folder: Path,
    hidden: int = 1024,
    layers: int = 4,
    heads: int = 16,
    kv_heads: int = 4,
    vocabulary: int = VOCABULARY,
    seed: int = 3,
) -> Path:
    """A LlamaForCausalLM in bf16."""
    draw, mlp, head = Draw(seed, torch.bfloat16), 3 * hidden, hidden // heads
    tensors = {
        "model.embed_tokens.weight": draw.normal(vocabulary, hidden, scale=1.0),
        "model.norm.weight": draw.around(hidden),
        "lm_head.weight": draw.normal(vocabulary, hidden, scale=3 * hidden**-0.5),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}."
        for linear, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_heads * head, hidden),
            "self_attn.v_proj": (kv_heads * head, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }.items():
            tensors[f"{name}{linear}.weight"] = draw.linear(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = draw.around(hidden)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return write(folder, config, tensors)
