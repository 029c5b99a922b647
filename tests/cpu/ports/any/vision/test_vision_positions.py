"""Looked-up position embeddings against stock's one-hot product, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.vision import vision_positions as patch
from tests.cpu.conftest import only_patch, patched_sglang

NAME = "vision_positions"


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME), torch.no_grad():
        yield


def embedder(dtype: torch.dtype = torch.bfloat16, positions: int = 64) -> Any:
    """Stock's patch embedder, with negative zeros in its table."""
    from sglang.srt.models.gemma4_vision import Gemma4VisionPatchEmbedder

    config = SimpleNamespace(patch_size=4, hidden_size=40, position_embedding_size=positions)
    made = Gemma4VisionPatchEmbedder(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    made.position_embedding_table.uniform_(-2, 2, generator=generator)
    table = made.position_embedding_table
    table[table.abs() < 0.5] = -0.0
    return made


def places(*shape: int) -> torch.Tensor:
    """Any two coordinates; some of them -1, and the last of each row padding."""
    generator = torch.Generator().manual_seed(1)
    made = torch.randint(-1, 64, (*shape, 2), generator=generator)
    made[:, -1:] = -1
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 0), (0, 4)])
def test_every_bit_is_stocks(dtype: torch.dtype, shape: tuple[int, int]):
    made, ids = embedder(dtype), places(*shape)
    padding = (ids == -1).all(dim=-1)
    before = ENGINE.runs[NAME].counters.engaged
    found = made._position_embeddings(ids, padding)
    assert ENGINE.runs[NAME].counters.engaged == before + 1
    ENGINE.revert()
    expected = made._position_embeddings(ids, padding)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))


def test_the_whole_embedder_and_its_memory():
    """Through ``forward``; nothing as wide as the table's length is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widest(TorchDispatchMode):
        widest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.data_ptr() not in own:
                Widest.widest = max(Widest.widest, out.numel())
            return out

    made, ids = embedder(), places(2, 9)
    own = {half.data_ptr() for half in made.position_embedding_table}
    own.add(made.input_proj.weight.data_ptr())
    pixels = torch.rand(2, 9, 48)
    padding = (ids == -1).all(dim=-1)
    with Widest():
        found = made(pixels, ids, padding)
    assert Widest.widest <= 2 * 2 * 9 * 48
    ENGINE.revert()
    assert torch.equal(found, made(pixels, ids, padding))


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (torch.zeros(1, 4, 2, dtype=torch.int32), "int64"),
        (torch.zeros(1, 4, 3, dtype=torch.int64), "batch, patches, 2"),
    ],
)
def test_what_stock_refuses_it_still_refuses(
    ids: torch.Tensor, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ENGINE.runs[NAME], "_decline_reason", "")
    with pytest.raises(RuntimeError):
        embedder()._position_embeddings(ids, torch.zeros(1, 4, dtype=torch.bool))
    assert reason in ENGINE.runs[NAME].full_reason()


def test_a_place_outside_the_table_is_an_error_as_in_stock():
    ids = torch.full((1, 2, 2), 64)
    with pytest.raises(RuntimeError, match="Class values"):
        embedder()._position_embeddings(ids, torch.zeros(1, 2, dtype=torch.bool))
    assert ENGINE.runs[NAME].state == states.ACTIVE  # the error is not ours


def test_verify_finds_a_wrong_look_up(monkeypatch: pytest.MonkeyPatch):
    run = ENGINE.runs[NAME]
    assert all(check.passed for check in patch.verify(run, "cpu"))
    right = patch.look_up
    monkeypatch.setattr(patch, "look_up", lambda ids, *rest: right(ids.flip(-1), *rest))
    assert not any(check.passed for check in patch.verify(run, "cpu"))


def test_a_look_up_that_raises_is_stocks(monkeypatch: pytest.MonkeyPatch):
    """Once and never again, until the patch is put in anew."""
    made, ids = embedder(), places(2, 5)
    padding = (ids == -1).all(dim=-1)
    expected = made._position_embeddings(ids, padding)
    run, tries = ENGINE.runs[NAME], []

    def fails(*given: Any) -> torch.Tensor:
        tries.append(given)
        raise RuntimeError("no memory")

    monkeypatch.setattr(patch, "look_up", fails)
    before = run.counters.engaged
    for _ in range(2):
        assert torch.equal(made._position_embeddings(ids, padding), expected)
    assert len(tries) == 1
    assert run.counters.engaged == before
    assert run.state == states.FAILED
    assert "RuntimeError: no memory" in run.reason
