"""Ports whose sources are the same in every supported release line: what they stand on, as data."""

from __future__ import annotations

from gemma4_turbo.engine.port import Port

HERE = __package__
ROOT = "sglang"  # the package that all ports are for
GEMMA4_MODELS = "sglang.srt.models.gemma4_"  # how the modules of its models begin
GEMMA4_KINDS = frozenset({"causal", "mm", "unified", "mtp"})  # DiffusionGemma is beside them


# The vision encoder is the same from 0.5.11 on; its linear layers and backends change later.
VISION_RELEASES = (
    "0.5.11",
    "0.5.12",
    "0.5.12.post1",
    "0.5.13",
    "0.5.13.post1",
    "0.5.14",
    "0.5.15",
    "0.5.15.post1",
    "0.5.16",
    "0.5.17",
    "0.5.18",
    "0.5.19",
    "0.5.20",
    "0.5.21",
    "0.5.22",
    "0.5.23",
)


PORTS: dict[str, Port] = {
    "vision_batch": Port(
        module=f"{HERE}.vision.vision_batch",
        targets=(
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_image_feature",
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_video_feature",
        ),
        relies_on=(
            "sglang.srt.models.gemma4_mm:Gemma4MultimodalEmbedder.forward",
            "sglang.srt.models.gemma4_vision:Gemma4VisionEncoder.forward",
            "sglang.srt.models.gemma4_vision:Gemma4VisionTransformer.forward",
            "sglang.srt.models.gemma4_vision:Gemma4VisionPatchEmbedder._position_embeddings",
        ),
        reads=(
            (
                "sglang.srt.models.gemma4_mm:Gemma4MultimodalEmbedder.__init__",
                ("embedding_pre_projection_norm", "embedding_projection"),
            ),
        ),
        written_for=VISION_RELEASES,
    ),
    "vision_positions": Port(
        module=f"{HERE}.vision.vision_positions",
        targets=("sglang.srt.models.gemma4_vision:Gemma4VisionPatchEmbedder._position_embeddings",),
        relies_on=("sglang.srt.models.gemma4_vision:Gemma4VisionPatchEmbedder.__init__",),
        written_for=VISION_RELEASES,
    ),
    "vision_rope": Port(
        module=f"{HERE}.vision.vision_rope",
        targets=("sglang.srt.models.gemma4_vision:_apply_multidimensional_rope",),
        relies_on=(
            "sglang.srt.models.gemma4_vision:_apply_rotary",
            "sglang.srt.models.gemma4_vision:_rotate_half",
        ),
        written_for=VISION_RELEASES,
    ),
    "vision_clamps": Port(
        module=f"{HERE}.vision.vision_clamps",
        targets=(
            "sglang.srt.layers.clippable_linear:ClippableRowParallelLinear.forward",
            "sglang.srt.layers.clippable_linear:ClippableColumnParallelLinear.forward",
            "sglang.srt.layers.clippable_linear:ClippableQKVParallelLinear.forward",
            "sglang.srt.layers.clippable_linear:ClippableGateUpParallelLinear.forward",
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.load_weights",
        ),
        # The loader changes from release to release; the port waits for its end and nothing else.
        written_for=VISION_RELEASES[1:],
    ),
    "vision_masks": Port(
        module=f"{HERE}.vision.vision_masks",
        targets=("sglang.srt.models.gemma4_vision:Gemma4VisionAttention.forward",),
        # None of these reads the mask, in any of the releases.
        relies_on=(
            "sglang.srt.layers.attention.vision:VisionTritonAttention.forward",
            "sglang.srt.layers.attention.vision:VisionFlash3Attention.forward",
            "sglang.srt.layers.attention.vision:VisionFlash4Attention.forward",
        ),
        written_for=VISION_RELEASES,
    ),
}
