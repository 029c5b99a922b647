"""Two small Gemma 4 models to train: their sizes, their configs, their checkpoint folders.

A checkpoint of at most 60 MB holds 30 million numbers in bf16, embeddings and all experts included. So:

* ``moe``, as 26B-A4B: six layers, 128 experts of width 32 with top-8, K = V on full layers, and a hidden
  size of 256, the least that the norm kernels take. Two thirds of its 28 million numbers are experts, of
  which a token meets one in sixteen: about 10 million numbers are active. More would not fit.
* ``ple``, as E2B: eight layers, the last four of which share KV and have an MLP twice as wide, per-layer
  embeddings of width 256, and a hidden size of 512. All of its 28 million numbers are active.

Head sizes are the real ones, 256 and 512; every third or fourth layer attends to everything. The window is
256 tokens, so that a row of 1024 leaves it behind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.models import compressed, small_tasks
from gemma4_turbo.models import geometry

WEIGHTS = "model.safetensors"
MOST_BYTES = 60_000_000


class Size(NamedTuple):
    """Of a small Gemma 4."""

    hidden: int
    mlp: int
    kinds: str  # a letter for each layer: s slides, f attends to everything
    heads: int
    kv_sliding: int
    kv_full: int
    window: int = 256
    experts: int = 0
    expert_width: int = 0
    topk: int = 8
    k_eq_v: bool = False
    per_layer: int = 0  # width of the per-layer embeddings
    shared: int = 0  # layers at the end that read another layer's KV
    head_sliding: int = geometry.HEAD_DIM_SLIDING
    head_full: int = geometry.HEAD_DIM_FULL


SIZES: dict[str, Size] = {
    "moe": Size(256, 768, "ssfssf", 4, 2, 1, experts=128, expert_width=32, k_eq_v=True),
    "ple": Size(512, 640, "sssfsssf", 4, 1, 1, per_layer=256, shared=4),
}


def published(size: Size) -> dict[str, Any]:
    """Fields of the config as published checkpoints and transformers name them."""
    made: dict[str, Any] = {
        "vocab_size": small_tasks.VOCABULARY,
        "vocab_size_per_layer_input": small_tasks.VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": len(size.kinds),
        "layer_types": [
            "full_attention" if kind == "f" else "sliding_attention" for kind in size.kinds
        ],
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_sliding,
        "num_global_key_value_heads": size.kv_full if size.k_eq_v else None,
        "head_dim": size.head_sliding,
        "global_head_dim": size.head_full,
        "sliding_window": size.window,
        "attention_k_eq_v": size.k_eq_v,
        "num_kv_shared_layers": size.shared,
        "hidden_size_per_layer_input": size.per_layer,
        "use_double_wide_mlp": size.shared > 0,
        "enable_moe_block": size.experts > 0,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rope_parameters": geometry.config("26b-a4b", 6)["rope_parameters"],
        "pad_token_id": small_tasks.PAD,
        "eos_token_id": small_tasks.EOS,
        "bos_token_id": small_tasks.BOS,
    }
    if size.experts:
        made |= {
            "num_experts": size.experts,
            "top_k_experts": size.topk,
            "moe_intermediate_size": size.expert_width,
        }
    return made


def renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the same model as SGLang reads it of a text-only folder.

    SGLang renames the head's fields only for multimodal configs: here they stand renamed.
    """
    made = dict(fields)
    full = made.pop("num_global_key_value_heads") or made["num_key_value_heads"]
    return made | {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "swa_num_key_value_heads": made["num_key_value_heads"],
        "num_key_value_heads": full,
        **dict.fromkeys(("swa_head_dim", "swa_v_head_dim"), made["head_dim"]),
        **dict.fromkeys(("head_dim", "v_head_dim"), made["global_head_dim"]),
    }


def unrenamed(config: dict[str, Any]) -> dict[str, Any]:
    """What `renamed` was made of."""
    made = {key: value for key, value in config.items() if not key.startswith("swa_")}
    for name in ("architectures", "model_type", "dtype", "v_head_dim"):
        del made[name]
    made.pop("quantization_config", None)
    return made | {
        "head_dim": config["swa_head_dim"],
        "num_key_value_heads": config["swa_num_key_value_heads"],
        # The only models with another number of KV heads on full layers are those with K = V.
        "num_global_key_value_heads": (
            config["num_key_value_heads"] if config["attention_k_eq_v"] else None
        ),
    }


def build(fields: dict[str, Any], experts: str | None = None) -> Any:
    """Transformers' own ``Gemma4ForCausalLM`` with attention in plain products and sums.

    Args:
        fields: as `published` has them.
        experts: transformers' implementation of the experts; None: its own choice.
    """
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    given = {} if experts is None else {"experts_implementation": experts}
    return Gemma4ForCausalLM._from_config(
        Gemma4TextConfig(**fields), attn_implementation="eager", **given
    )


