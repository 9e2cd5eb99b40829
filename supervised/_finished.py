"""What is kept of a child that is over, once nobody holds its handle any more."""

from __future__ import annotations

import functools
import json
import math
import struct
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
    from supervised._types import Action, CancelReason, Kind, Outcome


@attrs.frozen(kw_only=True)
class Common:
    """What the children of one target that have ended in the same way have in common.

    Args:
        actions: What each cause of the parent's end meant to it.
        flow_id: The flow of its run; `None` if it never had one.
        is_linked: Whether a tracking task run links its run to its parent.
        state_type: What kind of state its last one was; `None` if it had none.
        stored: What Prefect describes a persisted result with, as JSON and without what tells one
            result from another; `None` if there is none.
    """

    kind: Kind
    target: str
    actions: tuple[Action, ...]
    timeout_seconds: float | None
    flow_id: UUID | None
    deployment_id: UUID | None
    is_linked: bool
    outcome: Outcome
    state_type: StateType | None
    state_name: str | None
    stored: str | None
    escalations: tuple[str, ...]


_shared = functools.lru_cache(maxsize=4096)(Common)


@functools.lru_cache(maxsize=256)
def _same(message: str) -> str:
    """Return the same object for equal messages: many children end with one.

    Not `sys.intern`: from Python 3.12 on, what that keeps is never freed.
    """
    return message


@attrs.frozen(eq=False, kw_only=True)
class Finished:
    """A child that is over, in less than a kilobyte (benchmarks/growth.py).

    The handle that is made from it knows what the other one knew, except that of its run only what
    identifies it is left. It gets a result that was persisted from where that is.

    Args:
        common: What it shares with others.
        run_name: The name that Prefect or the user gave to its run.
        numbers: The ids of its run, of its tracking task run and of its last state; the times of
            that state, of its end, of the request for its cancellation and of the answer. Packed,
            they take a third of what they would take as objects.
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
    cancel_reason: CancelReason | None

    @classmethod
    def of(cls, child: Child[Any]) -> Finished | None:
        """Return what has to be kept of a child; `None` if that is all of it.

        It is all of it if the child may not be over for good, or was let go.
        """
        if child.outcome not in _OVER or child.ended_at is None or child.detach_requested:
            return None
        run, state, outcome = child.flow_run, child.last_state, child.outcome
        data = None if child.is_local or state is None else state.data
        if not isinstance(data, (compat.ResultMetadata, type(None))):
            return None
        stored = None if data is None else data.model_dump_json(exclude={_KEY})
        return cls(
            common=_shared(
                kind=child.kind,
                target=child.target,
                actions=tuple(child.on_parent[cause] for cause in CAUSES),
                timeout_seconds=child.timeout_seconds,
                flow_id=None if run is None else run.flow_id,
                deployment_id=None if run is None else run.deployment_id,
                is_linked=run is not None and run.parent_task_run_id is not None,
                outcome=outcome,
                state_type=None if state is None else state.type,
                state_name=None if state is None else state.name,
                stored=stored,
                escalations=child.escalations,
            ),
            name=child.name,
            key=child.key,
            generation=child.generation,
            restarts=child.restarts,
            run_name="" if run is None else run.name,
            numbers=_NUMBERS.pack(
                _NO_ID if run is None else run.id.bytes,
                child.task_run_id.bytes,
                _NO_ID if state is None else state.id.bytes,
                math.nan if state is None else state.timestamp.timestamp(),
                child.ended_at.timestamp(),
                _seconds(child.requested_at),
                _seconds(child.acknowledged_at),
            ),
            message=None if state is None or state.message is None else _same(state.message),
            storage_key=None if data is None else data.storage_key,
            value=child.local_value,
            exception=child.exception,
            cancel_reason=child.cancel_reason,
        )

    @property
    def flow_run_id(self) -> UUID | None:
        """The id of the child's flow run; `None` if it never had one."""
        return None if self.common.flow_id is None else UUID(bytes=self.numbers[:16])

    @property
    def kind(self) -> Kind:
        """Where it ran."""
        return self.common.kind

    @property
    def target(self) -> str:
        """What it was a run of."""
        return self.common.target

    @property
    def ended_at(self) -> datetime:
        """When it was over."""
        return datetime.fromtimestamp(_NUMBERS.unpack(self.numbers)[4], timezone.utc)

    @property
    def had_process(self) -> bool:
        """Whether its run had a process that was nobody else's."""
        return self.common.deployment_id is not None

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
        _, tracking_id, _, _, ended_at, requested_at, acknowledged_at = _NUMBERS.unpack(
            self.numbers
        )
        child.cancel_reason, child.escalations = self.cancel_reason, common.escalations
        child.requested_at, child.acknowledged_at = _moment(requested_at), _moment(acknowledged_at)
        state = self._state()
        child.be_over(
            common.outcome,
            self._run(state),
            state,
            value=self.value,
            exception=self.exception,
            ended_at=datetime.fromtimestamp(ended_at, timezone.utc),
            task_run_id=UUID(bytes=tracking_id),
        )
        return child

    def _state(self) -> State[Any] | None:
        if self.common.state_type is None:
            return None
        _, _, state_id, timestamp, *_ = _NUMBERS.unpack(self.numbers)
        return State(
            id=UUID(bytes=state_id),
            type=self.common.state_type,
            name=self.common.state_name,
            message=self.message,
            timestamp=datetime.fromtimestamp(timestamp, timezone.utc),
            data=self._stored(),
        )

    def _run(self, state: State[Any] | None) -> FlowRun | None:
        if self.common.flow_id is None:
            return None
        run_id, tracking_id, *_ = _NUMBERS.unpack(self.numbers)
        return FlowRun(
            id=UUID(bytes=run_id),
            name=self.run_name,
            flow_id=self.common.flow_id,
            deployment_id=self.common.deployment_id,
            parent_task_run_id=UUID(bytes=tracking_id) if self.common.is_linked else None,
            state=state,
        )

    def _stored(self) -> compat.ResultMetadata | None:
        """Return what Prefect finds the persisted result with."""
        if self.common.stored is None:
            return None
        fields = json.loads(self.common.stored)
        return compat.ResultMetadata.model_validate({**fields, _KEY: self.storage_key})


_OVER = ("completed", "failed", "crashed", "timed_out", "cancelled")
_KEY = "storage_key"
_NUMBERS = struct.Struct("16s16s16sdddd")
_NO_ID = bytes(16)


def _seconds(moment: datetime | None) -> float:
    return math.nan if moment is None else moment.timestamp()


def _moment(seconds: float) -> datetime | None:
    return None if math.isnan(seconds) else datetime.fromtimestamp(seconds, timezone.utc)


def _leave_alone(*_: object) -> None:
    """Do nothing: the child is over."""
