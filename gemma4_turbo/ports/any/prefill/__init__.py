"""Prefill: CUDA graphs, and You Only Cache Once (YOCO), which runs KV-shared layers on the rows that somebody reads.

The words are those of `docs/patches/prefill.md`: the cut leaves rows out, the tail is what it keeps.
"""
