"""Prefill: CUDA graphs, and You Only Cache Once."""
