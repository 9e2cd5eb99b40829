"""Cancelling a run with everything below it because somebody outside says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import httpx
from prefect.utilities.urls import url_for

from supervised import _clock, _identity
from supervised._policy import is_over, outcome_of, receipt_status
from supervised._reap import reap_below
from supervised._types import Receipt, TeardownReport

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from supervised._api import Orchestrator
    from supervised._tree import Node
    from supervised._types import CancelReason

_ASKING_SECONDS = 5.0  # for a server that is locked, or restarts
_LOOK_SECONDS = 1.0


async def cancel_tree(
    api: Orchestrator,
    node: Node,
    *,
    reason: CancelReason,
    grace_seconds: float,
    with_top: bool = True,
) -> TeardownReport:
    """Cancel a run with everything below it, all levels at once, and verify that it ends.

    Args:
        api: The seam to Prefect.
        node: The run and its tree, as it was just now.
        reason: Why, for the states of the runs.
        grace_seconds: Seconds for all of it.
        with_top: Whether the run itself is to end.

    Returns:
        What became of each run that was alive: the run itself first, if it was.
    """
    began, started_at = _clock.monotonic(), _clock.utc_now()
    asks_top = with_top and node.is_live
    unheard = await _ask(api, node.run.id, f"Cancelled because {reason}") if asks_top else ""
    report = await reap_below(
        api,
        _identity.lineage_of(node.run.id, node.run.labels),
        flow_name=node.run.name,
        cause="cancelled",
        reason=reason,
        grace_seconds=max(0.0, grace_seconds - (_clock.monotonic() - began)),
        is_gone=not node.is_live,
        spares=False,
    )
    receipts = report.receipts if report is not None else ()
    if asks_top:
        left = grace_seconds - (_clock.monotonic() - began)
        last = await _wait_for_end(api, node.run, left)
        if last is not None:
            receipts = (_receipt(last, 0, reason, started_at, unheard=unheard), *receipts)
    return TeardownReport(
        flow_name=node.run.name,
        flow_run_id=node.run.id,
        cause="cancelled",
        reason=str(reason),
        started_at=started_at,
        seconds=_clock.monotonic() - began,
        receipts=(*receipts, *await _ended_meanwhile(api, node, receipts, reason, started_at)),
    )


async def _ask(api: Orchestrator, run_id: UUID, message: str) -> str:
    """Ask a run to end, until the server has heard it; return why it has not."""
    why = "the server has not answered"
    with anyio.move_on_after(_ASKING_SECONDS):
        while True:
            try:
                (ack,) = await api.request_cancel([run_id], message)
            except httpx.TransportError as exc:
                why = f"the server does not answer: {exc!r}"
            else:
                if ack.accepted:
                    return ""
                why = f"the server has refused the request: {ack.detail}"
            await anyio.sleep(_LOOK_SECONDS)
    return why


async def _wait_for_end(api: Orchestrator, run: FlowRun, seconds: float) -> FlowRun | None:
    """Return the run as last read, over if it could be waited for; `None` if it is deleted."""
    until = _clock.monotonic() + seconds
    while True:
        (last,) = await api.read_runs([run.id]) or (None,)
        if last is None or is_over(last) or _clock.monotonic() >= until:
            return last
        await anyio.sleep(_LOOK_SECONDS)


async def _ended_meanwhile(
    api: Orchestrator,
    node: Node,
    receipts: Sequence[Receipt],
    reason: CancelReason,
    started_at: datetime,
) -> list[Receipt]:
    """Return what became of those that were alive, and over before they were looked for."""
    named = {receipt.flow_run_id for receipt in receipts}
    depths = {each.run.id: depth for depth, each in node.walk() if depth and each.is_live}
    missing = [run_id for run_id in depths if run_id not in named]
    found = await api.read_runs(missing) if missing else []
    return [_receipt(run, depths[run.id], reason, started_at) for run in found]


def _receipt(
    run: FlowRun,
    depth: int,
    reason: CancelReason,
    started_at: datetime,
    *,
    unheard: str = "",
) -> Receipt:
    """Return what became of a run, as last read."""
    outcome = outcome_of(run.state, asked=True) if run.state is not None else None
    stated = run.state.name if run.state is not None else "of no known state"
    waited = (_clock.utc_now() - started_at).total_seconds()
    dead = f"{waited:.0f} s after the request; its runner or process may be dead"
    return Receipt(
        name=run.name,
        flow_run_id=run.id,
        url=url_for("flow-run", obj_id=run.id),
        status=receipt_status(outcome or "abandoned", forced=False),
        reason=str(reason) if outcome else f"still {stated}: {unheard or dead}",
        requested_at=None if unheard else started_at,
        terminal_at=run.end_time if outcome else None,
        depth=depth,
    )
