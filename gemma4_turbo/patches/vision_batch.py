"""`vision_batch`: images and video frames go through the vision encoder in batches.

``get_image_feature`` and ``get_video_feature`` collect the entries, encode those of one patch count
together (`gemma4_turbo.forwards.vision_batches`) and project all valid tokens in one call. Inputs of
another form than SGLang's processor makes take stock's path, and so do stock's errors.

Numerics: a GEMM over more rows may choose another kernel, so values differ from stock's by the
rounding of the weights' type; the order of the tokens is stock's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.checks import Check
from gemma4_turbo.forwards import vision_batches as batches

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import MultimodalDataItem

    from gemma4_turbo.patching import PatchRun

IMAGE = "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_image_feature"
VIDEO = "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_video_feature"


class DeclinedError(Exception):
    """Why stock's path runs."""


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Both functions."""
    image, video = stock[IMAGE], stock[VIDEO]

    def get_image_feature(self: Any, items: list[MultimodalDataItem]) -> torch.Tensor:
        found = _features(run, self, items, "image_position_ids")
        return image(self, items) if found is None else found

    def get_video_feature(self: Any, items: list[MultimodalDataItem]) -> torch.Tensor:
        found = _features(run, self, items, "video_position_ids")
        return video(self, items) if found is None else found

    return {IMAGE: get_image_feature, VIDEO: get_video_feature}


def undo(run: PatchRun) -> None:
    """Live objects were not changed."""


def _features(run: PatchRun, model: Any, items: list[Any], attribute: str) -> torch.Tensor | None:
    """The embeddings of all items, or None where stock's path must run."""
    if torch.compiler.is_compiling():
        return None
    try:
        entries = [entry for item in items for entry in _entries(model, item, attribute)]
        if not entries:
            raise DeclinedError("no image and no frame")
    except DeclinedError as reason:
        run.declined(str(reason))
        return None
    tower = model.vision_tower
    device, dtype = tower.device, model.language_model.dtype()
    pixels = [entry for entry in entries if entry.positions is not None]
    encoded: list[tuple[torch.Tensor, torch.Tensor]] = []
    projected = masks = None
    if pixels:
        described = describe(tower)
        ranks = _ranks()
        # To ask the allocator takes longer than a single entry's share of anything here.
        budget = batches.free_budget(device, ranks) if len(pixels) > 1 else 0
        chunks = batches.plan(
            [entry.pixels.shape[1] for entry in pixels],
            lambda patches: batches.entry_bytes(described, patches),
            budget,
            1 if _one_at_a_time(tower) else None,
        )
        encoded = batches.encode(pixels, chunks, tower, device, dtype, halve=ranks == 1)
        projected, masks = batches.project(encoded, _embedder(model))
    run.engaged(False)
    return batches.in_order(entries, encoded, projected, masks, model.language_model.device)


def _embedder(model: Any) -> Any:
    return lambda tokens: model.embed_vision(inputs_embeds=tokens)


def _entries(model: Any, item: Any, attribute: str) -> list[batches.Entry]:
    """An item's images or frames. `DeclinedError` if it holds anything unexpected."""
    from sglang.srt.managers.schedule_batch import flatten_nested_list

    features = flatten_nested_list([item.feature])
    places = flatten_nested_list([getattr(item, attribute, None)])
    width = model.config.text_config.hidden_size
    video = attribute == "video_position_ids"
    entries = []
    for index, pixels in enumerate(features):
        if not isinstance(pixels, torch.Tensor):
            raise DeclinedError(f"pixel values are a {type(pixels).__name__}")
        if pixels.dim() in (2, 3) and pixels.shape[-1] == width:
            if pixels.dim() != 2:
                raise DeclinedError("an embedding that was given has three dimensions")
            entries.append(batches.Entry(pixels, None))
            continue
        positions = places[index] if index < len(places) else None
        if not isinstance(positions, torch.Tensor):
            raise DeclinedError(f"pixel values have no {attribute}")
        if video and pixels.dim() == 4:
            pixels = pixels.flatten(0, 1)
        if video and positions.dim() == 4:
            positions = positions.flatten(0, 1)
        if not video and pixels.dim() == 2:
            pixels = pixels.unsqueeze(0)
        if not video and positions.dim() == 2:
            positions = positions.unsqueeze(0)
        if pixels.dim() != 3 or positions.shape != (*pixels.shape[:2], 2):
            raise DeclinedError(
                f"pixel values {tuple(pixels.shape)} and {attribute} {tuple(positions.shape)} "
                "do not belong together"
            )
        entries += [
            batches.Entry(pixels[i : i + 1], positions[i : i + 1]) for i in range(len(pixels))
        ]
    return entries


def describe(tower: Any) -> batches.Encoder:
    """What the memory of SGLang's vision encoder depends on, under the patches that are in."""
    from gemma4_turbo import states
    from gemma4_turbo.patching import ENGINE

    config = tower.config
    weight = tower.patch_embedder.position_embedding_table
    return batches.Encoder(
        config.hidden_size,
        config.intermediate_size,
        config.position_embedding_size,
        weight.element_size(),
        one_hot=ENGINE.runs["vision_positions"].state != states.ACTIVE,
        masks=ENGINE.runs["vision_masks"].state != states.ACTIVE,
    )


def _one_at_a_time(tower: Any) -> bool:
    """SGLang's attention through torch refuses a batch in the form that Gemma 4 asks for."""
    backends = [layer.self_attn.qkv_backend for layer in tower.encoder.layers]
    return any(type(b).__name__ == "VisionSdpaAttention" and b.flatten_batch for b in backends)


def _ranks() -> int:
    from sglang.srt.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


def verify(run: PatchRun, device: str) -> list[Check]:
    """Nothing without a model: what is batched is SGLang's own encoder."""
    return []
