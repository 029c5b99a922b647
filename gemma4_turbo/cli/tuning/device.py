"""The GPU that is measured: what it is, and whether it can be measured now."""

from __future__ import annotations

import time
from typing import NamedTuple

from gemma4_turbo.cli import report
from gemma4_turbo.cli.modules import CannotRunError
from gemma4_turbo.cli.tuning.subject import Clock
from gemma4_turbo.engine import gpu_profile, nvml
from gemma4_turbo.engine.gpu_profile import Key
from gemma4_turbo.kernels import measured
from gemma4_turbo.kernels.gpu import Gpu, gpu

BUSY = 10  # percent, of others
SAMPLES, PAUSE_S = 6, 0.25
SPARE = 1 << 30  # bytes: contexts, graphs and what libraries take


class Device(NamedTuple):
    """A GPU, or what stands for one in a test."""

    torch_name: str  # cuda, cpu
    key: Key
    gpu: Gpu
    known: bool  # whether the package's own tiles are for it
    free: int  # bytes
    clock: Clock


def find() -> Device:
    """The first GPU that CUDA shows, idle.

    Raises:
        CannotRunError: if there is none, another process uses it, or its driver does not answer.
    """
    problem = report.torch_problem()
    if problem is not None:
        raise CannotRunError(problem)
    import torch

    if torch.version.hip is not None or not torch.cuda.is_available():
        raise CannotRunError("no NVIDIA GPU: torch.cuda.is_available() is false")
    try:
        machine = nvml.look()
    except (OSError, AttributeError) as error:
        raise CannotRunError(f"the NVIDIA driver does not answer: {error}") from None
    place = torch.device("cuda", 0)
    try:  # the first use of the GPU: other processes may have all its memory, or the GPU for themselves
        free = torch.cuda.mem_get_info(place)[0]
        percent = _busy(torch.cuda.get_device_properties(0))
    except RuntimeError as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CannotRunError(
            f"the GPU cannot be used: {told}; nvidia-smi lists who uses it"
        ) from None
    if percent > BUSY:
        raise CannotRunError(
            f"the GPU is busy, {percent} % with other processes: times would be wrong. "
            "nvidia-smi lists them"
        )
    from gemma4_turbo.cli.tuning.timing import GraphClock

    key = Key(torch.cuda.get_device_name(place), machine.driver, **_libraries())
    here = gpu(place)
    known = here.capability[0] in measured.KNOWN
    return Device("cuda", key, here, known, free, GraphClock())


def _libraries() -> dict[str, str]:
    found = gpu_profile.versions()
    if not found["sglang"]:
        raise CannotRunError("SGLang is not installed: pip install 'gemma4-turbo[sglang]'")
    return found


def _busy(properties: object) -> int:
    """Percent of the time in which a kernel of others runs; 0 where the driver does not tell."""
    names = [f"pci_{part}_id" for part in ("domain", "bus", "device")]
    if not all(hasattr(properties, name) for name in names):
        return 0
    domain, number, device = (int(getattr(properties, name)) for name in names)
    bus = f"{domain:08x}:{number:02x}:{device:02x}.0"
    most = 0
    for _ in range(SAMPLES):
        try:
            most = max(most, nvml.utilisation(bus))
        except (OSError, AttributeError):
            return most
        time.sleep(PAUSE_S)
    return most


def require_memory(device: Device, needed: int) -> None:
    """`CannotRunError` if the largest subject does not fit."""
    if device.free < needed + SPARE:
        free, wanted = (n / (1 << 30) for n in (device.free, needed + SPARE))
        raise CannotRunError(
            f"the GPU has {free:.1f} GiB free and {wanted:.1f} are needed: end what holds its memory, "
            "or name a smaller --model"
        )
