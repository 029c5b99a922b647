"""Processes that a benchmark starts: an engine or a load inside, commands as lines of JSON on stdin.

Rule: each file is run by its path and answers on stdout; none imports a benchmark or `bench.common`. `peers`
and `load` also run in environments of other engines: they import the standard library and what they measure.
"""
