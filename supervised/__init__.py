"""Structured concurrency for Prefect.

General layout, every module importing only from those below it:

- `_flow`: `@supervised_flow`, `SupervisedFlow`.
- `_scope`: what a flow's function is wrapped in: entering, leaving, what to raise.
- `_supervisor`: `Supervisor`; spawns, hears of the run's end, begins the teardown.
- `_orphans`, `_reap`, `_tree`: the same from outside: finding, ending and showing what is left.
- `_teardown`, `_launch`, `_watch`: the three things the control plane does for children.
- `_own_run`, `_link`, `_lease`: and for the run itself: its cancellation, its parent, its life.
- `_inline`, `_body`: code that runs here: a child's, and the flow's own.
- `_registry`, `_child`: the children of one scope, and the handle of one child.
- `_host`: the process that all of this runs in.
- `_api`, `_telemetry`, `_control`: Prefect's client, OpenTelemetry, the thread.
- `_proxy`, `_context`, `_hooks`, `_compat`: what is current; user hooks; Prefect's private parts.
- `_bell`, `_clock`, `_log`: what signals come, what time it is, and how to tell of it.
- `_policy`, `_identity`, `_errors`, `_types`: decisions, names and values, all pure.
"""

from __future__ import annotations

from supervised._child import Child
from supervised._context import cancelled
from supervised._errors import (
    ChildCancelled,
    ChildCrashed,
    ChildError,
    ChildFailed,
    ChildTimedOut,
    DeploymentNotFoundError,
    DeploymentPausedError,
    DuplicateKeyError,
    InvalidTargetError,
    NoApiError,
    NoSupervisorError,
    ParametersError,
    ScopeClosedError,
    ServerUnreachableError,
    SpawnError,
    SupervisedError,
    TeardownError,
)
from supervised._flow import SupervisedFlow, supervised_flow
from supervised._proxy import supervisor
from supervised._supervisor import Supervisor
from supervised._types import CancelReason, Receipt, TeardownReport

__all__ = [
    "CancelReason",
    "Child",
    "ChildCancelled",
    "ChildCrashed",
    "ChildError",
    "ChildFailed",
    "ChildTimedOut",
    "DeploymentNotFoundError",
    "DeploymentPausedError",
    "DuplicateKeyError",
    "InvalidTargetError",
    "NoApiError",
    "NoSupervisorError",
    "ParametersError",
    "Receipt",
    "ScopeClosedError",
    "ServerUnreachableError",
    "SpawnError",
    "SupervisedError",
    "SupervisedFlow",
    "Supervisor",
    "TeardownError",
    "TeardownReport",
    "cancelled",
    "supervised_flow",
    "supervisor",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("prefect-supervised")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
