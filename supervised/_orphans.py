"""Orphans: live runs whose parent is over, or silent, and whose policy says that they go with it.

Level-triggered: everything is read from the server each time, so nothing depends on an event having
been heard, and several finders at once do no harm. Nothing is judged by its tag alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from uuid import UUID

import anyio
import attrs

from supervised import _identity
from supervised._lease import LeaseReader, renewal_seconds
from supervised._log import get_logger
from supervised._policy import cause_of, is_over, is_silent
from supervised._reap import reap_below
from supervised._types import CancelReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import datetime

    from prefect.client.schemas.objects import FlowRun

    from supervised._api import Orchestrator
    from supervised._types import Cause, TeardownReport


logger = get_logger("prefect.supervised.orphans")

LEAST_SECONDS = 1.0
"""Between two looks, however short a lease or an interval somebody has chosen."""


@attrs.frozen(kw_only=True)
class Orphan:
    """A live run that its parent's end should have ended.

    Args:
        run: The run.
        parent_id: The run that launched it.
        parent: The same as the server knows it; `None` if it was deleted.
        cause: How the parent ended.
        why: The same in words.
        host_is_gone: Whether the parent's process is known to have ended.
    """

    run: FlowRun
    parent_id: UUID
    parent: FlowRun | None
    cause: Cause
    why: str
    host_is_gone: bool


def judge(
    run: FlowRun, known: Mapping[UUID, FlowRun], silence: Callable[[FlowRun], float]
) -> Orphan | None:
    """Return what makes a run an orphan, or `None` if it is none or not ours.

    Args:
        run: A live run.
        known: The runs above it, by id, as far as the server has them.
        silence: Seconds for which a run has given no sign of life.
    """
    labels = run.labels
    if labels.get(_identity.DETACHED) or not _identity.is_ours(run):
        return None
    parent_id = UUID(str(labels[_identity.PARENT]))
    parent = known.get(parent_id)
    cause, why = _end_of(run, parent, known, silence)
    if cause is None or _identity.on_parent_of(labels).get(cause) != "cancel":
        return None
    # A run that somebody has deleted may still have its process.
    is_gone = parent is not None and is_over(parent)
    return Orphan(
        run=run, parent_id=parent_id, parent=parent, cause=cause, why=why, host_is_gone=is_gone
    )


def _end_of(
    run: FlowRun,
    parent: FlowRun | None,
    known: Mapping[UUID, FlowRun],
    silence: Callable[[FlowRun], float],
) -> tuple[Cause | None, str]:
    if parent is None:
        return "crashed", "its parent run no longer exists"
    if parent.state is not None and is_over(parent):
        return cause_of(parent.state), f"its parent {parent.name!r} ended as {parent.state.name}"
    host_id = _identity.host_of(run.labels)
    host = known.get(host_id, parent) if host_id is not None else parent
    if host.state is not None and is_over(host):
        return (
            "crashed",
            f"the process of its parent, run {host.name!r}, ended as {host.state.name}",
        )
    seconds = _identity.lease_seconds_of(run.labels)
    held = _identity.LEASE in host.labels
    if held and is_silent(host.state, silence(host), seconds):
        is_cancelling = parent.state is not None and parent.state.is_cancelling()
        cause: Cause = "cancelled" if is_cancelling else "crashed"
        return cause, f"its parent's process has not been heard of for {seconds:g} s"
    return None, ""


@attrs.frozen
class Findings:
    """What one look at the server has found.

    Args:
        orphans: The orphans.
        look_again_after: Seconds after which to look again, for leases to be seen as they are.
        certain_after: Seconds after which it is certain whether the processes live that have been
            silent for some time; zero if there are none.
    """

    orphans: list[Orphan]
    look_again_after: float = math.inf
    certain_after: float = 0.0


async def find_orphans(api: Orchestrator, leases: LeaseReader) -> Findings:
    """Return all orphans that the server knows, in a few paged reads.

    A reader that has just begun takes the server's word for half of a lease's term, by the server's
    own clock. The other half it has to see for itself: after an outage every lease looks old.

    Args:
        api: The seam to Prefect.
        leases: What remembers for how long leases have stood still.
    """
    live = await api.read_tagged(_identity.COMMON_TAG, live_only=True)
    ours = [run for run in live if _identity.is_ours(run)]
    above = {run_id for run in ours for run_id in _identity.runs_above(run.labels)}
    known = {run.id: run for run in await api.read_runs(above)} if above else {}
    terms = {
        host: _identity.lease_seconds_of(run.labels)
        for run in ours
        if (host := _identity.host_of(run.labels)) is not None
        and host in known
        and _identity.LEASE in known[host].labels
    }
    leases.forget_all_but(terms)
    time = await api.server_time() if terms else None
    silence: dict[UUID, float] = {}
    for host, term in terms.items():
        before = min(_age(known[host], time), term / 2)
        silence[host] = leases.standstill(known[host], term, before=before)
    judged = (judge(run, known, lambda host: silence.get(host.id, 0.0)) for run in ours)
    orphans = [orphan for orphan in judged if orphan is not None]
    pending = [
        term - silence[host]
        for host, term in terms.items()
        if term / 2 <= silence[host] <= term and is_silent(known[host].state, math.inf, term)
    ]
    soon = max(LEAST_SECONDS, min(map(renewal_seconds, terms.values()), default=math.inf))
    return Findings(orphans, soon, max(pending, default=0.0))


async def find_for_certain(api: Orchestrator, leases: LeaseReader) -> list[Orphan]:
    """Look until it is certain which of the silent processes live, and return all orphans.

    See `find_orphans`.
    """
    found = await find_orphans(api, leases)
    while found.certain_after:
        logger.info("Waiting %.0f s for a sign of life", found.certain_after)
        await anyio.sleep(min(found.certain_after + 1, found.look_again_after))
        found = await find_orphans(api, leases)
    return found.orphans


def _age(run: FlowRun, time: datetime | None) -> float:
    """Return the seconds since the server has last touched a run, by the server's clock."""
    if time is None or run.updated is None:
        return 0.0
    return max(0.0, (time - run.updated).total_seconds())


async def reap_orphans(
    api: Orchestrator, orphans: Iterable[Orphan], *, grace_seconds: float
) -> list[TeardownReport]:
    """End orphans with all that they launched, one teardown for each lost parent, side by side.

    Returns:
        What became of them.
    """
    by_parent = {orphan.parent_id: orphan for orphan in orphans}
    reports: list[TeardownReport] = []

    async def reap(orphan: Orphan) -> None:
        name = orphan.parent.name if orphan.parent is not None else str(orphan.parent_id)
        try:
            report = await reap_below(
                api,
                _identity.parent_lineage(orphan.run.labels),
                flow_name=name,
                cause=orphan.cause,
                reason=CancelReason(source="parent_lost", message=orphan.why),
                grace_seconds=grace_seconds,
                is_gone=orphan.host_is_gone,
            )
        except Exception:
            # It must not end the others' teardowns; the next look finds these orphans again.
            logger.exception("Could not end what %s has left behind", name)
            return
        if report is not None:
            reports.append(report)

    async with anyio.create_task_group() as tasks:
        for orphan in by_parent.values():
            tasks.start_soon(reap, orphan)
    return reports
