"""The watcher reads as often as it has to, and no more often than the server can bear."""

import asyncio
import itertools
from contextlib import asynccontextmanager
from uuid import uuid4

import anyio
import attrs
import pytest
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Completed, Running
from support.virtual import play

from supervised import _clock
from supervised._api import RunEvent
from supervised._watch import open_watcher

HOUR = 3600.0


class Api:
    """Knows no run, takes its time to say so, and tells of events only if it is asked to."""

    def __init__(
        self,
        seconds_of_read,
        *,
        hears,
        stream_ends_after=10 * HOUR,
        fails_until=0.0,
        slow_at=(),
    ):
        self.seconds_of_read = seconds_of_read
        self.slow_at = slow_at
        self.hears = hears
        self.stream_ends_after = stream_ends_after
        self.fails_until = fails_until
        self.reads = []

    async def read_runs(self, run_ids):
        self.reads.append((_clock.monotonic(), set(run_ids)))
        if _clock.monotonic() < self.fails_until:
            await anyio.sleep(60.0)  # the client repeats it
            raise ConnectionError("the server is away")
        await anyio.sleep(30.0 if len(self.reads) in self.slow_at else self.seconds_of_read)
        return []

    @asynccontextmanager
    async def subscribe(self, resources):
        if not self.hears:
            raise ConnectionError("there is no stream")

        async def events():
            await anyio.sleep(self.stream_ends_after)
            self.hears = False
            for never in ():
                yield never

        yield events()


def watch(api, seconds, begin):
    """Let a watcher watch for some time."""

    async def story():
        async with open_watcher(api) as watcher:
            begin(watcher)
            await asyncio.sleep(seconds)

    play(story())


def an_owner(watcher):
    watcher.watch_owner(uuid4(), lambda run: None)


def test_while_events_flow_everything_is_read_every_ten_seconds():
    api = Api(0.01, hears=True)
    watch(api, HOUR, an_owner)
    assert 350 <= len(api.reads) <= 362


def test_without_events_it_is_read_more_often():
    api = Api(0.01, hears=False)
    watch(api, HOUR, an_owner)
    assert 2_300 <= len(api.reads) <= 2_400


@pytest.mark.parametrize(("hears", "share"), [(True, 0.05), (False, 0.25)])
def test_reading_takes_no_more_than_its_share_of_the_servers_time(hears, share):
    api = Api(4.0, hears=hears)
    watch(api, HOUR, an_owner)
    later = [moment for moment, _ in api.reads[2:]]  # one answer alone says nothing
    assert share * 0.7 <= len(later) * 4.0 / HOUR <= share


def test_what_has_a_pace_of_its_own_takes_the_rest_along_in_its_request():
    """A child reads its parent's lease, and itself: one request, not two."""
    api = Api(0.01, hears=True)

    def begin(watcher):
        an_owner(watcher)
        watcher.watch_other(uuid4(), lambda run_id, run: None, every=7.5)

    watch(api, HOUR, begin)
    assert HOUR / 7.5 - 5 <= len(api.reads) <= HOUR / 7.5 + 5


def test_where_the_rest_is_more_than_a_request_it_is_read_alone():
    api = Api(0.01, hears=True)
    other = uuid4()

    def begin(watcher):
        for _ in range(250):
            an_owner(watcher)
        watcher.watch_other(other, lambda run_id, run: None, every=2.0)

    watch(api, HOUR, begin)
    alone = [ids for _, ids in api.reads if ids == {other}]
    together = [ids for _, ids in api.reads if len(ids) == 251]
    assert 1_400 <= len(alone) + len(together) <= 1_900
    assert 340 <= len(together) <= 362


def test_what_has_a_pace_of_its_own_is_read_in_time_while_the_stream_fails_again_and_again():
    """Or who is ended by the silence of its parent would hear of that minutes later."""
    api, other = Api(0.01, hears=False), uuid4()

    def begin(watcher):
        for _ in range(250):
            an_owner(watcher)
        watcher.watch_other(other, lambda run_id, run: None, every=7.5)
        watcher._poll_seconds_taken.extend([50.0, 50.0])  # everything is read every 200 s

    watch(api, 190, begin)
    moments = [moment for moment, ids in api.reads if other in ids]
    gaps = [after - before for before, after in itertools.pairwise([0.0, *moments, 190.0])]
    assert max(gaps) <= 7.6


