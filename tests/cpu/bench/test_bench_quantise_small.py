"""bench/models/compressed.py and bench/quantise_small.py: numbers, names and files; no SGLang."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import quantise_small
from bench.models import compressed, small_models
from bench.models.compressed import Scheme

SIZE = small_models.Size(256, 64, "sf", 2, 1, 1, window=8, experts=4, expert_width=32, topk=2)


def weights(*shape: int) -> torch.Tensor:
    """Of many sizes, with a row of zeros and a row of one value."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(shape, generator=generator) * torch.logspace(-6, 2, shape[-2])[:, None]
    made[..., 0, :] = 0
    made[..., 1, :] = 3.3
    return made.bfloat16()


@pytest.mark.parametrize("shape", [(40, 256), (3, 40, 32)])
def test_fp8_is_at_most_half_a_step_off(shape: tuple[int, ...]):
    weight = weights(*shape)
    numbers, scale = compressed.fp8(weight)
    assert numbers.dtype == torch.float8_e4m3fn
    assert scale.shape == (*shape[:-1], 1)
    assert numbers.float().abs().max() == 448
    in_steps = weight.float() / scale
    # Three bits behind the point, down to 2^-6; below that steps of 2^-9.
    step = 2 ** (in_steps.abs().log2().floor().clamp(min=-6) - 3)
    assert ((numbers.float() - in_steps).abs() <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (64, 64), (192, 192)])
def test_int4_is_at_most_half_a_step_off(inputs: int, group: int):
    assert compressed.group_of(inputs) == group
    weight = weights(40, inputs)
    numbers, scale = compressed.int4(weight, group)
    assert scale.dtype == torch.bfloat16
    assert scale.shape == (40, inputs // group)
    assert -8 <= numbers.min() <= -7 < 7 == numbers.max()
    steps = weight.float().unflatten(1, (-1, group)) / scale.float()[..., None]
    assert ((numbers.unflatten(1, (-1, group)) - steps).abs() <= 0.5).all()


def test_packing_and_back():
    numbers = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(1)).to(
        torch.int8
    )
    packed = compressed.pack(numbers)
    assert (packed.dtype, packed.shape) == (torch.int32, (6, 8))
    assert torch.equal(packed[:, 0] & 15, numbers[:, 0] + 8)  # the first in the lowest bits
    assert torch.equal(compressed.unpack(packed), numbers)


def test_a_weight_that_cannot_be_packed():
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=f"^{name} must have a multiple of 8 inputs, got 12$"):
        compressed.quantised({name: torch.ones(4, 12)}, Scheme.W4A16)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match="hidden size must be a multiple of 128"):
        compressed.config({name: torch.ones(4, 64)}, Scheme.W4A16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    out = tmp_path_factory.mktemp("small") / "moe"
    fields = small_models.published(SIZE)
    model = small_models.build(fields, "eager")
    small_models.initialise(model, 0)
    small_models.save(out, model, fields, {"model": "moe", "steps": 3})
    (out / "held_out.txt").write_text("text")
    return out


@pytest.mark.parametrize("scheme", Scheme)
def test_a_folder(folder: Path, scheme: Scheme):
    done = CliRunner().invoke(app(), [str(folder), scheme.value])
    assert done.exit_code == 0, done.output
    out = folder.with_name(f"moe-{scheme}")
    config = json.loads((out / "config.json").read_text())
    assert small_models.unrenamed(config) == small_models.published(SIZE)
    notes = json.loads((out / "training.json").read_text())
    assert (notes["model"], notes["steps"]) == (f"moe-{scheme}", 3)
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    before, after = (small_models.load(f, torch.float32, "cpu", "eager") for f in (folder, out))
    ids = torch.arange(4, 24)[None]
    far = (small_models.logits(before, ids) - small_models.logits(after, ids)).abs().max()
    assert 1e-3 < far < 5
    again = CliRunner().invoke(app(), [str(out), scheme.value])
    assert again.exit_code == 2
    assert "quantised" in again.output


def app() -> object:
    """The program."""
    import typer

    made = typer.Typer()
    made.command()(quantise_small.main)
    return made


def test_experts_can_stay(folder: Path):
    from safetensors.torch import load_file

    tensors = load_file(folder / small_models.WEIGHTS)
    made = compressed.quantised(tensors, Scheme.FP8, experts=False)
    name = "model.layers.0.experts.down_proj"
    assert torch.equal(made[name], tensors[name])
    assert made["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert any("experts" in one for one in compressed.config(tensors, Scheme.FP8, False)["ignore"])
    groups = compressed.config(tensors, Scheme.W4A16)["config_groups"]
    assert groups["group_1"]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
