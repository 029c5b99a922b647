"""What each port for SGLang 0.5.22 and 0.5.23 stands on, as data. Nothing here imports SGLang."""

from __future__ import annotations

from gemma4_turbo.engine.port import Port

HERE = __package__

PORTS: dict[str, Port] = {}
