"""Ports for processes that are told theirs: the kernel gives none of these to connections meanwhile."""

import itertools
import os
import socket

BELOW = 32768
"""Where Linux's ports for connections begin."""
_next = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """A port that nobody listens on. Each process begins elsewhere: a port may be in use only some time later."""
    for number in itertools.islice(_next, 2000):
        port = BELOW - 1 - number % 2000
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free")
