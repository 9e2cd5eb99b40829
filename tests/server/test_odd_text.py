"""What cannot be stored is told all the same, and keeps nothing alive."""

import asyncio

import pytest
from prefect import flow
from prefect.states import Running
from support.databases import world_on

from supervised._api import open_orchestrator
from supervised._policy import parent_reason
from supervised._text import text_of

pytestmark = pytest.mark.server
LONG = "x" * 100_000


@flow(name="odd")
def odd_flow() -> None:
    """What the run would do."""


def test_a_run_is_cancelled_because_of_an_error_whose_text_no_server_takes(tmp_path):
    """A lone surrogate is no UTF-8, and PostgreSQL stores no NUL: that went on running."""
    error = FileNotFoundError(f"no such file: \udce9t\udce9.csv, \0, {LONG}")
    reason = parent_reason("failed", "odd", text_of(error))

    async def cancel(run_id):
        async with open_orchestrator() as api:
            (ack,) = await api.request_cancel([run_id], reason.message)
            assert ack.accepted

    with world_on("postgresql", tmp_path) as world:
        run = world.client.create_flow_run(odd_flow, state=Running())
        asyncio.run(cancel(run.id))
        state = world.run(run.id).state
        assert state.is_cancelling()
        assert "no such file: \\udce9t\\udce9.csv, \\x00, xxx" in state.message
        assert len(state.message) <= 2_000
