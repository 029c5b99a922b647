"""A forward hook for a server, and how often it was called."""

from __future__ import annotations

import json
from pathlib import Path

from gemma4_turbo.cli.arguments import flag

HOOK = '''\
"""A forward hook that changes a layer's output and writes down how often it was called."""

import os

import torch

ramps = {}
calls = 0


def make(config):
    def hook(module, args, output):
        global calls
        hidden = output[0] if isinstance(output, tuple) else output
        key = hidden.device, hidden.dtype, hidden.shape[-1]
        if key not in ramps:
            ramps[key] = torch.linspace(
                0, config["size"], hidden.shape[-1], device=hidden.device, dtype=hidden.dtype
            )
        calls += 1
        with open(f"{os.environ['BENCH_HOOK_CALLS']}.{os.getpid()}", "w") as file:
            file.write(str(calls))
        changed = hidden + ramps[key]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
'''


def hook_arguments(scratch: Path) -> tuple[list[str], Path]:
    """For launch_server, and the folder of the hook's module."""
    folder = scratch / "hooks"
    folder.mkdir(exist_ok=True)
    (folder / "bench_ramp_hook.py").write_text(HOOK)
    specification = {
        "name": "ramp",
        "target_modules": ["model.layers.1"],
        "hook_factory": "bench_ramp_hook:make",
        "config": {"size": 16.0},
    }
    # Dynamo, which SGLang sends prefills through to record them, does not take a hook that writes.
    arguments = ["--forward-hooks", json.dumps([specification])]
    arguments.append(flag("disable_piecewise_cuda_graph"))
    return arguments, folder


def hook_calls(base: Path) -> int:
    """How often the hook was called in a server's processes."""
    found = [path.read_text() for path in base.parent.glob(f"{base.name}.*")]
    return sum(int(text) for text in found if text)
