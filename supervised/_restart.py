"""Restarting children that crash or fail, in the sense of Erlang's supervisors.

See "Supervisor Behaviour" in the OTP design principles for the strategies and the intensity.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs

from supervised._errors import SpawnError
from supervised._policy import check_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from supervised._child import Child, End
    from supervised._registry import Registry
    from supervised._types import Outcome

Strategy = Literal["one_for_one", "rest_for_one", "one_for_all"]
"""Who is restarted with a child: nobody, who was spawned after it, or all."""

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
RESTARTED: tuple[Outcome, ...] = ("failed", "crashed", "timed_out")
"""Ends after which a child is restarted, unless somebody asked for its end."""


def _check_max(_: object, __: object, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"max must be a whole number, 0 or more; got {value!r}")


def _check_within(_: object, __: object, value: float) -> None:
    if not value > 0:
        raise ValueError(f"within_seconds must be more than 0; got {value!r}")


def _check_backoff(_: object, __: object, value: Any) -> None:
    if callable(value):
        return
    delays = value if isinstance(value, Sequence) else (value,)
    if not delays or isinstance(value, (str, bytes)) or None in delays:
        raise ValueError(f"backoff must be seconds, a list of seconds or a function; got {value!r}")
    for delay in delays:
        check_seconds("backoff", delay)


def _check_strategy(_: object, __: object, value: object) -> None:
    if value not in STRATEGIES:
        raise ValueError(f"strategy: {value!r} is none; use {', '.join(STRATEGIES)}")


@attrs.frozen
class Restart:
    """Restart a child that fails or crashes, within limits.

    Given to `supervisor.spawn`, it is for that child; given to `@supervised_flow`, for all children
    of the scope, which then share its limits. Each restart is a new run under the child's own key
    and handle. A child that completed, that somebody cancelled, or that was adopted, is not
    restarted.

    Args:
        max: How many restarts are allowed within *within_seconds*. One more is the scope's
            failure, whatever *on_child_failure* says; that of a child in a race is the race's.
        within_seconds: Seconds in which they are counted.
        backoff: Seconds to wait before a restart: a number, a list (its last value is used for
            all further restarts), or a function of the restart's number, counted from 1.
        strategy: Who else is restarted. *one_for_one*: nobody. *rest_for_one*: the live children
            that were spawned after it. *one_for_all*: all live children. They are cancelled first;
            who still waits for its turn goes on waiting.

    Raises:
        ValueError: If a value is out of range.

    Example:
        ```python
        supervisor.spawn("score/gpu", restart=Restart(max=5, backoff=[1, 10, 60]))
        ```
    """

    max: int = attrs.field(default=3, validator=_check_max)
    within_seconds: float = attrs.field(default=60.0, validator=_check_within)
    backoff: float | Sequence[float] | Callable[[int], float] = attrs.field(
        default=0.0, validator=_check_backoff
    )
    strategy: Strategy = attrs.field(default="one_for_one", validator=_check_strategy)

    def delay(self, number: int) -> float:
        """Return the seconds to wait before a restart.

        Args:
            number: Which restart it is, counted from 1.
        """
        if callable(self.backoff):
            return max(0.0, float(self.backoff(number)))
        if isinstance(self.backoff, Sequence):
            return float(self.backoff[min(number, len(self.backoff)) - 1])
        return float(self.backoff)


def check_restart(value: Restart | None) -> Restart | None:
    """Return *value* if it is limits of restarts, or `None`.

    Raises:
        TypeError: If it is anything else.
    """
    if value is not None and not isinstance(value, Restart):
        raise TypeError(f"restart must be a Restart, such as Restart(max=3); got {value!r}")
    return value


@attrs.define
class Intensity:
    """Counts restarts; who shares it shares the limits.

    Args:
        restart: The limits.
    """

    restart: Restart
    _times: deque[float] = attrs.field(factory=deque)

    def count(self, now: float) -> int | None:
        """Count one restart, and return which it is of those that still count.

        Args:
            now: Seconds from any fixed point.

        Returns:
            Its number, from 1; `None` if it would be one too many.
        """
        while self._times and now - self._times[0] > self.restart.within_seconds:
            self._times.popleft()
        if len(self._times) >= self.restart.max:
            return None
        self._times.append(now)
        return len(self._times)


def restarted_with(strategy: Strategy, position: int, live: Iterable[int]) -> list[int]:
    """Return the positions of the children that are restarted together with one.

    Args:
        strategy: The strategy.
        position: That child's, in the order of spawning.
        live: The positions of all children that are not over.
    """
    if strategy == "one_for_one":
        return []
    others = [each for each in live if each != position]
    return others if strategy == "one_for_all" else [each for each in others if each > position]


@attrs.define(eq=False)
class Round:
    """One restart: the children that take part, and how far they are.

    Args:
        culprit: The child whose end began it.
        restart: The limits that it counts against.
        number: Which restart it is of those that still count.
        members: The children that are restarted, in the order of spawning.
    """

    culprit: Child[Any]
    restart: Restart
    number: int
    members: list[Child[Any]]
    ends: dict[str, End] = attrs.field(factory=dict, init=False)
    ready: concurrent.futures.Future[None] = attrs.field(
        factory=concurrent.futures.Future, init=False
    )
    """Done when the attempts of all members have ended."""
    deserted: concurrent.futures.Future[None] = attrs.field(
        factory=concurrent.futures.Future, init=False
    )
    """Done when no member is left."""

    @property
    def others(self) -> list[Child[Any]]:
        """The children that have to end for the culprit's sake."""
        return [child for child in self.members if child is not self.culprit]

    def note(self, child: Child[Any], end: End) -> None:
        """Take note that the attempt of a member has ended."""
        self.ends.setdefault(child.key, end)
        self._check()

    def leave(self, child: Child[Any]) -> None:
        """Go on without a member."""
        self.members.remove(child)
        self._check()

    def _check(self) -> None:
        if not self.ready.done() and all(child.key in self.ends for child in self.members):
            self.ready.set_result(None)
        if not self.deserted.done() and not self.members:
            self.deserted.set_result(None)


