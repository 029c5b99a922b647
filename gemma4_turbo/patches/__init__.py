"""One file per patch: how the kernels are wired into SGLang. No arithmetic here."""
