"""`extend_attention`: the triton backend's extend path with `gemma4_turbo.kernels.attention.extend`.

Three functions of SGLang's triton backend are replaced. ``forward_extend`` keeps what surrounds the
kernel (output, KV store, choice of the layer's metadata), but makes no contiguous copies of K and V.
The two that gather the sliding window's slots read no lengths on the host; their index tensor is
therefore as long as the windows can be at most.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.kernels.attention import extend as kernel
from gemma4_turbo.kernels.attention import window as window_indices
from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.ports.v0_5_12 import extend_wraps
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.fallback import Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, RadixAttention, TritonBackend

BACKEND = "sglang.srt.layers.attention.triton_backend"
STOCK_KERNEL = "sglang.srt.layers.attention.triton_ops.extend_attention"
WINDOW = f"{BACKEND}:update_sliding_window_buffer"
WINDOW_GRAPH = f"{BACKEND}:update_sliding_window_buffer_cuda_graph"

_fallback = Fallback("the attention")
_window_fallback = Fallback("the gathering of window slots")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernels where they fit, else stock."""
    return {
        **extend_wraps.enable(
            run.patch.name, functools.partial(_forward, run), stock[extend_wraps.TARGET]
        ),
        WINDOW: _window(run, stock[WINDOW]),
        WINDOW_GRAPH: _window(run, stock[WINDOW_GRAPH]),
    }


def undo(run: PatchRun) -> None:
    """Leave the extend path, where another patch may stay."""
    extend_wraps.disable(run.patch.name)
    _fallback.clear()
    _window_fallback.clear()


# -- the attention ------------------------------------------------------------------------------


