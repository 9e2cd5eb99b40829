"""The fake Prefect server: its runs, the rules by which they change state, and its events.

The rules are those of `prefect/server/orchestration/core_policy.py` that matter to supervision. One
suite of tests holds this server and a real one to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound

from supervised._api import LIVE_STATES, Deployment, RunEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from datetime import datetime

    from supervised._stall import Limit
    from supervised.testing._virtual import VirtualLoop

_NEVER_FROM_TERMINAL = {StateType.CANCELLING, StateType.PAUSED, StateType.CRASHED}
_CASCADE_SECONDS = 20.0
_CANCELLING_SECONDS = 300.0  # PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_..., by default


@attrs.frozen
class Answer:
    """What the server makes of a proposed state."""

    accepted: bool
    state: State[Any]
    reason: str = ""


@attrs.frozen
class Change:
    """A change of state, and what the events of it can be subscribed by."""

    event: RunEvent
    resources: frozenset[str]


class Server:
    """Runs, deployments and the orchestration of states.

    Args:
        loop: Whose clock it goes by.
        seed: What the ids are made of.
    """

    def __init__(self, loop: VirtualLoop, seed: int = 0) -> None:
        self._loop = loop
        self._seed = seed
        self._ids = 0
        self.runs: dict[UUID, FlowRun] = {}
        self.deployments: dict[UUID, Deployment] = {}
        self.limits: dict[UUID | None, list[Limit]] = {}  # of deployments
        self.flow_ids: dict[str, UUID] = {}
        self.on_change: list[Callable[[Change], None]] = []
        self.on_nudge: list[Callable[[UUID], None]] = []
        self.up_from = 0.0
        self._of_key: dict[tuple[UUID, str], UUID] = {}
        self._tracking: dict[UUID, UUID] = {}  # the tracking task runs, and whose they are
        self._of_tracking_key: dict[tuple[UUID, str], UUID] = {}

    def new_id(self) -> UUID:
        """Return an id that the same seed makes again."""
        self._ids += 1
        return UUID(int=(self._seed % (1 << 32)) << 96 | self._ids, version=4)

    def time(self) -> datetime:
        """Return the time by the server's clock."""
        return self._loop.utc_now()

    @property
    def is_up(self) -> bool:
        """Whether the server answers."""
        return self._loop.time() >= self.up_from

    # -- what is created ----------------------------------------------------------------------

    def flow_id(self, name: str) -> UUID:
        """Return the id of a flow, which is known by its name."""
        return self.flow_ids.setdefault(name, self.new_id())

    def deploy(self, name: str) -> Deployment:
        """Add a deployment, *flow/deployment*, that takes any parameters."""
        made = Deployment(id=self.new_id(), name=name, version=None)
        self.deployments[made.id] = made
        return made

    def find_deployment(self, target: str | UUID) -> Deployment | None:
        """Return a deployment by id or name."""
        for deployment in self.deployments.values():
            if target in {deployment.id, deployment.name}:
                return deployment
        return None

    def track(self, tracking_id: UUID, flow_run_id: UUID, dynamic_key: str) -> UUID:
        """Create the task run that links a child to its parent, once for each key."""
        known = self._of_tracking_key.setdefault((flow_run_id, dynamic_key), tracking_id)
        self._tracking[known] = flow_run_id
        return known

    def untrack(self, tracking_id: UUID) -> None:
        """Delete a task run; what it linked has no parent any more."""
        self._tracking.pop(tracking_id, None)

    def create(
        self,
        flow_name: str,
        *,
        state: State[Any],
        deployment_id: UUID | None = None,
        name: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        labels: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        parent_task_run_id: UUID | None = None,
    ) -> FlowRun:
        """Create a run, or return the one that the same key made before."""
        flow_id = self.flow_id(flow_name)
        known = self._of_key.get((flow_id, idempotency_key)) if idempotency_key else None
        if known is not None and known in self.runs:
            return self.read(known)
        due: Any = state.state_details.scheduled_time or self._loop.utc_now()
        run = FlowRun(
            id=self.new_id(),
            flow_id=flow_id,
            name=name or f"{flow_name}-{self._ids}",
            deployment_id=deployment_id,
            parameters=dict(parameters or {}),
            tags=list(dict.fromkeys(tags)),
            labels=dict(labels or {}),
            idempotency_key=idempotency_key,
            parent_task_run_id=parent_task_run_id,
            run_count=0,
            expected_start_time=due,
        )
        self.runs[run.id] = run
        if idempotency_key:
            self._of_key[flow_id, idempotency_key] = run.id
        self._set(run, state)
        return self.read(run.id)

    # -- what is read ---------------------------------------------------------------------------

    def read(self, run_id: UUID) -> FlowRun:
        """Return a run as it is now.

        Raises:
            ObjectNotFound: If there is none.
        """
        if run_id not in self.runs:
            raise ObjectNotFound(LookupError(run_id))
        return self.runs[run_id].model_copy()

    def tagged(self, tag: str, *, live_only: bool) -> list[FlowRun]:
        """Return all runs with a tag."""
        return [
            run.model_copy()
            for run in self.runs.values()
            if tag in run.tags and (not live_only or is_live(run))
        ]

    def due(self, deployments: Collection[UUID]) -> list[FlowRun]:
        """Return the runs of these deployments whose time to start has come."""
        return [
            run.model_copy()
            for run in self.runs.values()
            if run.deployment_id in deployments and self._is_due(run)
        ]

    def _is_due(self, run: FlowRun) -> bool:
        if run.state is None or not run.state.is_scheduled():
            return False
        moment = run.state.state_details.scheduled_time
        return moment is None or moment <= self._loop.utc_now()

    def children(self, parents: Iterable[UUID]) -> list[FlowRun]:
        """Return the runs whose tracking task runs belong to these."""
        above = set(parents)
        return [run.model_copy() for run in self.runs.values() if self.parent_of(run) in above]

    def parent_of(self, run: FlowRun) -> UUID | None:
        """Return the run that launched a run, by Prefect's own link."""
        return self._tracking.get(run.parent_task_run_id) if run.parent_task_run_id else None

    # -- what changes -----------------------------------------------------------------------------

    def label(self, run_id: UUID, labels: Mapping[str, Any]) -> None:
        """Add labels to a run.

        Raises:
            ObjectNotFound: If there is none.
        """
        self.read(run_id)
        self._put(self.runs[run_id], labels={**self.runs[run_id].labels, **labels})

    def tag(self, run_id: UUID, tags: Sequence[str]) -> None:
        """Replace the tags of a run.

        Raises:
            ObjectNotFound: If there is none.
        """
        self.read(run_id)
        self._put(self.runs[run_id], tags=list(tags))

    def delete(self, run_id: UUID) -> None:
        """Delete a run."""
        self.runs.pop(run_id, None)

    def propose(self, run_id: UUID, state: State[Any]) -> Answer:
        """Change a run's state if the rules allow it.

        Raises:
            ObjectNotFound: If there is no such run.
        """
        run = self.runs.get(run_id)
        if run is None:
            raise ObjectNotFound(LookupError(run_id))
        assert run.state is not None
        refused = _refusal(run.state, state)
        if refused:
            return Answer(False, run.state, refused)
        if state.is_cancelling() and run.state.is_scheduled():
            # No infrastructure to terminate.
            state = State(type=StateType.CANCELLED, name="Cancelled", message=state.message)
        self._set(run, state)
        if state.is_cancelled():
            self._cascade(run_id)
        if state.is_cancelling():
            self._loop.call_unowned(_CANCELLING_SECONDS, self._end_cancelling, self.runs[run_id])
        return Answer(True, self.runs[run_id].state or state)

    def _set(self, run: FlowRun, state: State[Any]) -> None:
        moment = self._loop.utc_now()
        state = state.model_copy(update={"timestamp": moment})
        changes: dict[str, Any] = {"state": state}
        if state.is_running():
            changes["run_count"] = run.run_count + 1
            changes["start_time"] = run.start_time or moment
        changes["end_time"] = moment if state.is_final() else None
        self._put(run, **changes)
        self._tell(self.runs[run.id], state)

    def _put(self, run: FlowRun, **changes: Any) -> None:
        changes["updated"] = self._loop.utc_now()
        self.runs[run.id] = run.model_copy(update=changes)

    def _tell(self, run: FlowRun, state: State[Any]) -> None:
        event = RunEvent(run.id, state.type, state.name, self._loop.utc_now())
        resources = {f"prefect.flow-run.{run.id}", *(f"prefect.tag.{tag}" for tag in run.tags)}
        change = Change(event, frozenset(resources))
        for listen in list(self.on_change):
            listen(change)

    def nudge(self, run_id: UUID) -> None:
        """Tell the runners once more that a run is being cancelled."""
        for listen in list(self.on_nudge):
            listen(run_id)

    def _end_cancelling(self, then: FlowRun) -> None:
        """Close a run that nobody has ended (server/services/cancellation_cleanup.py)."""
        run = self.runs.get(then.id)
        if run is not None and run.state == then.state:
            self._set(run, State(type=StateType.CANCELLED, name="Cancelled"))
            self._cascade(run.id)

    def _cascade(self, run_id: UUID) -> None:
        """Cancel what a cancelled run has launched as plain Prefect does: one every 20 s."""
        self._loop.call_unowned(_CASCADE_SECONDS, self._cascade_once, run_id)

    def _cascade_once(self, run_id: UUID) -> None:
        for child in self.children([run_id]):
            if is_live(child) and child.state is not None and not child.state.is_cancelling():
                message = "Parent flow run was cancelled."
                self.propose(child.id, State(type=StateType.CANCELLING, message=message))
                self._cascade(run_id)
                return


def is_live(run: FlowRun) -> bool:
    """Whether a run has not ended."""
    return run.state is not None and run.state.type in LIVE_STATES


def _refusal(before: State[Any], proposed: State[Any]) -> str:
    """Return why the server refuses a change of state; nothing if it does not."""
    if before.is_final() and proposed.type in _NEVER_FROM_TERMINAL:
        return f"Run is already in terminal state {before.type.value}."
    if before.is_cancelling() and proposed.type != StateType.CANCELLED:
        return "Run is being cancelled."
    if proposed.is_pending() and (before.is_running() or before.is_cancelled()):
        return "Run has begun already."
    if before.is_pending() and proposed.is_pending() and proposed.name == "Pending":
        return "Run is pending already."
    return ""
