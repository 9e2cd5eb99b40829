"""Simulated processes: what dies at once, with everything in it, and is heard of no more."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from prefect.context import SettingsContext, get_settings_context
from prefect.exceptions import Abort, Pause

from supervised._control import Plane
from supervised._host import current_host
from supervised.testing._engine import Engine
from supervised.testing._virtual import current_owner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from prefect.client.schemas.objects import FlowRun
    from prefect.flows import Flow

    from supervised._api import Orchestrator
    from supervised.testing._client import FakeOrchestrator
    from supervised.testing._virtual import VirtualLoop

S = TypeVar("S")

logger = logging.getLogger("prefect.supervised.testing")

_KILL_SECONDS = 30.0  # after SIGTERM, in Prefect's runners


class FakeProcess:
    """A process that executes one flow run.

    Args:
        loop: The loop that stands for the machines' schedulers.
        api: Its connection to the server.
        flow: The flow.
        run: The run, which exists.
        has_runner: Whether a runner started it, and will signal it.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        api: FakeOrchestrator,
        flow: Flow[..., Any],
        run: FlowRun,
        *,
        has_runner: bool,
    ) -> None:
        self.loop = loop
        self.api = api
        self.flow = flow
        self.run = run
        self.has_runner = has_runner
        self.intent: str | None = None
        self.code: int | None = None
        self.exited = asyncio.Event()
        self.engine = Engine(self)
        self.context = _fresh_context(self)
        self._plane: _LoopPlane[Any] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended, however."""
        return self.code is not None

    def start(self) -> None:
        """Execute the run."""
        self._task = self.context.run(self.loop.create_task, self._main())

    async def _main(self) -> None:
        code = 1
        try:
            code = await self.engine.execute(self.flow, self.run)
        except asyncio.CancelledError:
            code = -15
        except (Abort, Pause):
            code = 0
        except Exception:
            logger.debug("The process of %s ends with an error", self.run.id, exc_info=True)
        finally:
            self._exit(code)

    def terminate(self, intent: str | None = None) -> None:
        """Send SIGTERM; what is still there 30 s later gets SIGKILL."""
        if self.is_dead or self._task is None:
            return
        self.intent = intent
        self._task.cancel()
        self.loop.call_unowned(_KILL_SECONDS, self.kill)

    def kill(self) -> None:
        """Send SIGKILL: nothing of the process runs on, not even what cleans up."""
        self._exit(-9)

    def _exit(self, code: int) -> None:
        if not self.is_dead:
            self.code = code
            self.api.disconnect()
            self.exited.set()

    # -- what supervision asks of the process it runs in ------------------------------------------

    starts_processes = (
        False  # there is one process in all: a child's code runs where it was spawned
    )

    def acquire_plane(self, services: Callable[[], AbstractAsyncContextManager[S]]) -> Plane[S]:
        if self._plane is None or self._plane.users == 0:
            self._plane = _LoopPlane(services, self.loop, _fresh_context(self))
        self._plane.users += 1
        return self._plane

    @contextlib.asynccontextmanager
    async def open_orchestrator(self) -> AsyncIterator[Orchestrator]:
        yield self.api

    def run_flow(self, flow: Flow[..., Any], run: FlowRun, parameters: Mapping[str, Any]) -> Any:
        if flow.isasync:
            return self.engine.run(flow, run, parameters)
        return self.engine.run_in_thread(flow, run, parameters)

    def termination_intent(self) -> str | None:
        return self.intent

    def runner_owns(self, run: FlowRun) -> bool:
        return self.has_runner and run.id == self.run.id

    def runner_runs_hooks(self, run: FlowRun) -> bool:
        return self.has_runner and run.deployment_id is not None


class _LoopPlane(Plane[S]):
    """A control plane in the simulation's own loop."""

    def __init__(
        self,
        services: Callable[[], AbstractAsyncContextManager[S]],
        loop: VirtualLoop,
        context: contextvars.Context,
    ) -> None:
        super().__init__(services)
        self._loop = loop
        self._context = context
        self.users = 0
        self.call_soon(self._start)

    def _start(self) -> None:
        serving = asyncio.get_running_loop().create_task(self._serve())
        serving.add_done_callback(lambda _: self._has_stopped())

    def release(self) -> Any:
        self.users -= 1
        return None if self.users else super().release()


def _fresh_context(process: FakeProcess) -> contextvars.Context:
    """Return an empty context but for the process, and for the settings of who asks."""
    settings = get_settings_context()
    context = contextvars.Context()
    context.run(current_owner.set, process)
    context.run(current_host.set, process)
    context.run(SettingsContext(profile=settings.profile, settings=settings.settings).__enter__)
    return context
