"""The process that a scope lives in, and Prefect's part in it.

`PrefectHost` is the real one: a control plane in a thread, Prefect's engine for inline flows, a
runner that signals. `supervised.testing` has another, in which all of that is simulated.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from supervised import _compat
from supervised._api import open_orchestrator
from supervised._control import ControlPlane, Plane

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from prefect.client.schemas.objects import FlowRun
    from prefect.flows import Flow

    from supervised._api import Orchestrator

S = TypeVar("S")


class Host(Protocol):
    """What supervision needs of the process that it runs in."""

    starts_processes: bool
    """Whether a child may be given a process of its own."""

    def acquire_plane(self, services: Callable[[], AbstractAsyncContextManager[S]]) -> Plane[S]:
        """Return the process's control plane, started if need be; each user releases it."""
        ...

    def open_orchestrator(self) -> AbstractAsyncContextManager[Orchestrator]:
        """Open the seam to Prefect, in the control plane."""
        ...

    def run_flow(self, flow: Flow[..., Any], run: FlowRun, parameters: Mapping[str, Any]) -> Any:
        """Run a flow here under a run that exists; return its state, or an awaitable of it."""
        ...

    def termination_intent(self) -> str | None:
        """Return why a runner is stopping this process; `None` if it is not."""
        ...

    def runner_owns(self, run: FlowRun) -> bool:
        """Whether a runner started this process for that very run, and will signal it."""
        ...

    def runner_runs_hooks(self, run: FlowRun) -> bool:
        """Whether a runner runs the run's `on_cancellation` hooks."""
        ...


class PrefectHost:
    """A real process with Prefect in it."""

    starts_processes = True

    def acquire_plane(self, services: Callable[[], AbstractAsyncContextManager[S]]) -> Plane[S]:
        return ControlPlane.acquire(services)

    def open_orchestrator(self) -> AbstractAsyncContextManager[Orchestrator]:
        return open_orchestrator()

    def run_flow(self, flow: Flow[..., Any], run: FlowRun, parameters: Mapping[str, Any]) -> Any:
        return _compat.run_flow_inline(flow, run, parameters)

    def termination_intent(self) -> str | None:
        return _compat.termination_intent()

    def runner_owns(self, run: FlowRun) -> bool:
        return _compat.runner_owns(run.id)

    def runner_runs_hooks(self, run: FlowRun) -> bool:
        return _compat.runner_runs_hooks(run)


current_host: ContextVar[Host] = ContextVar("supervised_host", default=PrefectHost())  # noqa: B039
