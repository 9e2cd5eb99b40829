"""What is asked for in the same instant is asked for in one request."""

from __future__ import annotations

import asyncio

import pytest
from support.virtual import play

from supervised._batch import Batches, Groups


class Server:
    """Answers with what it was sent, once it may; keeps what it was sent."""

    def __init__(self):
        self.requests = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.under_way = asyncio.Event()

    async def send(self, items):
        self.requests.append(list(items))
        self.under_way.set()
        await self.may_answer.wait()
        return [f"<{item}>" for item in items]


@pytest.fixture
def acting():
    """A function that runs a coroutine function with a server and batches of at most 3."""

    def act(test, send=None):
        async def run():
            server = Server()
            batches = Batches(send or server.send, limit=3)
            try:
                return await test(server, batches)
            finally:
                await batches.close()

        return asyncio.run(run())

    return act


def submitted(batches, items, kind="a"):
    return [asyncio.ensure_future(batches.submit(kind, item)) for item in items]


def test_what_is_submitted_at_once_is_sent_at_once_and_each_gets_its_own_answer(acting):
    async def test(server, batches):
        assert await asyncio.gather(*submitted(batches, "xyz")) == ["<x>", "<y>", "<z>"]
        assert server.requests == [["x", "y", "z"]]

    acting(test)


def test_a_request_carries_no_more_than_it_may(acting):
    async def test(server, batches):
        await asyncio.gather(*submitted(batches, range(7)))
        assert server.requests == [[0, 1, 2], [3, 4, 5], [6]]

    acting(test)


def test_what_comes_while_a_request_is_under_way_goes_with_the_next(acting):
    async def test(server, batches):
        server.may_answer.clear()
        first = submitted(batches, [1])
        await server.under_way.wait()
        rest = submitted(batches, [2, 3])
        await asyncio.sleep(0)
        server.may_answer.set()
        await asyncio.gather(*first, *rest)
        assert server.requests == [[1], [2, 3]]

    acting(test)


def test_kinds_are_not_mixed_and_take_turns(acting):
    async def test(server, batches):
        await asyncio.gather(
            *submitted(batches, range(5), kind="a"), *submitted(batches, "xy", kind="b")
        )
        assert server.requests == [[0, 1, 2], ["x", "y"], [3, 4]]

    acting(test)


def test_a_request_that_fails_is_what_all_of_its_items_have_led_to(acting):
    async def fail(_):
        raise ConnectionError("the server is down")

    async def test(server, batches):
        answers = await asyncio.gather(*submitted(batches, "xy"), return_exceptions=True)
        assert [type(answer) for answer in answers] == [ConnectionError, ConnectionError]

    acting(test, fail)


def test_one_item_may_fail_alone(acting):
    async def refuse_odd(items):
        return [ValueError(item) if item % 2 else item for item in items]

    async def test(server, batches):
        answers = await asyncio.gather(*submitted(batches, [2, 3]), return_exceptions=True)
        assert answers[0] == 2
        assert isinstance(answers[1], ValueError)

    acting(test, refuse_odd)


def test_who_is_cancelled_before_the_request_takes_the_item_back(acting):
    async def test(server, batches):
        one, two = submitted(batches, "xy")
        await asyncio.sleep(0)
        one.cancel()
        assert await two == "<y>"
        assert server.requests == [["y"]]

    acting(test)


def test_who_is_cancelled_during_the_request_does_not_end_it_for_the_others(acting):
    async def test(server, batches):
        server.may_answer.clear()
        one, two = submitted(batches, "xy")
        await server.under_way.wait()
        one.cancel()
        server.may_answer.set()
        assert await two == "<y>"
        await asyncio.wait([one])
        assert one.cancelled()

    acting(test)


def test_there_is_no_task_when_there_is_nothing_to_send(acting):
    async def test(server, batches):
        before = asyncio.all_tasks()
        await asyncio.gather(*submitted(batches, "xyz"))
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
        assert await batches.submit("a", "again") == "<again>"

    acting(test)


def test_closing_cancels_who_waits_and_sends_nothing_more(acting):
    async def test(server, batches):
        server.may_answer.clear()
        sent = submitted(batches, [1])
        await server.under_way.wait()
        waiting = submitted(batches, [2])
        await asyncio.sleep(0)
        await batches.close()
        await asyncio.wait([*sent, *waiting])
        assert all(each.cancelled() for each in [*sent, *waiting])
        assert server.requests == [[1]]

    acting(test)


