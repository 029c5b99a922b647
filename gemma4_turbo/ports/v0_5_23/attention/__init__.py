"""Attention kernels of a backend, and the KV cache that they read."""
