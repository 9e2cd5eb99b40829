"""Ending what a run left behind, with nothing but the run: no registry, no context, no body.

A runner calls the hooks of a run after its process is gone, in its own process or in a third one
that has imported the flow again. So everything is found on the server.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import anyio

from supervised import _identity
from supervised._api import open_orchestrator
from supervised._budget import Priority, priority
from supervised._log import get_logger, run_logger
from supervised._policy import Budget, parent_reason
from supervised._teardown import Teardown
from supervised._watch import Watcher

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State
    from prefect.flows import Flow

    from supervised._api import Orchestrator
    from supervised._types import CancelReason, Cause, TeardownReport

logger = get_logger("prefect.supervised.reap")

_START_SECONDS = 5.0  # beyond the grace: opening a client, and the first search


async def reap_below(
    api: Orchestrator,
    lineage: _identity.Lineage,
    *,
    flow_name: str,
    cause: Cause,
    reason: CancelReason,
    grace_seconds: float,
    is_gone: bool = True,
    spares: bool = True,
    tops: Mapping[UUID, CancelReason | None] | None = None,
    watcher: Watcher | None = None,
) -> TeardownReport | None:
    """End every live run below a run that is over, or lost.

    Args:
        api: The seam to Prefect.
        lineage: The run, and where it stands in its tree.
        flow_name: Its flow, for people.
        cause: How it ended; the policies of its children say what that means to them.
        reason: The same in words.
        grace_seconds: Seconds for all of it.
        is_gone: Whether the run's process is known to have ended.
        spares: Whether the policies of the runs count.
        tops: Children of the run, below which to search instead, and why what is below each is to
            end.
        watcher: Hears of the ends; without one, they are read.

    Returns:
        What became of them; `None` if nothing was alive.
    """
    teardown = Teardown(
        api,
        watcher or Watcher(api),
        flow_name=flow_name,
        lineage=lineage,
        cause=cause,
        reason=reason,
        children=lambda: (),
        in_body=set,
        budget=Budget(grace_seconds),
        top_is_gone=is_gone,
        can_wait=False,
        spares=spares,
        tops=tops,
    )
    with priority(Priority.TEARDOWN):
        return await teardown.run_if_needed()


def end_what_is_left(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """End what a run launched, when its runner finds that it is gone.

    The hook that `@supervised_flow` shows to runners. It finds nothing if the run's own teardown
    has done its work. It never raises, and is bounded by the flow's grace.
    """
    log = run_logger(flow_run, flow)
    try:
        report = asyncio.run(_end_below_on_server(flow, flow_run, state))
    except Exception:
        log.exception("Could not look for what this run has left behind")
        return
    if report is not None and report.receipts:
        log.log(logging.INFO if report.ok else logging.ERROR, "%s", report)


async def _end_below_on_server(
    flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]
) -> TeardownReport | None:
    async with open_orchestrator() as api:
        return await end_below(api, flow, flow_run, state)


async def end_below(
    api: Orchestrator, flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]
) -> TeardownReport | None:
    """End what a run of a supervised flow launched, as its runner's hooks do.

    Raises:
        TimeoutError: If the server does not answer within the flow's grace and a little more.
    """
    grace = flow.scope_options.grace_seconds  # type: ignore[attr-defined]
    cause: Cause = "crashed" if state.is_crashed() else "cancelled"
    with anyio.fail_after(grace + _START_SECONDS):
        return await reap_below(
            api,
            _identity.lineage_of(flow_run.id, flow_run.labels),
            flow_name=flow.name,
            cause=cause,
            reason=parent_reason(cause, flow.name),
            grace_seconds=grace,
        )
