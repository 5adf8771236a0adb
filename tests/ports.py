"""Ports on which processes of a test meet."""

from __future__ import annotations

import random
import socket

_CHOICE = random.SystemRandom()
"""Apart from the seeds of the tests."""


def free_port() -> int:
    """A port that nothing uses, outside the range from which systems take the ports of connections.

    A port asked of the system (0) lies within that range: between asking and listening any connection may take it.
    """
    for _ in range(100):
        port = _CHOICE.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError("no free port was found between 20000 and 32000")
