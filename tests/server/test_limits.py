"""Limits, order, deadlines, finalizers and adoption, on a real server.

Nobody serves most of the deployments: the tests say how their runs end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, LogFilter
from prefect.flow_engine import run_flow
from prefect.flows import bind_flow_to_infrastructure
from prefect.states import Cancelled, Cancelling, Completed, Failed, Pending, Running
from prefect.workers.process import ProcessWorker
from support.world import FLOWS, World, eventually

sys.path.insert(0, str(FLOWS))
from bundled import bundled

from supervised import ChildCancelled, ChildTimedOut, supervised_flow, supervisor
from supervised._context import current_supervisor
from supervised._control import CONTROL_THREAD
from supervised._identity import DEADLINE_SECONDS, DETACHED
from supervised.testing import running

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

SOON = 60.0


@flow
def nobody(part: int = 0) -> None:
    """What the runs of the deployments would run."""


@flow
async def double(x: int) -> int:
    return 2 * x


def deploy(world: World, **options):
    """Make a deployment that nobody serves; return its name."""
    name = f"limits-{uuid4()}"
    world.client.create_deployment(world.client.create_flow(nobody), name, **options)
    return f"nobody/{name}"


@pytest.fixture
def queue(world: World):
    """The name of a deployment that nobody serves."""
    return deploy(world)


def parts(count, start=0):
    return [{"part": part} for part in range(start, start + count)]


def run_of(child):
    """Return the id of a child's run, once it has one."""
    eventually(lambda: child.flow_run_id, seconds=SOON, what=f"{child.name!r} has a run")
    return child.flow_run_id


def live_parts(world):
    """Return the parts of the children of this run that the server has and that are not over."""
    below = world.tree(supervisor.flow_run_id)[1:]
    return [run.parameters["part"] for run in below if not run.state.is_final()]


def end(world, run_id, state):
    world.client.set_flow_run_state(run_id, state, force=True)


def runs_of(world, deployment):
    name = DeploymentFilter.model_validate({"name": {"any_": [deployment.split("/")[1]]}})
    return world.client.read_flow_runs(deployment_filter=name)


def alone(scenario, folder, *arguments):
    """Return the command that runs a parent of tests/flows/limited.py."""
    return [sys.executable, "limited.py", scenario, str(folder), *arguments]


def run_alone(world, scenario, *arguments, **env):
    command = alone(scenario, world.folder, *arguments)
    log = (world.folder / "alone.log").open("wb")
    with log:
        subprocess.run(
            command,
            cwd=FLOWS,
            env={**world.server.env, **env},
            stdout=log,
            stderr=log,
            check=True,
            timeout=120,
        )


def logs_of(world, run_id):
    of_run = LogFilter.model_validate({"flow_run_id": {"any_": [str(run_id)]}})
    return [log.message for log in world.client.read_logs(of_run, sort="TIMESTAMP_ASC")]


def reports_of(world, state):
    """Return the lines of each teardown's report in the log of the run that ended so."""
    texts = logs_of(world, state.state_details.flow_run_id)
    return [
        [line.strip() for line in text.splitlines()]
        for text in texts
        if text.startswith("Teardown of")
    ]


# -- how many at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(2, None), (None, 2)], ids=["scope", "map"])
def test_children_elsewhere_are_launched_as_they_were_spawned_and_two_at_once(world, queue, limits):
    of_scope, of_map = limits

    @supervised_flow(max_concurrent=of_scope)
    def parent():
        children = supervisor.map(queue, parts(5), max_concurrent=of_map)
        for part, child in enumerate(children):
            due = list(range(5))[part : part + 2]
            eventually(
                lambda due=due: sorted(live_parts(world)) == due, seconds=SOON, what=f"{due} live"
            )
            end(world, run_of(child), Completed())

    parent()


