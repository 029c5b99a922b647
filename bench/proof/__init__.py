"""The parts of ``bench/hostile.py``: surroundings, servers in them, what is compared and concluded.

Rule: nothing here changes what a server does beyond its environment, its arguments and the files that it
finds; stock and patched are asked the same.
"""
