"""Two large writes go side by side where the server takes several, and only there."""

from __future__ import annotations

import asyncio

import anyio
import httpx
import pytest
from support.virtual import play

from supervised import _writers
from supervised._writers import Writers

LARGE_SECONDS = 3.0
SMALL_SECONDS = 0.02


class Database:
    """Takes so many writes at a time, in the order in which they come.

    Args:
        writers: How many.
        fails: What small writes raise.
    """

    def __init__(self, writers, fails=None):
        self._lock = anyio.Semaphore(writers)
        self._fails = fails
        self.small = 0  # asked for
        self.left_over = 0  # asked for, and not yet answered
        self.under_way = 0
        self.most = 0
        self.met = 0  # large writes that began while a small one was not yet answered

    async def write_large(self, seconds=LARGE_SECONDS):
        self.met += self.left_over > 0
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            async with self._lock:
                await anyio.sleep(seconds)
        finally:
            self.under_way -= 1

    async def write_small(self):
        self.small += 1
        self.left_over += 1
        async with self._lock:
            await anyio.sleep(SMALL_SECONDS)
        self.left_over -= 1
        if self._fails is not None:
            raise self._fails


async def write(writers, database, count, seconds=LARGE_SECONDS):
    """Make so many large writes, all of them asked for at once; return how long they take."""
    began = asyncio.get_running_loop().time()

    async def one():
        async with writers.turn, writers.large(database.write_small):
            await database.write_large(seconds)

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(one)
    return asyncio.get_running_loop().time() - began


def test_where_the_server_takes_several_a_second_one_goes_beside_the_first():
    async def story():
        writers, database = Writers(), Database(writers=4)
        seconds = await write(writers, database, 2)
        assert database.most == 2
        assert seconds < LARGE_SECONDS + 0.5
        await write(writers, database, 6)
        assert database.most == 2, "never more"
        assert database.small == 2, "it was known"

    play(story())


def test_where_the_server_takes_one_they_go_one_after_the_other():
    async def story():
        writers, database = Writers(), Database(writers=1)
        await write(writers, database, 6)
        assert database.most == 1
        assert database.small == 1, "the first was answer enough"

    play(story())


def test_no_large_write_begins_before_a_small_one_is_answered():
    """On SQLite it would be thrown out: it has read, and somebody else writes before it does."""

    async def story():
        database = Database(writers=1)
        await write(Writers(), database, 2)
        assert database.small
        assert database.met == 0

    play(story())


def test_it_is_found_out_again_after_a_while(monkeypatch):
    async def story():
        writers = Writers()
        await write(writers, Database(writers=1), 2)
        assert not writers.may_be_several
        moved = Database(writers=4)
        await write(writers, moved, 2)
        assert moved.small == 0
        await anyio.sleep(_writers._AGAIN_SECONDS)
        assert writers.may_be_several
        await write(writers, moved, 2)
        assert writers.width == 2

    play(story())


def test_nothing_is_found_out_for_nobody():
    """Where no other large write waits, where all are quick, where it is not known from a few."""

    async def story():
        writers, database = Writers(), Database(writers=4)
        await write(writers, database, 1)
        await write(writers, database, 20, seconds=_writers._PAUSE_SECONDS / 2)
        assert database.small == 0
        await write(writers, database, 2, seconds=_writers._PAUSE_SECONDS * 1.5)
        assert writers.width == 1
        assert writers.may_be_several

    play(story())


def test_a_server_that_refuses_small_writes_is_sent_large_ones_one_by_one():
    async def story():
        writers, database = Writers(), Database(writers=4, fails=httpx.ReadTimeout("too late"))
        await write(writers, database, 4)
        assert database.most == 1
        assert database.small == 1

    play(story())


def test_a_small_write_that_is_never_answered_holds_nobody_up_for_long():
    async def story():
        writers = Writers()

        async def small():
            await anyio.sleep_forever()

        async def large(seconds):
            async with writers.turn, writers.large(small):
                await anyio.sleep(seconds)

        began = asyncio.get_running_loop().time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(large, 1.0)
            tasks.start_soon(large, 1.0)
        assert asyncio.get_running_loop().time() - began < 2.0 + 1.5 * _writers._LATE_SECONDS
        assert not writers.may_be_several

    play(story())


def test_what_was_lost_beside_another_is_followed_by_one_at_a_time():
    async def story():
        writers, database = Writers(), Database(writers=4)
        writers.note_lost()
        assert writers.may_be_several, "of one alone, it says nothing"
        await write(writers, database, 2)
        writers.note_lost()
        assert writers.width == 1
        assert not writers.may_be_several
        database.most = 0
        await write(writers, database, 4)
        assert database.most == 1

    play(story())


def test_what_a_large_write_raises_is_raised_as_it_is():
    async def story():
        writers = Writers()
        with pytest.raises(httpx.ConnectError, match="gone"):
            async with writers.turn, writers.large(Database(writers=1).write_small):
                raise httpx.ConnectError("gone")
        assert writers.turn.borrowed_tokens == writers.write.borrowed_tokens == 0
        assert len(asyncio.all_tasks()) == 1

    play(story())


@pytest.mark.parametrize("seconds", [0.1, 0.2, 1.0, LARGE_SECONDS + 0.01, LARGE_SECONDS + 1.0])
def test_who_is_cancelled_leaves_nothing_behind(seconds):
    async def story():
        writers = Writers()
        with anyio.move_on_after(seconds):
            await write(writers, Database(writers=1), 3)
        assert writers.turn.borrowed_tokens == writers.write.borrowed_tokens == 0
        assert len(asyncio.all_tasks()) == 1

    play(story())