class Restarts:
    """Decides which ends of children are only ends of attempts; thread-safe.

    Args:
        registry: The children of the scope.
        shared: Limits that they share; those of a child come first.
    """

    def __init__(self, registry: Registry, shared: Restart | None) -> None:
        self._registry = registry
        self._shared = Intensity(shared) if shared is not None else None
        self._own: dict[str, Intensity] = {}
        self._rounds: dict[str, Round] = {}
        self._lock = threading.RLock()

    def limit(self, child: Child[Any], restart: Restart) -> None:
        """Give a child limits of its own."""
        self._own[child.key] = Intensity(restart)

    def note_end(self, child: Child[Any], end: End, now: float) -> tuple[bool, Round | None]:
        """Take note that an attempt at a child has ended.

        Args:
            child: The child.
            end: How.
            now: Seconds from any fixed point.

        Returns:
            Whether the child goes on, and the round of restarts that this has begun, if any.
        """
        with self._lock:
            running = self._rounds.get(child.key)
            if running is not None:
                return self._note_in_round(child, end, running), None
            intensity = self._own.get(child.key, self._shared)
            if intensity is None or not _is_restarted(child, end):
                return False, None
            number = intensity.count(now)
            if number is None:
                child.used_up_restarts = True
                return False, None
            begun = Round(child, intensity.restart, number, self._members(child, intensity))
            self._rounds.update({member.key: begun for member in begun.members})
            return self._note_in_round(child, end, begun), begun

    def _note_in_round(self, child: Child[Any], end: End, running: Round) -> bool:
        if end.outcome in _FINAL or not child.is_spared:
            self.leave(child)
            return False
        child.attempt.is_queued = True  # nothing runs that would have to be asked to end
        running.note(child, end)
        return True

    def _members(self, child: Child[Any], intensity: Intensity) -> list[Child[Any]]:
        children = self._registry.kept()
        free = [
            position
            for position, each in enumerate(children)
            if not (each.is_over or each.attempt.is_queued or _is_kept(each))
            and each.key not in self._rounds
        ]
        position = next(i for i, each in enumerate(children) if each is child)
        also = restarted_with(intensity.restart.strategy, position, free)
        return [children[each] for each in sorted([position, *also])]

    def restart(self, child: Child[Any]) -> bool:
        """Take a child out of its round and begin its next attempt; false if it must not."""
        with self._lock:
            if child.key not in self._rounds or not child.begin_restart():
                return False
            self.leave(child)
            return True

    def leave(self, child: Child[Any]) -> None:
        """Take a child out of its round: it is restarted, or over for good."""
        with self._lock:
            running = self._rounds.pop(child.key, None)
            if running is not None:
                running.leave(child)

    def stop(self) -> list[tuple[Child[Any], End]]:
        """Begin no attempt any more; return who has ended, for good now, and how."""
        with self._lock:
            rounds, self._rounds = self._rounds, {}
            over = []
            for key, each in rounds.items():
                child = next(member for member in each.members if member.key == key)
                each.leave(child)
                if key in each.ends:
                    over.append((child, each.ends[key]))
            return over


_FINAL: tuple[Outcome, ...] = ("completed", "abandoned", "detached")


def _is_restarted(child: Child[Any], end: End) -> bool:
    if child.cancel_reason is not None or isinstance(end.exception, SpawnError):
        return False
    return end.outcome in RESTARTED and not _is_kept(child)


def _is_kept(child: Child[Any]) -> bool:
    """Whether it is not ours to launch again: nobody's any more, or launched by somebody else."""
    return child.is_detached or child.kind == "adopted"
