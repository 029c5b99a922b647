"""The engine of this process: the catalogue, and the ports of every release line."""

from __future__ import annotations

from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.engine import gpu_profile, imports, run
from gemma4_turbo.engine.installer import Engine
from gemma4_turbo.engine.port import Port, Ports
from gemma4_turbo.kernels import measured
from gemma4_turbo.ports.any import sources as any_line
from gemma4_turbo.ports.v0_5_12 import sources as v0_5_12
from gemma4_turbo.ports.v0_5_23 import sources as v0_5_23

LINES = (v0_5_23, v0_5_12, any_line)  # the newest release line first
PORTS: Ports = {
    patch.name: tuple(line.PORTS[patch.name] for line in LINES if patch.name in line.PORTS)
    for patch in CATALOGUE
}
imports.root = any_line.ROOT
ENGINE = Engine(
    CATALOGUE,
    PORTS,
    own_models=any_line.GEMMA4_MODELS,
    own_kinds=any_line.GEMMA4_KINDS,
    launch_gates="gemma4_turbo.ports.any.launch.launch_gates",
    measured=gpu_profile.decisions,
)
run.RUNS.update(ENGINE.runs)
measured.source = gpu_profile.tiles


def every_port() -> list[Port]:
    """Of all patches and lines."""
    return [port for ports in PORTS.values() for port in ports]
