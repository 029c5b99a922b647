"""Which engines are compared, by name, and what all of them are started with."""

from __future__ import annotations

from typing import Any

STOCK, PATCHED, CONTROL = "stock", "patched", "stock again"
BITS = "patched, bitwise"  # with the patches that have stock's bits, and no other
PIECEWISE = "stock, piecewise"
CHUNKS = "stock, chunks of "  # and how many tokens
EXACT = "stock, attention in fp32"
ARGUMENTS: dict[str, Any] = {  # of every engine on a generated model
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "chunked_prefill_size": 4096,
    "log_level": "info",
}
