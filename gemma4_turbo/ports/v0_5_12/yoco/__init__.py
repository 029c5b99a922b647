"""You Only Cache Once (YOCO): a prefill runs the layers that share KV on the rows that somebody reads.

The words are those of `docs/patches/prefill.md`: the cut leaves rows out, the tail is what it keeps.
"""
