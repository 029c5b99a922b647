"""Batched images and frames on SGLang's own multimodal model, against stock image by image."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.plans import vision_batches as batches
from gemma4_turbo.ports.any.vision import encoding
from gemma4_turbo.ports.any.vision import vision_batch as patch
from tests.cpu import vision
from tests.cpu.conftest import only_patch, patched_sglang

NAME = "vision_batch"
BACKENDS = pytest.mark.parametrize("backend", ["triton_attn", "sdpa"])


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    """Each test starts with this patch on, and no other."""
    with only_patch(NAME), torch.no_grad():
        yield


class Calls:
    """Batch sizes that the encoder and token counts that the projection were called with."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, int]] = []
        self.projected: list[int] = []
        tower, embed = type(model.vision_tower), type(model.embed_vision)
        encode, project = tower.forward, embed.forward

        def counted_encode(this, pixel_values, pixel_position_ids):
            self.batches.append(tuple(pixel_values.shape[:2]))
            return encode(this, pixel_values, pixel_position_ids)

        def counted_project(this, inputs_embeds):
            self.projected.append(inputs_embeds.shape[1])
            return project(this, inputs_embeds)

        monkeypatch.setattr(tower, "forward", counted_encode)
        monkeypatch.setattr(embed, "forward", counted_project)


def stock(model: Any, items: list[Any], what: str = "get_image_feature") -> torch.Tensor:
    """Stock's own function, with the patch taken out for the call."""
    ENGINE.revert()
    found = getattr(model, what)(items)
    ENGINE.apply(only=[NAME])
    return found


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Two bf16 roundings of the largest value of a token: GEMMs of another height add otherwise."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    scale = expected.float().abs().amax(dim=-1, keepdim=True)
    assert bool(((found.float() - expected.float()).abs() <= 2**-7 * scale).all())


IMAGES = [(4, 4, 0), (4, 2, 8), (8, 4, 0), (4, 4, 0), (2, 2, 0), (8, 4, 0)]


def mixed() -> list[Any]:
    return [vision.image(*size, seed=seed) for seed, size in enumerate(IMAGES)]


def flattens(model: Any) -> bool:
    """Whether stock's attention through torch takes one image at a time, as in 0.5.12."""
    parts = [part for part in model.modules() if type(part).__name__ == "VisionSdpaAttention"]
    return any(part.flatten_batch for part in parts)


@BACKENDS
def test_mixed_sizes_in_stocks_order(backend: str, monkeypatch: pytest.MonkeyPatch):
    """Three sizes interleaved, one with padding: an encoder call a size, one projection."""
    model = vision.model(backend)
    expected = stock(model, mixed())
    apart = [stock(model, [item]) for item in mixed()]
    assert torch.equal(torch.cat(apart), expected)
    assert all((a.float() - b.float()).abs().max() > 0.5 for a, b in zip(apart, apart[3:]))  # noqa: B905
    before = ENGINE.runs[NAME].counters.engaged
    calls = Calls(model, monkeypatch)
    assert_near(model.get_image_feature(mixed()), expected)
    assert ENGINE.runs[NAME].counters.engaged == before + 1
    assert calls.projected == [len(expected)]
    if backend == "triton_attn" or not flattens(model):
        assert calls.batches == [(3, 16), (2, 32), (1, 4)]
    else:
        assert {batch for batch, _ in calls.batches} == {1}


def test_one_image_is_stocks_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    """The same two calls, on the very pixels, with no copy of them."""
    model = vision.model("triton_attn")
    item = vision.image(4, 4)
    expected = stock(model, [item])
    calls = Calls(model, monkeypatch)
    assert torch.equal(model.get_image_feature([item]), expected)
    assert calls.batches == [(1, 16)]
    assert calls.projected == [4]


def test_no_image_takes_stocks_path():
    model = vision.model("triton_attn")
    found = model.get_image_feature([])
    assert torch.equal(found, stock(model, []))
    assert found.shape == (0, vision.WIDTH)
    assert "no image" in ENGINE.runs[NAME].full_reason()


