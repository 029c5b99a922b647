"""The parts of ``bench/peers.py``: engines named on its command line, workloads, rows, HTTP.

Rule: engines of any kind are asked over a pipe or HTTP; no package of theirs is imported here.
"""
