"""The result of comparing one patch with stock, as `verify` and the demonstration print it."""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    """One comparison."""

    patch: str
    what: str  # the inputs
    against: str  # what it was compared with
    compared: int  # elements
    differing: int  # elements whose bits differ from that
    allowed: str  # what still counts as equal
    passed: bool
