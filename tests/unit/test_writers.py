"""Two large writes go side by side where the server takes several, and only there."""

from __future__ import annotations

import asyncio

import anyio
import httpx
import pytest
from support.virtual import play

from supervised import _writers
from supervised._writers import Writers, note_refusal

LARGE_SECONDS = 3.0
SMALL_SECONDS = 0.02


class Database:
    """Takes so many writes at a time, in the order in which they come.

    Args:
        writers: How many.
        reads: Seconds for which a large write only reads before it writes. If another one has
            written meanwhile, a database with one writer throws it out.
        fails: What small writes raise.
    """

    def __init__(self, writers, *, reads=0.0, fails=None):
        self._lock = anyio.Semaphore(writers)
        self._has_one = writers == 1
        self._reads = reads
        self._fails = fails
        self.small = 0  # asked for
        self.under_way = 0
        self.most = 0
        self.written = 0
        self.thrown_out = 0

    async def write_large(self, seconds=LARGE_SECONDS):
        """Return whether it has been written."""
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            before = self.written
            await anyio.sleep(self._reads)
            async with self._lock:
                if self._has_one and self.written > before:
                    self.thrown_out += 1
                    return False
                await anyio.sleep(seconds)
                self.written += 1
                return True
        finally:
            self.under_way -= 1

    async def write_small(self):
        self.small += 1
        async with self._lock:
            await anyio.sleep(SMALL_SECONDS)
        if self._fails is not None:
            raise self._fails


async def write(writers, database, count, seconds=LARGE_SECONDS):
    """Make so many large writes, all of them asked for at once; return how long they take."""
    began = asyncio.get_running_loop().time()

    async def one():
        is_written = False
        while not is_written:
            async with writers.turn, writers.large(database.write_small) as this:
                is_written = await database.write_large(seconds)
            if not is_written and this.is_evidence:
                writers.note_lost()

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(one)
    return asyncio.get_running_loop().time() - began


def test_where_the_server_takes_several_a_second_one_goes_beside_the_first():
    async def story():
        writers, database = Writers(), Database(writers=4)
        seconds = await write(writers, database, 2)
        assert database.most == 2
        assert seconds < LARGE_SECONDS + 1.0
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


@pytest.mark.parametrize("reads", [0.0, 0.2, 0.3])
def test_that_a_large_write_begins_late_to_write_does_not_deceive(reads):
    """A small one that overtakes it is answered at once on SQLite, too."""

    async def story():
        writers, database = Writers(), Database(writers=1, reads=reads)
        await write(writers, database, 4)
        assert database.most == 1
        assert database.thrown_out == 0

    play(story())


def test_if_it_has_deceived_the_first_that_is_thrown_out_tells():
    async def story():
        writers, database = Writers(), Database(writers=1, reads=1.0)
        await write(writers, database, 6)
        assert database.most == 2
        assert database.thrown_out == 1
        assert writers.width == 1
        assert writers.is_known

    play(story())


def test_an_answer_that_the_large_write_does_not_outlive_says_nothing():
    async def story():
        for seconds in (0.16, 0.2, 0.3, 0.4):  # the first answer, and the second, come just before
            writers, database = Writers(), Database(writers=4)
            await write(writers, database, 2, seconds)
            assert database.small
            assert database.most == writers.width == 1
            assert not writers.is_known

    play(story())


def test_a_server_that_is_slow_to_answer_may_take_several_all_the_same():
    async def story():
        writers, database = Writers(), Database(writers=4)

        async def small():
            await anyio.sleep(0.5)
            await database.write_small()

        async def one():
            async with writers.turn, writers.large(small):
                await database.write_large()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            tasks.start_soon(one)
        assert database.most == 2

    play(story())


@pytest.mark.parametrize("first", [1, 4])
def test_it_is_found_out_again_after_a_while(first):
    async def story():
        writers = Writers()
        await write(writers, Database(writers=first), 2)
        assert writers.is_known
        moved = Database(writers=5 - first)
        await anyio.sleep(_writers._AGAIN_SECONDS)
        assert not writers.is_known
        await write(writers, moved, 4)
        assert moved.small
        assert writers.width == (1 if first == 4 else 2)

    play(story())


def test_nothing_is_found_out_for_nobody():
    """Where no other large write waits, and where all are quick."""

    async def story():
        writers, database = Writers(), Database(writers=4)
        await write(writers, database, 1)
        await write(writers, database, 20, seconds=_writers._PAUSE_SECONDS / 2)
        assert database.small == 0
        assert not writers.is_known

    play(story())


