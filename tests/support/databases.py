"""The databases that a test's own server may have."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from support.postgres import find_binaries, local_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator


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
