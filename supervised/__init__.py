"""Structured concurrency for Prefect.

General layout, every module importing only from those below it:

- `_flow`: `@supervised_flow`, `SupervisedFlow`.
- `_scope`: what a flow's function is wrapped in: entering, leaving, what to raise.
- `_supervisor`: `Supervisor`; spawns, hears of the run's end, begins the teardown.
- `_lifecycle`, `_deadline`, `_interrupts`: a child's life, the scope's time, the body's end.
- `_by_hand`, `_orphans`, `_reap`, `_tree`: the same from outside: ending, finding and showing runs.
- `_teardown`, `_launch`, `_watch`: the three things the control plane does for children.
- `_escalation`, `_asking`, `_reading`, `_discovery`: what a teardown does, in turns.
- `_grace`, `_search`, `_receipts`: how long it may take, where it looks, what it tells of a run.
- `_mandate`, `_targets`: what is to become of whom, and how far each has come.
- `_own_run`, `_link`, `_lease`: and for the run itself: its cancellation, its parent, its life.
- `_process`, `_inline`, `_body`: code that runs here: a child's, and the flow's own.
- `_restart`, `_slots`, `_finalizers`: who begins again, how many run at once, what else must end.
- `_join`, `_registry`: children waited for, the children of one scope.
- `_finished`, `_child`: one that is over, and any one.
- `_host`: the process that all of this runs in.
- `_api`, `_bulk`, `_batch`: Prefect's client, and how it asks for many things at once.
- `_pace`, `_writers`, `_budget`: how many requests there are at a time, and in a minute.
- `_telemetry`, `_control`: OpenTelemetry, the thread.
- `_proxy`, `_context`, `_hooks`, `_compat`: what is current; user hooks; Prefect's private parts.
- `_bell`, `_clock`, `_lean`, `_log`: what signals come, what time it is, what memory can be
  shared, and how to tell of it.
- `_stall`: why nothing moves.
- `_policy`, `_schema`, `_identity`, `_canonical`, `_errors`, `_types`, `_text`: decisions, names,
  values and words, all pure.
"""

from __future__ import annotations

import typing as _typing

if _typing.TYPE_CHECKING:
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
        RunNotFoundError,
        ScopeClosedError,
        ScopeTimeoutError,
        ServerUnreachableError,
        SpawnError,
        SupervisedError,
        TeardownError,
    )
    from supervised._finalizers import Finalizer
    from supervised._flow import SupervisedFlow, supervised_flow
    from supervised._join import AsCompleted, Children, Join
    from supervised._proxy import supervisor
    from supervised._restart import Restart
    from supervised._supervisor import Supervisor
    from supervised._types import CancelReason, Receipt, TeardownReport

    __version__: str

__all__ = [
    "AsCompleted",
    "CancelReason",
    "Child",
    "ChildCancelled",
    "ChildCrashed",
    "ChildError",
    "ChildFailed",
    "ChildTimedOut",
    "Children",
    "DeploymentNotFoundError",
    "DeploymentPausedError",
    "DuplicateKeyError",
    "Finalizer",
    "InvalidTargetError",
    "Join",
    "NoApiError",
    "NoSupervisorError",
    "ParametersError",
    "Receipt",
    "Restart",
    "RunNotFoundError",
    "ScopeClosedError",
    "ScopeTimeoutError",
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


# Like Prefect's own names, each is imported when it is first asked for: `import supervised` costs
# nothing, and who writes a flow pays for the decorator alone. All others are exceptions.
_MODULES = {
    "AsCompleted": "_join",
    "CancelReason": "_types",
    "Child": "_child",
    "Children": "_join",
    "Finalizer": "_finalizers",
    "Join": "_join",
    "Receipt": "_types",
    "Restart": "_restart",
    "SupervisedFlow": "_flow",
    "Supervisor": "_supervisor",
    "TeardownReport": "_types",
    "cancelled": "_context",
    "supervised_flow": "_flow",
    "supervisor": "_proxy",
}


if not _typing.TYPE_CHECKING:  # or a type checker would believe every name

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("prefect-supervised")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f"supervised.{_MODULES.get(name, '_errors')}")
        return globals().setdefault(name, getattr(module, name))

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
