"""Reading and asking page by page, while the runs go on: nothing is skipped, and nobody held up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from uuid import UUID

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.exceptions import PrefectHTTPStatusError

from supervised import _api
from supervised._api import PrefectOrchestrator
from supervised._budget import RequestBudget

PAGE = 4


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(_api, "_PAGE", PAGE)


class Shrinking:
    """Has runs that end between its answers.

    Args:
        count: How many live at first.
        ends: The runs that end after each answer.
    """

    def __init__(self, count, ends=()):
        self.live = [UUID(int=number) for number in range(count, 0, -1)]
        self._ends = iter(ends)
        self.requests = 0

    async def read_flow_runs(self, *, offset, limit, **_):
        self.requests += 1
        page = [SimpleNamespace(id=run_id) for run_id in self.live[offset : offset + limit]]
        for number in next(self._ends, ()):
            if UUID(int=number) in self.live:
                self.live.remove(UUID(int=number))
        return page


def read_tagged(client):
    api = PrefectOrchestrator(client, RequestBudget())
    return [run.id for run in asyncio.run(api.read_tagged("supervised:x", live_only=True))]


@given(
    count=st.integers(0, 30),
    ends=st.lists(st.lists(st.integers(1, 30), max_size=12), max_size=12),
)
def test_what_lives_on_is_never_skipped_whatever_ends_meanwhile(count, ends):
    client = Shrinking(count, ends)
    found = read_tagged(client)
    assert set(client.live) <= set(found)
    assert len(found) == len(set(found))


def test_without_changes_each_page_is_read_once():
    client = Shrinking(3 * PAGE - 3)
    assert len(read_tagged(client)) == 3 * PAGE - 3
    assert client.requests == 3


def test_of_runs_read_by_their_ids_no_page_is_asked_for_in_vain():
    client = Shrinking(PAGE)
    api = PrefectOrchestrator(client, RequestBudget())
    asyncio.run(api.read_runs(client.live))
    assert client.requests == 1


class Refusing:
    """Sets states in bulk, unless one of the runs is bad.

    Args:
        bad: The runs for whose sake a request fails.
        status: How it fails.
    """

    def __init__(self, bad, status=500):
        self._bad = {UUID(int=number) for number in bad}
        self._status = status
        self.requests = 0
        self.asked = set()

    async def request(self, method, path, *, json):
        self.requests += 1
        ids = {UUID(run_id) for run_id in json["flow_runs"]["id"]["any_"]}
        if self._bad & ids:
            request = httpx.Request(method, "http://prefect.test")
            response = httpx.Response(self._status, json={"detail": "no"}, request=request)
            raise PrefectHTTPStatusError("no", request=request, response=response)
        self.asked |= ids
        state = {"type": "CANCELLING", "name": "Cancelling"}
        results = [
            {"flow_run_id": str(each), "status": "ACCEPT", "state": state} for each in sorted(ids)
        ]
        return SimpleNamespace(json=lambda: {"results": results})


@pytest.mark.parametrize("bad", [[], [1], [17, 50], [49, 50]])
@pytest.mark.parametrize("status", [422, 500])
def test_one_that_cannot_be_asked_keeps_no_other_alive(bad, status):
    client = Refusing(bad, status)
    api = PrefectOrchestrator(client, RequestBudget())
    everything = [UUID(int=number) for number in range(1, 51)]
    acks = asyncio.run(api.request_cancel(everything, "the night is over"))
    assert [ack.run_id for ack in acks] == everything
    assert {ack.run_id for ack in acks if not ack.accepted} == {UUID(int=each) for each in bad}
    assert client.asked == set(everything) - {UUID(int=each) for each in bad}
    assert client.requests <= 1 + 12 * len(bad)


@pytest.mark.parametrize("status", [401, 429, 503])
def test_a_server_that_takes_no_requests_is_not_asked_for_each(status):
    client = Refusing([1], status)
    api = PrefectOrchestrator(client, RequestBudget())
    with pytest.raises(PrefectHTTPStatusError):
        asyncio.run(api.request_cancel([UUID(int=number) for number in range(1, 51)], "over"))
    assert client.requests == 1


class Old:
    """Sets the states of single runs only.

    Args:
        status: The answer to a request in bulk.
    """

    def __init__(self, status):
        self._status = status
        self.in_bulk = 0
        self.asked = []

    async def request(self, method, path, **_):
        self.in_bulk += 1
        request = httpx.Request(method, "http://prefect.test")
        response = httpx.Response(self._status, json={"detail": "no"}, request=request)
        raise PrefectHTTPStatusError("no", request=request, response=response)

    async def set_flow_run_state(self, run_id, state):
        self.asked.append(run_id)
        return SimpleNamespace(state=state)


@pytest.mark.parametrize("status", [403, 404, 405, 501])
def test_a_server_that_sets_no_states_in_bulk_is_asked_for_each_run_and_not_tried_again(status):
    client = Old(status)
    api = PrefectOrchestrator(client, RequestBudget())
    everything = [UUID(int=number) for number in range(1, 121)]

    async def ask_twice():
        acks = await api.request_cancel(everything[:70], "the night is over")
        return acks + await api.request_cancel(everything[70:], "the night is over")

    acks = asyncio.run(ask_twice())
    assert [ack.run_id for ack in acks] == client.asked == everything
    assert all(ack.accepted for ack in acks)
    assert client.in_bulk == 1
