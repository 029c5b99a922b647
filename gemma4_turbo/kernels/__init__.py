"""Triton kernels, each beside its plain torch reference. Nothing here imports SGLang."""