def test_a_large_map_does_not_keep_a_small_one_waiting(world, queue):
    begun = []

    @supervised_flow(max_concurrent=1)
    def parent():
        children = [*supervisor.map(queue, parts(4)), *supervisor.map(queue, parts(1, start=4))]
        while len(begun) < len(children):
            (part,) = eventually(lambda: live_parts(world), seconds=SOON, what="one is launched")
            begun.append(part)
            end(world, run_of(children[part]), Completed())
            children[part].wait()

    parent()
    assert begun.index(4) < begun.index(2)
    assert [part for part in begun if part < 4] == [0, 1, 2, 3]


def test_a_child_that_waits_for_a_slot_is_cancelled_without_ever_having_a_run(world, queue):
    @supervised_flow(max_concurrent=1)
    def parent():
        first, second, third = supervisor.map(queue, parts(3))
        run_of(first)
        second.cancel("nobody needs it")
        assert second.is_over
        for child in (first, third):
            end(world, run_of(child), Completed())
        with pytest.raises(ChildCancelled, match="nobody needs it"):
            second.result()
        assert second.flow_run_id is None
        return supervisor.flow_run_id

    assert sorted(run.parameters["part"] for run in world.tree(parent())[1:]) == [0, 2]


def test_of_a_scope_that_is_torn_down_those_that_wait_are_never_launched(world, queue):
    ids = []

    @supervised_flow(max_concurrent=1)
    def parent():
        ids.append(supervisor.flow_run_id)
        run_of(supervisor.map(queue, parts(4))[0])
        raise ValueError("the body failed")

    with pytest.raises(ValueError, match="the body failed"):
        parent()
    (below,) = world.tree(ids[0])[1:]
    assert below.parameters["part"] == 0
    assert below.state.is_cancelled()


# -- how many requests --------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """When supervision has made which requests, by the monotonic clock; some are repeated."""
    made = []
    handle = httpx.AsyncHTTPTransport.handle_async_request

    async def noted(self, request):
        if threading.current_thread().name == CONTROL_THREAD:
            made.append((time.monotonic(), f"{request.method} {request.url.path}", request))
        return await handle(self, request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", noted)
    return made


BURST_SECONDS = 10  # what was not used in so many seconds may be used at once


def test_a_budget_of_requests_is_kept_and_a_cancellation_heard_while_launches_wait(world, asked):
    deployments = [deploy(world) for _ in range(20)]
    told, heard_at = [], []

    def cancel(run_id):
        end(world, run_id, Cancelling())
        told.append(time.monotonic())  # the database may have been locked before

    @supervised_flow(requests_per_minute=120, grace_seconds=5)
    async def parent():
        for deployment in deployments:
            supervisor.spawn(deployment)
        while len(asked) < 24:
            await asyncio.sleep(0.01)
        try:
            await asyncio.to_thread(cancel, supervisor.flow_run_id)
            await asyncio.sleep(60)
        finally:
            heard_at.append(time.monotonic())

    assert asyncio.run(parent(return_state=True)).is_cancelled()
    (heard,) = heard_at
    assert heard - told[0] < 3
    times = [at for at, *_ in asked if at <= heard]
    for first, last in itertools.combinations(range(len(times)), 2):
        assert last - first <= 2 * (BURST_SECONDS + times[last] - times[first]), asked


@pytest.mark.parametrize(("kind", "per_minute"), [("elsewhere", 240), ("inline", 120)])
def test_launches_that_wait_for_the_budget_are_given_up_without_another_request(
    world, asked, kind, per_minute
):
    targets = [deploy(world) for _ in range(40)] if kind == "elsewhere" else [double] * 30
    seen = []

    @supervised_flow(requests_per_minute=per_minute, grace_seconds=20)
    async def parent():
        seen.append(current_supervisor.get())
        for part, target in enumerate(targets):
            supervisor.spawn(target, {"x": part} if kind == "inline" else {})
        while len(asked) < per_minute / 60 * BURST_SECONDS + 2:
            await asyncio.sleep(0.01)
        seen.append(time.monotonic())
        raise ValueError("the body failed")

    with pytest.raises((ValueError, ExceptionGroup)):
        asyncio.run(parent())
    scope, failed = seen
    of_launches = re.compile(r"GET .*/deployments/name/|POST .*/(task_runs|flows|flow_runs)/$")
    # Prefect's client repeats what a database that is locked has refused.
    requests = {id(request): what for at, what, request in asked if at > failed}
    later = [what for what in requests.values() if of_launches.match(what)]
    lookups = [what for what in later if what.startswith("GET")]
    assert len(lookups) <= 1, "no more than one deployment was being looked up"
    assert len(later) - len(lookups) <= 2, "no more than one child was under way"
    assert scope.report.ok, scope.report


class Busy(socketserver.BaseRequestHandler):
    """Passes connections on, but answers one request itself: that the server wants two seconds."""

    ANSWER = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n"

    def handle(self):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(self.server.upstream) as upstream,
        ):
            threading.Thread(target=self._answer, args=(upstream,), daemon=True).start()
            while data := self.request.recv(1 << 16):
                line = data.partition(b"\r\n")[0].decode(errors="replace")
                if line.endswith(" HTTP/1.1"):
                    self.server.made.append((time.monotonic(), line))
                if self.server.refused in line and not self.server.is_refused():
                    self.server.refused_at = time.monotonic()
                    self.request.sendall(self.ANSWER)
                    self.server.tell()  # not before: what comes next must not overtake it
                else:
                    upstream.sendall(data)

    def _answer(self, upstream):
        with contextlib.suppress(OSError):
            while data := upstream.recv(1 << 16):
                self.request.sendall(data)
            self.request.shutdown(socket.SHUT_WR)


