"""RMSNorm with the bits of stock's kernels, and what is fused with it."""
