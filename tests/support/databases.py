"""The databases that a test's own server may have."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from support.postgres import find_binaries, local_postgres
from support.world import World

from supervised.testing import local_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def world_on(database: str, home: Path) -> Iterator[World]:
    """Yield a server of its own, on *sqlite* or on *postgresql*."""
    with contextlib.ExitStack() as stack:
        settings = stack.enter_context(settings_for(database))
        server = stack.enter_context(local_server(home=home, settings=settings))
        stack.enter_context(temporary_settings({PREFECT_API_URL: server.url, PREFECT_HOME: home}))
        client = stack.enter_context(get_client(sync_client=True))
        yield World(server, home, client)


@contextlib.contextmanager
def settings_for(database: str) -> Iterator[dict[str, str]]:
    """Yield what a server is set to for its database: *sqlite*, or a *postgresql* of its own.

    Skips the test where there is no PostgreSQL: whoever has none can run the others, and where
    there is one, as in CI, nothing is skipped.
    """
    if database == "sqlite":
        yield {}
        return
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("there are no binaries of PostgreSQL on this machine")
    with local_postgres(binaries) as url:
        yield {"PREFECT_API_DATABASE_CONNECTION_URL": url}
