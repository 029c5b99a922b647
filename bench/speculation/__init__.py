"""The parts of ``bench/mtp.py`` and ``bench/quality_mtp.py``: engines that speculate, and their accept length.

Rule: what a run found is compared and told here; how it is run is in the benchmarks.
"""
