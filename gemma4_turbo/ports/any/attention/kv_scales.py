"""`kv_scales`: attention that reads another layer's KV cache uses the scales it was written with.

A layer with an 8-bit KV cache stores ``K / k_scale`` and ``V / v_scale``. The last layers of E2B and
E4B and all layers of an MTP assistant read the cache of another layer, its owner, but stock leaves
their own scales at 1. Here they take the owner's, as soon as the dtype of the cache is known and
after every later loading of weights. Nothing is touched where the owner's scales are 1.

In an extend step the Triton backend hands such a layer's new K and V to its kernel as they are in
the cache, and the kernel takes them for unscaled ones: they are multiplied first. How a line gets
there is its own; the rest is here.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import (
        AssistantModel,
        FrozenKVContext,
        KVPool,
        ModelRunner,
        Module,
    )
    from gemma4_turbo.ports.any.protocols import KVBuffers, RadixAttention

CONFIGURE = "sglang.srt.model_executor.model_runner:ModelRunner.configure_kv_cache_dtype"
BIND = "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM.build_frozen_kv_mtp_context"
FINISH = "sglang.srt.layers.quantization.kv_cache:BaseKVCacheMethod.process_weights_after_loading"


class Scales(NamedTuple):
    """What a ``RadixAttention`` keeps of its two scales: tensors for writing, floats for reading."""

    k_scale: torch.Tensor | float | None
    v_scale: torch.Tensor | float | None
    k_scale_float: float | None
    v_scale_float: float | None

    @staticmethod
    def of(attention: RadixAttention) -> Scales:
        """Copies of the tensors: a ``Parameter`` may be written to in place."""

        def copied(value: torch.Tensor | float | None) -> torch.Tensor | float | None:
            return value.detach().clone() if isinstance(value, torch.Tensor) else value

        return Scales(
            copied(attention.k_scale),
            copied(attention.v_scale),
            attention.k_scale_float,
            attention.v_scale_float,
        )

    def write_to(self, attention: RadixAttention) -> None:
        """Into parameters in place, where there are any: a later loading finds them there."""
        for name in ("k_scale", "v_scale"):
            present, value = getattr(attention, name), getattr(self, name)
            if isinstance(present, torch.nn.Parameter):
                present.data.copy_(value)
            else:
                setattr(attention, name, value)
        attention.k_scale_float, attention.v_scale_float = self.k_scale_float, self.v_scale_float


class Link(NamedTuple):
    """Whose cache an attention reads."""

    owner: weakref.ref[RadixAttention]
    stock: Scales  # what stock left there


def floats(attention: RadixAttention) -> tuple[float, float]:
    """The scales as the kernels see them: without one, 1."""
    k, v = attention.k_scale_float, attention.v_scale_float
    return (1.0 if k is None else k, 1.0 if v is None else v)


_links: weakref.WeakKeyDictionary[RadixAttention, Link] = weakref.WeakKeyDictionary()
_scaled: weakref.WeakSet[RadixAttention] = weakref.WeakSet()  # given the owner's scales by us
_owners: weakref.WeakSet[RadixAttention] = weakref.WeakSet()


def build(
    run: PatchRun,
    stock: dict[str, Any],
    of_model: Callable[[ModelRunner], bool],
    of_pool: Callable[[KVPool], bool],
) -> dict[str, Any]:
    """Link readers and owners when the cache's dtype is known; keep them equal afterwards.

    Args:
        run: of the patch.
        stock: with `CONFIGURE`, `BIND` and `FINISH`.
        of_model: whether the cache of a model runner, now configured, holds K and V divided by scales.
        of_pool: the same of a pool that a draft is bound to.
    """
    return {
        CONFIGURE: _configure(run, stock[CONFIGURE], of_model),
        BIND: _bind(run, stock[BIND], of_pool),
        FINISH: _finish(run, stock[FINISH]),
    }


def _configure(
    run: PatchRun,
    configure: Callable[[ModelRunner], None],
    of_model: Callable[[ModelRunner], bool],
) -> Callable[[ModelRunner], None]:
    @functools.wraps(configure)
    def configure_kv_cache_dtype(self: ModelRunner) -> None:
        configure(self)
        _guarded(run, _link_model, self, of_model)

    return configure_kv_cache_dtype


def _bind(
    run: PatchRun,
    bind: Callable[[AssistantModel, Module, KVPool], FrozenKVContext],
    of_pool: Callable[[KVPool], bool],
) -> Callable[[AssistantModel, Module, KVPool], FrozenKVContext]:
    @functools.wraps(bind)
    def build_frozen_kv_mtp_context(
        self: AssistantModel, target_model: Module, target_token_to_kv_pool: KVPool
    ) -> FrozenKVContext:
        context = bind(self, target_model, target_token_to_kv_pool)
        _guarded(run, _link_bound, self, target_model, context, of_pool)
        return context

    return build_frozen_kv_mtp_context


def _finish(
    run: PatchRun, finish: Callable[[object, RadixAttention], None]
) -> Callable[[object, RadixAttention], None]:
    @functools.wraps(finish)
    def process_weights_after_loading(self: object, layer: RadixAttention) -> None:
        finish(self, layer)
        if _links:
            _guarded(run, refresh, layer)

    return process_weights_after_loading


def _guarded(run: PatchRun, function: Callable[..., None], *arguments: object) -> None:
    try:
        function(run, *arguments)
    except Exception as error:  # never in the way of a model that stock can serve
        run.set(states.FAILED, one_line(error))


def eight_bit(dtype: object) -> bool:
    """Whether a KV cache of ``dtype`` is written divided by the scales."""
    return isinstance(dtype, torch.dtype) and dtype.itemsize == 1


def _link_model(
    run: PatchRun, runner: ModelRunner, of_model: Callable[[ModelRunner], bool]
) -> None:
    if of_model(runner):
        link_shared_layers(run, runner.model)
        if not _links:
            run.declined("no layer reads another's KV cache")
    else:
        run.declined(f"a KV cache of {runner.kv_cache_dtype} is not divided by scales")


def _link_bound(
    run: PatchRun,
    draft: AssistantModel,
    target_model: Module,
    context: FrozenKVContext,
    of_pool: Callable[[KVPool], bool],
) -> None:
    pool = context.target_token_to_kv_pool
    if of_pool(pool):
        link_draft(run, draft, target_model, context)
    else:
        run.declined(f"a KV cache of {getattr(pool, 'dtype', None)} is not divided by scales")


def link_shared_layers(run: PatchRun, model: Module) -> None:
    """Every KV-shared layer of ``model`` follows the layer whose cache it reads."""
    from sglang.srt.models.gemma4_causal import Gemma4TextModel
    from sglang.srt.models.gemma4_mtp import Gemma4AssistantForCausalLM

    if isinstance(model, Gemma4AssistantForCausalLM):
        return  # its layers' indices are the target's
    for module in model.modules():
        if isinstance(module, Gemma4TextModel):
            for layer in module.layers:
                attention = layer.self_attn
                if attention.is_kv_shared_layer and attention.kv_shared_layer_index is not None:
                    owner = module.layers[attention.kv_shared_layer_index].self_attn
                    link(run, attention.attn, owner.attn)


def link_draft(
    run: PatchRun, draft: AssistantModel, target_model: Module, context: FrozenKVContext
) -> None:
    """Every layer of an assistant follows the target's layer that ``context`` gives it."""
    from sglang.srt.models.gemma4_mtp import _resolve_target_text_model

    owners = _resolve_target_text_model(target_model).layers
    for index, layer in enumerate(draft.model.layers):
        owner = owners[context.get_physical_layer_id(index)]
        link(run, layer.self_attn.attn, owner.self_attn.attn)


