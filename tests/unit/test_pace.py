"""How many requests are under way at a time is found out from how long they take."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervised import _clock
from supervised._pace import CHUNK, Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told to go on."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(_clock, "monotonic", lambda: Clock.now)
    return Clock


def send(pace, count, seconds_of_round, clock):
    """Send so many chunks to a server whose rounds take so long; return the rounds' widths."""
    widths, under_way = [], []

    async def ask(chunk):
        under_way.append(chunk)
        await asyncio.sleep(0)
        if under_way:
            widths.append(len(under_way))
            clock.now += seconds_of_round(len(under_way))
            under_way.clear()
        return True

    asyncio.run(pace.each(range(count * CHUNK), ask))
    return widths


def test_writers_that_collide_are_let_through_one_at_a_time(clock):
    pace = Pace()
    assert send(pace, 8, lambda width: width * 1.0, clock) == [1, 1, 2, 2, 1, 1]
    assert pace.width == 1


def test_a_server_that_does_several_at_once_is_sent_several(clock):
    pace = Pace()
    assert send(pace, 38, lambda width: 1.0, clock) == [1, 1, 2, 2, 4, 4, 8, 8, 8]


def test_it_stops_where_more_at_a_time_is_no_quicker(clock):
    pace = Pace()
    send(pace, 40, lambda width: max(1.0, width / 4), clock)
    assert pace.width == 4


def test_what_was_found_out_counts_for_the_next_time(clock):
    pace = Pace()
    send(pace, 8, lambda width: width * 1.0, clock)
    assert send(pace, 3, lambda width: width * 1.0, clock) == [1, 1, 1]


def test_one_slow_answer_is_no_reason_to_send_several(clock):
    pace, slow = Pace(), iter([3.0])
    send(pace, 8, lambda width: next(slow, width * 1.0), clock)
    assert pace.width == 1


def test_a_round_that_is_not_full_proves_nothing(clock):
    pace = Pace()

    async def ask(chunk):
        clock.now += 1.0
        return True

    asyncio.run(pace.each(range(CHUNK - 1), ask))
    assert pace.width == 1


def test_a_request_that_failed_proves_nothing_however_quick_it_was(clock):
    pace = Pace()

    async def refuse(chunk):
        clock.now += 0.01
        return False

    asyncio.run(pace.each(range(8 * CHUNK), refuse))
    assert pace.width == 1
    assert send(pace, 6, lambda width: 1.0, clock) == [1, 1, 2, 2]


@given(st.integers(0, 20 * CHUNK), st.lists(st.floats(0.001, 10), min_size=1, max_size=40))
def test_everything_is_asked_for_once_and_in_order_of_importance(count, seconds):
    asked = []
    pace = Pace()

    async def ask(chunk):
        asked.append(chunk)
        pace.note(seconds[len(asked) % len(seconds)])
        return True

    asyncio.run(pace.each(range(count), ask))
    assert [item for chunk in asked for item in chunk] == list(range(count))
    assert all(len(chunk) <= CHUNK for chunk in asked)
    assert 1 <= pace.width <= 8


def test_what_a_request_raises_ends_the_whole():
    async def ask(chunk):
        raise ConnectionError

    with pytest.RaisesGroup(ConnectionError):
        asyncio.run(Pace().each(range(CHUNK), ask))


def test_it_looks_again_in_case_the_server_has_changed(clock):
    pace = Pace()
    send(pace, 8, lambda width: width * 1.0, clock)
    assert send(pace, 160, lambda width: 1.0, clock)[:60] == [1] * 60
    assert pace.width == 8


def test_it_looks_again_at_once_where_what_was_best_has_become_much_slower(clock):
    pace = Pace()
    send(pace, 38, lambda width: 1.0, clock)
    assert pace.width == 8
    send(pace, 80, lambda width: width * 1.0, clock)
    assert pace.width == 1


def test_one_round_that_is_slow_does_not_make_it_look_again(clock):
    pace, slow = Pace(), iter([9.0])
    send(pace, 8, lambda width: width * 1.0, clock)
    assert send(pace, 6, lambda width: next(slow, 1.0), clock) == [1] * 6


def test_what_a_run_takes_is_measured_whatever_the_width(clock):
    pace = Pace()
    assert pace.seconds_each == 0
    send(pace, 30 + 8 * 8, lambda width: 5.0, clock)
    assert pace.width == 8
    assert pace.seconds_each == pytest.approx(5.0 / (8 * CHUNK))


def sizes_of(pace, count, answers):
    """Ask for so many; return the sizes of the chunks. A request that says false times out."""
    sizes = []

    async def ask(chunk):
        sizes.append(len(chunk))
        is_answered = next(answers, True)
        if not is_answered:
            pace.note_timeout(len(chunk))
        return is_answered

    asyncio.run(pace.each(range(count), ask))
    return sizes


def test_a_chunk_that_was_not_answered_in_time_is_followed_by_smaller_ones(clock):
    sizes = sizes_of(Pace(), 150, iter([False, False, True]))
    assert sizes == [50, 12, 3, 6, 12, 24, 43]


def test_a_server_that_answers_nothing_is_asked_for_one_at_a_time_at_last(clock):
    sizes = sizes_of(Pace(), 110, iter([False] * 20))
    assert sizes[:3] == [50, 12, 3]
    assert set(sizes[3:20]) == {1}
