"""Budgets: of requests, with their rate, their order and what the server asks for; and of time."""

import asyncio
from datetime import timedelta, timezone
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.virtual import play

from supervised import _clock, supervised_flow, supervisor
from supervised._budget import Priority, RequestBudget, priority
from supervised.testing import FakePrefect


def http_date(seconds):
    """Return the date and time so many seconds from now, as a header has it."""
    moment = _clock.utc_now() + timedelta(seconds=seconds)
    return format_datetime(moment.astimezone(timezone.utc), usegmt=True)


def test_without_a_limit_nothing_waits():
    async def story():
        budget = RequestBudget()
        for _ in range(1000):
            await budget.take()
        return asyncio.get_running_loop().time()

    assert play(story()) == 0


def test_more_important_requests_overtake_the_others():
    order = []

    async def story():
        budget = RequestBudget()
        budget.limit(60)
        for _ in range(10):
            await budget.take()  # what may be used at once

        async def ask(name, value):
            with priority(value):
                await budget.take()
            order.append(name)

        await asyncio.gather(
            ask("poll", Priority.POLL),
            ask("launch", Priority.LAUNCH),
            ask("teardown", Priority.TEARDOWN),
        )

    play(story())
    assert order == ["teardown", "launch", "poll"]


def test_an_inner_block_cannot_lower_the_priority():
    async def story():
        budget = RequestBudget()
        budget.limit(6)
        await budget.take()
        order = []

        async def teardown():
            with priority(Priority.TEARDOWN), priority(Priority.POLL):
                await budget.take()
            order.append("teardown")

        async def launch():
            with priority(Priority.LAUNCH):
                await budget.take()
            order.append("launch")

        await asyncio.gather(launch(), teardown())
        return order

    assert play(story()) == ["teardown", "launch"]


def test_everybody_waits_when_the_server_asks_for_it():
    async def story():
        budget = RequestBudget()
        await budget.after(httpx.Response(429, headers={"Retry-After": "7"}))
        await budget.after(httpx.Response(429, headers={"Retry-After": "tomorrow"}))
        await budget.after(httpx.Response(200))
        await budget.before(httpx.Request("GET", "http://127.0.0.1/"))
        return asyncio.get_running_loop().time()

    assert 7 <= play(story()) < 8


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_may_ask_for_it_until_a_date(status):
    async def story():
        budget = RequestBudget()
        value = http_date(30)
        await budget.after(httpx.Response(status, headers={"Retry-After": value}))
        await budget.take()
        return asyncio.get_running_loop().time()

    assert 29 <= play(story()) <= 30  # the date has whole seconds


def test_a_server_that_is_not_available_may_ask_for_it():
    async def story():
        budget = RequestBudget()
        await budget.after(httpx.Response(503, headers={"Retry-After": "7"}))
        await budget.take()
        return asyncio.get_running_loop().time()

    assert 7 <= play(story()) < 8


def test_a_date_that_is_over_asks_for_nothing():
    async def story():
        budget = RequestBudget()
        value = http_date(-30)
        await budget.after(httpx.Response(429, headers={"Retry-After": value}))
        await budget.take()
        return asyncio.get_running_loop().time()

    assert play(story()) == 0


def test_of_those_that_wait_the_first_makes_all_its_requests_first():
    order = []

    async def story():
        budget = RequestBudget()
        budget.limit(60)
        for _ in range(10):
            await budget.take()  # what may be used at once

        async def launch(name):
            with priority(Priority.LAUNCH):
                for _ in range(3):
                    await budget.take()
                    order.append(name)

        await asyncio.gather(*(launch(name) for name in "abc"))

    play(story())
    assert order == list("aaabbbccc")


def test_who_is_cancelled_while_waiting_takes_nothing():
    async def story():
        budget = RequestBudget()
        budget.limit(60)
        for _ in range(10):
            await budget.take()
        waiting = asyncio.create_task(budget.take())
        await asyncio.sleep(0)
        waiting.cancel()
        await budget.take()
        return asyncio.get_running_loop().time()

    assert play(story()) < 1.5