def link(run: PatchRun, reader: RadixAttention, owner: RadixAttention) -> None:
    """From now on ``reader`` has the scales of ``owner``."""
    _links[reader] = Link(weakref.ref(owner), Scales.of(reader))
    _owners.add(owner)
    if floats(owner) == floats(reader):
        run.declined("a layer has the scales of the one whose cache it reads")
    follow(run, reader)


def follow(run: PatchRun, reader: RadixAttention) -> None:
    """Take over the owner's scales where they differ."""
    owner = _links[reader].owner()
    if owner is None or floats(owner) == floats(reader):
        return
    Scales.of(owner).write_to(reader)
    _scaled.add(reader)
    run.engaged(False)


def scaled(run: PatchRun, layer: RadixAttention) -> bool:
    """Whether what the cache holds for ``layer``, a reader or an owner, was divided by scales.

    A reader takes over here what somebody gave its owner without a loading of weights.
    """
    if layer in _links:
        follow(run, layer)
    elif layer not in _owners:
        return False
    return floats(layer) != (1.0, 1.0)


def refresh(run: PatchRun, layer: RadixAttention) -> None:
    """After the weights of ``layer`` were loaded again: itself, and all that read its cache."""
    for reader, (owner, _) in list(_links.items()):
        if reader is layer or owner() is layer:
            follow(run, reader)


def linked() -> bool:
    """Whether any attention follows another one."""
    return bool(_links)


def keys_and_values(
    layer: RadixAttention, pool: KVBuffers, slots: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of an extend step's own tokens, out of the owner's cache, as they were computed.

    Args:
        layer: the ``RadixAttention`` that reads, whose ``layer_id`` is the owner's; or the owner.
        pool: that holds them.
        slots: of the step's tokens in the layer's buffers.
        dtype: of the result.
    """
    keys, values = pool.get_kv_buffer(layer.layer_id)
    k, v = keys[slots].to(dtype), values[slots].to(dtype)
    k_scale, v_scale = floats(layer)
    return k.mul_(k_scale), v.mul_(v_scale)


def undo(run: PatchRun) -> None:
    """Give every live reader back what stock had left there."""
    for reader, (_, stock) in list(_links.items()):
        if reader in _scaled:
            stock.write_to(reader)
    _links.clear()
    _scaled.clear()
    _owners.clear()
