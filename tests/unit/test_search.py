"""Of a large tree no more is read than is needed, and whatever lives below it is found."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.states import Completed, Running, Scheduled

from supervised import _clock, supervised_flow, supervisor
from supervised._search import Search
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

TOP = UUID(int=1)
NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


class Tree:
    """Runs, their parents, and what was asked about them.

    Args:
        ahead: Seconds by which the server's clock is ahead.
    """

    def __init__(self, ahead=0.0):
        self._ahead = timedelta(seconds=ahead)
        self.now = NOON
        self.runs = {}
        self.parents = {}
        self.requests = 0
        self.rows = 0
        self.asked = []  # the parents of each request

    def add(self, parent=TOP, *, ended=None, deployed=True):
        """Add a run, which may have ended so many seconds ago."""
        run = FlowRun(
            id=uuid4(),
            flow_id=uuid4(),
            state=Running(),
            deployment_id=uuid4() if deployed else None,
        )
        self.runs[run.id], self.parents[run.id] = run, parent
        if ended is not None:
            self.end(run.id, ended)
        return run.id

    def end(self, run_id, ago=0.0):
        run = self.runs[run_id]
        run.state, run.end_time = Completed(), self.now - timedelta(seconds=ago) + self._ahead

    async def visit_children(self, parents, visit, *, only=None, since=None):
        self.requests += 1
        self.asked.append(set(parents))
        found = [run for run in self.runs.values() if self.parents[run.id] in self.asked[-1]]
        if only is not None:
            found = [run for run in found if run.state.is_final() == (only == "over")]
        if since is not None:
            found = [run for run in found if run.end_time >= since]
        self.rows += len(found)
        await visit(found)

    async def count_ended(self, parent, among=None):
        self.requests += 1
        ended = {i for i, run in self.runs.items() if run.state.is_final()}
        ended &= {i for i, above in self.parents.items() if above == parent}
        return len(ended if among is None else ended.intersection(among))

    async def server_time(self):
        self.requests += 1
        return self.now + self._ahead


@pytest.fixture
def search(monkeypatch):
    """A function that makes a tree, and one that searches it and returns what lives."""

    def make(**options):
        tree = Tree(**options)
        monkeypatch.setattr(_clock, "utc_now", lambda: tree.now)
        search = Search(tree)

        def look(*live, seconds=0.0):
            tree.now += timedelta(seconds=seconds)
            tree.requests = tree.rows = 0
            tree.asked.clear()
            found = set()

            async def take(runs, depth):
                found.update(run.id for run in runs if not run.state.is_final())

            asyncio.run(search.below([TOP], live, take, lambda _: False))
            return found

        look.over = search.add_over
        return tree, look

    return make


def known(tree, look, count):
    """Add children that were known to be over an hour ago."""
    children = [tree.add(ended=3600) for _ in range(count)]
    for child in children:
        look.over(child, tree.now - timedelta(hours=1))
    return children


def test_of_a_thousand_children_that_are_known_to_be_over_none_is_read(search):
    tree, look = search()
    known(tree, look, 1000)
    lives = tree.add()
    assert look() == {lives}
    assert (tree.requests, tree.rows) == (2 + 2 + 1, 1)
    for _ in range(2):
        assert look(lives, seconds=2) == {lives}
        assert (tree.requests <= 4, tree.rows) == (True, 1)


@pytest.mark.parametrize("count", [0, 10, 1000])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_what_lives_below_runs_that_are_over_is_found_at_any_depth(search, count, levels):
    tree, look = search()
    children = known(tree, look, count)
    above = TOP
    for _ in range(levels):
        above = tree.add(above, ended=3600)
    lives = {tree.add(above), *(tree.add(child) for child in children[:1])}
    assert look() == lives


@pytest.mark.parametrize("wide", [1, 100, 1000])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_a_search_takes_a_request_for_each_level_and_for_each_hundred_of_it(search, wide, levels):
    tree, look = search()
    above = [TOP] * wide
    for _ in range(levels):
        above = [tree.add(run) for run in above]
    assert len(look()) == wide * levels
    assert tree.requests <= (levels + 1) * max(1, wide // 100)


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_below_a_run_that_has_been_over_for_a_while_nothing_is_looked_for_again(search, ahead):
    tree, look = search(ahead=ahead)
    long_ago, lately = tree.add(ended=3600), tree.add(ended=1)
    look()
    assert {long_ago, lately} <= set.union(*tree.asked)
    late = tree.add(lately)
    assert look(seconds=2) == {late}
    assert long_ago not in set.union(*tree.asked)
    look(seconds=60)
    assert lately in set.union(*tree.asked)
    look(seconds=2)
    assert lately not in set.union(*tree.asked)


def test_below_a_run_whose_process_is_another_ones_it_is_looked_again_and_again(search):
    tree, look = search()
    inline = tree.add(ended=3600, deployed=False)
    look()
    late = tree.add(inline)
    assert look(seconds=2) == {late}


@pytest.mark.parametrize("count", [0, 1000])
def test_what_has_begun_and_ended_between_two_searches_is_looked_below(search, count):
    tree, look = search()
    known(tree, look, count)
    assert look() == set()
    lives = tree.add(tree.add(tree.add(ended=0), ended=0))
    assert look(seconds=2) == {lives}
    assert tree.rows <= 5


def test_what_has_ended_since_it_was_counted_is_looked_below(search):
    tree, look = search()
    known(tree, look, 1000)
    launcher = tree.add()
    assert look() == {launcher}
    lives = tree.add(launcher)
    tree.end(launcher)
    assert look(seconds=2) == {lives}


def test_a_search_that_failed_is_made_again(search):
    tree, look = search()
    lives = tree.add(known(tree, look, 1000)[-1])
    visit, tree.visit_children = tree.visit_children, None
    with pytest.raises(TypeError):
        look()
    tree.visit_children = visit
    assert look() == {lives}


def test_a_run_that_lives_again_is_looked_below_again(search):
    tree, look = search()
    (child,) = known(tree, look, 1)
    look()
    late = tree.add(child)
    assert look(child, seconds=2) == {late}


# -- in a teardown --------------------------------------------------------------------------------

MANY = 300


@pytest.fixture
def rows(monkeypatch):
    """The number of runs on each page that was read by a search."""
    visit_children, sizes = FakeOrchestrator.visit_children, []

    async def visit_and_count(self, parents, visit, **chosen):
        async def count(page):
            sizes.append(len(page))
            await visit(page)

        await visit_children(self, parents, count, **chosen)

    monkeypatch.setattr(FakeOrchestrator, "visit_children", visit_and_count)
    return sizes


def launch(prefect, name):
    """Launch a run of a deployment as plain Prefect does, from the flow that runs."""
    above = FlowRunContext.get().flow_run.id
    tracking = prefect.server.track(uuid4(), above, name)
    deployment = prefect.server.find_deployment(f"{name}/test")
    prefect.server.create(
        name, state=Scheduled(), deployment_id=deployment.id, parent_task_run_id=tracking
    )


@pytest.mark.parametrize("is_plain", [False, True])
def test_a_teardown_reads_no_children_that_are_over_but_ends_what_plain_ones_have_left(
    rows, is_plain
):
    @flow(name="launcher")
    async def launcher():
        launch(prefect, "job")

    @supervised_flow
    async def parent():
        if is_plain:
            launch(prefect, "launcher")
        for part in range(MANY):
            supervisor.spawn("score/gpu", {"part": part})
        supervisor.spawn("job/test")
        await asyncio.sleep(120)
        raise ValueError("the night is over")

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=1)
        prefect.deploy("launcher/test", launcher)
        prefect.deploy("job/test", takes=7200)
        run = prefect.start(parent)
        prefect.advance(110)
        assert len(prefect.alive) == 2 + is_plain
        rows.clear()
        prefect.until(lambda: not run.is_alive, within=120)
        assert run.report.ok
        assert not prefect.alive
    whole = MANY + 2 if is_plain else 0  # once, as nothing else tells which are not known
    assert sum(rows) < whole + 30
