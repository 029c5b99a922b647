"""The parts of ``bench/quality.py``, some of which ``bench/quality_mtp.py`` shares.

Rule: engines are asked, judged and compared here; which ones there are is the benchmarks' to say.
"""
