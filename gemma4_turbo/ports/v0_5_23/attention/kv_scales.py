"""`kv_scales`: attention that reads another layer's KV cache uses the scales it was written with.

See `gemma4_turbo.ports.any.attention.kv_scales`. Here a Triton backend gets an extend step of its own, on the
object, once an attention follows another one: servers without an 8-bit KV cache call stock's. A layer
without K and V comes to it in eager steps, in breakable graphs, whose attention runs between the
segments, and in the graphs of a verification alike. An MTP draft only decodes: its scales are enough.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.attention import kv_scales
from gemma4_turbo.ports.v0_5_23.attention import triton_backend
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.fallback import Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import KVPool, ModelRunner
    from gemma4_turbo.ports.v0_5_23.protocols import (
        ForwardBatch,
        RadixAttention,
        TritonBackend,
    )

MAKE = f"{triton_backend.MODULE}:TritonAttnBackend.__init__"
METHOD = "forward_extend"
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK_SCALED = ("mxfp8",)  # caches of these dtypes with scales in the pool besides

_fallback = Fallback("the multiplication of K and V")
_backends: weakref.WeakSet[TritonBackend] = weakref.WeakSet()  # that were made since we are in


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The scales, and the extend steps of Triton backends that may need them."""
    triton_backend.load()
    replacements = kv_scales.build(run, stock, _of_model, _of_pool)
    for target in (kv_scales.CONFIGURE, kv_scales.BIND):
        replacements[target] = _then_extend(run, replacements[target])
    return {**replacements, MAKE: _make(run, stock[MAKE])}


def _of_model(runner: ModelRunner) -> bool:
    name = getattr(runner, "kv_cache_dtype_str", None)
    return runner.kv_cache_dtype in DTYPES and name not in BLOCK_SCALED


def _of_pool(pool: KVPool) -> bool:
    return getattr(pool, "dtype", None) in DTYPES and not getattr(
        pool, "is_quantized_kv_cache", False
    )


def _then_extend(run: PatchRun, function: Callable[..., Any]) -> Callable[..., Any]:
    """After a link was made, backends that are there already are looked after."""

    @functools.wraps(function)
    def linking(*args: object, **kwargs: object) -> object:
        found = function(*args, **kwargs)
        if kv_scales.linked():
            for backend in list(_backends):
                _extend(run, backend)
        return found

    return linking


def _make(run: PatchRun, construct: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(construct)
    def __init__(self: TritonBackend, *args: object, **kwargs: object) -> None:
        construct(self, *args, **kwargs)
        if type(self) is not triton_backend.types().backend:
            return
        _backends.add(self)
        if kv_scales.linked():
            _extend(run, self)

    return __init__


def _extend(run: PatchRun, backend: TritonBackend) -> None:
    """Give one backend an extend step of its own, over that of its class."""
    if METHOD in vars(backend):  # ours, or somebody's own
        return
    of_class: Any = type(backend)
    alive = weakref.ref(backend)

    def forward_extend(
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        score_mod: object = None,
        aux_tensors: object = None,
    ) -> torch.Tensor:
        owner = alive()
        assert owner is not None
        if k is None and v is None and _fallback.unfit() is None:
            try:
                if kv_scales.scaled(run, layer):
                    reason = unfit(owner)
                    if reason is None:
                        k, v = new_keys_and_values(owner, layer, forward_batch, q)
                        save_kv_cache = False
                        run.engaged(custom_ops.capturing())
                    else:
                        run.declined(reason)
            except Exception as error:
                run.declined(_fallback.failed(run, None, error))
        options = save_kv_cache, sinks, score_mod, aux_tensors
        found: torch.Tensor = of_class.forward_extend(
            owner, q, k, v, layer, forward_batch, *options
        )
        return found

    forward_extend._gemma4_turbo = True  # type: ignore[attr-defined]
    vars(backend)[METHOD] = forward_extend


def unfit(backend: TritonBackend) -> str | None:
    """Why the rows of the new tokens are not multiplied, or None."""
    if backend.dcp_size > 1:
        return "the KV cache is spread over several GPUs (DCP)"
    return triton_backend.translator_unfit(
        backend.kv_index_translator
    ) or triton_backend.pool_unfit(backend.token_to_kv_pool)


def new_keys_and_values(
    backend: TritonBackend, layer: RadixAttention, forward_batch: ForwardBatch, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of an extend step's own tokens; LookupError if the backend has no slots for them."""
    slots = triton_backend.new_slots(backend, layer, forward_batch, q)
    if slots is None:
        raise LookupError(triton_backend.NO_SLOTS)
    return kv_scales.keys_and_values(layer, backend.token_to_kv_pool, slots, q.dtype)


def undo(run: PatchRun) -> None:
    """Give every live reader back what stock had left there, and every backend its class's step."""
    for backend in list(_backends):
        if hasattr(vars(backend).get(METHOD), "_gemma4_turbo"):
            del vars(backend)[METHOD]
    _backends.clear()
    kv_scales.undo(run)
    _fallback.clear()
