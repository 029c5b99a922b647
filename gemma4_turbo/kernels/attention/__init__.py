"""Attention over a paged KV cache, for decode and for prefill."""
