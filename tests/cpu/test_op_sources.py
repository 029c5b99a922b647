"""The place of a registration is PyTorch's own answer."""

from __future__ import annotations

import inspect
import sys

import torch
from torch._library import utils

from tests import op_sources


def test_the_same_place() -> None:
    frame = inspect.getframeinfo(sys._getframe(0))
    assert op_sources.get_source(1) == f"{frame.filename}:{frame.lineno + 1}"
    assert utils.get_source is op_sources.get_source


def test_an_operator_keeps_it() -> None:
    """Through PyTorch's own registration, whose frames are counted there."""
    library = torch.library.Library("gemma4_turbo_places", "FRAGMENT")
    library.define("here(Tensor x) -> Tensor")
    torch.library.register_fake("gemma4_turbo_places::here", lambda x: x, lib=library)
    entry = torch._library.simple_registry.singleton.find("gemma4_turbo_places::here")
    line = inspect.getframeinfo(sys._getframe(0)).lineno - 2
    assert entry.fake_impl.kernels[0].source == f"{__file__}:{line}"
