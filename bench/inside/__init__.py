"""What `bench/site` puts into an engine's own process.

Rule: torch and numbers alone, nothing else of the benchmarks, as the process has what SGLang needs and no more.
"""
