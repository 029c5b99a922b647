"""Entry point of group ``sglang.srt.plugins``: SGLang calls `register` in its processes."""

from __future__ import annotations


def register() -> None:
    """Register the patches. Never raises: SGLang would log that and go on without them."""
    import gemma4_turbo

    gemma4_turbo.bootstrap()