def test_the_loss_of_the_stream_is_no_reason_to_sleep_on():
    """Reading takes 15 s: every five minutes with events, every minute without."""
    api = Api(15.0, hears=True, stream_ends_after=20.0)
    watch(api, 200, an_owner)
    assert api.reads[1][0] - 20.0 <= 61.0


@pytest.mark.parametrize("slow_at", [(1,), (5,), (5, 6)], ids=str)
def test_an_answer_that_was_late_is_no_reason_to_read_less_often(slow_at):
    """A server that is starting anew may take half a minute for one answer."""
    api = Api(0.01, hears=True, slow_at=slow_at)
    watch(api, HOUR, an_owner)
    assert len(api.reads) >= 340


def test_what_a_failure_took_is_no_reason_to_read_less_often():
    api = Api(0.01, hears=True, fails_until=300.0)
    watch(api, HOUR, an_owner)
    before = [moment for moment, _ in api.reads if moment <= 300.0]
    assert len(before) >= 4
    assert api.reads[len(before)][0] <= 300.0 + 60.0 + 10.0


@attrs.frozen
class AChild:
    """A child whose run exists."""

    is_local: bool
    flow_run_id: object = attrs.field(factory=uuid4)


@pytest.mark.parametrize(("is_local", "is_owner", "reads"), [(1, 0, 0), (1, 1, 1), (0, 0, 1)])
def test_the_end_of_what_runs_here_is_not_read_for_the_sake_of_its_parent(
    is_local, is_owner, reads
):
    api, child = Api(0.1, hears=True), AChild(bool(is_local))

    def begin(watcher):
        watcher.watch(child)
        if is_owner:
            watcher.watch_owner(child.flow_run_id, lambda run: None)
        watcher._on_event(RunEvent(child.flow_run_id, StateType.COMPLETED))
        watcher._children.clear()  # the server knows none of them

    watch(api, 1, begin)  # before the first poll
    assert len(api.reads) == reads


class Committing(Api):
    """Tells of an end before a read shows it."""

    def __init__(self, run_id, *, after):
        super().__init__(0.01, hears=True)
        self.ended = Completed()
        self.runs = [
            FlowRun(id=run_id, flow_id=uuid4(), state=state) for state in (Running(), self.ended)
        ]
        self.after = after

    async def read_runs(self, run_ids):
        await super().read_runs(run_ids)
        return [self.runs[_clock.monotonic() > self.after]]


@pytest.mark.parametrize(("after", "most"), [(0.3, 0.6), (0.8, 1.6), (2.0, 3.6)])
@pytest.mark.parametrize("is_followed", [False, True])
def test_an_end_that_the_server_told_of_before_it_had_committed_it_is_read_until_it_shows(
    after, most, is_followed
):
    run_id, ended = uuid4(), []
    api = Committing(run_id, after=after)

    class AFollower:
        def take(self, run):
            if run.state.is_final():
                ended.append(_clock.monotonic())

    def begin(watcher):
        follower = AFollower()
        if is_followed:
            watcher.follow(run_id, follower)
        else:
            watcher.watch_other(run_id, lambda run_id, run: follower.take(run), every=HOUR)
        watcher._connected = True  # or the first poll would be the one that finds it
        watcher._on_event(RunEvent(run_id, StateType.COMPLETED))

    watch(api, 5, begin)
    assert after < ended[0] < most
    assert len(api.reads) <= 4


def test_an_end_that_the_read_has_shown_is_not_read_again():
    run_id = uuid4()
    api = Committing(run_id, after=0)

    def begin(watcher):
        watcher.watch_other(run_id, lambda run_id, run: None, every=HOUR)
        watcher._on_event(RunEvent(run_id, StateType.COMPLETED))

    watch(api, 1, begin)
    assert len(api.reads) == 1


def test_what_nobody_watches_any_more_is_not_read_again():
    run_id = uuid4()
    api = Committing(run_id, after=HOUR)

    def begin(watcher):
        def stop(run_id, run):
            watcher.unwatch_other(run_id, stop)

        watcher.watch_other(run_id, stop, every=HOUR)
        watcher._on_event(RunEvent(run_id, StateType.COMPLETED))

    watch(api, 5, begin)
    assert len(api.reads) == 1
