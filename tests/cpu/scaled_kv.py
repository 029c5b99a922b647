"""`small_mtp`'s models with scales of an 8-bit KV cache, and what holds of `kv_scales` in every line."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.attention import kv_scales
from tests.cpu import small_mtp
from tests.cpu.conftest import turn_on

NAME = "kv_scales"
FP8 = torch.float8_e4m3fn
SLIDING_OWNER, FULL_OWNER, SLIDING_READER, FULL_READER = 2, 3, 4, 5
SCALES = {SLIDING_OWNER: (0.5, 0.25), FULL_OWNER: (2.0, 1.0), SLIDING_READER: (8.0, 8.0)}
TRUE = torch.tensor([[1.0, 2, 3, 4]] * 2)  # K and V of the new tokens, as an owner computed them
READERS = pytest.mark.parametrize("reader", [SLIDING_READER, FULL_READER], ids=["sliding", "full"])


def engaged() -> int:
    return ENGINE.runs[NAME].counters.engaged


def draft_of(model: Any, quantised: bool = False, dtype: torch.dtype = FP8) -> Any:
    """An assistant bound to ``model`` as the worker does it."""
    draft = small_mtp.assistant(small_mtp.quantised_kv() if quantised else None)
    if quantised:
        with torch.no_grad():  # as SGLang's loader
            small_mtp.load_scales(draft, {})
    pool = SimpleNamespace(dtype=dtype)
    draft.bind_frozen_kv_context(draft.build_frozen_kv_mtp_context(model, pool))
    return draft


class Scales:
    """A line's test class is made of this one, with the line's own functions."""

    patch: ModuleType
    loaded: Callable[..., Any]  # a target, after a model runner has configured its cache
    scales_of: Callable[[Any], list[tuple[float, float]]]  # by layer, as a decode kernel gets them
    extend_step: Callable[..., torch.Tensor]  # K and V that an extend kernel gets for a reader

    def test_shared_layers_of_stock_have_scales_of_their_own(self) -> None:
        """1, or what a checkpoint gives them, though they read what others wrote; patched: theirs."""
        stock = self.scales_of(self.loaded())
        assert stock[SLIDING_OWNER] == (0.5, 0.25)
        assert stock[SLIDING_READER] == (8.0, 8.0)
        assert stock[FULL_READER] == (1.0, 1.0)
        turn_on(NAME)
        assert ENGINE.runs[NAME].port.module == self.patch.__name__  # type: ignore[union-attr]
        before = engaged()
        model = self.loaded()
        patched = self.scales_of(model)
        assert patched[:4] == stock[:4]
        assert patched[SLIDING_READER] == patched[SLIDING_OWNER] == (0.5, 0.25)
        assert patched[FULL_READER] == patched[FULL_OWNER] == (2.0, 1.0)
        assert engaged() == before + 2
        for attention in small_mtp.attentions(model)[4:]:  # the tensors agree with the floats
            assert (float(attention.k_scale), float(attention.v_scale)) == (
                attention.k_scale_float,
                attention.v_scale_float,
            )
            assert isinstance(attention.k_scale, torch.nn.Parameter)

    @pytest.mark.parametrize("quantised", [False, True], ids=["plain draft", "quantised draft"])
    def test_the_draft_has_the_scales_of_the_layers_that_it_reads(self, quantised: bool) -> None:
        """Also a draft without any quantisation, whose attention has no scales at all."""
        assert self.scales_of(draft_of(self.loaded(), quantised)) == [(1.0, 1.0), (1.0, 1.0)]
        turn_on(NAME)
        draft = draft_of(self.loaded(), quantised)
        assert self.scales_of(draft) == [(0.5, 0.25), (2.0, 1.0)]
        names = {name for name, _ in draft.named_parameters()}
        assert any("k_scale" in name for name in names) == quantised  # nothing new to load

    def test_a_model_that_is_gone_is_forgotten(self) -> None:
        turn_on(NAME)
        model = self.loaded()
        assert len(kv_scales._links) == 2
        del model
        gc.collect()
        assert len(kv_scales._links) == 0

    def test_a_model_of_another_kind_is_served_all_the_same(self) -> None:
        """An exception of ours: stock's path, and the report says so."""
        turn_on(NAME)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(kv_scales, "link", lambda *args: 1 / 0)
            model = self.loaded()
        assert self.scales_of(model)[FULL_READER] == (1.0, 1.0)
        run = ENGINE.runs[NAME]
        assert run.state == states.FAILED
        assert "ZeroDivisionError" in run.reason

    def test_a_multiplication_that_raises_is_stocks(self) -> None:
        turn_on(NAME)
        tries = []

        def fails(*given: Any) -> Any:
            tries.append(given)
            raise RuntimeError("no memory")

        k_scale, v_scale = SCALES[SLIDING_OWNER]
        stock = TRUE / torch.tensor([[k_scale], [v_scale]])
        model = self.loaded()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(self.patch, "new_keys_and_values", fails)
            for _ in range(2):
                assert torch.equal(self.extend_step(model, SLIDING_READER), stock)
        assert len(tries) == 1
        assert ENGINE.runs[NAME].state == states.FAILED
