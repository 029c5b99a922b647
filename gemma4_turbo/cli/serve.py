"""``serve -- ARGS``: what ``sglang serve ARGS`` starts, ``sglang.launch_server``, with the patches on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from gemma4_turbo.cli.modules import CannotRunError, require_sglang
from gemma4_turbo.ports.any.launch.routes import bootstrap_routes


def run(arguments: Sequence[str]) -> int:
    """Replace this process by the server."""
    require_sglang()
    if not bootstrap_routes():
        raise CannotRunError(
            "the server's processes would stay stock: install gemma4_turbo with pip (and let "
            "SGLANG_PLUGINS name gemma4_turbo if it is set), or PYTHONPATH=$(gemma4-turbo sitecustomize)"
        )
    os.execv(sys.executable, [sys.executable, "-m", "sglang.launch_server", *arguments])