def initialise(model: Any, seed: int) -> None:
    """Random weights that learn within minutes; what is not named here is one or zero.

    Linear layers keep the scale of their input. Attention has no scale in Gemma 4: the norms of Q and K
    start so that its logits are of ordinary size. The router's logits, products of a vector of length one,
    are spread by rows as long as the root of the hidden size: flat ones would not be learned from. A
    layer's scalar, which is not trained, differs from one as in published checkpoints.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_buffers():
        if name.endswith("layer_scalar"):
            tensor.copy_(0.85 + 0.25 * torch.rand(1, generator=generator))
    for name, tensor in model.named_parameters():
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            drawn = torch.full_like(drawn, tensor.numel() ** -0.25)
        elif tensor.dim() == 1:
            drawn = torch.ones_like(drawn)
        elif name.endswith("router.proj.weight"):
            pass
        elif "embed_tokens" in name:  # scaled up by the root of the width in the forward
            drawn *= 0.05
        else:
            drawn *= tensor.shape[-1] ** -0.5
        tensor.data.copy_(drawn)


def masks(length: int, window: int, dtype: torch.dtype, device: Any) -> dict[str, torch.Tensor]:
    """Of both kinds of layers, ``[1, 1, length, length]``, to be added to attention's logits."""
    at = torch.arange(length, device=device)
    behind = at[:, None] - at[None, :]
    seen = {"full_attention": behind >= 0, "sliding_attention": (behind >= 0) & (behind < window)}
    lowest = torch.finfo(dtype).min
    return {
        kind: torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, lowest)[
            None, None
        ]
        for kind, mask in seen.items()
    }


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[rows, length, vocabulary]`` of rows without padding before a token that counts."""
    window = model.config.sliding_window
    mask = masks(ids.shape[1], window, model.dtype, ids.device)
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found


@torch.no_grad()
def text_loss(model: Any, pieces: list[list[int]], batch: int = 16) -> float:
    """Nats a token on pieces of one length; the first token is given."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(pieces), batch):
        ids = torch.tensor(pieces[start : start + batch], device=device)
        found = logits(model, ids[:, :-1]).float()
        total += torch.nn.functional.cross_entropy(
            found.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
        count += ids[:, 1:].numel()
    return total / count


@torch.no_grad()
def answered(
    model: Any, asked: list[small_tasks.Question], batch: int = 16
) -> tuple[list[bool], float]:
    """Whether the model's greedy answer is the right one, for each question; and nats an answer's token.

    Greedy decoding says the right answer if and only if each of its tokens is the likeliest after the
    ones before it, which one forward over prompt and answer shows.
    """
    device = next(model.parameters()).device
    tokens = [question.tokens() for question in asked]
    order = sorted(range(len(asked)), key=lambda i: sum(map(len, tokens[i])))
    right = [False] * len(asked)
    total, count = 0.0, 0
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [tokens[i][0] + tokens[i][1] for i in chosen]
        longest = max(map(len, rows))
        padded = [row + [small_tasks.PAD] * (longest - len(row)) for row in rows]
        ids = torch.tensor(padded, device=device)
        found = logits(model, ids[:, :-1]).float().log_softmax(-1)
        said = found.argmax(-1)
        likely = found.gather(2, ids[:, 1:, None])[:, :, 0]
        for row, i in enumerate(chosen):
            first, last = len(tokens[i][0]) - 1, len(rows[row]) - 1
            right[i] = bool((said[row, first:last] == ids[row, first + 1 : last + 1]).all())
            total -= likely[row, first:last].sum().item()
            count += last - first
    return right, total / count


# -- folders --------------------------------------------------------------------------------------


def tokenizer() -> Any:
    """A ``tokenizers.Tokenizer``: each byte a token, BOS before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    # Byte-level tokenizers write a byte that is no printable character as one from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    special = {
        "<pad>": small_tasks.PAD,
        "<eos>": small_tasks.EOS,
        "<bos>": small_tasks.BOS,
        "<unk>": small_tasks.UNKNOWN,
    }
    known = {characters[byte]: small_tasks.FIRST_BYTE + byte for byte in range(256)}
    made = Tokenizer(BPE({**special, **known}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", small_tasks.BOS)]
    )
    return made


def write(folder: Path, model: Any, files: dict[str, dict[str, Any]]) -> None:
    """A model's weights in bf16, and JSON files, into a folder that is made if need be.

    Tensors have the names of published checkpoints. Tied weights are written once.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))


def save(folder: Path, model: Any, fields: dict[str, Any], notes: dict[str, Any]) -> None:
    """A checkpoint folder that SGLang loads; ``notes`` become training.json."""
    special = {"bos": small_tasks.BOS, "eos": small_tasks.EOS, "pad": small_tasks.PAD}
    files = {
        "config.json": renamed(fields),
        "generation_config.json": {f"{name}_token_id": token for name, token in special.items()},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": f"<{name}>" for name in (*special, "unk")},
            "model_max_length": fields["max_position_embeddings"],
        },
        "training.json": notes,
    }
    write(folder, model, files)
    tokenizer().save(str(folder / "tokenizer.json"))


def as_saved(model: Any) -> None:
    """The weights rounded to bf16, as a folder will hold them."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())


def load(folder: Path, dtype: torch.dtype, device: str, experts: str | None = None) -> Any:
    """Transformers' model of a folder, ready to be asked; quantised weights as what they stand for.

    Raises:
        RuntimeError: where the folder lacks a tensor or has one too many.
    """
    from safetensors.torch import load_file

    model = build(unrenamed(json.loads((folder / "config.json").read_text())), experts)
    tensors = compressed.plain(load_file(folder / WEIGHTS))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model.to(device=device, dtype=dtype).eval()
