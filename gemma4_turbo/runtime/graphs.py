"""CUDA graphs of a running server: which servers have none, what a failed capture leaves, what a graph runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from gemma4_turbo.runtime import hooks


def argument_unfit(arguments: Any, reasons: Mapping[str, str]) -> str | None:
    """What the first of the server's arguments that is set among ``reasons`` means there, or None."""
    return next((reason for name, reason in reasons.items() if getattr(arguments, name)), None)


@contextlib.contextmanager
def recording(graph: Any, pool: Any = None) -> Iterator[None]:
    """What runs on the GPU inside goes into ``graph``, its tensors into ``pool`` or memory of its own."""
    # The outer one puts the stream back where `torch.cuda.graph` fails to. The server's other
    # threads may do on the GPU what this one may not now.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        yield


def settle() -> None:
    """Let the GPU's random generator know that nothing is recorded any more. Without a GPU, nothing.

    Where CUDA itself breaks a capture off (something in it waited for the GPU), PyTorch leaves the
    generator as during one, and the next random number raises: that would be a sampler's. A capture
    that succeeds puts it right, so a single fill is recorded and thrown away. Should that fail too,
    the first failure is what is to be told.
    """
    if not torch.cuda.is_available():
        return
    with contextlib.suppress(RuntimeError), recording(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


class Watched:
    """Parameters, buffers and hooks of modules that a graph runs: cheap to look at again."""

    def __init__(self, modules: Iterable[Any]) -> None:
        roots = list(modules)
        every = list(dict.fromkeys(inner for module in roots for inner in module.modules()))
        self._tensors: list[tuple[Mapping[str, Any], str, int]] = [
            (store, name, tensor.data_ptr())
            for module in every
            for store in (module._parameters, module._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]
        self._hooks = hooks.Watched(roots)

    def moved(self) -> bool:
        """Whether a module or a tensor is not the one that was. One written over in place is."""
        return self._hooks.changed() or any(
            store.get(name) is None or store[name].data_ptr() != at
            for store, name, at in self._tensors
        )

    def hooked(self) -> bool:
        """Whether somebody wants to see, or change, what the modules compute."""
        return self._hooks.hooked()

    def elsewhere(self, device: torch.device) -> bool:
        """Whether a tensor lies on another device."""
        return any(store[name].device != device for store, name, _ in self._tensors)
