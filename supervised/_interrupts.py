"""When a body is interrupted: as soon as its scope ends, but never in the middle of its cleanup."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from supervised import _clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prefect.client.schemas.objects import FlowRun

    from supervised._body import Body
    from supervised._child import Child
    from supervised._host import Host
    from supervised._own_run import OwnRun

_ABOUT_TO_WAIT_SECONDS = 0.2
_LOOK_SECONDS = 0.02
_SIGNAL_SECONDS = 0.25
_RUNNER_SECONDS = 5.0  # how long a runner has to signal a body whose run is being cancelled


class Interrupts:
    """Decides when to interrupt the body of one scope.

    Args:
        body: The body.
        run: The scope's run.
        own: What the server says of that run.
        host: The process, which a runner may be about to signal.
        live: Returns the children that are not over.
        call_soon: Calls something in the control plane's loop; false if there is none.
    """

    def __init__(
        self,
        body: Body,
        *,
        run: FlowRun,
        own: OwnRun,
        host: Host,
        live: Callable[[], Iterable[Child[Any]]],
        call_soon: Callable[[Callable[[], object]], bool],
    ) -> None:
        self._body = body
        self._run = run
        self._own = own
        self._host = host
        self._live = live
        self._call_soon = call_soon
        self._culprit: Child[Any] | None = None  # whose failure ends the scope
        self._intended_at: float | None = None  # when the runner was first seen to stop the process

    # -- because a child has failed -------------------------------------------------------------

    def fail(
        self, child: Child[Any], begin_teardown: Callable[[Callable[[], object]], object]
    ) -> None:
        """Have a child's failure end the scope, and a body that does not ask for it.

        Args:
            child: The child.
            begin_teardown: Ends everything else, after it has called what it is given.
        """
        self._culprit = child
        # Before they are ended: a thread would wake up with the cancellation of the one that it
        # waits for, and be cut off in its cleanup.
        awaits_another = self._awaits_a_child

        def interrupt_thread() -> None:
            if awaits_another and self._body.loop is None:
                self._interrupt_unheard(child)

        begin_teardown(interrupt_thread)
        if child.delivered:
            return
        if self._body.loop is not None or awaits_another:
            self._interrupt_unheard(child)  # once only: of a thread, if another began the teardown
        else:
            self._give_thread_time(child)

    def stop_waiting(self, child: Child[Any]) -> None:
        """End a body that had waited for the failure that ends the scope, and waits no more."""
        if child is not self._culprit:
            return
        is_signalled = self._host.termination_intent() is not None
        if self._body.loop is not None and self._own.cancellation is None and not is_signalled:
            self._body.interrupt()

    @property
    def _awaits_a_child(self) -> bool:
        return any(child.is_awaited for child in self._live())

    def _interrupt_unheard(self, child: Child[Any]) -> None:
        """End a body that does not ask for the failure that ends the scope.

        One that has just spawned the child, and is about to wait for it, is to hear of it there.
        One that its runner has signalled is cleaning up.
        """
        self._body.interrupt(
            unless=lambda: child.delivered or self._host.termination_intent() is not None
        )

    def _give_thread_time(self, child: Child[Any]) -> None:
        """Interrupt a thread, unless it asks for a failure in time.

        It cannot be asked what it is about to do.
        """
        until = _clock.monotonic() + _ABOUT_TO_WAIT_SECONDS

        def look() -> None:
            if self._awaits_a_child or _clock.monotonic() >= until:
                self._interrupt_unheard(child)
            elif not child.delivered:
                asyncio.get_running_loop().call_later(_LOOK_SECONDS, look)

        if not self._call_soon(look):
            self._interrupt_unheard(child)

    # -- because the run is being cancelled -----------------------------------------------------

    def cancel(self) -> None:
        """Interrupt a body whose run is being cancelled; one that a runner owns, if that does not.

        A second time would cut its cleanup off. Called in the control plane.
        """
        delay = _RUNNER_SECONDS if self._host.runner_owns(self._run) else 0.0
        asyncio.get_running_loop().call_later(delay, self._interrupt_unsignalled)

    def _interrupt_unsignalled(self) -> None:
        if not (self._host.runner_owns(self._run) and self._host.termination_intent() == "cancel"):
            self._body.interrupt()

    def is_signal_due(self) -> bool:
        """Whether the runner is about to signal the body, which is to hear of no other end before.

        A body that wakes up for `ChildCancelled` would be cut off by the signal in its cleanup.
        """
        if self._own.cancelled_at is None or not self._host.runner_owns(self._run):
            return False
        now = _clock.monotonic()
        if self._host.termination_intent() is None:
            return now < self._own.cancelled_at + _RUNNER_SECONDS
        if self._intended_at is None:
            self._intended_at = now  # and the signal follows
        return now < self._intended_at + _SIGNAL_SECONDS
