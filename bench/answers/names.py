"""Who answers besides the engines' variants, and where distributions are compared."""

from __future__ import annotations

from bench.common.variants import STOCK

JUDGE = "transformers, fp32"
BATCHES = f"{STOCK}, other batches"
AGAIN = f"{STOCK}, once more"
PROMPT, GENERATED = "prompt", "generated"
