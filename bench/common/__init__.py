"""What several benchmarks use: processes with engines and servers, their turns, rows and comparisons.

Rule: knows no single benchmark, and imports neither torch nor SGLang: what has a GPU is another process.
"""
