"""Decode step: the layer, its attention module, what comes before the first."""
