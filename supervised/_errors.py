"""Every exception of ours.

SupervisedError
├─ NoSupervisorError (RuntimeError)      `supervisor` used outside a supervised run
├─ SpawnError                            a child that could not be launched
│  ├─ InvalidTargetError (TypeError)     neither a flow nor a deployment
│  ├─ DuplicateKeyError (ValueError)     one key, two different pieces of work
│  ├─ ScopeClosedError (RuntimeError)    the scope is over, or being torn down
│  ├─ DeploymentNotFoundError (LookupError)
│  ├─ RunNotFoundError (LookupError)     no run to adopt
│  ├─ DeploymentPausedError
│  ├─ ParametersError (ValueError)       parameters that the flow or deployment refuses
│  ├─ NoApiError                         no Prefect API is configured
│  └─ ServerUnreachableError             no answer within the launch's patience
├─ ChildError                            how a launched child ended, if not well
│  ├─ ChildFailed
│  ├─ ChildCrashed
│  ├─ ChildTimedOut
│  └─ ChildCancelled
├─ ScopeTimeoutError (TimeoutError)      a scope's deadline was exceeded
└─ TeardownError                         a teardown that could not verify every run

`ChildCancelled` reports the cancellation of a *child* and is an ordinary exception; the
cancellation of the code that waits for it stays asyncio's own `CancelledError`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.schemas.objects import State

    from supervised._types import CancelReason, TeardownReport


class SupervisedError(Exception):
    """Base of every exception that this library raises."""


class NoSupervisorError(SupervisedError, RuntimeError):
    """`supervisor` was used where no supervised flow run is current."""


class SpawnError(SupervisedError):
    """A child could not be launched; `child` is its name where it has one."""

    def __init__(self, message: str, *, child: str | None = None) -> None:
        super().__init__(message)
        self.child = child


class InvalidTargetError(SpawnError, TypeError):
    """The target of `spawn` is neither a flow nor the name or id of a deployment."""


class DuplicateKeyError(SpawnError, ValueError):
    """A key was used twice in one scope, for different work."""


class ScopeClosedError(SpawnError, RuntimeError):
    """The scope no longer takes children: it is over, or it is being torn down."""


class DeploymentNotFoundError(SpawnError, LookupError):
    """The server knows no deployment of that name or id."""


class RunNotFoundError(SpawnError, LookupError):
    """The server knows no flow run of that id."""


class DeploymentPausedError(SpawnError):
    """The deployment is paused, is in no work pool, and nothing has asked for its runs lately.

    That is how `serve` leaves it when it ends. One that is only paused takes children: Prefect
    holds its schedules back, and runs what is launched.
    """


class ParametersError(SpawnError, ValueError):
    """The parameters do not fit the flow, or the deployment's schema."""


NO_API = (
    "No Prefect API is configured. Set PREFECT_API_URL, for example: "
    "prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api"
)


class NoApiError(SpawnError):
    """No Prefect API is configured, and no ephemeral one may be started."""


class ServerUnreachableError(SpawnError):
    """The Prefect server did not answer within the patience of a launch."""


class ChildError(SupervisedError):
    """A launched child did not complete. `__cause__` is the child's own exception, if known.

    Args:
        message: What happened and why.
        child: The child's name.
        flow_run_id: Its flow run, if it got one.
        state: Its last known Prefect state.
        reason: Who asked for the cancellation, if it was cancelled.
        url: The run's page in Prefect's UI, where a UI is configured.
    """

    def __init__(
        self,
        message: str,
        *,
        child: str,
        flow_run_id: UUID | None = None,
        state: State | None = None,
        reason: CancelReason | None = None,
        url: str | None = None,
    ) -> None:
        super().__init__(message)
        self.child = child
        self.flow_run_id = flow_run_id
        self.state = state
        self.reason = reason
        self.url = url

    def __reduce__(self) -> Any:
        return functools.partial(type(self), child=self.child), self.args, self.__dict__

    def __str__(self) -> str:
        text = super().__str__()
        run = f" (flow run {self.flow_run_id})" if self.flow_run_id else ""
        end = "" if text.endswith((".", "!", "?")) else "."
        where = f"{end} See {self.url}" if self.url else ""
        return f"Child {self.child!r}{run} {text}{where}"

    def __repr__(self) -> str:
        """Name the child, as `str` does: Prefect logs this."""
        return f"{type(self).__name__}({str(self)!r})"


class ChildFailed(ChildError):
    """The child's flow raised, or returned a failed state."""


class ChildCrashed(ChildError):
    """The child's process or infrastructure died and nobody had asked for it."""


class ChildTimedOut(ChildError):
    """The child exceeded its own timeout."""


class ChildCancelled(ChildError):
    """The child was cancelled; `reason` says by whom."""


class ScopeTimeoutError(SupervisedError, TimeoutError):
    """The deadline of a scope was exceeded; Prefect calls the run's state *TimedOut*."""


class TeardownError(SupervisedError):
    """Teardown could not verify that every child is over; `report` names them."""

    def __init__(self, report: TeardownReport) -> None:
        names = ", ".join(f"{r.name} ({r.flow_run_id})" for r in report.unverified)
        super().__init__(
            f"{len(report.unverified)} run(s) below '{report.flow_name}' {report.flow_run_id} "
            f"may still be alive: {names}. Check them in the Prefect UI, or cancel them by hand: "
            "prefect flow-run cancel <id>"
        )
        self.report = report

    def __reduce__(self) -> Any:
        return type(self), (self.report,)
