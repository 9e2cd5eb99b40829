"""Asking runs to end: those that run here directly, the rest in bulk, at the server's own pace.

What the server was not asked, or could not do, is asked again, and is not said to have been asked.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import anyio

from supervised import _clock, _identity
from supervised._log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from supervised import _telemetry
    from supervised._api import Ack, Orchestrator
    from supervised._grace import Grace
    from supervised._mandate import Mandate
    from supervised._pace import Pace
    from supervised._reading import Reading
    from supervised._targets import Target, Targets
    from supervised._types import CancelReason

logger = get_logger("prefect.supervised.teardown")

_REQUEST_SECONDS = 8.0
_ASK_AGAIN_SECONDS = 1.0
_ASKING_SECONDS_EACH = 0.1  # four times what SQLite needs to cancel a run on two busy cores
_MOST_ASKING_SECONDS_EACH = 0.5  # one slow answer for ten runs says little of the next thousand
_MOST_REASONS = 4  # for which there is a request each
_SLOWER = 4.0  # than it has been: what one request may take
_SLOWER_ALL = 1.5  # the same of all requests together


class Asking:
    """Asks the targets of one teardown to end, and notes what each has answered.

    Args:
        api: The seam to Prefect.
        targets: All that the teardown knows of.
        mandate: Why they are to end.
        grace: Bounds the requests; told when it is known better what they take.
        reading: Told of the states that the server answers.
        has_handed_over: Tells, before each request, whether what runs elsewhere belongs to a later
            attempt of the scope's run, and is not to be asked.
        span: Gets an event for each request.
    """

    def __init__(
        self,
        api: Orchestrator,
        targets: Targets,
        mandate: Mandate,
        *,
        grace: Grace,
        reading: Reading,
        has_handed_over: Callable[[], Awaitable[bool]],
        span: _telemetry.TeardownSpan | None,
    ) -> None:
        self._api = api
        self._targets = targets
        self._mandate = mandate
        self._grace = grace
        self._reading = reading
        self._has_handed_over = has_handed_over
        self._span = span

    async def ask(self, targets: list[Target]) -> None:
        """Ask these for the first time, or once more if that was in vain."""
        for target in targets:  # all of them before any request: that may take long
            self._tell(target)
        remote = [t for t in targets if t.runs_remotely or t.has_own_process]
        await self.ask_server(sorted(remote, key=lambda target: target.depth))

    def _tell(self, target: Target) -> None:
        """Do what needs no server: again and again until the run is known, then no more."""
        if target.is_told:
            return
        if target.child is not None:
            target.child.mark_cancel(self._mandate.reason)
        if target.attempt is not None and target.attempt.interrupt is not None:
            target.attempt.interrupt()
        if target.run is not None:
            target.is_told = True
            if not target.runs_remotely:
                target.note_request()

    async def ask_server(self, targets: list[Target]) -> None:
        """Ask the server to cancel these, the first ones first."""
        for message, some in by_message(targets, self._targets, self._mandate).items():
            ask = functools.partial(self._ask_for_some, message=message)
            await self._api.pace.each(some, ask)

    async def _ask_for_some(self, targets: list[Target], message: str) -> bool:
        """Make one request; what it cannot ask for is asked for again in a later round.

        Returns:
            Whether it was answered.
        """
        try:
            with anyio.fail_after(_REQUEST_SECONDS):
                if await self._has_handed_over():
                    return False
        except Exception as exc:
            error = f"not asked (again): the server does not tell whose it is by now: {exc!r}"
            self._note_failure(targets, error)
            return False
        live = [t for t in targets if not t.is_over]
        acks = await self._send(live, message) if live else None
        if acks is None:
            return False
        if self._span is not None:
            self._span.step("requested", len(acks))
        for ack in acks:
            self._note_answer(ack)
        return True

    async def _send(self, targets: list[Target], message: str) -> list[Ack] | None:
        """Send one request; `None` if it was not answered."""
        self._grace.allow_time_to_ask()  # by now it is known how slow the server is
        for target in targets:
            target.note_request()
        error = "the request was cut off"  # as when the grace ends
        pace = self._api.pace
        try:
            with anyio.fail_after(seconds_for_one(len(targets), pace)):
                acks = await self._api.request_cancel(
                    [t.run_id for t in targets if t.run_id], message
                )
            error = ""
        except Exception as exc:
            logger.debug("A request for cancellation failed", exc_info=True)
            error = f"the request failed: {exc!r}"
            if isinstance(exc, TimeoutError):
                pace.note_timeout(len(targets))
            return None
        else:
            return acks
        finally:  # it may have been carried out all the same: to ask twice is harmless
            if error:
                self._note_failure(targets, error)

    def _note_failure(self, targets: list[Target], error: str) -> None:
        for target in targets:
            target.note_failure(error)
        self._reading.expect_changes()  # before asking again: somebody may have detached one since

    def _note_answer(self, ack: Ack) -> None:
        target = self._targets.of_run(ack.run_id)
        if target is None:  # it was detached meanwhile
            return
        target.error = "" if ack.accepted else ack.detail
        if ack.state is not None:
            self._reading.learn(target, ack.state)
        else:  # SQLite was locked, say
            target.requested = None
            target.ask_after = _clock.monotonic() + _ASK_AGAIN_SECONDS
        if ack.accepted and target.acknowledged_at is None:
            target.acknowledged_at = _clock.utc_now()
            if target.child is not None:
                target.child.mark_acknowledged()


def by_message(asked: list[Target], targets: Targets, mandate: Mandate) -> dict[str, list[Target]]:
    """Return with which message to ask whom.

    Args:
        asked: Whom to ask, in this order.
        targets: All that the teardown knows of, with the tops that may have reasons.
        mandate: The reason of the teardown, and of whoever has none of its own.
    """
    found: dict[str, list[Target]] = {}
    for target in asked:
        message = _message(_reason_now(target, targets, mandate), mandate)
        found.setdefault(message, []).append(target)
    if len(found) > _MOST_REASONS:
        # 200 requests, one after the other, took longer than the grace. Who was cancelled for a
        # reason of its own tells it all the same: its handle, its span and its receipt.
        return {_message(mandate.reason, mandate): asked}
    return found


def _reason_now(target: Target, targets: Targets, mandate: Mandate) -> CancelReason:
    """Return what the run's state is to say; who was heard before keeps what it says now."""
    child = target.child
    is_new = child is None or child.acknowledged_at is None
    return mandate.reason_for(target, targets) if is_new else mandate.reason


def _message(reason: CancelReason, mandate: Mandate) -> str:
    return _identity.mark_message(f"Cancelled because {reason}", mandate.lineage.run_id)


def seconds_for_all(count: int, pace: Pace) -> float:
    """Return what a slow server needs to be asked for so many, by what others have taken."""
    return count * _bounded(_SLOWER_ALL * pace.seconds_each)


def seconds_for_one(count: int, pace: Pace) -> float:
    """Return what one request for so many may take, by what others have taken."""
    return _REQUEST_SECONDS + count * _bounded(_SLOWER * pace.width * pace.seconds_each)


def _bounded(seconds_each: float) -> float:
    return min(max(_ASKING_SECONDS_EACH, seconds_each), _MOST_ASKING_SECONDS_EACH)
