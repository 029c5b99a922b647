"""What `decode_attention` has in every release line: one launch's arguments, its reasons, its checks.

Stock cuts a sliding layer's window into as many splits as the whole sequence, although it computes the
window's own number too. The kernel needs neither: it counts on the device, from the window's lengths.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.kernels.attention import decode as kernel
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.fallback import Fallback
from gemma4_turbo.runtime.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.protocols import KVBuffers, RadixAttention, TritonBackend

MAX_PAIRS = 16384  # of a sequence and a KV head
ARRIVED = "_gemma4_turbo_arrived"

_verdicts = Verdicts()
fallback = Fallback("the launch")


def undo(run: PatchRun) -> None:
    """Forget the checks. The counters stay where a captured graph may still use them."""
    _verdicts.clear()
    fallback.clear()


class Call:
    """Arguments of one launch, or why there is none."""

    def __init__(
        self,
        backend: TritonBackend,
        pool: KVBuffers,
        q: torch.Tensor,
        layer: RadixAttention,
    ) -> None:
        metadata = backend.forward_metadata
        if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
            self.indptr, self.indices = metadata.window_kv_indptr, metadata.window_kv_indices
            self.longest = backend.sliding_window_size
        else:
            self.indptr, self.indices = metadata.kv_indptr, metadata.kv_indices
            # No sequence has more tokens than its row in this table.
            self.longest = backend.req_to_token.shape[1]
        if self.indptr is None or self.indices is None:
            self.reason: str | None = "the backend has no KV indices for the layer"
            return
        self.q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        self.k_buffer = pool.get_key_buffer(layer.layer_id)
        self.v_buffer = pool.get_value_buffer(layer.layer_id)
        self.reason = kernel.unfit(self.q, self.k_buffer, self.v_buffer, self.indptr, self.indices)
        if self.reason is not None:
            return
        batch, heads, dim = self.q.shape
        kv_heads = self.k_buffer.shape[1]
        if batch * kv_heads > MAX_PAIRS:
            self.reason = f"more than {MAX_PAIRS} pairs of a sequence and a KV head"
            return
        self.config = kernel.cut(batch, kv_heads, heads // kv_heads, dim, q.device)
        self.scaling = layer.scaling
        arrived = backend.__dict__.get(ARRIVED)
        if arrived is None:
            if custom_ops.capturing():  # its zeros would be written at every replay only
                self.reason = "the backend did not run a step before the capture"
                return
            # One for each backend: those of two streams may run at the same time.
            arrived = torch.zeros(MAX_PAIRS, dtype=torch.int32, device=q.device)
            backend.__dict__[ARRIVED] = arrived
        self.arrived = arrived
        self.key = (q.device, self.q.shape, kv_heads, self.config)  # of the memory that it needs
        self.reason = fallback.unfit(self.key)

    def launch(self) -> torch.Tensor:
        """``[batch, heads * head_dim]``."""
        out = self.q.new_empty(self.q.shape)
        kernel.launch_decode_attention(
            self.q,
            self.k_buffer,
            self.v_buffer,
            self.indptr,
            self.indices,
            self.scaling,
            self.config,
            self.longest,
            self.arrived,
            out,
        )
        return out.view(out.shape[0], -1)


def layer_unfit(
    backend: TritonBackend, layer: RadixAttention, sinks: torch.Tensor | None
) -> str | None:
    """Why the kernel cannot do what this layer asks for, or None."""
    if backend.use_mla:
        return "MLA"
    if backend.enable_deterministic:
        return "deterministic inference needs splits that do not depend on the batch"
    if sinks is not None:
        return "attention sinks"
    if layer.logit_cap > 0:
        return f"a logit cap of {layer.logit_cap}"
    if layer.xai_temperature_len > 0:
        return "xai temperature"
    if layer.k_scale is not None or layer.v_scale is not None:
        return "K or V have a scale"
    if layer.qk_head_dim != layer.v_head_dim:
        return f"heads of {layer.qk_head_dim} in K, {layer.v_head_dim} in V"
    return None


def check_unfit(run: PatchRun, call: Call, capturing: bool) -> str | None:
    """Why this kernel may not run here, or None.

    Without a GPU nothing is compared: the interpreter's results are the tests' business.
    """
    kv_heads = call.k_buffer.shape[1]
    heads, dim = call.q.shape[1:]
    key = (call.q.device, call.q.dtype, heads, kv_heads, dim, call.indices.dtype, call.config)
    waiting = None
    if capturing:
        waiting = f"a batch of {call.q.shape[0]} was not run before the capture"
    return _verdicts.unfit(run, key, waiting, lambda: _compare(key) if call.q.is_cuda else None)


def _compare(key: tuple[Any, ...]) -> str | None:
    device, dtype, heads, kv_heads, dim, indices, config = key
    error, allowed = errors(
        (1, 1100, 64, 33), heads, kv_heads, dim, dtype, indices, str(device), config
    )
    # Written so that a NaN fails.
    if error <= max(2 * allowed, 1e-3):
        return None
    return (
        f"self-check: relative error {error:.2e} with {heads} and {kv_heads} heads of {dim}, {config}, "
        f"on {torch.cuda.get_device_name(device)} with torch {torch.__version__}"
    )


def errors(
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    indices: torch.dtype,
    device: str,
    config: kernel.Config | None = None,
) -> tuple[float, float]:
    """Relative error of the kernel against fp64 on random sequences, and that of one rounding."""
    generator = torch.Generator(device).manual_seed(sum(lengths))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    total = sum(lengths)
    pool = total + 100
    q = randn(len(lengths), heads, dim)
    k, v = randn(pool, kv_heads, dim), randn(pool, kv_heads, dim)
    indptr = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    at = torch.randperm(pool, generator=generator, device=device)[:total].to(indices)
    ours = kernel.decode_attention(
        q, k, v, indptr, at, dim**-0.5, config, out=torch.full_like(q, torch.nan)
    ).double()
    exact = kernel.reference_decode_attention(
        q.double(), k.double(), v.double(), indptr, at, dim**-0.5
    )
    rounding = (exact.to(dtype).double() - exact).norm() / exact.norm()
    return float((ours - exact).norm() / exact.norm()), float(rounding)


def verify(run: PatchRun, device: str) -> list[Check]:
    """The kernel against fp64: no farther than twice the rounding of the result."""
    checks = []
    lengths = (1, 500, 1023, 8000) if device == "cuda" else (1, 200)
    cases = ((16, 8, 256), (16, 2, 512), (8, 2, 256), (8, 1, 256), (8, 1, 512))
    for heads, kv_heads, dim in cases if device == "cuda" else ((4, 2, 256),):
        if not kernel.runs_here(len(lengths), kv_heads, heads // kv_heads, dim, device):
            continue  # stock's code runs here
        error, rounding = errors(lengths, heads, kv_heads, dim, torch.bfloat16, torch.int64, device)
        checks.append(
            Check(
                "decode_attention",
                f"{heads} query and {kv_heads} KV heads of {dim}, {len(lengths)} sequences",
                "fp64",
                len(lengths) * heads * dim,
                0 if error <= 2 * rounding else len(lengths) * heads * dim,
                f"relative error {2 * rounding:.2e} (two roundings), is {error:.2e}",
                error <= 2 * rounding,
            )
        )
    return checks
