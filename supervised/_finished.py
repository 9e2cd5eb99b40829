"""What is kept of a child that is over, once nobody holds its handle any more."""

from __future__ import annotations

import functools
import json
import struct
import sys
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs
from prefect.client.schemas.objects import FlowRun, State, StateType

from supervised import _compat as compat
from supervised._child import Child
from supervised._policy import policy_of
from supervised._types import CAUSES

if TYPE_CHECKING:
    from supervised._types import Action, Kind, Outcome


@attrs.frozen(kw_only=True)
class Common:
    """What the children of one target that have ended in the same way have in common.

    Args:
        actions: What each cause of the parent's end meant to it.
        is_linked: Whether a tracking task run links its run to its parent.
        stored: What Prefect describes a persisted result with, as JSON and without what tells one
            result from another; `None` if there is none.
    """

    kind: Kind
    target: str
    actions: tuple[Action, ...]
    timeout_seconds: float | None
    flow_id: UUID
    deployment_id: UUID | None
    is_linked: bool
    outcome: Outcome
    state_type: StateType
    state_name: str | None
    stored: str | None


_shared = functools.lru_cache(maxsize=4096)(Common)


@attrs.frozen(eq=False, kw_only=True)
class Finished:
    """A child that is over, in less than a kilobyte (benchmarks/growth.py).

    The handle that is made from it knows what the other one knew, except that of its run only what
    identifies it is left. It gets a result that was persisted from where that is.

    Args:
        common: What it shares with others.
        run_name: The name that Prefect or the user gave to its run.
        numbers: The ids of its run, of its tracking task run and of its last state; the times of
            that state and of its end. Packed, they take a third of what they would take as objects.
        storage_key: What tells its persisted result from others.
        value: What it returned, if it ran here.
    """

    common: Common
    name: str
    key: str
    generation: int
    restarts: int
    run_name: str
    numbers: bytes
    message: str | None
    storage_key: str | None
    value: Any
    exception: BaseException | None

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
        if not isinstance(data, (compat.ResultMetadata, type(None))):
            return None
        stored = None if data is None else data.model_dump_json(exclude={_KEY})
        return cls(
            common=_shared(
                kind=child.kind,
                target=child.target,
                actions=tuple(child.on_parent[cause] for cause in CAUSES),
                timeout_seconds=child.timeout_seconds,
                flow_id=run.flow_id,
                deployment_id=run.deployment_id,
                is_linked=run.parent_task_run_id is not None,
                outcome=outcome,
                state_type=state.type,
                state_name=state.name,
                stored=stored,
            ),
            name=child.name,
            key=child.key,
            generation=child.generation,
            restarts=child.restarts,
            run_name=run.name,
            numbers=_NUMBERS.pack(
                run.id.bytes,
                child.task_run_id.bytes,
                state.id.bytes,
                state.timestamp.timestamp(),
                child.ended_at.timestamp(),
            ),
            message=None if state.message is None else sys.intern(state.message),
            storage_key=None if data is None else data.storage_key,
            value=child.local_value,
            exception=child.exception,
        )

    @property
    def flow_run_id(self) -> UUID:
        """The id of the child's flow run."""
        return UUID(bytes=self.numbers[:16])

    @property
    def kind(self) -> Kind:
        """Where it ran."""
        return self.common.kind

    @property
    def target(self) -> str:
        """What it was a run of."""
        return self.common.target

    def action(self, cause: str) -> Action:
        """Return what an end of the parent meant to it."""
        return self.common.actions[CAUSES.index(cause)]

    def child(self) -> Child[Any]:
        """Return a handle of the child."""
        common = self.common
        child: Child[Any] = Child(
            name=self.name,
            kind=common.kind,
            key=self.key,
            target=common.target,
            on_parent=policy_of(common.actions),
            timeout_seconds=common.timeout_seconds,
            on_done=_leave_alone,
            ask_cancel=_leave_alone,
            ask_detach=_leave_alone,
        )
        child.generation, child.restarts = self.generation, self.restarts
        run_id, tracking_id, state_id, timestamp, ended_at = _NUMBERS.unpack(self.numbers)
        task_run_id = UUID(bytes=tracking_id)
        state: State[Any] = State(
            id=UUID(bytes=state_id),
            type=common.state_type,
            name=common.state_name,
            message=self.message,
            timestamp=datetime.fromtimestamp(timestamp, timezone.utc),
            data=self._stored(),
        )
        run = FlowRun(
            id=UUID(bytes=run_id),
            name=self.run_name,
            flow_id=common.flow_id,
            deployment_id=common.deployment_id,
            parent_task_run_id=task_run_id if common.is_linked else None,
            state=state,
        )
        child.be_over(
            common.outcome,
            run,
            state,
            value=self.value,
            exception=self.exception,
            ended_at=datetime.fromtimestamp(ended_at, timezone.utc),
            task_run_id=task_run_id,
        )
        return child

    def _stored(self) -> compat.ResultMetadata | None:
        """Return what Prefect finds the persisted result with."""
        if self.common.stored is None:
            return None
        fields = json.loads(self.common.stored)
        return compat.ResultMetadata.model_validate({**fields, _KEY: self.storage_key})


_BY_ITSELF = {"completed", "failed", "crashed", "timed_out"}
_KEY = "storage_key"
_NUMBERS = struct.Struct("16s16s16sdd")


def _leave_alone(*_: object) -> None:
    """Do nothing: the child is over."""
