"""Which supervisor, and which inline child, the running code belongs to."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervised._child import Child
    from supervised._supervisor import Supervisor

current_supervisor: ContextVar[Supervisor | None] = ContextVar(
    "supervised_supervisor", default=None
)
ended_supervisor: ContextVar[Supervisor | None] = ContextVar(
    "supervised_ended_supervisor", default=None
)
"""The last scope of this context, for the flow's hooks, which run after it."""

current_child: ContextVar[Child[Any] | None] = ContextVar("supervised_child", default=None)


def cancelled() -> bool:
    """Whether the running inline child, or the supervised run around it, is to stop.

    A sync flow that was spawned inline runs in a thread, and no thread can be ended from
    outside: its loops ask this and return.

    Returns:
        True once cancellation was asked for; false outside supervised runs.

    Example:
        ```python
        @flow
        def crunch(rows: list[str]) -> None:
            for row in rows:
                if supervised.cancelled():
                    return
                process(row)
        ```
    """
    child = current_child.get()
    if child is not None and child.cancel_reason is not None:
        return True
    supervisor = current_supervisor.get()
    if supervisor is None or (child is not None and supervisor.owns(child)):
        return False  # a child ends when it is asked itself: its policy may be to be waited for
    return supervisor.is_ending
