"""Without a GPU, kernels run in Triton's interpreter: it must be chosen before triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_report_header() -> str:
    """Say what this machine leaves out."""
    if torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name()}"
    return "no CUDA device: tests/gpu is not collected, kernels run in Triton's interpreter"
