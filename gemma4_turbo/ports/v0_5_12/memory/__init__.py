"""Sizes of the KV pools."""
