"""`supervisor`: the current run's supervisor under one importable name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from supervised._context import current_supervisor
from supervised._errors import NoSupervisorError

if TYPE_CHECKING:
    from supervised._supervisor import Supervisor


class _SupervisorProxy:
    """Stands for the supervisor of the run that the calling code belongs to.

    As `prefect.runtime` does for the run itself. It is found through context variables, so it
    works in tasks, and in threads that were given a copy of the context.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        current = current_supervisor.get()
        if current is None:
            raise NoSupervisorError(
                f"supervisor.{name} was used outside a supervised flow run. Use it in a function "
                "decorated with @supervised_flow, in what that calls, or in a thread that runs in "
                "a copy of its context (contextvars.copy_context().run)."
            )
        return getattr(current, name)

    def __repr__(self) -> str:
        return f"<supervisor of {current_supervisor.get()!r}>"


supervisor = cast("Supervisor", _SupervisorProxy())
