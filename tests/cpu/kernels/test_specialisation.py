"""No kernel compiles anew for another number of tokens: a server captures graphs for dozens."""

from __future__ import annotations

import json
import os
import subprocess
import sys

COUNTS = {"M", "rows", "batch", "tokens", "slots", "split", "splits", "tiles", "K_BLOCKS"}
LIST = """
import importlib, json, pkgutil
import gemma4_turbo.kernels as kernels
from triton.runtime.jit import JITFunction

found = {}
for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
    for name, value in vars(importlib.import_module(module.name)).items():
        if isinstance(value, JITFunction) and name.endswith("_kernel"):
            found[name] = [
                p.name for p in value.params if not p.is_constexpr and not p.do_not_specialize
            ]
print(json.dumps(found))
"""


def test_counts_are_not_specialised():
    # Under the interpreter of the other tests a kernel is no JITFunction.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", LIST], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) > 10
    assert {name: sorted(COUNTS & set(names)) for name, names in found.items()} == {
        name: [] for name in found
    }
