"""The children of one scope: thread-safe, and the only place that admits new ones."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from supervised._errors import DuplicateKeyError, ScopeClosedError
from supervised._finished import Finished
from supervised._identity import is_comparable, occurrence_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from supervised._child import Child
    from supervised._types import CancelReason


class Registry:
    """Keeps children by key.

    A child that is over stays, so that reports can name it, but no more of it than it takes to make
    its handle again, unless somebody holds that: there may be 100,000.
    """

    def __init__(self, scope: str) -> None:
        self._scope = scope
        self._lock = threading.RLock()
        self._children: dict[str, Child[Any] | Finished] = {}
        self._held: WeakValueDictionary[str, Child[Any]] = WeakValueDictionary()
        self._work: dict[str, str] = {}  # where the key does not tell
        self._occurrences: dict[str, int] = {}  # of what was spawned more than once
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
            elif key in self._children:
                known = self._handle(key)
                if self._work.get(key, key) == work and is_comparable(work):
                    return known, False
                why = "other parameters" if is_comparable(work) else "parameters beyond comparison"
                raise DuplicateKeyError(
                    f"The key {key!r} is taken in '{self._scope}' by {known.target} with {why}. "
                    "Use another key, or none.",
                    child=known.name,
                )
            child = self._children[key] = make(key)
            if key != work:
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
        if work not in self._children:
            return work
        while True:
            self._occurrences[work] = occurrence = self._occurrences.get(work, 1) + 1
            key = occurrence_key(work, occurrence)
            if key not in self._children:
                return key

    def finished(self, child: Child[Any]) -> None:
        """Count one child as over, and keep no more of it than is needed."""
        with self._lock:
            self._live -= 1
            if self._banned is None and (kept := Finished.of(child)) is not None:
                self._children[child.key] = kept
                self._held[child.key] = child
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
            return [self._handle(key) for key in self._children]

    def kept(self) -> list[Child[Any]]:
        """Return the children that may have to be ended or told of, in the order of spawning."""
        with self._lock:
            return [each for each in self._children.values() if not isinstance(each, Finished)]

    def finished_children(self) -> list[Finished]:
        """Return what is kept of the others."""
        with self._lock:
            return [each for each in self._children.values() if isinstance(each, Finished)]

    def live(self) -> list[Child[Any]]:
        """Return the children that are not over, in the order of spawning."""
        return [child for child in self.kept() if not child.is_over]

    def owns(self, child: Child[Any]) -> bool:
        """Whether a child was admitted here."""
        with self._lock:
            known = self._held.get(child.key) or self._children.get(child.key)
            return known is child

    def of_run(self, run_id: UUID) -> Child[Any] | None:
        """Return the child that has a run, or that has been told to adopt it."""
        with self._lock:
            for key, each in self._children.items():
                if each.flow_run_id == run_id or each.target == str(run_id):
                    return self._handle(key)
        return None

    def _handle(self, key: str) -> Child[Any]:
        """Return a child's handle; make one if nobody holds it."""
        known = self._held.get(key) or self._children[key]
        if isinstance(known, Finished):
            known = self._held[key] = known.child()
        return known


def describe_ban(reason: CancelReason) -> str:
    """Return what a refused spawn is told."""
    return f"the scope is being torn down because {reason}"
