"""The children of one scope: thread-safe, and the only place that admits new ones."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any

from supervised._errors import DuplicateKeyError, ScopeClosedError
from supervised._identity import is_comparable, occurrence_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from supervised._child import Child
    from supervised._types import CancelReason


class Registry:
    """Keeps children by key. A child that is over stays, so that reports can name it."""

    def __init__(self, scope: str) -> None:
        self._scope = scope
        self._lock = threading.RLock()
        self._children: dict[str, Child[Any]] = {}
        self._work: dict[str, str] = {}
        self._occurrences: dict[str, int] = {}
        self._live = 0
        self._waiting: list[concurrent.futures.Future[None]] = []
        self._banned: str | None = None

    def admit(
        self, *, key: str | None, work: str, make: Callable[[str], Child[Any]]
    ) -> tuple[Child[Any], bool]:
        """Return the child for a piece of work, and whether it is new.

        Args:
            key: The key that the user gave, or `None` for one derived from *work*.
            work: What tells equal work: target and parameters.
            make: Makes the child, given its final key.

        Raises:
            ScopeClosedError: If the scope takes no more children.
            DuplicateKeyError: If *key* stands for other work already.
        """
        with self._lock:
            self.require_open()
            if key is None:
                key = self._next_key(work)
            elif (known := self._children.get(key)) is not None:
                if self._work[key] == work and is_comparable(work):
                    return known, False
                why = "other parameters" if is_comparable(work) else "parameters beyond comparison"
                raise DuplicateKeyError(
                    f"The key {key!r} is taken in '{self._scope}' by {known.target} with {why}. "
                    "Use another key, or none.",
                    child=known.name,
                )
            child = self._children[key] = make(key)
            self._work[key] = work
            self._live += 1
            return child, True

    def require_open(self) -> None:
        """Refuse anything new if the scope is over or being torn down.

        Raises:
            ScopeClosedError: If it is.
        """
        if self._banned is not None:
            raise ScopeClosedError(
                f"Nothing can be spawned in '{self._scope}' any more: {self._banned}. "
                "Spawn before the flow ends, and not from its cleanup."
            )

    def _next_key(self, work: str) -> str:
        while True:
            self._occurrences[work] = occurrence = self._occurrences.get(work, 0) + 1
            key = occurrence_key(work, occurrence)
            if key not in self._children:
                return key

    def finished(self, _: Child[Any]) -> None:
        """Count one child as over."""
        with self._lock:
            self._live -= 1
            if self._live:
                return
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def ban(self, why: str) -> None:
        """Admit nothing from now on. The first reason stays."""
        with self._lock:
            self._banned = self._banned or why
        self._wake_waiters()

    def ban_if_settled(self, why: str) -> bool:
        """Admit nothing from now on, unless a child is live; true if nothing is admitted now."""
        with self._lock:
            if self._live and self._banned is None:
                return False
            self._banned = self._banned or why
            return True

    def ban_if_empty(self, why: str) -> bool:
        """Admit nothing from now on, unless there are children."""
        with self._lock:
            if self._children:
                return False
            self._banned = self._banned or why
            return True

    def when_settled(self) -> concurrent.futures.Future[None]:
        """Return a future that is done once no child is live, or none may be added."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            if self._live and self._banned is None:
                self._waiting.append(future)
                return future
        future.set_result(None)
        return future

    def all(self) -> list[Child[Any]]:
        """Return every child, in the order of spawning."""
        with self._lock:
            return list(self._children.values())

    def live(self) -> list[Child[Any]]:
        """Return the children that are not over, in the order of spawning."""
        return [child for child in self.all() if not child.is_over]


def describe_ban(reason: CancelReason) -> str:
    """Return what a refused spawn is told."""
    return f"the scope is being torn down because {reason}"