def test_images_of_one_item():
    """``[images, patches, ...]`` in one item, and a list of tensors in another."""
    model = vision.model("triton_attn")
    made = [vision.pixels(4, 4, seed=i) for i in range(4)]
    several = SimpleNamespace(
        feature=torch.stack([p for p, _ in made[:2]]),
        image_position_ids=torch.stack([q for _, q in made[:2]]),
    )
    listed = SimpleNamespace(
        feature=[p for p, _ in made[2:]], image_position_ids=[q for _, q in made[2:]]
    )
    items = [several, listed]
    assert_near(model.get_image_feature(items), stock(model, items))


def test_a_video_and_videos_of_two_sizes(monkeypatch: pytest.MonkeyPatch):
    model = vision.model("triton_attn")
    items = [vision.video(3, 4, 4), vision.video(2, 4, 2, seed=5), vision.video(2, 4, 4, seed=9)]
    expected = stock(model, items, "get_video_feature")
    calls = Calls(model, monkeypatch)
    assert_near(model.get_video_feature(items), expected)
    assert calls.batches == [(5, 16), (2, 8)]


def test_attention_through_torch_takes_a_video_too():
    """Stock of 0.5.12 refuses the frames as a batch there; here each goes by itself."""
    items = [vision.video(2, 4, 4)]
    model = vision.model("sdpa")
    if flattens(model):
        with pytest.raises(AssertionError, match="flatten_batch"):
            stock(model, items, "get_video_feature")
    ENGINE.apply(only=[NAME])
    frames = items[0].feature[0], items[0].video_position_ids[0]
    apart = [SimpleNamespace(feature=p, image_position_ids=q) for p, q in zip(*frames, strict=True)]
    assert_near(model.get_video_feature(items), stock(model, apart))


def test_embeddings_that_were_given_keep_their_place(monkeypatch: pytest.MonkeyPatch):
    model = vision.model("triton_attn")
    items = [
        vision.given(3, seed=1),
        vision.image(4, 4, seed=2),
        vision.image(4, 2, 8, seed=3),
        vision.given(1, seed=4),
        vision.image(4, 4, seed=5),
        vision.given(2, seed=6),
    ]
    expected = stock(model, items)
    found = model.get_image_feature(items)
    assert_near(found, expected)
    assert torch.equal(found[:3], items[0].feature)
    assert torch.equal(found[-2:], items[-1].feature)
    calls = Calls(model, monkeypatch)
    only = [items[0], items[3]]
    assert torch.equal(model.get_image_feature(only), stock(model, only))
    assert not calls.batches


@pytest.mark.parametrize(
    "broken",
    [
        SimpleNamespace(feature=vision.pixels(4, 4)[0]),
        SimpleNamespace(feature=vision.pixels(4, 4)[0], image_position_ids=None),
        SimpleNamespace(feature=[*vision.pixels(4, 4)], image_position_ids=[]),
    ],
)
def test_stocks_errors_stay(broken: Any):
    model = vision.model("triton_attn")
    with pytest.raises(ValueError, match="has no matching image_position_ids"):
        model.get_image_feature([broken])
    assert "image_position_ids" in ENGINE.runs[NAME].full_reason()


def test_positions_of_another_length_take_stocks_path():
    model = vision.model("triton_attn")
    feature, places = vision.pixels(4, 4)
    with pytest.raises(RuntimeError):
        model.get_image_feature([SimpleNamespace(feature=feature, image_position_ids=places[:12])])
    assert "do not belong together" in ENGINE.runs[NAME].full_reason()


# -- memory --------------------------------------------------------------------------------------------


