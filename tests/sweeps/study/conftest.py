"""Fixtures of the tests of studies."""

from collections.abc import Iterator

import pytest
from support.postgres import Server, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A PostgreSQL server."""
    with running_server() as running:
        yield running


@pytest.fixture
def database(server: Server) -> str:
    """The address of the server's database."""
    return server.address
