"""Every patch as data, one record each.

A record is all that the rest of the package knows of a patch. Its code is in
``patches/<name>.py``, its kernel in ``kernels/<name>.py``, its tests in ``tests/*/test_<name>.py``,
and the fingerprints of its targets, release by release, in ``releases.json``.
"""

from __future__ import annotations

from typing import NamedTuple

BITWISE = "bitwise"  # stock's bits on every input it accepts
TOLERANCE = "tolerance"  # bounded distance from stock; the bounds are in the kernel's docstring
BEHAVIOUR = "behaviour"  # no arithmetic of its own: defaults, fixes, graphs


class Alias(NamedTuple):
    """Another variable that switches a patch, as the patch's forerunner named it."""

    env: str
    disables: bool  # True: a true value switches the patch off


class Patch(NamedTuple):
    """One patch."""

    name: str
    summary: str
    numerics: str
    default: bool
    origin: str = ""
    aliases: tuple[Alias, ...] = ()
    requires: tuple[str, ...] = ()  # patches that it stands on: off when one of them is

    @property
    def env(self) -> str:
        """The patch's own switch."""
        return f"GEMMA4_TURBO_{self.name.upper()}"


CATALOGUE: tuple[Patch, ...] = (
    Patch(
        name="router",
        summary="Expert routing of Gemma 4's MoE (top-k, softmax, scale, casts) in one launch",
        numerics=BITWISE,
        default=True,
        origin="pyc96/sglang#1; upstream sgl-project/sglang#26502",
        aliases=(Alias("SGLANG_GEMMA4_DISABLE_FUSED_ROUTER", disables=True),),
    ),
    Patch(
        name="step_prologue",
        summary="Per-layer inputs (E2B, E4B) in two launches and a GEMM; no unread copy of the ids",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="moe_align",
        summary="Small batches' slots grouped by expert for the fused MoE kernel in one launch",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="layer_norms",
        summary="Norms, residual and router scale between attention and feed-forward in one launch",
        numerics=BITWISE,
        default=True,
        origin="pyc96/sglang#18",
    ),
    Patch(
        name="router_norm",
        summary="The router's norm and scale in one launch, where layer_norms does not take the layer",
        numerics=BITWISE,
        default=True,
        origin="sgl-project/sglang#26588",
    ),
    Patch(
        name="ple_tail",
        summary="The end of a layer with per-layer embeddings (E2B, E4B) in three launches beside its GEMMs",
        numerics=BITWISE,
        default=True,
        origin="pyc96/sglang#18",
    ),
    Patch(
        name="qkv_norm",
        summary="Norms of Q, K and V with one program per token and head",
        numerics=BITWISE,
        default=True,
        origin="sgl-project/sglang#26588, #25461",
    ),
    Patch(
        name="rope_store",
        summary="Rotation and KV store in the launch of the QKV norms; no dummy K on layers that share KV",
        numerics=BITWISE,
        default=True,
        requires=("qkv_norm",),
    ),
    Patch(
        name="qkv_proj",
        summary="Only the rows of the QKV weight that a layer needs are multiplied",
        numerics=TOLERANCE,
        default=True,
        origin="sgl-project/sglang#25461",
    ),
    Patch(
        name="input_norm",
        summary="The next layer's input norm in the launch of a layer's end",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="experts_sum",
        summary="The sum over a token's experts in the launch of the layer's end",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="mlp_stream",
        summary="The dense MLP beside the experts, on a second stream of the CUDA graph",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="skinny_gemm",
        summary="Linear layers for up to 64 tokens, activations in the launch of the product before",
        numerics=TOLERANCE,
        default=True,
    ),
    Patch(
        name="pdl",
        summary="Programmatic dependent launch between the package's own kernels (Hopper and later)",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="extend_attention",
        summary="Attention of prefill and verification for head sizes 256 and 512 on Hopper; window slots without host reads",
        numerics=TOLERANCE,
        default=True,
        origin="sgl-project/sglang#26588",
    ),
    Patch(
        name="vision_batch",
        summary="Images and video frames go through the vision encoder in batches",
        numerics=TOLERANCE,
        default=True,
        origin="pyc96/sglang#18; upstream sgl-project/sglang#26606 (open)",
    ),
    Patch(
        name="vision_positions",
        summary="Rows of the vision encoder's position table are looked up, not multiplied out",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="vision_clamps",
        summary="Activations of the vision and audio encoders are not clamped to infinite bounds",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="vision_masks",
        summary="No attention mask in the vision encoder where the attention does not read it",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="vision_syncs",
        summary="The vision encoder's layers do not wait for the GPU to learn a length they know",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="vision_rope",
        summary="Rotary embedding of the vision encoder in one launch for Q and one for K",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="optional_kv",
        summary="Layers that share KV (E2B, E4B) run under piecewise CUDA graphs",
        numerics=BEHAVIOUR,
        default=True,
        origin="pyc96/sglang#18; upstream sgl-project/sglang#26515",
    ),
    Patch(
        name="mm_prefill_graph",
        summary="Piecewise CUDA graphs for the language model of models that take pictures",
        numerics=BEHAVIOUR,
        default=True,
        origin="pyc96/sglang#18",
        aliases=(Alias("SGLANG_ENABLE_PIECEWISE_CUDA_GRAPH_FOR_MM", disables=False),),
    ),
    Patch(
        name="yoco",
        summary="Prefill gives layers that share KV (E2B, E4B) only the rows whose logits are wanted",
        numerics=TOLERANCE,
        default=True,
        origin="pyc96/sglang#18; upstream sgl-project/sglang#27183 (open)",
        aliases=(Alias("SGLANG_GEMMA4_YOCO", disables=False),),
    ),
    Patch(
        name="yoco_graph",
        summary="Prefill's layers that share KV, on the rows that `yoco` leaves, in CUDA graphs",
        numerics=BEHAVIOUR,
        default=True,
        requires=("yoco",),
    ),
    Patch(
        name="yoco_piecewise",
        summary="The cut of `yoco` where SGLang runs the prefill in piecewise CUDA graphs",
        numerics=TOLERANCE,
        default=True,
        requires=("yoco", "optional_kv"),
    ),
    Patch(
        name="shared_kv_pool",
        summary="No KV memory for layers that share another layer's (E2B, E4B)",
        numerics=BEHAVIOUR,
        default=True,
    ),
    Patch(
        name="swa_ratio",
        summary="Default swa_full_tokens_ratio of 0.15 for the MoE models; a given one stays",
        numerics=BEHAVIOUR,
        default=False,
        origin="pyc96/sglang#2, #18",
    ),
    Patch(
        name="decode_attention",
        summary="Decode attention with the window's own splits, for heads of 256 and 512 (Hopper)",
        numerics=TOLERANCE,
        default=True,
    ),
    Patch(
        name="moe_configs",
        summary="Block sizes of the fused experts' kernel, tuned for Gemma 4's experts on this GPU",
        numerics=TOLERANCE,
        default=True,
        origin="sgl-project/sglang#26588",
    ),
    Patch(
        name="mtp_merge_batch",
        summary="MTP: a batch whose requests all finished in one step can be merged with a new one",
        numerics=BEHAVIOUR,
        default=True,
        origin="pyc96/sglang#22; upstream sgl-project/sglang#26859",
    ),
    Patch(
        name="frozen_kv_views",
        summary="MTP: the draft's attention backend follows the KV pool that is swapped in",
        numerics=BEHAVIOUR,
        default=True,
        origin="pyc96/sglang#6; upstream sgl-project/sglang#26966",
    ),
    Patch(
        name="kv_scales",
        summary="8-bit KV cache: who reads another layer's cache uses the scales it was written with",
        numerics=BEHAVIOUR,
        default=True,
        origin="vllm-project/vllm#55559, #48666",
    ),
    Patch(
        name="mtp_launch",
        summary="MTP: an assistant without pipeline group or number of experts can be loaded",
        numerics=BEHAVIOUR,
        default=True,
        origin="sgl-project/sglang#26026",
    ),
    Patch(
        name="mtp_moe_runner",
        summary="Unquantised Gemma 4 MoE never gets a FlashInfer runner that was not asked for",
        numerics=BEHAVIOUR,
        default=True,
        origin="sgl-project/sglang#26026",
    ),
    Patch(
        name="mtp_chain",
        summary="MTP: a chain of drafts takes the largest logit; no softmax, no search in a tree",
        # The token is stock's but where a softmax rounds two logits to one probability.
        numerics=TOLERANCE,
        default=True,
    ),
    Patch(
        name="mtp_seed_graph",
        summary="MTP: the seed step of the draft, which stock runs eagerly, in CUDA graphs",
        numerics=BEHAVIOUR,
        default=True,
        origin="upstream sgl-project/sglang#25539",
    ),
    Patch(
        name="mtp_metadata",
        summary="MTP: the draft attends with the metadata of the seed step before it",
        numerics=BEHAVIOUR,
        default=True,
        requires=("mtp_seed_graph",),
    ),
    Patch(
        name="swa_window",
        summary="Sliding layers attend to as many tokens as the model was trained with, not one more",
        numerics=BEHAVIOUR,  # a fix, and the one that changes what stock computes
        default=False,
        origin="upstream sgl-project/sglang#26147",
    ),
    Patch(
        name="trtllm_debug",
        summary="Traps before the TRT-LLM attention kernel and behind the sliding-window allocator",
        numerics=BEHAVIOUR,
        default=False,
        origin="pyc96/sglang#3",
        aliases=(Alias("SGLANG_TRTLLM_MHA_DEBUG", disables=False),),
    ),
)


def by_name(name: str) -> Patch:
    """The record called ``name``; KeyError if there is none."""
    for patch in CATALOGUE:
        if patch.name == name:
            return patch
    raise KeyError(name)
