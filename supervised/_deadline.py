"""How long a scope may take: its own time, and what whoever has launched it had left."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING

from supervised import _clock, _identity, _launch
from supervised._log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prefect.client.schemas.objects import FlowRun

    from supervised._api import Orchestrator

logger = get_logger("prefect.supervised")


class Deadline:
    """The moment at which a scope's time is over; it is waited for in the control plane.

    Args:
        run: The scope's run.
        started: When its body began, by the monotonic clock.
        seconds: How long the scope may take; `None` for as long as it takes.
        inherited: What its launcher had left when it launched the run; `None` if it had no limit.
    """

    def __init__(
        self, run: FlowRun, *, started: float, seconds: float | None, inherited: float | None
    ) -> None:
        self._run = run
        self._inherited = inherited
        self._own = math.inf if seconds is None else started + seconds
        self.at = self._own if inherited is None else min(self._own, started + inherited)
        """When the time is over, by the monotonic clock."""

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit."""
        return not math.isinf(self.at)

    async def wait(self, api: Orchestrator, closed: Callable[[float], Awaitable[bool]]) -> bool:
        """Wait until the time is over; false if the scope was over before.

        Args:
            api: The seam to Prefect.
            closed: Waits for the scope's end, for so many seconds; tells whether it has come.
        """
        if self._inherited is not None:
            await self._subtract_age(api, self._inherited)
        while not await closed(self.at - _clock.monotonic()):
            if _clock.monotonic() >= self._own or not await self._was_detached(api):
                return True
            self.at = self._own
        return False

    async def _subtract_age(self, api: Orchestrator, inherited: float) -> None:
        """Subtract what passed before the body began; by the server's clock, as hosts differ."""
        try:
            now = await _launch.patiently(api.server_time)
        except Exception:
            logger.debug("Could not read the server's time", exc_info=True)
            return
        age = now - self._run.created if now and self._run.created else timedelta(0)
        left = inherited - max(0.0, age.total_seconds())
        self.at = min(self.at, _clock.monotonic() + left)

    async def _was_detached(self, api: Orchestrator) -> bool:
        """Whether somebody has let this run go since it was launched: then its time is its own."""
        try:
            runs = await _launch.patiently(lambda: api.read_runs([self._run.id]))
        except Exception:
            logger.debug("Could not read the own run", exc_info=True)
            return False
        return any(run.labels.get(_identity.DETACHED) for run in runs)
