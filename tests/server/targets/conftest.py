from collections.abc import Iterator

import pytest

from testbed.chat_server import ChatServer
from testbed.vllm_server import VllmServer


@pytest.fixture
def other() -> Iterator[ChatServer]:
    """Another server, as a target has it."""
    with ChatServer() as server:
        yield server
    assert server.objections == []  # every request was as the API's reference has it


@pytest.fixture
def vllm() -> Iterator[VllmServer]:
    """A vLLM server."""
    with VllmServer() as server:
        yield server
    assert server.objections == []  # every request has only documented fields