def test_of_several_limits_the_smallest_counts_until_it_is_taken_back():
    async def story():
        budget = RequestBudget()
        budget.limit(600)
        budget.limit(6)
        await budget.take()
        waiting = asyncio.create_task(budget.take())
        await asyncio.sleep(1)
        assert not waiting.done()
        budget.unlimit(6)
        await waiting
        return asyncio.get_running_loop().time()

    assert play(story()) < 2


@given(limit=st.integers(1, 600), gaps=st.lists(st.floats(0, 5), min_size=1, max_size=40))
def test_no_minute_sees_more_requests_than_allowed_and_a_burst(limit, gaps):
    async def story():
        budget, passed = RequestBudget(), []
        budget.limit(limit)
        loop = asyncio.get_running_loop()

        async def ask():
            await budget.take()
            passed.append(loop.time())

        asked = []
        for gap in gaps:
            asked.append(asyncio.create_task(ask()))
            await asyncio.sleep(gap)
        await asyncio.gather(*asked)
        return passed

    passed = play(story())
    assert len(passed) == len(gaps)
    burst = max(1, limit / 6)
    for moment in passed:
        assert sum(1 for other in passed if 0 <= moment - other < 60) <= limit + burst + 1


# -- a scope with a budget ----------------------------------------------------------------------


@supervised_flow(requests_per_minute=60, lease_seconds=20, on_child_failure="ignore")
async def busy():
    """Keep a child, and launch more than can be launched in ten minutes."""
    supervisor.spawn("region/test")
    await asyncio.sleep(20)
    supervisor.map("score/gpu", [{"i": i} for i in range(200)])
    await asyncio.sleep(36_000)


@supervised_flow
async def region():
    """Stay."""
    await asyncio.sleep(36_000)


def busy_world():
    prefect = FakePrefect()
    prefect.deploy("busy/test", busy, runner="busy")
    prefect.deploy("region/test", region)
    prefect.deploy("score/gpu", takes=36_000)
    return prefect


def test_a_lease_is_renewed_though_hundreds_of_launches_wait():
    """Or the children end themselves: they take their parent for dead."""
    with busy_world() as prefect:
        root = prefect.start("busy/test")
        prefect.until(lambda: root.below and root.below[0].state.is_running(), within=60)
        prefect.advance(120)
        assert root.below[0].state.is_running()
        assert 10 < len(root.below) < 100


def test_a_cancellation_is_heard_though_hundreds_of_launches_wait():
    heard = []

    @supervised_flow(requests_per_minute=60)
    async def root():
        supervisor.map("score/gpu", [{"i": i} for i in range(200)])
        try:
            await asyncio.sleep(36_000)
        finally:
            heard.append(True)

    with busy_world() as prefect:
        run = prefect.start(root)
        prefect.advance(60)
        run.cancel()
        prefect.until(lambda: heard, within=10)
        assert len(run.below) < 100


# -- time ---------------------------------------------------------------------------------------


def test_what_is_left_of_a_parents_deadline_is_known_from_the_first_line():
    seen = []

    @supervised_flow
    async def mid():
        seen.append(supervisor.seconds_left)

    @supervised_flow(deadline_seconds=100)
    async def root():
        await supervisor.spawn("mid/test")

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        prefect.deploy("mid/test", mid)
        prefect.start("root/test")
        prefect.until(lambda: not prefect.alive)
    assert len(seen) == 1
    assert 0 < seen[0] <= 100


def test_a_deadline_counts_though_the_server_does_not_tell_its_time():
    @supervised_flow(deadline_seconds=50)
    async def mid():
        await asyncio.sleep(3600)

    @supervised_flow(deadline_seconds=1000)
    async def root():
        await supervisor.spawn("mid/test")

    def unanswered():
        raise httpx.ReadTimeout("no answer", request=httpx.Request("GET", "http://fake"))

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        prefect.deploy("mid/test", mid)
        run = prefect.start("root/test")
        prefect.server.time = unanswered
        prefect.until(lambda: run.below and run.below[0].state.is_running(), within=60)
        prefect.advance(40)
        assert run.below[0].state.is_running()
        prefect.until(lambda: not run.below[0].is_alive, within=20)
        assert run.below[0].state.name == "TimedOut"