def test_chunks_stay_inside_the_budget(monkeypatch: pytest.MonkeyPatch):
    """Two of 16 patches fit, and 32 patches are too large for it alone: one at a time, stock's values."""
    model = vision.model("triton_attn")
    described = patch.describe(model.vision_tower)
    budget = 2 * batches.entry_bytes(described, 16)
    assert batches.entry_bytes(described, 64) > budget
    monkeypatch.setattr(encoding, "FIXED_BUDGET", budget)
    items = [*mixed(), vision.image(8, 8, seed=7), vision.image(8, 8, seed=8)]
    expected = stock(model, items)
    calls = Calls(model, monkeypatch)
    assert_near(model.get_image_feature(items), expected)
    assert calls.batches == [(2, 16), (1, 16), (1, 32), (1, 32), (1, 4), (1, 64), (1, 64)]


@pytest.mark.parametrize("positions", [10240, 32])
def test_the_peak_is_what_is_said(positions: int):
    """Bytes that the dispatcher saw alive at once in the real encoder, against the formula."""
    from sglang.srt.models.gemma4_vision import Gemma4VisionPatchEmbedder
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    class Alive(TorchDispatchMode):
        """The most bytes that results of operators held at a time."""

        def __init__(self) -> None:
            super().__init__()
            self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
            self.peak = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                storage = out.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            alive = [size for ref, size in self.storages.values() if not ref.expired()]
            self.peak = max(self.peak, sum(alive))
            return out

    tower = vision.model("triton_attn").vision_tower
    described = patch.describe(tower)._replace(positions=positions, masks=False)
    config = SimpleNamespace(patch_size=4, hidden_size=64, position_embedding_size=positions)
    embedder = Gemma4VisionPatchEmbedder(config).bfloat16()
    with Alive() as alive:
        embedder._position_embeddings(
            torch.zeros(1, 16, 2, dtype=torch.long), torch.zeros(1, 16, dtype=torch.bool)
        )
    stated = batches.entry_bytes(described, 16)
    if positions == 10240:  # beside the table's rows and the clamped places, a few KB
        assert stated == 16 * 2 * 10240 * (8 + 2)
        assert stated <= alive.peak <= stated * 1.01
    else:  # the layers outweigh a small table
        assert alive.peak < stated


def test_the_other_patches_shrink_the_bound():
    """Without one-hot and without masks more images go together."""
    tower = vision.model("triton_attn").vision_tower
    alone = patch.describe(tower)
    assert (alone.one_hot, alone.masks) == (True, True)
    ENGINE.apply(only=[NAME, "vision_positions", "vision_masks"])
    assert patch.describe(tower)[-2:] == (False, False)
    large = alone._replace(positions=10240, hidden_size=768, intermediate_size=3072)
    small = large._replace(one_hot=False, masks=False)
    assert batches.entry_bytes(small, 2520) * 4 < batches.entry_bytes(large, 2520)


@pytest.mark.parametrize(("ranks", "device"), [(1, "cpu"), (2, "cuda"), (8, "cpu")])
def test_ranks_cut_alike(ranks: int, device: str):
    """Free memory differs between ranks; what they all-reduce must not."""
    assert encoding.free_budget(torch.device(device), ranks) == encoding.FIXED_BUDGET