class Proxy(socketserver.ThreadingTCPServer):
    """In front of the server; notes every request, and refuses the first that names *refused*."""

    daemon_threads = True

    def __init__(self, world, refused):
        super().__init__(("127.0.0.1", 0), Busy)
        there = urlsplit(world.server.url)
        self.upstream = there.hostname, there.port
        self.url = f"http://127.0.0.1:{self.server_address[1]}/api"
        self.refused = refused
        self.made = []
        self.refused_at = None
        self._world = world

    def is_refused(self):
        return self.refused_at is not None

    def tell(self):
        self._world.tell("refused")

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return super().__enter__()

    def __exit__(self, *exc_info):
        self.shutdown()
        super().__exit__(*exc_info)


def test_when_the_server_asks_for_time_nothing_is_asked_of_it_meanwhile(world):
    first, second = deploy(world), deploy(world)
    with Proxy(world, refused=f"/deployments/name/{second} ") as proxy:
        run_alone(world, "waits_for_the_server", first, second, PREFECT_API_URL=proxy.url)
        of_logs = re.compile("/logs/|/csrf-token|/events/in |GET /api/flows/")
        made = [
            (at - proxy.refused_at, line) for at, line in proxy.made if not of_logs.search(line)
        ]
    assert not [line for at, line in made if 0.3 < at < 2], made
    assert min(at for at, line in made if "bulk_set_state" in line) >= 2
    for name in (first, second):
        (run,) = runs_of(world, name)
        assert run.state.is_cancelled()


# -- what comes first ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "words"),
    [(Failed(message="no disk"), "failed: no disk"), (Cancelled(), "was cancelled")],
    ids=["failed", "cancelled"],
)
def test_what_comes_after_a_child_that_did_not_complete_is_never_launched(
    world, queue, state, words
):
    @supervised_flow(on_child_failure="ignore")
    def parent():
        extract = supervisor.spawn(queue, {"part": 0}, name="extract")
        load = supervisor.spawn(queue, {"part": 1}, name="load", after=[extract])
        report = supervisor.spawn(queue, {"part": 2}, name="report", after=[load])
        end(world, run_of(extract), state)
        with pytest.raises(ChildCancelled, match=f"'extract', which comes before it, {words}"):
            load.result(timeout=SOON)
        with pytest.raises(ChildCancelled, match="'load', which comes before it, was cancelled"):
            report.result(timeout=SOON)
        for child in (load, report):
            assert child.cancel_reason.source == "predecessor_failed"
        assert report.cancel_reason.child == "load"
        return supervisor.flow_run_id

    assert len(world.tree(parent())) == 2