def test_who_waits_when_it_is_closed_at_once_is_cancelled_and_so_is_nobody_after():
    async def run():
        batches = Batches(Server().send, limit=3)
        answer = asyncio.ensure_future(batches.submit("a", 1))
        asyncio.get_running_loop().call_soon(lambda: None)
        await asyncio.sleep(0)
        await batches.close()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(answer, 60)
        assert await asyncio.wait_for(batches.submit("a", 2), 60) == "<2>"
        await batches.close()

    asyncio.run(run())


def test_no_more_than_two_requests_are_under_way(acting):
    async def test(server, batches):
        server.may_answer.clear()
        answers = submitted(batches, range(10))
        await server.under_way.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert [len(request) for request in server.requests] == [3, 3]
        server.may_answer.set()
        assert await asyncio.gather(*answers) == [f"<{item}>" for item in range(10)]

    acting(test)


def test_what_comes_while_the_last_requests_are_under_way_is_sent(acting):
    async def test(server, batches):
        server.may_answer.clear()
        first = submitted(batches, range(6))
        await server.under_way.wait()
        await asyncio.sleep(0.05)
        later = submitted(batches, [7])
        server.may_answer.set()
        assert await asyncio.wait_for(asyncio.gather(*first, *later), 60) == [
            "<0>",
            "<1>",
            "<2>",
            "<3>",
            "<4>",
            "<5>",
            "<7>",
        ]

    acting(test)


def test_what_comes_while_one_request_is_under_way_does_not_wait_for_its_answer(acting):
    async def test(server, batches):
        server.may_answer.clear()
        first = submitted(batches, range(3))
        await server.under_way.wait()
        server.under_way.clear()
        await asyncio.sleep(0.05)
        later = submitted(batches, [7, 8])
        await asyncio.wait_for(server.under_way.wait(), 60)
        assert server.requests == [[0, 1, 2], [7, 8]]
        server.may_answer.set()
        assert len(await asyncio.gather(*first, *later)) == 5

    acting(test)


def test_what_comes_one_by_one_while_a_request_is_under_way_is_one_request_too():
    async def run():
        server = Server()
        batches, answers = Batches(server.send, limit=100), []
        server.may_answer.clear()
        answers += submitted(batches, range(3))
        await server.under_way.wait()
        for item in range(10, 30):
            answers += submitted(batches, [item])
            await asyncio.sleep(0.02)
        server.may_answer.set()
        await asyncio.gather(*answers)
        assert server.requests == [[0, 1, 2], [*range(10, 30)]]

    play(run())


@pytest.mark.parametrize(
    ("pauses", "sizes"),
    [([0.006] * 15, [16]), ([0.006] * 30, [17, 14]), ([0.02], [1, 1])],
    ids=["a burst", "what does not end", "one by one"],
)
def test_the_first_request_waits_while_more_come_but_not_for_long(pauses, sizes):
    async def run():
        server = Server()
        batches = Batches(server.send, limit=100)
        answers = submitted(batches, [0])
        for item, pause in enumerate(pauses, 1):
            await asyncio.sleep(pause)
            answers += submitted(batches, [item])
        await asyncio.gather(*answers)
        assert [len(items) for items in server.requests] == sizes

    play(run())


def test_a_request_that_is_full_waits_for_nothing():
    async def run():
        server, loop = Server(), asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*submitted(Batches(server.send, limit=3), range(3)))
        assert loop.time() == began

    play(run())


