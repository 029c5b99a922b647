"""Marks of a test file whose kernels run through Triton's interpreter."""

from __future__ import annotations

import pytest

from gemma4_turbo.kernels.attention import extend

MARKS = [
    pytest.mark.skipif(not extend.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]