# -- how long -----------------------------------------------------------------------------------


def test_a_child_elsewhere_times_out_by_itself_when_its_parents_time_is_over(deployed):
    command = alone("has_fifteen_seconds", deployed.folder)
    log = deployed.folder / "alone.log"
    with running(command, env=deployed.server.env, log=log, cwd=FLOWS) as parent:
        root = UUID(next(iter(eventually(deployed.pids, seconds=SOON, what="the parent runs"))))
        child = eventually(lambda: deployed.tree(root)[1:], seconds=14, what="it has a child")[0]
        parent.send_signal(signal.SIGSTOP)  # so that nobody else can end the child
        state = eventually(
            lambda: (state := deployed.run(child.id).state).is_final() and state,
            seconds=SOON,
            what="the child is over",
        )
        assert not deployed.run(root).state.is_final()
        parent.kill()
    assert state.name == "TimedOut"
    assert "its deadline was exceeded" in state.message
    assert state.timestamp - child.created >= timedelta(seconds=child.labels[DEADLINE_SECONDS])


# -- telling why nothing moves ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["work pool", "work queue"])
def test_a_run_says_once_which_limit_keeps_its_child_waiting(world, monkeypatch, kind):
    monkeypatch.setattr("supervised._lifecycle._STALL_SECONDS", 0.5)
    pool, queue = f"pool-{uuid4()}", f"queue-{uuid4()}"
    of_pool, of_queue = (1, None) if kind == "work pool" else (None, 1)
    world.client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    world.client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=of_pool))
    world.client.create_work_queue(queue, work_pool_name=pool, concurrency_limit=of_queue)
    deployment = deploy(world, work_pool_name=pool, work_queue_name=queue)

    @supervised_flow(on_child_failure="ignore")
    def parent():
        child = supervisor.spawn(deployment)
        run_of(child)
        assert not world.client.get_scheduled_flow_runs_for_work_pool(pool)
        eventually(
            lambda: any("waits for a slot" in line for line in logs_of(world, run.id)),
            seconds=SOON,
            what="it says so",
        )
        time.sleep(2)  # in which it would say so again
        child.cancel()
        child.wait()

    run = world.client.create_flow_run_from_deployment(
        world.client.read_deployment_by_name(deployment).id
    )
    run_flow(parent, flow_run=run)
    said = eventually(
        lambda: (lines := logs_of(world, run.id)) and lines[-1].startswith("Finished") and lines,
        seconds=SOON,
        what="its log has arrived",
    )
    name = pool if kind == "work pool" else queue
    (line,) = [line for line in said if "waits for a slot" in line]
    assert line.startswith(f"The only child waits for a slot of {kind} {name!r} (limit 1), and ")
    assert f"runs of the same tree hold the slots: {run.name!r}." in line


# -- finalizers ---------------------------------------------------------------------------------


def test_a_cancelled_run_calls_its_finalizers_and_its_log_has_what_they_raise(world):
    called = []

    async def drop(name):
        await asyncio.sleep(0)
        called.append(name)
        if name == "cluster":
            raise KeyError("no such cluster")

    def cancel_query():
        called.append("query")
        raise ValueError("it has ended")

    @supervised_flow
    async def parent():
        supervisor.on_teardown(drop, "lock")
        supervisor.on_teardown(cancel_query)
        supervisor.on_teardown(drop, name="cluster")
        await asyncio.to_thread(end, world, supervisor.flow_run_id, Cancelling())
        await asyncio.sleep(60)

    state = asyncio.run(parent(return_state=True))
    assert state.is_cancelled()
    assert called == ["cluster", "query", "lock"]
    (report,) = eventually(
        lambda: reports_of(world, state), seconds=SOON, what="the report is in the log"
    )
    assert report[1:] == [
        "finalizer  drop: KeyError: 'no such cluster'",
        "finalizer  cancel_query: ValueError: it has ended",
    ]


