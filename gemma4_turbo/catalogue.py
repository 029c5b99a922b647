"""What a user can switch: every patch as data, one record each. No name of SGLang's.

Which of SGLang's functions a patch replaces, and where its code is, is said by its ports, one for each
release line: ``ports/<line>/sources.py``. See `docs/adding-a-patch.md`.
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


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="router",
        summary="MoE routing (top-k, softmax, per-expert scale, two casts) in one launch instead of seven",
        numerics=BITWISE,
        default=True,
        origin="pyc96/sglang#1; upstream sgl-project/sglang#26502",
        aliases=(Alias("SGLANG_GEMMA4_DISABLE_FUSED_ROUTER", disables=True),),
    ),
    Patch(
        name="step_prologue",
        summary="Per-layer inputs (E2B, E4B) in two launches and a GEMM; token ids are not copied",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="moe_align",
        summary="Expert alignment of small batches for the fused MoE kernel, in one launch instead of two",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="layer_norms",
        summary="RMSNorms, residual add and router scale between attention and MLP, in one launch",
        numerics=BITWISE,
        default=True,
        origin="pyc96/sglang#18",
    ),
    Patch(
        name="router_norm",
        summary="Router RMSNorm and scale in one launch, on layers that `layer_norms` declines",
        numerics=BITWISE,
        default=True,
        origin="sgl-project/sglang#26588",
    ),
    Patch(
        name="ple_tail",
        summary="Epilogue of layers with per-layer embeddings (E2B, E4B): three launches beside the GEMMs",
        numerics=BITWISE,
        default=True,
        origin="pyc96/sglang#18",
    ),
    Patch(
        name="qkv_norm",
        summary="RMSNorms of Q, K and V with one program per token and head",
        numerics=BITWISE,
        default=True,
        origin="sgl-project/sglang#26588, #25461",
    ),
    Patch(
        name="rope_store",
        summary="RoPE and KV store in the launch of the QKV norms; no dummy K on KV-shared layers",
        numerics=BITWISE,
        default=True,
        requires=("qkv_norm",),
    ),
    Patch(
        name="qkv_proj",
        summary="QKV projection without the unused K and V rows on KV-shared layers",
        numerics=TOLERANCE,
        default=True,
        origin="sgl-project/sglang#25461",
    ),
    Patch(
        name="input_norm",
        summary="Input RMSNorm of the next layer in the launch of the layer before it",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="experts_sum",
        summary="Sum over a token's experts in the launch of the layer's last norm",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="experts_few",
        summary="Experts of up to four tokens in two launches instead of five, bound by reading their weights",
        numerics=TOLERANCE,
        default=True,
    ),
    Patch(
        name="router_few",
        summary="Router of up to eight tokens in one launch: product, top-k, softmax and scale",
        numerics=TOLERANCE,
        default=True,
        requires=("layer_norms",),
    ),
    Patch(
        name="feed_forward_few",
        summary="Router, dense MLP and experts of up to two tokens in one launch",
        numerics=TOLERANCE,
        default=False,
        requires=("layer_norms",),
    ),
    Patch(
        name="mlp_stream",
        summary="Dense MLP on a second CUDA stream, concurrent with the experts, inside CUDA graphs",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="skinny_gemm",
        summary="Linear layers of up to 64 tokens, with the activation fused into the preceding GEMM",
        numerics=TOLERANCE,
        default=True,
    ),
    Patch(
        name="mlp_few",
        summary="Dense MLP of up to two tokens in one launch, in layers without experts",
        numerics=TOLERANCE,
        default=False,
    ),
    Patch(
        name="pdl",
        summary="Programmatic dependent launch between the package's own kernels (Hopper and later)",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="extend_attention",
        summary="Prefill and verification attention for head sizes 128, 256 and 512 (Hopper); window indices without host syncs",
        numerics=TOLERANCE,
        default=True,
        origin="sgl-project/sglang#26588",
    ),
    Patch(
        name="vision_batch",
        summary="Batched vision encoder: images and video frames of one patch count share a call",
        numerics=TOLERANCE,
        default=True,
        origin="pyc96/sglang#18; upstream sgl-project/sglang#26606 (open)",
    ),
    Patch(
        name="vision_positions",
        summary="Vision position embeddings by table lookup instead of a one-hot matrix product",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="vision_clamps",
        summary="Clamps with infinite bounds are skipped in the vision and audio encoders",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="vision_masks",
        summary="Attention masks of the vision encoder are built only for backends that read them",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="vision_syncs",
        summary="Vision attention without device-to-host syncs for a length that the host knows",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="vision_rope",
        summary="RoPE of the vision encoder in one launch each for Q and K",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="picture_memory",
        summary="Memory fix: nothing of a request's pictures stays in a CUDA memory pool that was given up",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="optional_kv",
        summary="Prefill CUDA graphs for text-only E2B and E4B, with which stock fails to start",
        numerics=BEHAVIOUR,
        default=True,
        origin="pyc96/sglang#18; upstream sgl-project/sglang#26515",
    ),
    Patch(
        name="mm_prefill_graph",
        summary="CUDA graphs of prefill for the language model of multimodal checkpoints",
        numerics=BEHAVIOUR,
        default=True,
        origin="pyc96/sglang#18",
        aliases=(Alias("SGLANG_ENABLE_PIECEWISE_CUDA_GRAPH_FOR_MM", disables=False),),
    ),
    Patch(
        name="yoco",
        summary="You Only Cache Once: KV-shared layers (E2B, E4B) prefill only the rows whose logits are needed",
        numerics=TOLERANCE,
        default=True,
        origin="pyc96/sglang#18; upstream sgl-project/sglang#27183 (open)",
        aliases=(Alias("SGLANG_GEMMA4_YOCO", disables=False),),
    ),
    Patch(
        name="yoco_graph",
        summary="CUDA graphs for the KV-shared layers of a prefill, on the rows that `yoco` keeps",
        numerics=BEHAVIOUR,
        default=True,
        requires=("yoco",),
    ),
    Patch(
        name="yoco_piecewise",
        summary="The cut of `yoco` inside CUDA graphs of prefill",
        numerics=TOLERANCE,
        default=True,
        requires=("yoco", "optional_kv"),
    ),
    Patch(
        name="shared_kv_pool",
        summary="KV pools without memory for KV-shared layers (18 of 42 on E4B, 20 of 35 on E2B)",
        numerics=BEHAVIOUR,
        default=True,
    ),
    Patch(
        name="swa_ratio",
        summary="Default `swa_full_tokens_ratio` of 0.15 for the MoE models; an explicit value wins",
        numerics=BEHAVIOUR,
        default=False,
        origin="pyc96/sglang#2, #18",
    ),
    Patch(
        name="decode_attention",
        summary="Decode attention for head sizes 256 and 512 (Hopper), with splits chosen on the device from the lengths",
        numerics=TOLERANCE,
        default=True,
    ),
    Patch(
        name="moe_configs",
        summary="Tuned block sizes of the fused MoE kernel for 26B-A4B on H100 and H200",
        numerics=TOLERANCE,
        default=True,
        origin="sgl-project/sglang#26588",
    ),
    Patch(
        name="mtp_merge_batch",
        summary="MTP fix: merging a batch whose requests all finished in one verify step",
        numerics=BEHAVIOUR,
        default=True,
        origin="pyc96/sglang#22; upstream sgl-project/sglang#26859",
    ),
    Patch(
        name="kv_scales",
        summary="8-bit KV cache fix: KV-shared layers and the MTP draft dequantise with the owner layer's scales",
        numerics=BEHAVIOUR,
        default=True,
        origin="vllm-project/vllm#55559, #48666",
    ),
    Patch(
        name="mtp_chain",
        summary="MTP drafts with one candidate per step: arg-max instead of softmax, no tree search",
        # The token is stock's but where a softmax rounds two logits to one probability.
        numerics=TOLERANCE,
        default=True,
    ),
    Patch(
        name="mtp_seed_graph",
        summary="CUDA graphs for the MTP draft's seed step, which stock runs eagerly",
        numerics=BEHAVIOUR,
        default=True,
        origin="upstream sgl-project/sglang#25539",
    ),
    Patch(
        name="mtp_metadata",
        summary="Attention metadata and positions of the MTP seed step are reused by the draft",
        numerics=BEHAVIOUR,
        default=True,
        requires=("mtp_seed_graph",),
    ),
    Patch(
        name="mtp_sync",
        summary="The MTP draft waits for no lengths from the GPU; the tree's mask is written where the target reads it",
        numerics=BITWISE,
        default=True,
    ),
    Patch(
        name="swa_window",
        summary="Sliding-window off-by-one fix: layers attend to exactly the trained window; changes the output",
        numerics=BEHAVIOUR,  # a fix, and the one that changes what stock computes
        default=False,
        origin="upstream sgl-project/sglang#26147",
    ),
    Patch(
        name="trtllm_debug",
        summary="Debug traps around the TRT-LLM attention kernel and the sliding-window allocator",
        numerics=BEHAVIOUR,
        default=False,
        origin="pyc96/sglang#3",
        aliases=(Alias("SGLANG_TRTLLM_MHA_DEBUG", disables=False),),
    ),
)

# Defects that are looked for: no release from 0.5.11 to 0.5.23 has one, development trees between two
# had. Listings name them in one line, and give a row to one that is found.
DEFECTS: tuple[Patch, ...] = (
    Patch(
        name="frozen_kv_views",
        summary="MTP fix: the draft's attention backend follows a swapped KV pool",
        numerics=BEHAVIOUR,
        default=True,
        origin="pyc96/sglang#6; upstream sgl-project/sglang#26966",
    ),
    Patch(
        name="mtp_launch",
        summary="MTP fix: assistants without a pipeline group or expert count can be loaded",
        numerics=BEHAVIOUR,
        default=True,
        origin="sgl-project/sglang#26026",
    ),
    Patch(
        name="mtp_moe_runner",
        summary="MTP fix: an unquantised MoE gets no FlashInfer runner unless one is requested",
        numerics=BEHAVIOUR,
        default=True,
        origin="sgl-project/sglang#26026",
    ),
)

CATALOGUE = PATCHES + DEFECTS


def by_name(name: str) -> Patch:
    """The record called ``name``; KeyError if there is none."""
    for patch in CATALOGUE:
        if patch.name == name:
            return patch
    raise KeyError(name)
