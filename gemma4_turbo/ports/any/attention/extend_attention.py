"""What `extend_attention` has in every release line: one call's arguments, its reasons, its checks.

Beside the attention, the slots of the sliding window, gathered without a length read on the host: their
index tensor is therefore as long as the windows can be at most.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.kernels.attention import extend as kernel
from gemma4_turbo.kernels.attention import window as window_indices
from gemma4_turbo.runtime.fallback import Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.protocols import KVBuffers, RadixAttention, TritonBackend

fallback = Fallback("the attention")
window_fallback = Fallback("the gathering of window slots")


def forget() -> None:
    """What has failed is tried again."""
    fallback.clear()
    window_fallback.clear()


# -- the attention ------------------------------------------------------------------------------


def layer_unfit(
    backend: TritonBackend,
    layer: RadixAttention,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> str | None:
    """Why this layer takes stock's path in this backend, or None."""
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


class Call:
    """One call: its arguments as the kernel takes them.

    K and V of a layer that shares another's are gathered only when the kernel is to run: until then
    as many rows of the buffers, of the same types and shapes, stand for them.
    """

    def __init__(
        self,
        backend: TritonBackend,
        pool: KVBuffers,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        slots: torch.Tensor,
    ) -> None:
        """``slots``: of the new tokens in the buffers, or as many others."""
        heads, dim = layer.tp_q_head_num, layer.qk_head_dim
        metadata = backend.forward_metadata
        self.layer = layer
        self.k_buffer = pool.get_key_buffer(layer.layer_id)
        self.v_buffer = pool.get_value_buffer(layer.layer_id)
        if k is None or v is None:  # the layer shares the KV of an earlier one
            tokens = slots.shape[0]
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

    def unfit(self) -> str | None:
        """Why the kernel does not take it, or None."""
        if self.kv_indptr is None or self.kv_indices is None:
            return "the backend has no KV indices for the layer"
        few = kernel.few_queries(self.kv_indices, self.longest)
        return kernel.unfit(
            self.q, self.k, self.v, self.k_buffer, self.v_buffer, few=few, **self.options
        )

    def attend(self, out: torch.Tensor, query_block: Callable[[int], int]) -> torch.Tensor:
        """Attention of the new tokens into ``out``, which is returned; it holds as much as q.

        ``query_block``: of stock's kernel, for a head size.
        """
        block = 0
        if self.causal and self.options["custom_mask"] is not None:
            block = query_block(self.layer.qk_head_dim)
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


# -- the window's slots -------------------------------------------------------------------------


class Rows(NamedTuple):
    """Where the slots of sequences are read: a row a request, and a mapping of slots or None."""

    req_to_token: torch.Tensor
    mapping: torch.Tensor | None


RowsOf = Callable[[dict[str, Any]], tuple[Rows | None, str]]
"""From the arguments of stock's function: the rows, or None and why it is stock's to find them."""


def window(run: PatchRun, stock: Callable[..., object], rows_of: RowsOf) -> Callable[..., object]:
    """A function of stock's that gathers them; that of the CUDA graphs also brings the indices' buffer."""
    names = tuple(inspect.signature(stock).parameters)

    @functools.wraps(stock)
    def window(*args: object, **kwargs: object) -> object:
        found = failure = None
        reason = window_fallback.unfit()
        if reason is None:
            try:
                found = _gather(run, {**dict(zip(names, args, strict=False)), **kwargs}, rows_of)
            except Exception as error:
                failure = error.with_traceback(None)
        else:
            run.declined(reason)
        if found is not None:
            return found
        result = stock(*args, **kwargs)  # all that ours may have written is written again
        if failure is not None:
            run.declined(window_fallback.failed(run, None, failure))
        return result

    return window


def _gather(run: PatchRun, given: dict[str, Any], rows_of: RowsOf) -> window_indices.Window | None:
    """The window's slots, or None if stock must find them. Not counted: no layer's arithmetic."""
    lengths, bs = given["seq_lens"], given["bs"]
    rows, reason = rows_of(given)
    if rows is None:
        run.declined(reason)
        return None
    arguments = (
        given["window_kv_indptr"],
        rows.req_to_token,
        given["sliding_window_size"],
        lengths,
        given["req_pool_indices"],
    )
    unfit = None
    if lengths.shape[0] != bs:
        unfit = f"{lengths.shape[0]} lengths for {bs} sequences"
    if unfit is None:
        unfit = window_indices.unfit(*arguments, rows.mapping)
    if unfit is not None:
        run.declined(unfit)
        return None
    return window_indices.launch_window(*arguments, rows.mapping, given.get("window_kv_indices"))


# -- verify -------------------------------------------------------------------------------------


def compared(device: str, stock: Callable[..., torch.Tensor]) -> list[Check]:
    """Against fp64: no further from it than stock's kernel (on a GPU) or than rounding (without).

    ``stock``: the line's ``extend_attention``.
    """
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
            few = kernel.few_queries(tensors[-1], max(new))
            if kernel.unfit(*tensors[:5], few=few, **options) is not None:
                continue  # stock's code runs here
            got = kernel.extend_attention(*tensors, max(new), **options)
            exact = kernel.reference_extend_attention(*tensors, **options)
            bound, against = 1e-3, "plain torch in fp64"
            if device == "cuda":
                q, *others = tensors
                theirs = stock(
                    q, *others[:2], torch.empty_like(q), *others[2:], max(new), **options
                )
                bound = 1.1 * _error(theirs, exact)
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
