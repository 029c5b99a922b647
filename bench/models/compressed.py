"""Weights in the two formats of compressed-tensors that `quantise_small.py` writes, and back.

FP8 (``float-quantized``), for activations that SGLang quantises by token as it runs:

    q = e4m3(w / s),  s = max |w| / 448 of a row;  w' = q s

``weight`` [out, in] float8_e4m3fn, ``weight_scale`` [out, 1] fp32. Experts, which a Gemma 4 checkpoint
holds in one tensor [experts, out, in], keep their names: ``experts.gate_up_proj`` with its scales
[experts, out, 1] as ``experts.gate_up_proj_scale``. Stock's loader turns the first part of both names into
``experts.w13_weight``, on either line. Published checkpoints have a tensor an expert
(``experts.0.gate_proj.weight``); 0.5.12.post1 passes over these with a warning and runs on.

W4A16 (``pack-quantized``), symmetric, activations as they are:

    q = round(w / s) in -8 ... 7,  s = max |w| / 7.5 of 128 inputs, or of a row;  w' = q s

``weight_packed`` [out, in / 8] int32, eight numbers q + 8 from the lowest bits on, ``weight_scale``
[out, groups] bf16, ``weight_shape`` int64. Experts stay in bf16: stock's Marlin experts know SiLU alone,
and Gemma 4 has GELU.

In both: a weight is at most half a step off. The router, embeddings with the head, and what belongs to
per-layer embeddings stay in bf16, as in published checkpoints.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import torch

GROUP = 128
LARGEST = 448.0  # of float8_e4m3fn
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
EXPERTS = re.compile(r"model\.layers\.\d+\.experts\.(gate_up|down)_proj")


class Scheme(StrEnum):
    """Of a checkpoint."""

    FP8 = "fp8"
    W4A16 = "w4a16"


Tensors = dict[str, torch.Tensor]


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[..., in]`` as float8_e4m3fn, and the rows' scales ``[..., 1]`` fp32; a row of zeros has one."""
    weight = weight.float()
    scale = weight.abs().amax(-1, keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale).to(torch.float8_e4m3fn), scale


def int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[out, in]`` as numbers from -8 to 7, and scales ``[out, in / group]`` in bf16."""
    grouped = weight.float().unflatten(1, (-1, group))
    most = grouped.abs().amax(-1, keepdim=True)
    # Rounded to bf16 from above: with less the largest weight would be more than half a step off.
    scale = (most / 7.5 * (1 + 2**-8)).bfloat16()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    numbers = (grouped / scale.float()).round().clamp(-8, 7).to(torch.int8)
    return numbers.flatten(1), scale[..., 0]


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` from -8 to 7 as ``[out, in / 8]`` int32."""
    parts = (numbers.to(torch.int64) + 8).unflatten(1, (-1, 8))
    packed = (parts << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """What `pack` was given."""
    parts = packed.to(torch.int64)[..., None] >> (4 * torch.arange(8))
    return ((parts & 15) - 8).flatten(1).to(torch.int8)


def group_of(inputs: int) -> int:
    """Inputs for a scale: 128, or all where these cannot be cut so."""
    return inputs if inputs % GROUP else GROUP


def quantised(tensors: Tensors, scheme: Scheme, experts: bool = True) -> Tensors:
    """A checkpoint's tensors; ``experts``: FP8 experts too, where there are any.

    Raises:
        ValueError: a weight whose number of inputs is no multiple of 8 cannot be packed.
    """
    made: Tensors = {}
    for name, tensor in tensors.items():
        linear = LINEAR.fullmatch(name) is not None
        if scheme == Scheme.FP8 and (linear or (experts and EXPERTS.fullmatch(name))):
            made[name], made[f"{name}_scale"] = fp8(tensor)
        elif scheme == Scheme.W4A16 and linear:
            if tensor.shape[1] % 8:
                raise ValueError(f"{name} must have a multiple of 8 inputs, got {tensor.shape[1]}")
            numbers, made[f"{name}_scale"] = int4(tensor, group_of(tensor.shape[1]))
            made[f"{name}_packed"] = pack(numbers)
            made[f"{name}_shape"] = torch.tensor(tensor.shape)
        else:
            made[name] = tensor
    return made


def plain(tensors: Tensors) -> Tensors:
    """The tensors of an unquantised checkpoint: quantised ones as ``q s`` in fp32, others as they are."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            made[name] = tensor.float() * tensors[f"{name}_scale"]
        elif name.endswith("_packed"):
            whole = name.removesuffix("_packed")
            scale = tensors[f"{whole}_scale"].float()
            numbers = unpack(tensor).float().unflatten(1, (scale.shape[1], -1))
            made[whole] = (numbers * scale[..., None]).flatten(1)
        elif not name.endswith(("weight_scale", "_proj_scale", "weight_shape")):
            made[name] = tensor
    return made


def config(tensors: Tensors, scheme: Scheme, experts: bool = True) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint with these tensors before they were `quantised`.

    Groups of 128 are of linear layers in general; those with one scale a row are named one by one. SGLang
    joins Q, K and V, gate and up: their input, the hidden size, must be a multiple of 128 then.
    """
    ignored = ["lm_head", r"re:.*embed_tokens.*", r"re:.*router.*", r"re:.*per_layer.*"]
    groups: dict[str, dict[str, Any]]
    if scheme == Scheme.FP8:
        kind: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
        groups = {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**kind, "strategy": "channel", "dynamic": False},
                "input_activations": {**kind, "strategy": "token", "dynamic": True},
            }
        }
        if not experts:
            ignored.append(r"re:.*experts.*")
    else:
        ignored.append(r"re:.*experts.*")
        whole = [
            name.removesuffix(".weight")
            for name, tensor in tensors.items()
            if LINEAR.fullmatch(name) and tensor.shape[1] % GROUP
        ]
        joined = [name for name in whole if not name.endswith((".o_proj", ".down_proj"))]
        if joined:
            raise ValueError(f"the hidden size must be a multiple of {GROUP}, as of {joined[0]}")
        kind = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
        groups = {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**kind, "strategy": "group", "group_size": GROUP},
                "input_activations": None,
            }
        }
        if whole:
            groups["group_1"] = {
                "targets": whole,
                "weights": {**kind, "strategy": "channel"},
                "input_activations": None,
            }
    form = "float-quantized" if scheme == Scheme.FP8 else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": groups,
    }