def gpu(monkeypatch: pytest.MonkeyPatch, free: int, total: int, idle: int) -> None:
    """A GPU with so much free, and an allocator that holds so much idle."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000 + idle)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)


def budgets(monkeypatch: pytest.MonkeyPatch, *states: tuple[int, int, int]) -> list[int]:
    """Of one process, one state of its GPU after the other."""
    monkeypatch.setattr(encoding, "_least_idle", {})
    found = []
    for state in states:
        gpu(monkeypatch, *state)
        found.append(encoding.free_budget(torch.device("cuda"), 1))
    return found


def test_the_budget_of_one_gpu(monkeypatch: pytest.MonkeyPatch):
    """Half of what is free; at most a tenth of the GPU, and no more than pays."""
    most = encoding.MOST_BUDGET
    assert budgets(monkeypatch, (4000, 100_000, 0)) == [2000]
    assert budgets(monkeypatch, (90_000, 100_000, 0)) == [10_000]
    assert budgets(monkeypatch, (90 * most, 100 * most, 0)) == [most]


def test_idle_pools_of_graphs_are_not_free(monkeypatch: pytest.MonkeyPatch):
    """What was idle from the start never counts; what later chunks left behind does."""
    at_first = (1000, 100_000, 2000)
    a_chunk_is_cached = (500, 100_000, 2500)
    nothing_but_cache = (0, 100_000, 3000)
    found = budgets(monkeypatch, at_first, a_chunk_is_cached, nothing_but_cache)
    assert found == [500, 500, 500]
    # An emptied cache shows how much of the first was the graphs'.
    assert budgets(monkeypatch, at_first, (1500, 100_000, 1500), at_first) == [500, 750, 750]


def test_a_single_image_asks_nobody_for_memory(monkeypatch: pytest.MonkeyPatch):
    """The allocator's figures take longer than all else here."""
    model = vision.model("triton_attn")
    asked: list[int] = []
    budget = encoding.free_budget
    monkeypatch.setattr(encoding, "free_budget", lambda *a: asked.append(1) or budget(*a))
    model.get_image_feature([vision.given(2), vision.image(4, 4)])
    assert not asked
    model.get_image_feature([vision.image(4, 4), vision.image(4, 4)])
    assert asked


def test_out_of_memory_halves_the_chunk(monkeypatch: pytest.MonkeyPatch):
    """Down to one entry; an entry that fails by itself fails as in stock."""
    model = vision.model("triton_attn")
    items = [vision.image(4, 4, seed=i) for i in range(5)]
    expected = stock(model, items)
    calls = Calls(model, monkeypatch)
    tower = type(model.vision_tower)
    encode = tower.forward
    limit = 2

    def scarce(this, pixel_values, pixel_position_ids):
        if len(pixel_values) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(this, pixel_values, pixel_position_ids)

    monkeypatch.setattr(tower, "forward", scarce)
    assert_near(model.get_image_feature(items), expected)
    assert [batch for batch, _ in calls.batches] == [2, 1, 2]
    monkeypatch.setattr(patch, "_ranks", lambda: 2)
    with pytest.raises(torch.OutOfMemoryError):  # the other ranks would not follow
        model.get_image_feature(items)
    monkeypatch.setattr(patch, "_ranks", lambda: 1)
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        model.get_image_feature(items)


def test_plan_keeps_every_entry_once_and_in_order():
    chunks = batches.plan([4, 9, 4, 4, 9, 1], lambda patches: patches, 8, None)
    assert chunks == [[0, 2], [3], [1], [4], [5]]
    assert batches.plan([], lambda patches: patches, 8, None) == []
    assert batches.plan([4, 4], lambda patches: 0, 0, 1) == [[0], [1]]


# -- who is to see image after image ---------------------------------------------------------------------


