"""Speculation with a multi-token prediction assistant, whose worker runs ahead of the GPU (spec v2)."""
