"""`supervisor`: the current run's supervisor under one importable name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from prefect.context import FlowRunContext

from supervised._context import current_supervisor, ended_supervisor
from supervised._errors import NoSupervisorError

if TYPE_CHECKING:
    from supervised._supervisor import Supervisor


_READABLE_AFTERWARDS = {"report", "children", "flow_run_id"}


class _SupervisorProxy:
    """Stands for the supervisor of the run that the calling code belongs to.

    As `prefect.runtime` does for the run itself. It is found through context variables, so it
    works in tasks, and in threads that were given a copy of the context. What a run has come to
    (`report`, `children`, `flow_run_id`) can be read after its body too, in the hooks that
    Prefect's engine runs within the run.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        current = current_supervisor.get()
        if current is None and name in _READABLE_AFTERWARDS:
            current = _ended()
        if current is None:
            raise NoSupervisorError(
                f"supervisor.{name} was used outside a supervised flow run. Use it in a function "
                "decorated with @supervised_flow, in what that calls, or in a thread that runs in "
                "a copy of its context (contextvars.copy_context().run)."
            )
        return getattr(current, name)

    def __repr__(self) -> str:
        return f"<supervisor of {current_supervisor.get()!r}>"


def _ended() -> Supervisor | None:
    """Return the scope that has ended, while the engine still works on its run."""
    context, ended = FlowRunContext.get(), ended_supervisor.get()
    if context is None or context.flow_run is None or ended is None:
        return None
    return ended if ended.flow_run_id == context.flow_run.id else None


supervisor = cast("Supervisor", _SupervisorProxy())
