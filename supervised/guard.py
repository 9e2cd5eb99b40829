"""The guard: a service that ends what nobody else can.

It covers the children that carry no code of ours once their parent's runner and host are gone. It
is level-triggered: the end of any run makes it look at once, a timer makes it look for certain,
and it remembers nothing but for how long leases have stood still. Several guards do no harm.

Run it with `supervised guard`, as a service; with `supervised guard --once`, from cron; or serve
the flow of this module:

```python
from supervised.guard import guard

if __name__ == "__main__":
    guard.serve("every-minute", interval=60)
```
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio
import attrs
from prefect import flow
from prefect.client.schemas.objects import TERMINAL_STATES

from supervised import _clock, _telemetry
from supervised._api import open_orchestrator
from supervised._lease import LeaseReader
from supervised._log import get_logger
from supervised._orphans import (
    LEAST_SECONDS,
    Findings,
    find_for_certain,
    find_orphans,
    reap_orphans,
)

if TYPE_CHECKING:
    from uuid import UUID

    from supervised._api import Orchestrator
    from supervised._orphans import Orphan
    from supervised._types import TeardownReport

__all__ = ["Guard", "guard"]

logger = get_logger("prefect.supervised.guard")

_SETTLE_SECONDS = 5.0  # after an end, for the run's own teardown and its runner's hooks to act
_RECONNECT_SECONDS = 5.0
_FIRST_PATIENCE = 60.0
_MOST_PATIENCE = 900.0


@attrs.frozen
class _Patience:
    """How long to leave a run alone that could not be ended; its runner may come back.

    Args:
        seconds: Since the last attempt.
        until: By the monotonic clock.
    """

    seconds: float
    until: float

    @classmethod
    def after(cls, earlier: _Patience | None) -> _Patience:
        """Return twice the patience of the attempt before."""
        seconds = _FIRST_PATIENCE if earlier is None else min(2 * earlier.seconds, _MOST_PATIENCE)
        return cls(seconds, _clock.monotonic() + seconds)


@attrs.define
class Guard:
    """Finds orphans and ends them.

    Args:
        api: The seam to Prefect.
        interval_seconds: Seconds between two looks when nothing is heard.
        grace_seconds: Seconds that ending the orphans of one parent may take.
    """

    api: Orchestrator
    interval_seconds: float = 30.0
    grace_seconds: float = 20.0
    looked_at: float | None = attrs.field(default=None, init=False)
    """When the last look at the server succeeded, by the monotonic clock."""

    _leases: LeaseReader = attrs.field(factory=LeaseReader, init=False)
    _ending: set[UUID] = attrs.field(factory=set, init=False)  # parents whose orphans are
    _unverified: dict[UUID, _Patience] = attrs.field(factory=dict, init=False)
    _heard: anyio.Event = attrs.field(factory=anyio.Event, init=False)

    @property
    def unverified(self) -> int:
        """How many runs could not be ended so far, or not be verified to have."""
        return len(self._unverified)

    @property
    def is_healthy(self) -> bool:
        """Whether the server could be looked at lately."""
        patience = 3 * self.interval_seconds + self.grace_seconds
        return self.looked_at is not None and _clock.monotonic() - self.looked_at < patience

    async def run(self) -> None:
        """Guard until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen)
            while True:
                self._heard = anyio.Event()
                found = await self._find()
                seconds = self.interval_seconds
                if found is not None:
                    # Beside the next looks: one process that cannot be ended must not hold up the
                    # others, nor the reading of leases.
                    tasks.start_soon(self._reap_and_tell, self._due(found.orphans))
                    seconds = max(LEAST_SECONDS, min(seconds, found.look_again_after))
                with anyio.move_on_after(seconds):
                    await self._heard.wait()
                    await anyio.sleep(min(_SETTLE_SECONDS, seconds))

    async def look_for_certain(self) -> list[TeardownReport]:
        """Look until it is certain which of the silent processes live, as if never to look again.

        Returns:
            What became of the orphans, for the caller to tell of.
        """
        with _telemetry.unobserved():
            orphans = await find_for_certain(self.api, self._leases)
        return await self._reap(orphans)

    async def _find(self) -> Findings | None:
        """Return what there is to end; `None` if the server did not tell."""
        try:
            with _telemetry.unobserved():
                found = await find_orphans(self.api, self._leases)
        except Exception as exc:
            logger.warning("Could not look for orphans, trying again: %r", exc)
            logger.debug("Looking failed", exc_info=True)
            return None
        self.looked_at = _clock.monotonic()
        return found

    def _due(self, orphans: list[Orphan]) -> list[Orphan]:
        """Return the orphans to end now: not those being ended, or that were not to be ended."""
        live = {orphan.run.id for orphan in orphans}
        for run_id in self._unverified.keys() - live:
            del self._unverified[run_id]
        return [
            orphan
            for orphan in orphans
            if orphan.parent_id not in self._ending and not self._is_left(orphan.run.id)
        ]

    def _is_left(self, run_id: UUID) -> bool:
        patience = self._unverified.get(run_id)
        return patience is not None and _clock.monotonic() < patience.until

    async def _reap(self, orphans: list[Orphan]) -> list[TeardownReport]:
        for orphan in orphans:
            level = logging.DEBUG if orphan.run.id in self._unverified else logging.WARNING
            logger.log(level, "Ending run %r (%s): %s", orphan.run.name, orphan.run.id, orphan.why)
        parents = {orphan.parent_id for orphan in orphans}
        self._ending |= parents
        try:
            reports = await reap_orphans(self.api, orphans, grace_seconds=self.grace_seconds)
        except Exception:
            logger.exception("Could not end every orphan, trying again")
            return []
        finally:
            self._ending -= parents
        return reports

    async def _reap_and_tell(self, orphans: list[Orphan]) -> None:
        for report in await self._reap(orphans):
            self.tell(report)

    def tell(self, report: TeardownReport) -> None:
        """Log a report, in short if it repeats what nobody could do anything about before."""
        failed = {r.flow_run_id for r in report.unverified if r.flow_run_id is not None}
        is_known = bool(failed) and failed <= self._unverified.keys()
        for run_id in failed:
            earlier = self._unverified.get(run_id)
            self._unverified[run_id] = _Patience.after(earlier)
        if is_known:
            pause = min(self._unverified[run_id].seconds for run_id in failed)
            what = f"{len(failed)} run(s) below {report.flow_name!r} {report.flow_run_id}"
            logger.info("%s could still not be ended; trying again in %.0f s", what, pause)
            return
        logger.log(logging.INFO if report.ok else logging.ERROR, "%s", report)

    async def _listen(self) -> None:
        """Look soon after any run has ended; a lost stream costs speed, not certainty."""
        while True:
            try:
                async with self.api.subscribe_all() as events:
                    async for event in events:
                        if event.state_type in TERMINAL_STATES:
                            self._heard.set()
                logger.debug("The event stream ended; opening another")
            except Exception:
                logger.debug("The event stream failed; opening another", exc_info=True)
            await anyio.sleep(_RECONNECT_SECONDS)


@flow(name="supervised-guard")
async def guard(grace_seconds: float = 20.0) -> list[str]:
    """Look for orphans once and end them; serve it on an interval.

    Args:
        grace_seconds: Seconds that ending the orphans of one parent may take.

    Returns:
        One line for each run that was ended.
    """
    async with open_orchestrator() as api:
        service = Guard(api, grace_seconds=grace_seconds)
        reports = await service.look_for_certain()
        for report in reports:
            service.tell(report)
    return [str(receipt) for report in reports for receipt in report.receipts]
