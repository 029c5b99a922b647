"""`vision_batch`: images and video frames go through the vision encoder in batches.

``get_image_feature`` and ``get_video_feature`` collect the entries, encode those of one patch count
together (`gemma4_turbo.plans.vision_batches`) and project all valid tokens in one call. Inputs of
another form than SGLang's processor makes take stock's path, and so do stock's errors. A hook in the
encoder or on the projection is to see image after image: stock's path as well.

Numerics: a GEMM over more rows may choose another kernel, so values differ from stock's by the
rounding of the weights' type; the order of the tokens is stock's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.engine.run import peer
from gemma4_turbo.plans import vision_batches as batches
from gemma4_turbo.ports.any import ranks as ranks_here
from gemma4_turbo.ports.any.vision import encoding
from gemma4_turbo.runtime import hooks
from gemma4_turbo.runtime.attempts import attempt
from gemma4_turbo.runtime.fallback import DeclinedError, Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.protocols import MultimodalItem, MultimodalModel, VisionTower

IMAGE = "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_image_feature"
VIDEO = "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_video_feature"

# By their class: whether a vision attention takes several images at once. Others run stock's way.
TAKE_BATCHES = ("VisionTritonAttention", "VisionFlash3Attention", "VisionFlash4Attention")
SDPA = "VisionSdpaAttention"

_fallback = Fallback("a batch of images")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Both functions."""
    image, video = stock[IMAGE], stock[VIDEO]

    def get_image_feature(self: MultimodalModel, items: list[MultimodalItem]) -> torch.Tensor:
        return _features(run, self, items, "image_position_ids", image)

    def get_video_feature(self: MultimodalModel, items: list[MultimodalItem]) -> torch.Tensor:
        return _features(run, self, items, "video_position_ids", video)

    return {IMAGE: get_image_feature, VIDEO: get_video_feature}


def undo(run: PatchRun) -> None:
    """Live objects were not changed."""
    _fallback.clear()


def _features(
    run: PatchRun,
    model: MultimodalModel,
    items: list[MultimodalItem],
    attribute: str,
    stock: Callable[[MultimodalModel, list[MultimodalItem]], torch.Tensor],
) -> torch.Tensor:
    """The embeddings of all items."""

    def stocks() -> torch.Tensor:
        return stock(model, items)

    if torch.compiler.is_compiling():
        return stocks()
    ranks, problem = attempt(run, "the number of ranks", _ranks)
    if ranks is None:
        run.declined(str(problem))
        return stocks()
    if ranks == 1:
        return _fallback.call(
            run, lambda: _encoded(model, _plan(model, items, attribute, 1)), stocks
        )

    def ours() -> torch.Tensor:
        plan = _fallback.prepared(run, lambda: _plan(model, items, attribute, ranks))
        return _encoded(model, plan)

    # One of several ranks alone must not begin anew: the others wait for its part.
    return _fallback.call(run, ours, stocks, through=Exception)


class Plan(NamedTuple):
    """What goes through the encoder together."""

    entries: list[encoding.Entry]
    pixels: list[encoding.Entry]  # of them, those that are no embeddings yet
    chunks: list[list[int]]
    ranks: int


def _plan(model: MultimodalModel, items: list[MultimodalItem], attribute: str, ranks: int) -> Plan:
    """From the items, the model and, on one GPU, its memory; `DeclinedError` where stock's path is to run."""
    entries = [entry for item in items for entry in _entries(model, item, attribute)]
    if not any(entry.positions is not None for entry in entries):
        raise DeclinedError("no image and no frame to encode")
    reason = model_unfit(model)
    if reason is not None:
        raise DeclinedError(reason)
    tower = model.vision_tower
    pixels = [entry for entry in entries if entry.positions is not None]
    described = describe(tower)
    # To ask the allocator takes longer than a single entry's share of anything here.
    budget = encoding.free_budget(tower.device, ranks) if len(pixels) > 1 else 0
    chunks = batches.plan(
        [entry.pixels.shape[1] for entry in pixels],
        lambda patches: batches.entry_bytes(described, patches),
        budget,
        1 if _one_at_a_time(tower) else None,
    )
    return Plan(entries, pixels, chunks, ranks)


def _encoded(model: MultimodalModel, plan: Plan) -> torch.Tensor:
    """The embeddings of all items."""
    tower, dtype = model.vision_tower, model.language_model.dtype()
    encoded = encoding.encode(
        plan.pixels, plan.chunks, tower, tower.device, dtype, halve=plan.ranks == 1
    )
    projected, masks = encoding.project(encoded, _embedder(model))
    return encoding.in_order(plan.entries, encoded, projected, masks, model.language_model.device)


def model_unfit(model: MultimodalModel) -> str | None:
    """Why this model's encoder is called image by image, or None."""
    from sglang.srt.layers.attention import vision
    from sglang.srt.models.gemma4_mm import Gemma4ForConditionalGeneration, Gemma4MultimodalEmbedder
    from sglang.srt.models.gemma4_vision import Gemma4VisionEncoder

    for part, known in (
        (model, Gemma4ForConditionalGeneration),
        (model.vision_tower, Gemma4VisionEncoder),
        (model.embed_vision, Gemma4MultimodalEmbedder),
    ):
        if type(part) is not known:
            return f"{type(part).__name__} is not SGLang's {known.__name__}"
    known_backends = [getattr(vision, name, None) for name in (*TAKE_BATCHES, SDPA)]
    for layer in model.vision_tower.encoder.layers:
        kind = type(layer.self_attn.qkv_backend)
        if kind not in known_backends:
            return f"{kind.__name__} may not take several images at once"
    if hooks.Watched([model.vision_tower, model.embed_vision]).hooked():
        return hooks.HOOKED.format("the encoder")
    return None


def _embedder(model: MultimodalModel) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tokens: model.embed_vision(inputs_embeds=tokens)


def _entries(model: MultimodalModel, item: MultimodalItem, attribute: str) -> list[encoding.Entry]:
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
            entries.append(encoding.Entry(pixels, None))
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
            encoding.Entry(pixels[i : i + 1], positions[i : i + 1]) for i in range(len(pixels))
        ]
    return entries


def describe(tower: VisionTower) -> batches.Encoder:
    """What the memory of SGLang's vision encoder depends on, under the patches that are in."""
    from gemma4_turbo.engine import states

    config = tower.config
    weight = tower.patch_embedder.position_embedding_table
    return batches.Encoder(
        config.hidden_size,
        config.intermediate_size,
        config.position_embedding_size,
        weight.element_size(),
        one_hot=peer("vision_positions").state != states.ACTIVE,
        masks=peer("vision_masks").state != states.ACTIVE,
    )


def _one_at_a_time(tower: VisionTower) -> bool:
    """SGLang's attention through torch refuses a batch in the form that Gemma 4 asks for."""
    from sglang.srt.layers.attention import vision

    backends = [layer.self_attn.qkv_backend for layer in tower.encoder.layers]
    return any(type(b) is vision.VisionSdpaAttention and b.flatten_batch for b in backends)


def _ranks() -> int:
    return ranks_here.gpus()
