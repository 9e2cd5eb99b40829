"""How a run of ours is recognised with no memory of it: tag, labels, keys. Pure functions.

A tag can be filtered on and subscribed to but is copied with a run; labels cannot be filtered
on. So the tag finds, and labels together with the idempotency key prove.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs

from supervised._canonical import digest
from supervised._types import ACTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect.client.schemas.objects import FlowRun

    from supervised._types import Action, Cause

_MARK = re.compile(r"\[supervised by ([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\]")

COMMON_TAG = "supervised"
"""The tag of every run that a supervisor launched, whatever its tree."""

TAG_PREFIX = "supervised:"
ROOT = "supervised.root"
PARENT = "supervised.parent"
PATH = "supervised.path"
KEY = "supervised.key"
GENERATION = "supervised.generation"
WORK = "supervised.work"
SPAWN = "supervised.spawn"
ON_PARENT = "supervised.on_parent"
DETACHED = "supervised.detached"
ADOPTED = "supervised.adopted"
HOST = "supervised.host"
FOLLOWS_ROOT = "supervised.follows_root"
LEASE_SECONDS = "supervised.lease_seconds"
LEASE = "supervised.lease"
DEADLINE_SECONDS = "supervised.deadline_seconds"

Labels = dict[str, Any]
_UNHASHABLE = "unhashable"


@attrs.frozen
class Lineage:
    """Where a run stands in its tree.

    Args:
        run_id: The run itself.
        path: Its supervised ancestors, from the root down, the run itself last.
        host: The outermost supervised run of its process, which holds the lease.
        follows_root: Whether the root's end, if it is a bad one, is the end of this run too.
    """

    run_id: UUID
    path: tuple[UUID, ...]
    host: UUID = attrs.field(default=attrs.Factory(lambda self: self.run_id, takes_self=True))
    follows_root: bool = True

    @property
    def root(self) -> UUID:
        """The run at the top of the tree."""
        return self.path[0]

    @property
    def tag(self) -> str:
        """The tag that every run below the root carries."""
        return TAG_PREFIX + str(self.root)

    def nested(self, run_id: UUID) -> Lineage:
        """Return the lineage of a run directly below this one, in the same process."""
        return Lineage(run_id, (*self.path, run_id), self.host, self.follows_root)


def lineage_of(run_id: UUID, labels: Mapping[str, Any]) -> Lineage:
    """Return the lineage that a run's labels state; a run without them is a root."""
    above = () if labels.get(DETACHED) else path_of(labels)
    follows_root = bool(labels.get(FOLLOWS_ROOT)) if above else True
    return Lineage(run_id, (*above, run_id), follows_root=follows_root)


def child_labels(
    parent: Lineage,
    *,
    key: str,
    generation: int,
    on_parent: Mapping[Cause, Action],
    lease_seconds: float = 30.0,
) -> Labels:
    """Return the labels of a child; they say all that a stranger needs to supervise it."""
    bad_ends = {action for cause, action in on_parent.items() if cause != "completed"}
    labels: Labels = {
        HOST: str(parent.host),
        FOLLOWS_ROOT: parent.follows_root and bad_ends == {"cancel"},
        LEASE_SECONDS: lease_seconds,
        ROOT: str(parent.root),
        PARENT: str(parent.run_id),
        PATH: "/".join(str(run_id) for run_id in parent.path),
        KEY: key,
        GENERATION: generation,
        ON_PARENT: ",".join(f"{cause}={action}" for cause, action in on_parent.items()),
    }
    if set(on_parent.values()) == {"detach"}:
        labels[DETACHED] = True
    return labels


def runs_above(labels: Mapping[str, Any]) -> set[UUID]:
    """Return the runs whose end is the end of a child: parent, its process, and often the root."""
    names = (PARENT, HOST, ROOT) if labels.get(FOLLOWS_ROOT) else (PARENT, HOST)
    found: set[UUID] = set()
    for name in names:
        with suppress(ValueError):
            found.add(UUID(str(labels.get(name))))
    return found


def host_of(labels: Mapping[str, Any]) -> UUID | None:
    """Return the outermost run of the process that launched a child."""
    try:
        return UUID(str(labels.get(HOST)))
    except ValueError:
        return None


def parent_lineage(labels: Mapping[str, Any]) -> Lineage:
    """Return where the parent of a child of ours stands, though nothing else is known of it."""
    path = tuple(UUID(part) for part in str(labels[PATH]).split("/"))
    return Lineage(path[-1], path)


