"""`FakePrefect`: a server, runners and processes, simulated in one thread, on a virtual clock."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import TYPE_CHECKING, Any

import anyio
from prefect.flows import Flow
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Cancelling, Pending, Scheduled
from typing_extensions import Self

from supervised.guard import Guard
from supervised.testing._client import FakeOrchestrator, Hub
from supervised.testing._faults import Dice, Faults
from supervised.testing._processes import FakeProcess
from supervised.testing._runner import FakeRunner
from supervised.testing._server import Server, is_live
from supervised.testing._virtual import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping
    from types import TracebackType
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

    from supervised._types import TeardownReport

_RUNNER = "runner"


class FakePrefect:
    """A Prefect without servers, processes or waiting, to test what a teardown leaves behind.

    Flows run for real, over simulated runs: they spawn, wait, fail and are cancelled as they would
    be, by the code that supervises them in production. Time is virtual: a night passes in
    milliseconds. Everything that is random comes from the seed, so what failed once fails again.

    Flows may spawn, wait and sleep. What needs Prefect's own engine, such as tasks and plain calls
    of other flows, needs `local_server`.

    Args:
        seed: What all that is random is drawn from.
        faults: What goes wrong between processes and the server; nothing by default.

    Example:
        ```python
        def test_a_cancelled_night_leaves_nothing_behind():
            with FakePrefect() as prefect:
                prefect.deploy("score/gpu", takes=3600)
                run = prefect.start(nightly, {"day": "2026-11-22"})
                prefect.advance(60)
                run.cancel()
                prefect.advance(30)
                assert run.report.ok
                assert prefect.alive == []
        ```
    """

    has_hooks = True
    """Whether runners run our hook; without it the other mechanisms have to do."""

    def __init__(self, *, seed: int = 0, faults: Faults | None = None) -> None:
        self._is_open = False
        self.loop = VirtualLoop()
        self.dice = Dice(random.Random(seed), faults or Faults())
        self.server = Server(self.loop, seed)
        self.hub = Hub(self.server, self.loop, self.dice)
        self.runners: dict[str, FakeRunner] = {}
        self._gone: list[FakeRunner] = []
        self._local: dict[UUID, FakeProcess] = {}
        self._settings = temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False})

    def __enter__(self) -> Self:
        self._settings.__enter__()
        self._is_open = True
        for runner in self.runners.values():
            runner.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with _silence():
                self.loop.wind_up()
        finally:
            self.loop.close()
            self._settings.__exit__(kind, exc, traceback)

    # -- the world ------------------------------------------------------------------------------

    @property
    def faults(self) -> Faults:
        """What goes wrong from now on."""
        return self.dice.faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self.dice.faults = faults

    def deploy(
        self,
        name: str,
        flow: Flow[..., Any] | None = None,
        *,
        takes: float = 3600.0,
        fails: bool = False,
        returns: Any = None,
        runner: str = _RUNNER,
    ) -> None:
        """Serve a deployment.

        Args:
            name: *flow/deployment*.
            flow: What its runs execute; by default a plain flow that sleeps.
            takes: Seconds that such a run takes.
            fails: Whether it fails then.
            returns: What it returns then.
            runner: Who serves it; each name is a runner of its own.
        """
        made = self.server.deploy(name)
        if runner not in self.runners:
            self.runners[runner] = self._new_runner(runner)
        flow = flow or _sleeper(name, takes, fails=fails, returns=returns)
        self.runners[runner].flows[made.id] = flow

    def connect(self) -> FakeOrchestrator:
        """Return a connection to the server."""
        return FakeOrchestrator(
            self.server, self.hub, self.dice, is_over=lambda: self.loop.is_closing
        )

    def start(
        self, target: Flow[..., Any] | str, parameters: Mapping[str, Any] | None = None
    ) -> FakeRun:
        """Start a run: of a deployment by its runner, of a flow in a process without one.

        Args:
            target: A flow, or the name of a deployment.
            parameters: The flow's parameters by name.
        """
        if isinstance(target, Flow):
            run = self.server.create(target.name, state=Pending(), parameters=parameters)
            process = FakeProcess(self.loop, self.connect(), target, run, has_runner=False)
            self._local[run.id] = process
            process.start()
            return FakeRun(self, run.id)
        deployment = self.server.find_deployment(target)
        if deployment is None:
            raise LookupError(f"There is no deployment {target!r}; add it with `deploy`")
        run = self.server.create(
            target.split("/")[0],
            state=Scheduled(),
            deployment_id=deployment.id,
            parameters=parameters,
        )
        return FakeRun(self, run.id)

    def copy(self, run: FakeRun) -> FakeRun:
        """Copy a run as people do: its deployment, parameters, tags and labels, but not its key."""
        original = run.flow_run
        copied = self.server.create(
            f"copy-of-{original.name}",
            state=Scheduled(),
            deployment_id=original.deployment_id,
            parameters=original.parameters,
            tags=original.tags,
            labels=original.labels,
        )
        return FakeRun(self, copied.id)

    def replace_runner(self, name: str) -> None:
        """Start a runner in place of one that was killed; it knows nothing of that one's runs.

        Args:
            name: The name of both.
        """
        old = self.runners[name]
        self._gone.append(old)
        self.runners[name] = self._new_runner(name)
        self.runners[name].flows = old.flows

    def _new_runner(self, name: str) -> FakeRunner:
        runner = FakeRunner(self, name)
        if self._is_open:
            runner.start()
        return runner

    def guard(self, interval_seconds: float = 30.0) -> None:
        """Run `supervised guard` from now on."""
        guard = Guard(self.connect(), interval_seconds=interval_seconds)
        self.loop.create_task(guard.run())

    def restart(self, seconds: float) -> None:
        """Take the server down for some time; streams end, and nothing is lost.

        Args:
            seconds: How long it does not answer.
        """
        self.server.up_from = max(self.server.up_from, self.loop.time() + seconds)
        self.hub.break_all()

    def close_streams(self) -> None:
        """Close every event stream."""
        self.hub.break_all()

    # -- time -----------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Virtual seconds since the beginning."""
        return self.loop.time()

    def advance(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def until(self, condition: Callable[[], object], *, within: float = 600.0) -> None:
        """Let virtual time pass until something is true.

        Args:
            condition: What is to be true.
            within: Virtual seconds after which it is too late.

        Raises:
            TimeoutError: If it is not true by then.
        """

        async def look() -> None:
            with anyio.fail_after(within):
                while not condition():
                    await asyncio.sleep(0.1)

        self.loop.run_until_complete(look())

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the simulation's loop, and return what it returns."""
        return self.loop.run_until_complete(coroutine)

    # -- what there is --------------------------------------------------------------------------

    @property
    def runs(self) -> list[FakeRun]:
        """Every run, in the order of their creation."""
        return [FakeRun(self, run_id) for run_id in self.server.runs]

    @property
    def alive(self) -> list[FakeRun]:
        """The runs that have not ended, or whose process has not."""
        return [run for run in self.runs if run.is_alive]

    @property
    def processes(self) -> list[FakeProcess]:
        """The processes that have not ended."""
        served = [p for runner in self._all_runners for p in runner.history.values()]
        return [p for p in (*served, *self._local.values()) if not p.is_dead]

    @property
    def _all_runners(self) -> list[FakeRunner]:
        return [*self.runners.values(), *self._gone]

    @property
    def local_ids(self) -> set[UUID]:
        """The runs that were started in processes of their own, without a runner."""
        return set(self._local)

    def run(self, run_id: UUID) -> FakeRun:
        """Return a run by its id."""
        return FakeRun(self, run_id)

    def runner_of(self, run_id: UUID) -> FakeRunner | None:
        """Return the last runner that has started a process for a run."""
        for runner in self._all_runners:
            if run_id in runner.history:
                return runner
        return None

    def process_of(self, run_id: UUID) -> FakeProcess | None:
        """Return the last process that executed a run."""
        runner = self.runner_of(run_id)
        return runner.history[run_id] if runner is not None else self._local.get(run_id)


class FakeRun:
    """One run of a `FakePrefect`, by its id.

    Args:
        prefect: Where it runs.
        id: Its id.
    """

    def __init__(self, prefect: FakePrefect, id: UUID) -> None:
        self._prefect = prefect
        self.id = id

    def __repr__(self) -> str:
        state = self.state.name if self.state else None
        return f"<FakeRun {self.flow_run.name} {state}>"

    @property
    def flow_run(self) -> FlowRun:
        """The run as the server knows it."""
        return self._prefect.server.read(self.id)

    @property
    def state(self) -> State[Any] | None:
        """Its state."""
        return self.flow_run.state

    @property
    def has_process(self) -> bool:
        """Whether its process lives."""
        process = self._prefect.process_of(self.id)
        return process is not None and not process.is_dead

    @property
    def has_started(self) -> bool:
        """Whether it has ever been `Running`."""
        return self.flow_run.start_time is not None

    @property
    def host(self) -> FakeRun:
        """The run in whose process it runs: itself, or the one above that called it inline."""
        run = self.flow_run
        while run.deployment_id is None and run.id not in self._prefect.local_ids:
            parent_id = self._prefect.server.parent_of(run)
            if parent_id is None:
                break
            run = self._prefect.server.read(parent_id)
        return FakeRun(self._prefect, run.id)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended, or its process has not."""
        return self.has_process or is_live(self.flow_run)

    @property
    def report(self) -> TeardownReport | None:
        """What became of its children, if it had to tear them down and has ended itself."""
        process = self._prefect.process_of(self.id)
        scope = process.engine.supervisor if process is not None else None
        return scope.report if scope is not None else None

    @property
    def below(self) -> list[FakeRun]:
        """The runs that it has launched, and those that they have."""
        found: list[FakeRun] = []
        frontier = [self.id]
        while children := self._prefect.server.children(frontier):
            found += [FakeRun(self._prefect, run.id) for run in children]
            frontier = [run.id for run in children]
        return found

    def cancel(self) -> None:
        """Set it to `Cancelling`, as Prefect's UI does."""
        self._prefect.server.propose(self.id, Cancelling())

    def kill(self) -> None:
        """Send SIGKILL to its process."""
        process = self._prefect.process_of(self.id)
        if process is not None:
            process.kill()

    def terminate(self) -> None:
        """Send SIGTERM to its process."""
        process = self._prefect.process_of(self.id)
        if process is not None:
            process.terminate()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Log nothing: what is said while all is being wound up has not happened."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _sleeper(name: str, takes: float, *, fails: bool, returns: Any) -> Flow[..., Any]:
    async def sleep(**parameters: Any) -> Any:
        await asyncio.sleep(takes)
        if fails:
            raise RuntimeError("it was made to fail")
        return returns

    return Flow(
        sleep, name=name.split("/", maxsplit=1)[0], validate_parameters=False, persist_result=True
    )
