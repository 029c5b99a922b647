"""Multi-token prediction, whose worker runs ahead of the GPU here (spec v2)."""
