"""What the NVIDIA driver says of its GPUs, without a CUDA context and without torch.

Through NVML's C interface, documented in NVIDIA's "NVML API Reference": the library comes with the
driver, its Python binding may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

LIBRARY = "libnvidia-ml.so.1"
_TEXT = 96  # bytes of a name or a version: NVML's own bound


class Machine(NamedTuple):
    """The driver and its GPUs."""

    driver: str
    names: tuple[str, ...]


@contextmanager
def _library() -> Iterator[Any]:
    import ctypes  # here, because `apply` has no use for it on a machine without a GPU profile

    nvml = ctypes.CDLL(LIBRARY)
    _require(nvml.nvmlInit_v2())
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _require(status: int) -> None:
    if status:
        raise OSError(f"NVML: error {status}")


def look() -> Machine:
    """Driver and names of all GPUs; OSError if there is no driver, or it cannot be asked."""
    import ctypes

    with _library() as nvml:
        text = ctypes.create_string_buffer(_TEXT)
        _require(nvml.nvmlSystemGetDriverVersion(text, _TEXT))
        driver = text.value.decode(errors="replace")
        count = ctypes.c_uint()
        _require(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        names = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            _require(nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)))
            _require(nvml.nvmlDeviceGetName(handle, text, _TEXT))
            names.append(text.value.decode(errors="replace"))
    return Machine(driver, tuple(names))


def utilisation(bus: str) -> int:
    """Percent of the last sampling period in which a kernel ran on a GPU; OSError if it is not told.

    Args:
        bus: the GPU's place on the PCI bus, ``0000:3b:00.0``.
    """
    import ctypes

    class Rates(ctypes.Structure):
        _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))

    with _library() as nvml:
        handle, rates = ctypes.c_void_p(), Rates()
        found = nvml.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(handle))
        _require(found)
        _require(nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)))
    return int(rates.gpu)