def test_a_server_that_refuses_small_writes_is_sent_large_ones_one_by_one():
    async def story():
        writers, database = Writers(), Database(writers=4, fails=httpx.ReadTimeout("too late"))
        await write(writers, database, 4)
        assert database.most == 1
        assert database.small == 1

    play(story())


def test_a_small_write_that_is_never_answered_holds_nobody_up():
    async def story():
        writers = Writers()

        async def large(seconds):
            async with writers.turn, writers.large(anyio.sleep_forever):
                await anyio.sleep(seconds)

        began = asyncio.get_running_loop().time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(large, 1.0)
            tasks.start_soon(large, 1.0)
        assert asyncio.get_running_loop().time() - began < 2.1
        assert writers.width == 1
        assert writers.is_known

    play(story())


def test_a_small_write_that_cannot_be_ended_is_not_waited_for_for_ever():
    async def story():
        writers = Writers()

        async def small():
            with anyio.CancelScope(shield=True):
                await anyio.sleep(3600)

        async def large():
            async with writers.turn, writers.large(small):
                await anyio.sleep(1.0)

        began = asyncio.get_running_loop().time()
        with anyio.move_on_after(0.5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(large)
                tasks.start_soon(large)
        assert asyncio.get_running_loop().time() - began < 0.6 + _writers._STOP_SECONDS

    play(story())


def test_what_has_told_of_several_and_led_to_nothing_has_deceived():
    """On SQLite a large write that is thrown out has no lock, and holds no small one up."""

    async def story():
        writers = Writers()

        async def thrown_out():
            async with writers.turn, writers.large(lambda: anyio.sleep(SMALL_SECONDS)) as this:
                await anyio.sleep(LARGE_SECONDS)
            return this

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(thrown_out)
            tasks.start_soon(thrown_out)
            first = await thrown_out()
        assert first.is_evidence

    play(story())


def test_beside_a_large_write_that_is_refused_and_sent_again_nothing_is_found_out():
    """Until it is sent again nothing is under way, and SQLite answers a small one at once."""

    async def story():
        writers, database = Writers(), Database(writers=1)
        answers = iter([503, 200])

        async def answer(request):
            return httpx.Response(next(answers))

        async def large():
            transport = httpx.MockTransport(answer)
            hooks = {"response": [note_refusal]}
            async with httpx.AsyncClient(transport=transport, event_hooks=hooks) as client:
                async with writers.turn, writers.large(database.write_small):
                    while (await client.get("http://prefect.test")).is_error:
                        await anyio.sleep(2.0)  # as Prefect's client does
                    await database.write_large()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(large)
            await anyio.sleep(0.01)
            tasks.start_soon(write, writers, database, 1)
        assert database.small == 2
        assert database.most == writers.width == 1

    play(story())


def test_a_small_write_that_is_refused_is_not_taken_for_the_large_one():
    async def story():
        writers = Writers()

        async def small():
            await note_refusal(httpx.Response(503))

        async with writers.turn, writers.large(small) as this:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(write, writers, Database(writers=4), 1)
                await anyio.sleep(1.0)
                assert not this.was_refused
                assert writers.width == 2

    play(story())


def test_what_was_lost_beside_another_is_followed_by_one_at_a_time():
    async def story():
        writers, database = Writers(), Database(writers=4)
        writers.note_lost()
        assert not writers.is_known, "where one is let through at a time, it says nothing"
        await write(writers, database, 2)
        writers.note_lost()
        assert writers.width == 1
        assert writers.is_known
        database.most = 0
        await write(writers, database, 4)
        assert database.most == 1

    play(story())


def test_a_large_write_is_evidence_if_another_was_beside_it():
    async def story():
        writers, database = Writers(), Database(writers=4)
        async with writers.turn, writers.large(database.write_small) as alone:
            await database.write_large()
        assert not alone.is_evidence
        await write(writers, database, 2)
        seen = []

        async def one():
            async with writers.turn, writers.large(database.write_small) as this:
                await database.write_large()
            seen.append(this.is_evidence)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            tasks.start_soon(one)
        assert seen == [True, True]

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
        began = asyncio.get_running_loop().time()
        with anyio.move_on_after(seconds):
            await write(writers, Database(writers=1), 3)
        assert asyncio.get_running_loop().time() - began == pytest.approx(seconds)
        assert writers.turn.borrowed_tokens == writers.write.borrowed_tokens == 0
        assert len(asyncio.all_tasks()) == 1

    play(story())
