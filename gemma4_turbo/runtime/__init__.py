"""What a patch may ask while a server runs: hooks, operators, CUDA graphs, comparisons that may fail."""
