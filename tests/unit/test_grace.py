"""How long a teardown asks, and how long it waits, whatever asking has taken."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from supervised import supervised_flow, supervisor
from supervised._grace import Grace
from supervised._policy import Budget
from supervised.testing import FakePrefect


@pytest.fixture
def play():
    """Plays a coroutine in a world whose clock jumps."""
    with FakePrefect() as prefect:
        yield prefect.call


def test_asking_that_is_quick_takes_nothing_from_the_waiting_and_adds_nothing(play):
    async def tear_down():
        grace = Grace(Budget(20.0), lambda: 100.0)
        with grace.for_asking():
            await anyio.sleep(3)
        assert grace.left == pytest.approx(17)

    play(tear_down())


@pytest.mark.parametrize(("needed", "left"), [(100.0, 20 + 25 - 30), (10.0, 20 + 10 - 30)])
def test_waiting_is_as_much_longer_as_a_slow_server_was_asked_but_not_than_it_needs(
    play, needed, left
):
    async def tear_down():
        grace = Grace(Budget(20.0), lambda: needed)
        with grace.for_asking():
            await anyio.sleep(30)
        assert grace.left == pytest.approx(left)

    play(tear_down())


@pytest.mark.parametrize(("needed", "bound"), [(1.0, 20.0), (100.0, 105.0)])
def test_asking_is_bounded_by_the_grace_or_by_what_is_needed_if_that_is_more(play, needed, bound):
    async def tear_down():
        grace = Grace(Budget(20.0), lambda: needed)
        with grace.for_asking():
            await anyio.sleep(2)
            grace.allow_time_to_ask()
            await anyio.sleep_forever()
        assert grace.elapsed == pytest.approx(bound, abs=0.1)

    play(tear_down())


def test_more_time_is_allowed_when_more_is_known(play):
    async def tear_down():
        needed = [0.0]
        grace = Grace(Budget(1.0), lambda: needed[0])
        with grace.for_asking():
            grace.allow_time_to_ask()
            await anyio.sleep(4)
            needed[0] = 60.0
            grace.allow_time_to_ask()
            await anyio.sleep_forever()
        assert grace.elapsed == pytest.approx(65, abs=0.1)

    play(tear_down())


def test_waiting_ends_with_the_grace_and_begins_anew_with_a_harder_end(play):
    async def tear_down():
        grace = Grace(Budget(20.0), lambda: 0.0)
        began = anyio.current_time()

        async def harden():
            await anyio.sleep(15)
            grace.begin_anew()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(harden)
            with grace.for_waiting():
                await anyio.sleep_forever()
        assert anyio.current_time() - began == pytest.approx(35, abs=0.1)
        assert grace.elapsed == pytest.approx(20, abs=0.1)

    play(tear_down())


def test_what_asking_took_before_a_harder_end_adds_nothing_after_it(play):
    async def tear_down():
        grace = Grace(Budget(20.0), lambda: 100.0)
        with grace.for_asking():
            await anyio.sleep(30)
        grace.begin_anew()
        assert grace.left == pytest.approx(20)

    play(tear_down())


def test_nobody_waits_when_nothing_is_left(play):
    async def tear_down():
        grace = Grace(Budget(0.0), lambda: 0.0)
        with grace.for_waiting():
            await anyio.sleep_forever()
        assert grace.elapsed < 1

    play(tear_down())


def test_a_run_waits_as_long_as_a_harder_end_has_and_tells_how_long_that_was():
    """Its scope does not leave before the teardown has got the whole grace once more."""
    failed_at = []

    @supervised_flow(grace_seconds=20)
    async def parent():
        supervisor.spawn("leaf/test")
        await asyncio.sleep(20)
        failed_at.append(prefect.seconds)
        raise ValueError("the night is over")

    with FakePrefect() as prefect:
        prefect.deploy("leaf/test")
        run = prefect.start(parent)
        prefect.advance(15)
        prefect.runners["runner"].kill()  # so that nobody ends the leaf
        prefect.until(lambda: failed_at, within=60)
        prefect.advance(15)
        run.cancel()
        prefect.until(lambda: not run.has_process, within=60)
        assert prefect.seconds - failed_at[0] == pytest.approx(15 + 20, abs=1)
        assert run.report.cause == "cancelled"
        assert run.report.seconds == pytest.approx(15 + 20, abs=1)
        assert [receipt.status for receipt in run.report.receipts] == ["unverified"]
