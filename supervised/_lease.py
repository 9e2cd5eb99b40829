"""Leases: how those who cannot see a process tell that it is alive.

The control plane of a process renews a label of its run for as long as it has children elsewhere:
one request for the whole process. Not the body does, so a body that is paused, slow or computing
keeps the lease. A reader measures with its own clock for how long the label has stood still, and
counts only what it has seen: no two clocks are ever compared, and an outage of the server expires
nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import anyio
import attrs

from supervised import _clock, _identity
from supervised._budget import Priority, priority
from supervised._log import get_logger
from supervised._policy import may_have_process

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from supervised._api import Orchestrator

logger = get_logger("prefect.supervised.lease")

_RENEWALS = 4  # in one term: three may be lost before anybody thinks the process dead


class LeaseHolder:
    """Renews the lease of one run; lives in the control plane.

    Args:
        api: The seam to Prefect.
        run: The run, as it was when this attempt began.
        seconds: How long the lease lasts without a renewal.
    """

    def __init__(self, api: Orchestrator, run: FlowRun, seconds: float) -> None:
        self._api = api
        self._run = run
        self._seconds = seconds
        self._count = 0
        self._began = -math.inf  # the last renewal
        self._dropped = anyio.Event()

    async def hold(self) -> None:
        """Renew until the lease is dropped; a request under way is then given up.

        The control plane closes when its tasks are over, and the run ends after that: a server that
        answers late would hold it up.
        """
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._renew_for_ever)
            await self._dropped.wait()
            tasks.cancel_scope.cancel()

    async def _renew_for_ever(self) -> None:
        while True:
            # Of a small budget no more than half, or nothing would ever be launched.
            spared = min(2 * self._api.budget.seconds_of_one, self._seconds / 2)
            due = self._began + max(renewal_seconds(self._seconds), spared)
            await anyio.sleep(max(0.0, due - _clock.monotonic()))  # it may have taken its time
            await self.renew()

    async def renew(self) -> None:
        """Give a sign of life; one that is lost is made good by the next."""
        self._count += 1
        self._began = _clock.monotonic()
        value = _identity.lease(self._run.run_count, self._count)
        try:
            with anyio.move_on_after(renewal_seconds(self._seconds)), priority(Priority.LIFE):
                await self._api.label(self._run.id, {_identity.LEASE: value})
        except Exception:
            logger.debug("Could not renew the lease of %s", self._run.id, exc_info=True)

    def drop(self) -> None:
        """Renew no more: nothing is left that depends on it, or a later attempt has taken over."""
        self._dropped.set()


@attrs.define
class _Sighting:
    value: object
    at: float
    still: float


class LeaseReader:
    """Tells for how long leases have stood still, as far as it has seen that itself.

    A time in which it read nothing counts for one renewal at most. If it could not reach the
    server, the holder probably could not either.

    Args:
        clock: Seconds from any fixed point.
    """

    def __init__(self, clock: Callable[[], float] = _clock.monotonic) -> None:
        self._clock = clock
        self._seen: dict[UUID, _Sighting] = {}

    def standstill(self, run: FlowRun, term: float, *, before: float = 0.0) -> float:
        """Return the seconds for which a run's lease has not changed.

        Args:
            run: The run, as just read.
            term: Seconds that its lease lasts; to be read every `renewal_seconds` of it.
            before: Seconds to count for the time before this reader has first seen it.
        """
        value, now = (run.run_count, run.labels.get(_identity.LEASE)), self._clock()
        last = self._seen.get(run.id)
        if not may_have_process(run.state):
            still = 0.0  # nor does it count until it goes on
        elif last is None:
            still = before
        elif last.value != value:
            still = 0.0
        else:
            still = last.still + min(now - last.at, renewal_seconds(term))
        self._seen[run.id] = _Sighting(value, now, still)
        return still

    def forget_all_but(self, run_ids: Collection[UUID]) -> None:
        """Forget the leases of runs that nobody asks for any more."""
        for run_id in self._seen.keys() - set(run_ids):
            del self._seen[run_id]


def renewal_seconds(term: float) -> float:
    """Return the seconds between two renewals of a lease."""
    return term / _RENEWALS
