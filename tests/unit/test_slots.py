import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervised._slots import SlotPool, Slots


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


class Queue:
    """Takes slots for people who are served in turn, and notes who got one."""

    def __init__(self, limit):
        self.slots = Slots(limit)
        self.served = []
        self.tasks = []

    async def ask(self, name, pool):
        async def take():
            await self.slots.take(pool)
            self.served.append(name)

        self.tasks.append(asyncio.create_task(take()))
        await settle()


def test_who_came_first_is_served_first():
    async def story():
        queue, pool = Queue(1), SlotPool()
        for name in "abc":
            await queue.ask(name, pool)
        assert queue.served == ["a"]
        queue.slots.give_back(pool)
        queue.slots.give_back(pool)
        await settle()
        assert queue.served == ["a", "b", "c"]

    asyncio.run(story())


def test_a_large_pool_does_not_keep_a_small_one_waiting():
    async def story():
        queue, large, small = Queue(2), SlotPool(), SlotPool()
        for number in range(10):
            await queue.ask(f"large-{number}", large)
        await queue.ask("small", small)
        queue.slots.give_back(large)
        queue.slots.give_back(large)
        await settle()
        assert "small" in queue.served
        for task in queue.tasks:
            task.cancel()

    asyncio.run(story())


def test_a_pool_has_a_limit_of_its_own():
    async def story():
        queue, pool, other = Queue(None), SlotPool(2), SlotPool()
        for number in range(4):
            await queue.ask(number, pool)
        await queue.ask("other", other)
        assert queue.served == [0, 1, "other"]
        queue.slots.give_back(pool)
        await settle()
        assert queue.served == [0, 1, "other", 2]
        for task in queue.tasks:
            task.cancel()

    asyncio.run(story())


@pytest.mark.parametrize("is_served", [False, True])
def test_who_stops_waiting_holds_nothing(is_served):
    async def story():
        queue, pool = Queue(1), SlotPool()
        await queue.ask("a", pool)
        await queue.ask("b", pool)
        if is_served:
            queue.slots.give_back(pool)  # b's turn has come, but it has not run yet
        queue.tasks[1].cancel()
        await settle()
        if not is_served:
            queue.slots.give_back(pool)
        await queue.ask("c", pool)
        assert queue.served == ["a", "c"]

    asyncio.run(story())


@given(
    limit=st.none() | st.integers(1, 4),
    limits=st.lists(st.none() | st.integers(1, 3), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.sampled_from(["take", "give", "leave"]), st.integers(0, 99))),
)
def test_no_limit_is_exceeded_and_no_slot_is_lost(limit, limits, steps):
    async def story():
        slots, pools = Slots(limit), [SlotPool(each) for each in limits]
        held = []
        waiting = []

        async def take(pool):
            await slots.take(pool)
            held.append(pool)

        for step, number in steps:
            if step == "take":
                waiting.append(asyncio.create_task(take(pools[number % len(pools)])))
            elif step == "give" and held:
                slots.give_back(held.pop(number % len(held)))
            elif step == "leave" and waiting:
                waiting.pop(number % len(waiting)).cancel()
            await settle()
            assert limit is None or len(held) <= limit
            for pool in pools:
                assert pool.limit is None or held.count(pool) <= pool.limit
        while held:
            slots.give_back(held.pop())
            await settle()
        assert all(task.done() for task in waiting), "everybody is served in the end"
        assert not slots._groups

    asyncio.run(story())
