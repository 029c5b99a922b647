"""Piecewise CUDA graphs of a prefill."""
