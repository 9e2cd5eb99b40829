"""What is kept of a child that is over, once nobody holds its handle any more."""

from __future__ import annotations

import functools
import json
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

    from supervised._types import Action, Cause, Kind, Outcome


@attrs.define(eq=False, kw_only=True)
class Finished:
    """A child that is over, in less than a kilobyte (benchmarks/growth.py).

    The handle that is made from it knows what the other one knew, except that of its run only what
    identifies it is left. It gets a result that was persisted from where that is.

    Args:
        handle: The child's handle, for as long as somebody holds it.
        run_name: The name that Prefect or the user gave to its run.
        ids: Those of its run, its tracking task run and its last state: 16 bytes each and not 100.
        is_linked: Whether that task run links the run to its parent.
        timestamp: Seconds since the epoch.
        ended_at: The same.
        stored: Where its result was persisted.
        value: What it returned, if it ran here.
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
    outcome: Outcome
    state_type: StateType
    state_name: str | None
    message: str | None
    timestamp: float
    stored: Stored | None
    value: Any
    exception: BaseException | None
    ended_at: float

    @property
    def flow_run_id(self) -> UUID:
        """The id of the child's flow run."""
        return UUID(bytes=self.ids[:16])

    @classmethod
    def of(cls, child: Child[Any]) -> Finished | None:
        """Return what has to be kept of a child; `None` if that is all of it.

        It is all of it unless the child has ended by itself, and there is no more to tell of it
        than that.
        """
        run, state, outcome = child.flow_run, child.state, child.outcome
        is_plain = outcome in _BY_ITSELF and child.cancel_reason is None
        if run is None or child.ended_at is None or not is_plain or child.detach_requested:
            return None
        assert outcome is not None
        data = None if child.is_local else state.data
        if not isinstance(data, (BaseModel, type(None))):
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
            outcome=outcome,
            state_type=state.type,
            state_name=_interned(state.name),
            message=_interned(state.message),
            timestamp=state.timestamp.timestamp(),
            stored=None if data is None else Stored.of(data),
            value=child.local_value,
            exception=child.exception,
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
        state: State[Any] = State(
            id=UUID(bytes=self.ids[32:]),
            type=self.state_type,
            name=self.state_name,
            message=self.message,
            timestamp=datetime.fromtimestamp(self.timestamp, timezone.utc),
            data=self.stored.load() if self.stored is not None else None,
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
        child.be_over(
            self.outcome,
            run,
            state,
            value=self.value,
            exception=self.exception,
            ended_at=ended_at,
            task_run_id=task_run_id,
        )
        return child


@attrs.frozen
class Stored:
    """Where a result was persisted: what a storage has in common is kept once.

    Args:
        model: What Prefect describes it with.
        key: What tells it from others in the same storage.
        common: Everything else, as JSON.
    """

    model: type[BaseModel]
    key: str | None
    common: str

    @classmethod
    def of(cls, data: BaseModel) -> Stored:
        fields = data.model_dump(mode="json")
        key = fields.pop(_KEY, None)
        return cls(type(data), key, sys.intern(json.dumps(fields)))

    def load(self) -> BaseModel:
        return self.model.model_validate({**json.loads(self.common), _KEY: self.key})


_KEY = "storage_key"  # of `ResultRecordMetadata`
_BY_ITSELF = {"completed", "failed", "crashed", "timed_out"}


def _interned(text: str | None) -> str | None:
    return None if text is None else sys.intern(text)


def _leave_alone(*_: object) -> None:
    """Do nothing: the child is over."""


@functools.lru_cache(maxsize=256)
def _shared(value: UUID | None) -> Any:
    """Return the first of equal ids, so that the children of a deployment share theirs."""
    return value
