"""TCP ports for engines that start at the same time.

SGLang looks for a free port as it starts (``nccl_port``, of torch's rendezvous) and takes it a minute
later. 0.5.12.post1 looks among the ephemeral ports, 0.5.23 from 22000 to 29999; of several engines two can
find the same one, and any connection can be given an ephemeral one meanwhile.
"""

from __future__ import annotations

import random
import socket

PORTS = range(14_000, 22_000)
"""Below Linux's ephemeral ports (32768 on) and those that SGLang itself looks among; SGLang derives others
from a server's port, up to 10,000 above it."""

_held: list[socket.socket] = []


def own_port() -> int:
    """A free port that no process with this function has been handed and still runs.

    The claim is the name of a Unix socket in Linux's abstract namespace: one process has it, the kernel frees
    it with the process, and its scope is that of the ports, the network namespace.
    """
    for port in random.sample(PORTS, len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0gemma4_turbo-bench-port-{port}")
            with socket.socket() as probe:
                # Without SO_REUSEADDR: nor one whose last connection is just being closed.
                probe.bind(("0.0.0.0", port))
        except OSError:
            claim.close()
        else:
            _held.append(claim)
            return port
    raise SystemExit(f"no free port between {PORTS.start} and {PORTS.stop - 1}")