class Slow(Server):
    """Takes its time for each request, and says when each came."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.times = []

    async def send(self, items):
        self.times.append(round(asyncio.get_running_loop().time() - self.began, 2))
        answers = await super().send(items)
        await asyncio.sleep(self.seconds)
        return answers


def timed(seconds, limit, *, arrivals):
    """Submit items, each at a time and of a kind; return what was sent when."""

    async def run():
        server = Slow(seconds)
        batches = Batches(server.send, limit=limit)
        server.began = asyncio.get_running_loop().time()

        async def arrive(at, kind):
            await asyncio.sleep(at)
            await batches.submit(kind, f"{kind}{at:g}")

        await asyncio.gather(*(arrive(at, kind) for at, kind in arrivals))
        return list(zip(server.times, server.requests, strict=True))

    return play(run())


def test_while_a_request_is_under_way_nobody_waits_for_others_for_more_than_half_a_second():
    trickle = [(0.1 + 0.2 * number, "b") for number in range(10)]
    sent = timed(60, 100, arrivals=[(0, "a"), *trickle])
    assert sent[1] == (0.61, ["b0.1", "b0.3", "b0.5"])


def test_a_request_that_becomes_full_is_sent_at_once_and_holds_up_no_other_kind():
    arrivals = [(0, "a"), (0.1, "b"), (0.2, "c"), (0.2, "c"), (0.2, "c")]
    sent = timed(0.3, 3, arrivals=arrivals)
    assert sent == [(0.01, ["a0"]), (0.21, ["b0.1"]), (0.31, ["c0.2"] * 3)]


def test_what_has_waited_for_a_turn_is_not_held_again():
    kinds = [(0, kind) for kind in "abcdef"]
    times = [time for time, _ in timed(0.7, 3, arrivals=kinds)]
    assert times == pytest.approx([0.01, 0.51, 0.72, 1.22, 1.43, 1.93], abs=0.02)


class Incomparable:
    """As a parameter may be, such as an array."""

    def __eq__(self, other):
        raise ValueError("the truth value is ambiguous")

    __hash__ = object.__hash__


def test_items_are_never_compared():
    async def run():
        async def send(items):
            await asyncio.sleep(items[0][1])  # so that the second one is answered first
            return items

        batches = Batches(send, limit=1)
        items = [(Incomparable(), seconds) for seconds in (2.0, 1.0)]
        answers = [asyncio.ensure_future(batches.submit("a", item)) for item in items]
        for item, answer in zip(items, answers, strict=True):
            assert await answer is item

    play(run())


def test_when_it_is_closed_nobody_waits_whether_or_not_the_request_had_begun(acting):
    async def test(server, batches):
        server.may_answer.clear()
        answers = submitted(batches, range(8))
        for _ in range(20):
            await asyncio.sleep(0.002)  # some are sent, some about to be, some wait
        await batches.close()
        done, pending = await asyncio.wait(answers, timeout=60)
        assert not pending
        assert all(answer.cancelled() for answer in done)

    acting(test)


def added(groups, items):
    return [asyncio.ensure_future(groups.add(item)) for item in items]


def acting_on_groups(test):
    async def run():
        server = Server()
        return await test(server, Groups(server.send))

    return play(run())  # how many groups there are depends on how long a sleep takes


def test_what_is_added_in_the_same_instant_is_acted_upon_once_and_together():
    async def test(server, groups):
        await asyncio.gather(*added(groups, "xyzx"))
        await groups.add("x")
        assert server.requests == [["x", "y", "z"], ["x"]]

    acting_on_groups(test)


def test_a_group_does_not_wait_for_another_and_takes_up_nothing_that_is_being_acted_upon():
    async def test(server, groups):
        server.may_answer.clear()
        first = added(groups, "xy")
        await server.under_way.wait()
        server.under_way.clear()
        second = added(groups, "yz")
        await server.under_way.wait()
        assert server.requests == [["x", "y"], ["z"]]
        server.may_answer.set()
        await asyncio.gather(*first, *second)

    acting_on_groups(test)


def test_the_more_groups_are_under_way_the_more_the_next_one_takes_up():
    async def test(server, groups):
        server.may_answer.clear()
        tasks = []
        for item in range(100):
            tasks += added(groups, [item])
            await asyncio.sleep(0.005)
        server.may_answer.set()
        await asyncio.gather(*tasks)
        assert sum(map(len, server.requests)) == 100
        assert len(server.requests) < 20

    acting_on_groups(test)


def test_everybody_in_a_group_waits_until_it_has_been_acted_upon():
    async def test(server, groups):
        server.may_answer.clear()
        tasks = added(groups, "xyz")
        await server.under_way.wait()
        await asyncio.sleep(1)
        assert not any(task.done() for task in tasks)
        server.may_answer.set()
        await asyncio.gather(*tasks)

    acting_on_groups(test)


def test_a_group_that_is_given_up_before_it_was_acted_upon_holds_up_no_other():
    async def test(server, groups):
        first, second = added(groups, "xy")
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first, second])
        await groups.add("y")
        assert server.requests == [["y"]]

    acting_on_groups(test)
