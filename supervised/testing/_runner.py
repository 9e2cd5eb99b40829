"""What Prefect's runner does: starts processes, ends those whose runs are cancelled, runs hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from prefect.client.schemas.objects import State, StateType
from prefect.states import Cancelling, Crashed, Pending

from supervised._flow import SupervisedFlow
from supervised._reap import end_below
from supervised.testing._engine import run_hooks
from supervised.testing._processes import FakeProcess

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun
    from prefect.flows import Flow

    from supervised.testing._client import FakeOrchestrator
    from supervised.testing._fake import FakePrefect

_POLL_SECONDS = 2.0
_SUBMIT_SECONDS = 0.5
_START_SECONDS = 2.0
_HEAR_SECONDS = 0.5
_LOOK_SECONDS = 3.0  # a runner looks that often whether a process that it has signalled is gone
_MISSED_POLL_SECONDS = 10.0


class FakeRunner:
    """A `serve` process, or a worker, with what it has started.

    Args:
        fake: The world that it is in.
        name: Its name.
    """

    def __init__(self, fake: FakePrefect, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.flows: dict[UUID, Flow[..., Any]] = {}
        self.processes: dict[UUID, FakeProcess] = {}
        self.history: dict[UUID, FakeProcess] = {}
        self._fake = fake
        self._api: FakeOrchestrator = fake.connect()
        self._taken: set[UUID] = set()
        self._ending: set[UUID] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to poll and to listen."""
        self._spawn(self._poll())
        self._spawn(self._listen())
        self._spawn(self._look_for_missed())
        self._fake.server.on_nudge.append(self._on_nudge)

    def kill(self) -> None:
        """Send SIGKILL to the runner; the processes that it has started live on."""
        self.is_alive = False
        if self._on_nudge in self._fake.server.on_nudge:
            self._fake.server.on_nudge.remove(self._on_nudge)
        self._api.disconnect()
        for task in self._tasks:
            task.cancel()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._fake.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- starting -----------------------------------------------------------------------------

    async def _poll(self) -> None:
        while True:
            await anyio.sleep(_POLL_SECONDS)
            for run in self._fake.server.due(self.flows):
                if run.id not in self._taken:
                    self._taken.add(run.id)
                    self._spawn(self._execute(run))

    async def _execute(self, run: FlowRun) -> None:
        assert run.deployment_id is not None
        flow = self.flows[run.deployment_id]
        try:
            if not (await self._api.propose(run.id, Pending())).is_pending():
                return
            await anyio.sleep(self._fake.dice.upto(_SUBMIT_SECONDS))
            process = FakeProcess(self._fake.loop, self._fake.connect(), flow, run, has_runner=True)
            self.processes[run.id] = self.history[run.id] = process
            await anyio.sleep(self._fake.dice.upto(_START_SECONDS))
            process.start()
            await process.exited.wait()
            self.processes.pop(run.id, None)
            if process.code != 0:
                await self._crashed(flow, run, process)
        finally:
            self._taken.discard(run.id)

    async def _crashed(self, flow: Flow[..., Any], run: FlowRun, process: FakeProcess) -> None:
        state: State[Any] = Crashed(message=f"Process exited with status code: {process.code}.")
        answer = await self._api.propose(run.id, state)
        if answer.is_crashed():
            await self._run_hooks(flow, run, answer)

    # -- cancelling -----------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            try:
                async with self._api.subscribe_all() as events:
                    async for event in events:
                        if event.state_type == StateType.CANCELLING:
                            self._spawn(self._cancel(event.run_id))
            except ConnectionError:
                pass
            await anyio.sleep(_POLL_SECONDS)

    def _on_nudge(self, run_id: UUID) -> None:
        self._spawn(self._cancel(run_id))

    async def _look_for_missed(self) -> None:
        """Look for what an event should have told."""
        while True:
            await anyio.sleep(_MISSED_POLL_SECONDS)
            for run_id in list(self.processes):
                run = self._fake.server.runs.get(run_id)
                if run is not None and run.state is not None and run.state.is_cancelling():
                    self._spawn(self._cancel(run_id))

    async def _cancel(self, run_id: UUID) -> None:
        """Kill, run hooks, write the state; a run without a process is not looked at again."""
        await anyio.sleep(self._fake.dice.upto(_HEAR_SECONDS))
        process = self.processes.get(run_id)
        if process is None or run_id in self._ending:
            return
        self._ending.add(run_id)
        process.terminate("cancel")
        while not process.is_dead:
            await anyio.sleep(_LOOK_SECONDS)
        await self._run_hooks(process.flow, process.run, Cancelling())
        await self._api.propose(run_id, State(type=StateType.CANCELLED, name="Cancelled"))
        self._ending.discard(run_id)

    async def _run_hooks(self, flow: Flow[..., Any], run: FlowRun, state: State[Any]) -> None:
        hooks = flow.on_crashed_hooks if state.is_crashed() else flow.on_cancellation_hooks
        await run_hooks(hooks, flow, run, state)
        if isinstance(flow, SupervisedFlow) and self._fake.has_hooks:
            (now,) = await self._api.read_runs([run.id]) or (run,)
            await end_below(self._api, flow, now, state)