def parts(model: Any) -> list[Any]:
    layer = model.vision_tower.encoder.layers[1]
    return [model.vision_tower, layer, layer.mlp.gate_up, model.embed_vision]


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("how", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_sees_and_changes_what_it_does_in_stock(part: int, how: str):
    """On the encoder, in it, and on the projection; also one that comes after a batch has run."""
    model = vision.model("triton_attn")
    items = [vision.image(4, 4, seed=1), vision.image(4, 4, seed=2), vision.image(4, 2, 8, seed=3)]
    expected = stock(model, items)
    assert_near(model.get_image_feature(items), expected)
    seen: list[Any] = []
    if how == "register_forward_hook":

        def hook(module: Any, given: Any, found: Any) -> Any:
            first = found[0] if isinstance(found, tuple) else found
            seen.append(tuple(first.shape))
            return (first * 2, *found[1:]) if isinstance(found, tuple) else found * 2
    else:

        def hook(module: Any, given: Any) -> Any:  # type: ignore[misc]
            seen.append([tuple(x.shape) for x in given])

    run = ENGINE.runs[NAME]
    before = run.counters.engaged
    handle = getattr(parts(model)[part], how)(hook)
    try:
        found = model.get_image_feature(items)
        patched = list(seen)
        seen.clear()
        steered = stock(model, items)
    finally:
        handle.remove()
    assert torch.equal(found, steered)
    assert patched == seen != []
    assert run.counters.engaged == before
    ENGINE.apply(only=[NAME])
    assert_near(model.get_image_feature(items), expected)


def test_hooks_for_all_modules_count(monkeypatch: pytest.MonkeyPatch):
    model = vision.model("triton_attn")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    before = ENGINE.runs[NAME].counters.engaged
    try:
        model.get_image_feature([vision.image(4, 4), vision.image(4, 4)])
    finally:
        handle.remove()
    assert ENGINE.runs[NAME].counters.engaged == before
    assert "the encoder has forward hooks" in ENGINE.runs[NAME].full_reason()


@pytest.mark.parametrize("what", ["model", "tower", "backend"])
def test_classes_that_are_not_sglangs_own(what: str, monkeypatch: pytest.MonkeyPatch):
    """A subclass of the same name may do anything: stock's path."""
    model = vision.model("triton_attn")
    backend = model.vision_tower.encoder.layers[0].self_attn.qkv_backend
    part = {"model": model, "tower": model.vision_tower, "backend": backend}[what]
    items = [vision.image(4, 4, seed=1), vision.image(4, 4, seed=2)]
    expected = stock(model, items)
    kind = type(part)
    monkeypatch.setattr(part, "__class__", type(kind.__name__, (kind,), {}))
    calls = Calls(model, monkeypatch)
    before = ENGINE.runs[NAME].counters.engaged
    assert torch.equal(model.get_image_feature(items), expected)
    assert calls.batches == [(1, 16)] * 2
    assert ENGINE.runs[NAME].counters.engaged == before


def test_given_embeddings_alone_are_no_batch():
    model, run = vision.model("triton_attn"), ENGINE.runs[NAME]
    before = run.counters.engaged
    model.get_image_feature([vision.given(3)])
    assert run.counters.engaged == before
    assert "no image" in run.full_reason()


def test_the_ranks_are_stocks():
    """Of the process's own group, by the installed release's name for it."""
    vision.model("triton_attn")
    assert patch._ranks() == 1


@pytest.mark.parametrize("where", ["_entries", "describe", "model_unfit", "_ranks"])
def test_an_error_of_ours_is_not_the_servers(where: str, monkeypatch: pytest.MonkeyPatch):
    model, run = vision.model("triton_attn"), ENGINE.runs[NAME]
    items = [vision.image(4, 4, seed=1), vision.image(4, 4, seed=2)]
    expected = stock(model, items)
    before = run.counters.engaged

    def fails(*given: Any) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr(patch, where, fails)
    for _ in range(2):
        assert torch.equal(model.get_image_feature(items), expected)
    assert run.counters.engaged == before
    assert run.state == states.FAILED
    assert "AttributeError: no such thing" in run.reason


def test_a_batch_that_the_encoder_does_not_take(monkeypatch: pytest.MonkeyPatch):
    """Alone it takes each image; an image that it takes in no way is its own error."""
    model, run = vision.model("triton_attn"), ENGINE.runs[NAME]
    items = [vision.image(4, 4, seed=1), vision.image(4, 4, seed=2)]
    expected = stock(model, items)
    tower = type(model.vision_tower)
    encode, most = tower.forward, 1

    def limited(this: Any, pixel_values: Any, pixel_position_ids: Any) -> Any:
        if len(pixel_values) > most:
            raise ValueError("too many")
        return encode(this, pixel_values, pixel_position_ids)

    monkeypatch.setattr(tower, "forward", limited)
    most = 0
    with pytest.raises(ValueError, match="too many"):
        model.get_image_feature(items)
    assert run.state == states.ACTIVE
    most = 1
    assert torch.equal(model.get_image_feature(items), expected)
    assert run.state == states.FAILED
