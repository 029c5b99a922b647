"""A batch of SGLang's own, as far as layers read it."""

from gemma4_turbo.cli.small_model import prefill

__all__ = ["prefill"]
