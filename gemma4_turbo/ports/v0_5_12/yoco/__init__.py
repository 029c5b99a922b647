"""You Only Cache Once: a prefill runs the layers that share KV on the rows that somebody reads."""
