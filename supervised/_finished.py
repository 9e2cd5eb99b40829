"""What is kept of a child that has completed, once nobody holds its handle any more."""

from __future__ import annotations

import functools
import sys
import weakref
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs
from prefect.client.schemas.objects import FlowRun, State, StateType
from pydantic import BaseModel

from supervised._child import Child

if TYPE_CHECKING:
    from collections.abc import Mapping

    from supervised._types import Action, Cause, Kind


@attrs.define(eq=False, kw_only=True)
class Finished:
    """A child that has completed, in less than a kilobyte; its handle takes eight.

    The handle that is made from it knows what the other one knew, except that of its run only what
    identifies it is left. It gets its result from where that was persisted.

    Args:
        handle: The child's handle, for as long as somebody holds it.
        run_name: The name that Prefect or the user gave to its run.
        ids: Those of its run, its tracking task run and its last state: 16 bytes each and not 100.
        is_linked: Whether that task run links the run to its parent.
        timestamp: Seconds since the epoch.
        ended_at: The same.
        data: Where its result was persisted: what Prefect describes that with, and as JSON.
    """

    handle: weakref.ref[Child[Any]]
    name: str
    kind: Kind
    key: str
    target: str
    on_parent: Mapping[Cause, Action]
    timeout_seconds: float | None
    generation: int
    restarts: int
    ids: bytes
    run_name: str
    flow_id: UUID
    deployment_id: UUID | None
    is_linked: bool
    state_name: str
    message: str | None
    timestamp: float
    data: tuple[type[BaseModel], str] | None
    ended_at: float

    @property
    def flow_run_id(self) -> UUID:
        """The id of the child's flow run."""
        return UUID(bytes=self.ids[:16])

    @classmethod
    def of(cls, child: Child[Any]) -> Finished | None:
        """Return what has to be kept of a child; `None` if that is all of it.

        It is all of it unless the child has completed, and by itself. If it ran here and its
        result was not persisted, its handle has that.
        """
        run, state = child.flow_run, child.state
        is_plain = child.outcome == "completed" and child.cancel_reason is None
        if run is None or child.ended_at is None or not is_plain or child.detach_requested:
            return None
        stored = None if child.is_local else state.data
        if child.holds_result or not isinstance(stored, (BaseModel, type(None))):
            return None
        return cls(
            handle=weakref.ref(child),
            name=child.name,
            kind=child.kind,
            key=child.key,
            target=child.target,
            on_parent=child.on_parent,
            timeout_seconds=child.timeout_seconds,
            generation=child.generation,
            restarts=child.restarts,
            ids=run.id.bytes + child.task_run_id.bytes + state.id.bytes,
            run_name=run.name,
            flow_id=_shared(run.flow_id),
            deployment_id=_shared(run.deployment_id),
            is_linked=run.parent_task_run_id is not None,
            state_name=sys.intern(state.name or "Completed"),
            message=None if state.message is None else sys.intern(state.message),
            timestamp=state.timestamp.timestamp(),
            data=(type(stored), stored.model_dump_json()) if stored is not None else None,
            ended_at=child.ended_at.timestamp(),
        )

    def child(self) -> Child[Any]:
        """Return the child's handle; make one if nobody holds it. Under the registry's lock."""
        held = self.handle()
        if held is None:
            held = self._make()
            self.handle = weakref.ref(held)
        return held

    def _make(self) -> Child[Any]:
        child: Child[Any] = Child(
            name=self.name,
            kind=self.kind,
            key=self.key,
            target=self.target,
            on_parent=self.on_parent,
            timeout_seconds=self.timeout_seconds,
            on_done=_leave_alone,
            ask_cancel=_leave_alone,
            ask_detach=_leave_alone,
        )
        child.generation, child.restarts = self.generation, self.restarts
        task_run_id = UUID(bytes=self.ids[16:32])
        model, stored = self.data or (None, "")
        state: State[Any] = State(
            id=UUID(bytes=self.ids[32:]),
            type=StateType.COMPLETED,
            name=self.state_name,
            message=self.message,
            timestamp=datetime.fromtimestamp(self.timestamp, timezone.utc),
            data=model.model_validate_json(stored) if model is not None else None,
        )
        run = FlowRun(
            id=self.flow_run_id,
            name=self.run_name,
            flow_id=self.flow_id,
            deployment_id=self.deployment_id,
            parent_task_run_id=task_run_id if self.is_linked else None,
            state=state,
        )
        ended_at = datetime.fromtimestamp(self.ended_at, timezone.utc)
        child.be_completed(run, state, ended_at=ended_at, task_run_id=task_run_id)
        return child


def _leave_alone(*_: object) -> None:
    """Do nothing: the child is over."""


@functools.lru_cache(maxsize=256)
def _shared(value: UUID | None) -> Any:
    """Return the first of equal ids, so that the children of a deployment share theirs."""
    return value