def _forward(run: PatchRun, stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(stock)
    def forward_extend(
        self: TritonBackend,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        def stocks() -> torch.Tensor:
            return stock(self, q, k, v, layer, forward_batch, save_kv_cache, sinks)

        if torch.compiler.is_compiling():
            return stocks()
        key = q.device, q.dtype, layer.tp_q_head_num, layer.qk_head_dim, layer.sliding_window_size
        reason = _fallback.unfit(key) or _layer_unfit(self, layer, k, v, sinks)
        if reason is None:
            try:
                call = _Call(self, q, k, v, layer, forward_batch)
                reason = call.reason()
                found = None if reason is not None else call.run(save_kv_cache)
            except Exception as error:
                failure = error.with_traceback(None)  # whose frames hold the call's tensors
                # K and V are stored again: the same, at the same place.
                found = stocks()
                run.declined(_fallback.failed(run, key, failure))
                return found
            if found is not None:
                run.engaged(custom_ops.capturing())
                return found
        run.declined(str(reason))
        return stocks()

    return forward_extend


def _layer_unfit(
    backend: TritonBackend,
    layer: RadixAttention,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> str | None:
    """Why this layer takes stock's path in this backend, or None."""
    if not sglang_types.is_triton_backend(backend):
        return f"the attention backend is {type(backend).__name__}"
    if backend.enable_deterministic:
        return "deterministic inference has a kernel of its own"
    if backend.use_mla:
        return "multi-head latent attention"
    if layer.qk_head_dim != layer.v_head_dim:
        return f"head sizes {layer.qk_head_dim} and {layer.v_head_dim} differ"
    if layer.is_cross_attention:
        return "cross attention"
    if layer.logit_cap > 0 or layer.logit_capping_method != "tanh":
        return "logit cap"
    if layer.xai_temperature_len > 0:
        return "xai temperature"
    if layer.k_scale is not None or layer.v_scale is not None:
        return "scales of the KV cache"
    if sinks is not None:
        return "attention sinks"
    if (k is None) != (v is None):
        return "K without V, or V without K"
    return None


class _Call:
    """One call: its arguments as the kernel takes them.

    K and V of a layer that shares another's are gathered only when the kernel is to run: until then
    as many rows of the buffers, of the same types and shapes, stand for them.
    """

    def __init__(
        self,
        backend: TritonBackend,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
    ) -> None:
        heads, dim = layer.tp_q_head_num, layer.qk_head_dim
        pool = forward_batch.token_to_kv_pool
        metadata = backend.forward_metadata
        self.query = q
        self.layer = layer
        self.batch = forward_batch
        self.given = k, v
        self.k_buffer = pool.get_key_buffer(layer.layer_id)
        self.v_buffer = pool.get_value_buffer(layer.layer_id)
        if k is None or v is None:  # the layer shares the KV of an earlier one
            tokens = forward_batch.out_cache_loc.shape[0]
            k, v = self.k_buffer[:tokens], self.v_buffer[:tokens]
        self.q = q.view(-1, heads, dim)
        self.k, self.v = k, v
        self.qo_indptr = metadata.qo_indptr
        self.longest = int(metadata.max_extend_len)  # SGLang's host tensors too
        window = layer.sliding_window_size
        sliding = window is not None and window > -1
        self.kv_indptr = metadata.window_kv_indptr if sliding else metadata.kv_indptr
        self.kv_indices = metadata.window_kv_indices if sliding else metadata.kv_indices
        if metadata.kv_indices is not None and metadata.kv_indices.shape[0] == 0:
            self.kv_indices = metadata.kv_indices  # no prefix at all; the window's is a bound
        self.options: dict[str, Any] = {
            "sm_scale": layer.scaling,
            "sliding_window_size": window if sliding else -1,
            "custom_mask": metadata.custom_mask,
            "mask_indptr": metadata.mask_indptr,
            "window_kv_offsets": metadata.window_kv_offsets if sliding else None,
        }
        self.causal = _causal(backend, layer)

    def reason(self) -> str | None:
        """Why the kernel does not take it, or None."""
        if self.kv_indptr is None or self.kv_indices is None:
            return "the backend has no KV indices for the layer"
        return kernel.unfit(self.q, self.k, self.v, self.k_buffer, self.v_buffer, **self.options)

    def run(self, save_kv_cache: bool) -> torch.Tensor:
        """Store K and V, attend, and return the output in q's shape."""
        key, value = self.given
        if key is None or value is None:
            slots = extend_wraps.new_slots(self.layer, self.batch)
            self.k, self.v = self.k_buffer[slots], self.v_buffer[slots]
        elif save_kv_cache:
            self.batch.token_to_kv_pool.set_kv_buffer(
                self.layer, self.batch.out_cache_loc, key, value
            )
        out = torch.empty_like(self.query)
        block = 0
        if self.causal and self.options["custom_mask"] is not None:
            block = _stock_query_block(self.layer.qk_head_dim)
        kernel.launch_extend(
            self.q,
            self.k,
            self.v,
            self.k_buffer,
            self.v_buffer,
            self.qo_indptr,
            self.kv_indptr,
            self.kv_indices,
            self.longest,
            is_causal=self.causal,
            skip_prefix_custom_mask=True,
            mask_query_block=block,
            out=out.view(self.q.shape),
            **self.options,
        )
        return out


def _causal(backend: TritonBackend, layer: RadixAttention) -> bool:
    """As stock decides it; the kinds of attention are compared by their names."""
    kind = getattr(layer.attn_type, "name", "")
    both_ways = kind == "DECODER_BIDIRECTIONAL" and backend.allow_bidirectional_attention_in_extend
    return not (kind == "ENCODER_ONLY" or both_ways)


@functools.cache
def _stock_query_block(head_dim: int) -> int:
    """Stock's block of queries on this GPU, which shows in what a custom mask lets them see."""
    sizes = importlib.import_module(STOCK_KERNEL)._get_block_sizes_for_extend_attention(
        head_dim, head_dim
    )
    return int(sizes[3])


# -- the window's slots -------------------------------------------------------------------------


def _mapping(allocator: object) -> tuple[torch.Tensor | None, str | None]:
    """(the mapping from full to sliding slots or None, why it cannot be told or None)."""
    if not hasattr(allocator, "translate_loc_from_full_to_swa"):
        return None, None
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool, SWATokenToKVPoolAllocator

    cache = getattr(allocator, "_kvcache", None)
    if type(allocator) is not SWATokenToKVPoolAllocator or type(cache) is not SWAKVPool:
        names = type(allocator).__name__, type(cache).__name__
        return None, f"slots are translated by {names[0]} over {names[1]}"
    return cache.full_to_swa_index_mapping, None  # type: ignore[union-attr]


def _window(run: PatchRun, stock: Callable[..., object]) -> Callable[..., object]:
    """Either of stock's two functions; that of the CUDA graphs also brings the indices' buffer."""
    names = tuple(inspect.signature(stock).parameters)

    @functools.wraps(stock)
    def window(*args: object, **kwargs: object) -> object:
        found = failure = None
        reason = _window_fallback.unfit()
        if reason is None:
            try:
                found = _gather(run, {**dict(zip(names, args, strict=False)), **kwargs})
            except Exception as error:
                failure = error.with_traceback(None)
        else:
            run.declined(reason)
        if found is not None:
            return found
        result = stock(*args, **kwargs)  # all that ours may have written is written again
        if failure is not None:
            run.declined(_window_fallback.failed(run, None, failure))
        return result

    return window


def _gather(run: PatchRun, given: dict[str, Any]) -> window_indices.Window | None:
    """The window's slots, or None if stock must find them. Not counted: no layer's arithmetic."""
    lengths, bs = given["seq_lens"], given["bs"]
    arguments = (
        given["window_kv_indptr"],
        given["req_to_token"],
        given["sliding_window_size"],
        lengths,
        given["req_pool_indices"],
    )
    mapping, reason = _mapping(given.get("token_to_kv_pool_allocator"))
    if reason is None and lengths.shape[0] != bs:
        reason = f"{lengths.shape[0]} lengths for {bs} sequences"
    if reason is None:
        reason = window_indices.unfit(*arguments, mapping)
    if reason is not None:
        run.declined(reason)
        return None
    return window_indices.launch_window(*arguments, mapping, given.get("window_kv_indices"))


# -- verify -------------------------------------------------------------------------------------


def verify(run: PatchRun, device: str) -> list[Check]:
    """Against fp64: no further from it than stock's kernel (on a GPU) or than rounding (without)."""
    generator = torch.Generator(device).manual_seed(0)
    if device == "cuda" and kernel.device_unfit(torch.device("cuda", 0)) is not None:
        return []
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    sizes = ((128, 4, 2, 20),) if device == "cpu" else ((256, 16, 8, 1024), (512, 16, 2, -1))
    checks = []
    for head_dim, heads, kv_heads, window in sizes:
        for lengths, prefixes in (((40, 1, 0), (0, 30, 9)), ((4, 4, 4), (90, 0, 33))):
            scale = 1 if device == "cpu" else 20
            old = [length * scale for length in prefixes]
            new = [length * scale if length > 4 else length for length in lengths]

            def randn(*shape: int) -> torch.Tensor:
                return torch.randn(shape, generator=generator, device=device).to(dtype)

            k_buffer, v_buffer = (randn(sum(old) + 1, kv_heads, head_dim) for _ in range(2))
            tensors = (
                randn(sum(new), heads, head_dim),
                randn(sum(new), kv_heads, head_dim),
                randn(sum(new), kv_heads, head_dim),
                k_buffer,
                v_buffer,
                _starts(new, device),
                _starts(old, device),
                torch.randperm(sum(old), generator=generator, device=device) + 1,
            )
            options: dict[str, Any] = {
                "sm_scale": head_dim**-0.5,
                "sliding_window_size": window,
            }
            got = kernel.extend_attention(*tensors, max(new), **options)
            exact = kernel.reference_extend_attention(*tensors, **options)
            bound, against = 1e-3, "plain torch in fp64"
            if device == "cuda":
                bound = 1.1 * _error(_stock(tensors, max(new), **options), exact)
                against = "fp64, against which stock is measured too"
            error = _error(got, exact)
            what = f"head size {head_dim}, lengths {list(new)} on {old}"
            allowed = f"relative error {bound:.1e}, found {error:.1e}"
            differing = int((got != exact.to(dtype)).sum())
            checks.append(
                Check(
                    "extend_attention",
                    what,
                    against,
                    got.numel(),
                    differing,
                    allowed,
                    error <= bound,
                )
            )
    return checks


def _starts(lengths: list[int], device: str) -> torch.Tensor:
    sums = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return torch.tensor(sums, dtype=torch.int32, device=device)


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def _stock(
    tensors: tuple[torch.Tensor, ...], longest: int, sm_scale: float, sliding_window_size: int
) -> torch.Tensor:
    q, k, v, *rest = tensors
    out = torch.empty_like(q)
    importlib.import_module(STOCK_KERNEL).extend_attention_fwd(
        q,
        k,
        v,
        out,
        *rest,
        None,
        True,
        None,
        longest,
        1.0,
        1.0,
        sm_scale,
        sliding_window_size=sliding_window_size,
    )
    return out
