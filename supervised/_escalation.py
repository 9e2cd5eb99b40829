"""What is done for a run that does not end when it is asked, where something is known to help."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import anyio

from supervised import _clock
from supervised._asking import seconds_for_one
from supervised._log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from supervised._api import Orchestrator
    from supervised._asking import Asking
    from supervised._policy import Budget
    from supervised._reading import Reading
    from supervised._targets import Target, Targets

logger = get_logger("prefect.supervised.teardown")

_CLOSE_AGAIN_SECONDS = 1.0
_ENGINE_SECONDS = 1.0  # what an engine may need, on a busy server, to write how its run has ended


class Escalation:
    """Takes further steps for what has been asked: each once for each run, but closes until closed.

    Args:
        api: The seam to Prefect.
        targets: All that the teardown knows of: what is a process's may be closed with it.
        budget: When to take which step.
        asking: Asks once more.
        reading: Tells what has never begun.
        has_handed_over: Tells, before a step, whether what runs elsewhere belongs to a later
            attempt of the scope's run, and is not to be touched.
    """

    def __init__(
        self,
        api: Orchestrator,
        targets: Targets,
        budget: Budget,
        *,
        asking: Asking,
        reading: Reading,
        has_handed_over: Callable[[], Awaitable[bool]],
    ) -> None:
        self._api = api
        self._targets = targets
        self._budget = budget
        self._asking = asking
        self._reading = reading
        self._has_handed_over = has_handed_over

    async def escalate(self, asked: list[Target]) -> None:
        """Do for each of these what is due, whatever goes wrong with another.

        Args:
            asked: What has been asked, and is not over.
        """
        await self._reading.read_doubtful(asked, after=self._budget.nudge_after)
        await self._ask_again(asked)
        waiting = [t for t in asked if t.requested is not None]
        self._interrupt_again([t for t in waiting if t.is_local])
        unstarted = [t for t in waiting if is_unstarted(t)]
        await self._nudge([t for t in unstarted if t.has_waited(self._budget.nudge_after)])
        late = [t for t in unstarted if t.has_waited(self._budget.close_after)]
        await self._close(late, "Cancelled before it had started.")
        inline = [t for t in waiting if not t.is_local and not t.runs_remotely]
        left_over = [t for t in inline if self._targets.host_is_over(t)]
        await self._close(left_over, "Cancelled together with its process.")

    async def _ask_again(self, asked: list[Target]) -> None:
        """Ask once more for what the server has not agreed to."""
        after = self._budget.request_again_after
        remote = [t for t in asked if t.runs_remotely and not t.is_local]
        silent = [t for t in remote if t.acknowledged_at is None and t.has_waited(after)]
        await self._asking.ask_server([t for t in silent if t.note_step("asked again")])

    def _interrupt_again(self, targets: list[Target]) -> None:
        for target in targets:
            try:
                self._escalate_inline(target)
            except Exception as exc:
                _note_error([target], f"escalating failed: {exc!r}")

    def _escalate_inline(self, target: Target) -> None:
        """Repeat the request to code that swallowed it; at last end its engine's task."""
        interrupt = target.attempt.interrupt if target.attempt is not None else None
        if interrupt is None or target.has_own_process:
            return  # who owns a process kills it in time
        after = self._budget.request_again_after
        if target.has_waited(after) and target.note_step("asked again"):
            interrupt()
        # To cut the engine off sooner, however short the grace, made `Crashed` of `Cancelled`.
        ends_after = max(self._budget.close_after, _ENGINE_SECONDS)
        if target.has_waited(ends_after) and target.note_step("interrupted"):
            interrupt(hard=True)

    async def _nudge(self, targets: list[Target]) -> None:
        """Tell runners once more of runs whose processes they may not have known yet."""
        new = [t for t in targets if "nudged" not in t.escalations]
        if new and not await self._is_forbidden(new):
            await self._api.pace.each(new, self._nudge_some)

    async def _nudge_some(self, targets: list[Target]) -> bool:
        run_ids = [t.run_id for t in targets if t.run_id is not None and t.note_step("nudged")]
        try:
            with anyio.fail_after(seconds_for_one(len(run_ids), self._api.pace)):
                await self._api.nudge(run_ids)
        except Exception:
            logger.debug("Could not tell runners of %d runs again", len(run_ids), exc_info=True)
        return False  # it says nothing of how long it takes to set a state

    async def _close(self, targets: list[Target], message: str) -> None:
        """Write the last state of runs that are known to have no process, until it is written."""
        due = [t for t in targets if _clock.monotonic() >= t.ask_after]
        if due and not await self._is_forbidden(due):
            await self._api.pace.each(due, functools.partial(self._close_some, message=message))

    async def _close_some(self, targets: list[Target], message: str) -> bool:
        """Make one request; what it could not close is tried again a second later."""
        targets = [t for t in targets if not t.is_over]  # by now: others came first
        if not targets:
            return False
        for target in targets:
            target.note_step("closed")
        run_ids = [t.run_id for t in targets if t.run_id]
        try:
            with anyio.fail_after(seconds_for_one(len(run_ids), self._api.pace)):
                acks = await self._api.close_runs(run_ids, message)
        except Exception as exc:
            logger.debug("Could not close %d runs", len(targets), exc_info=True)
            _note_error(targets, f"closing it failed: {exc!r}")
            return False
        finally:
            for target in targets:
                target.ask_after = _clock.monotonic() + _CLOSE_AGAIN_SECONDS
        for ack in acks:
            known = self._targets.of_run(ack.run_id)
            if known is not None and ack.state is not None:
                self._reading.learn(known, ack.state)
            elif known is not None:
                known.error = ack.detail
        return True

    async def _is_forbidden(self, targets: list[Target]) -> bool:
        """Whether these belong to a later attempt of the scope's run, or nobody can tell."""
        try:
            return await self._has_handed_over()
        except Exception as exc:
            _note_error(targets, f"escalating failed: {exc!r}")
            return True


def is_unstarted(target: Target) -> bool:
    """Whether a run was cancelled while its process was starting.

    The server refuses `Running` to it, so its process ends with code 1 before the user's code, and
    nothing ever writes its last state (300 s until the server's own timeout). A runner that had not
    registered the process yet is told again; it then needs 3.3 s to finish the run. If none does,
    there is no process.
    """
    is_remote = target.runs_remotely and not target.is_local
    return is_remote and target.acknowledged_at is not None and target.never_ran


def _note_error(targets: list[Target], error: str) -> None:
    for target in targets:
        target.error = error
