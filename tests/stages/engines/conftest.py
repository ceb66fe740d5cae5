"""The chat servers of a test."""

from collections.abc import Callable, Iterator

import pytest
from support.chat_server import Answer, Server


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, int], Answer]], Server]]:
    servers: list[Server] = []

    def start(rule: Callable[[str, int], Answer]) -> Server:
        servers.append(Server(rule))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