def lease_seconds_of(labels: Mapping[str, Any]) -> float:
    """Return how long the lease of a child's parent lasts; for ever if its labels do not say."""
    value = labels.get(LEASE_SECONDS)
    return float(value) if isinstance(value, (int, float)) else math.inf


def deadline_seconds_of(labels: Mapping[str, Any]) -> float | None:
    """Return how long a child had when it was created, if its parent's time was limited."""
    value = labels.get(DEADLINE_SECONDS)
    return float(value) if isinstance(value, (int, float)) else None


def lease(attempt: int, renewal: int) -> str:
    """Return the value of a lease: attempts of one run fence each other off by it."""
    return f"{attempt}:{renewal}"


def idempotency_key(parent: UUID, key: str, generation: int) -> str:
    """Return the key under which the server creates one run, however often it is asked."""
    return f"{TAG_PREFIX}{parent}:{key}:{generation}"


def default_key(target: str, parameters: Mapping[str, Any], *, code: str = "") -> str:
    """Return a key that is the same for the same work, whatever the order of spawning.

    Args:
        target: The target's name.
        parameters: What it is called with.
        code: What tells it from another target of that name.
    """
    found = digest(target, code, dict(parameters))
    return f"{target}:{found[:12] if found else _UNHASHABLE}"


def is_comparable(work: str) -> bool:
    """Whether two equal default keys mean the same work."""
    return not work.endswith(f":{_UNHASHABLE}")


def occurrence_key(base: str, occurrence: int) -> str:
    """Return the key of the n-th child among equals, counted from 1."""
    return base if occurrence == 1 else f"{base}#{occurrence}"


def path_of(labels: Mapping[str, Any]) -> tuple[UUID, ...]:
    """Return the supervised runs above a run, from the root down; none if it is not ours."""
    try:
        return tuple(UUID(part) for part in str(labels[PATH]).split("/"))
    except (KeyError, ValueError):
        return ()


def spawn_of(labels: Mapping[str, Any]) -> tuple[UUID, str, int] | None:
    """Return which spawn made a run: the parent, the key and the generation."""
    try:
        return UUID(str(labels[PARENT])), str(labels[KEY]), int(labels.get(GENERATION, 0))
    except (KeyError, ValueError):
        return None


def is_below(labels: Mapping[str, Any], ancestor: UUID) -> bool:
    """Whether a run's labels place it below *ancestor*, detached runs excepted."""
    return not labels.get(DETACHED) and ancestor in path_of(labels)


def is_ours(run: FlowRun) -> bool:
    """Whether a run's labels and idempotency key prove that a supervisor created or adopted it.

    A copied run carries its original's tags, and may carry its labels, but an idempotency
    key is unique per flow on the server: no copy has it. Nor is a copy the run that a label
    names as adopted.
    """
    made = spawn_of(run.labels)
    if made is None or path_of(run.labels)[-1:] != made[:1]:
        return False
    if run.labels.get(ADOPTED) == str(run.id):
        return True
    return str(run.idempotency_key or "").startswith(f"{TAG_PREFIX}{made[0]}:")


def keeper_of(run: FlowRun) -> UUID | None:
    """Return the run whose supervisor looks after a run, if one does."""
    made = spawn_of(run.labels)
    if made is None or run.labels.get(DETACHED) or not is_ours(run):
        return None
    return made[0]


def mark_message(text: str, by: UUID) -> str:
    """Return a state message that says which supervised run asked for the cancellation."""
    return f"{text} [supervised by {by}]"


def marked_by(message: str | None) -> UUID | None:
    """Return the supervised run that a state message names, if any."""
    # The last, because a reason may quote the message that it is a consequence of.
    found = _MARK.findall(message or "")
    return UUID(found[-1]) if found else None


def action_of(labels: Mapping[str, Any], cause: Cause) -> Action:
    """Return what a parent's end means to a run; a run that is not ours goes with it."""
    stated = on_parent_of(labels).get(cause)
    return stated if stated in ACTIONS else "cancel"


def on_parent_of(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's policy as its labels state it; empty for runs that are not ours."""
    value = labels.get(ON_PARENT)
    if not isinstance(value, str):
        return {}
    return dict(part.split("=", 1) for part in value.split(",") if "=" in part)