def test_a_finalizer_that_takes_too_long_holds_up_a_cancelled_run_for_its_grace(world):
    released, called, ended = threading.Event(), [], []

    def wait():
        ended.append(released.wait(60))

    @supervised_flow(grace_seconds=1)
    async def parent():
        supervisor.on_teardown(called.append, "first")
        supervisor.on_teardown(wait)
        await asyncio.to_thread(end, world, supervisor.flow_run_id, Cancelling())
        await asyncio.sleep(60)

    state = asyncio.run(parent(return_state=True))
    assert not ended
    released.set()
    assert state.is_cancelled()
    assert not called
    (report,) = eventually(
        lambda: reports_of(world, state), seconds=SOON, what="the report is in the log"
    )
    assert report[1:] == [
        "finalizer  wait: not done within the grace of 1 s",
        "finalizer  append: not called, the grace of 1 s was over",
    ]


# -- adoption -----------------------------------------------------------------------------------


def plain_run(world, deployment, *states):
    """Start a run that nobody looks after, and say how far it has come."""
    run = world.client.create_flow_run_from_deployment(
        world.client.read_deployment_by_name(deployment).id
    )
    for state in states:
        end(world, run.id, state)
    return run


def test_an_adopted_run_whose_time_is_over_is_cancelled(world, queue):
    run = plain_run(world, queue, Pending(), Running())

    @supervised_flow(on_child_failure="ignore")
    def parent():
        began = time.monotonic()
        child = supervisor.adopt(run, timeout_seconds=1)
        eventually(lambda: world.run(run.id).state.is_cancelling(), seconds=SOON, what="asked")
        assert time.monotonic() - began >= 1, "its time begins with the adoption"
        end(world, run.id, Cancelled())  # as its runner would
        with pytest.raises(ChildTimedOut) as late:
            child.result(timeout=SOON)
        assert str(late.value.reason) == "its deadline of 1 s was exceeded"
        assert child.outcome == "timed_out"

    parent()


def test_an_adopted_run_that_was_detached_is_nobodys_any_more(world, queue):
    run = plain_run(world, queue, Pending(), Running())

    @supervised_flow
    def parent():
        child = supervisor.adopt(run)
        run_of(child)
        assert child.kind == "adopted"
        child.detach()
        assert child.is_over
        eventually(lambda: world.run(run.id).labels[DETACHED] is True, seconds=SOON, what="known")
        raise ValueError("the body failed")

    with pytest.raises(ValueError, match="the body failed"):
        parent()
    left = world.run(run.id)
    assert left.state.is_running()
    assert left.labels[DETACHED] is True


@pytest.fixture
def bound(world):
    """A flow that is bound to a work pool."""
    pool = f"pool-{uuid4()}"
    world.client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    # With a launcher of its own it needs no `uv`, which installs what it depends on.
    launcher = [sys.executable, "-m", "prefect.bundles.execute"]
    return bind_flow_to_infrastructure(bundled, pool, ProcessWorker, launcher=launcher)


AD_HOC = pytest.mark.filterwarnings("ignore:Ad-hoc flow submission:FutureWarning")


@AD_HOC
def test_the_future_of_a_submitted_flow_is_adopted_and_gives_its_result(world, bound):
    folder = str(world.folder)
    world.tell("finish")  # `submit` waits for its worker, and that for the run

    @supervised_flow
    def parent():
        return supervisor.adopt(bound.submit(folder)).result(timeout=SOON)

    assert parent() == 42


@AD_HOC
def test_what_a_worker_runs_is_adopted_while_it_runs_and_ends_with_its_new_parent(world, bound):
    async def story():
        async with ProcessWorker(work_pool_name=bound.work_pool) as worker:
            future = await worker.submit(bound, {"folder": str(world.folder)})

            @supervised_flow(grace_seconds=30)
            async def parent():
                supervisor.adopt(future)
                while not world.started(1):
                    await asyncio.sleep(0.05)
                raise ValueError("the body failed")

            try:
                with pytest.raises(ValueError, match="^the body failed$"):
                    await parent()
            finally:
                world.tell("finish")
            return future.flow_run_id

    assert world.run(asyncio.run(story())).state.is_cancelled()
    assert not world.alive()
