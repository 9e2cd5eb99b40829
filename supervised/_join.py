"""Waiting for several children at once: all of them, the first, or enough of them.

What decides a join is the order in which its children have ended, and nothing else: `decide` is a
pure function of it. A race owns its children: their failures are its own to report, and once it is
decided those that go on are cancelled.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import math
import queue
import sys
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs

from supervised import _clock
from supervised._child import Child
from supervised._control import SLICE_SECONDS, wait_in_loop, wait_in_slices
from supervised._log import get_logger
from supervised._policy import breaks_scope, check_limit, check_seconds
from supervised._text import headline
from supervised._types import CancelReason

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Callable,
        Generator,
        Iterable,
        Iterator,
        Sequence,
    )

logger = get_logger("prefect.supervised.join")

R = TypeVar("R")
T = TypeVar("T")

LOST_THE_RACE = CancelReason(source="lost_race", message="it lost the race")


@attrs.frozen
class Rule:
    """What decides a join.

    Args:
        needed: Completed children with which it is won.
        tolerated: Children that may end in another way before it is lost.
    """

    needed: int
    tolerated: int


@attrs.frozen
class Decision:
    """How a join came out.

    Args:
        won: Whether enough children completed.
        completed: Positions of those that had by then, in the order in which they ended.
        failed: Positions of those that had ended in another way.
    """

    won: bool
    completed: tuple[int, ...]
    failed: tuple[int, ...]


def decide(rule: Rule, ends: Iterable[tuple[int, bool]]) -> Decision | None:
    """Return how a join came out, or `None` while that is open.

    Args:
        rule: What decides it.
        ends: The positions of the children that are over, in the order in which they ended, and
            whether each completed.
    """
    completed: list[int] = []
    failed: list[int] = []
    if rule.needed == 0:
        return Decision(won=True, completed=(), failed=())
    for position, did_complete in ends:
        (completed if did_complete else failed).append(position)
        if len(completed) == rule.needed or len(failed) > rule.tolerated:
            won = len(completed) == rule.needed
            return Decision(won=won, completed=tuple(completed), failed=tuple(failed))
    return None


class Join(Generic[T]):
    """What several children come to: `await join`, or `join.result()`.

    Returned by `supervisor.gather`, `first_success`, `first_completed` and `quorum`, never built
    by hand. It is decided whether or not somebody waits for it.

    Args:
        children: The children.
        rule: What decides it.
        take: Makes the answer of the results, in the order of *children* that gave them.
        timeout: Seconds from now that may be waited; `None` for as long as it takes.
        is_race: Whether those that go on when it is decided are cancelled.
        counts_any_end: Whether a child that fails counts as completed, with its error as result.
        raises_group: Whether the errors with which it is lost are raised as a group.
    """

    def __init__(
        self,
        children: Sequence[Child[Any]],
        rule: Rule,
        *,
        take: Callable[[dict[int, Any]], T],
        timeout: float | None = None,
        is_race: bool = False,
        counts_any_end: bool = False,
        raises_group: bool = False,
    ) -> None:
        self.children = tuple(children)
        self.delivered = False
        self._rule = rule
        self._take = take
        self._timeout = timeout
        self._is_race = is_race
        self._counts_any_end = counts_any_end
        self._raises_group = raises_group
        self._deadline = math.inf if timeout is None else _clock.monotonic() + timeout
        self._lock = threading.Lock()
        self._is_expired = False
        self._ends: list[tuple[int, bool]] = []
        self._decision: Decision | None = None
        self._decided: concurrent.futures.Future[None] = concurrent.futures.Future()
        for child in self.children:
            child.is_raced |= is_race
        self._decide()
        for position, child in sorted(enumerate(self.children), key=_ended_at):
            child.add_done_callback(functools.partial(self._note, position))

    def __repr__(self) -> str:
        word = "open" if self._decision is None else "won" if self._decision.won else "lost"
        return f"<Join of {len(self.children)} {word}>"

    @property
    def winners(self) -> tuple[Child[Any], ...]:
        """The children that had completed when it was decided, in the order in which they did."""
        completed = self._decision.completed if self._decision is not None else ()
        return tuple(self.children[position] for position in completed)

    @property
    def losers(self) -> tuple[Child[Any], ...]:
        """The children whose ends have lost it, in the order in which they came."""
        decision = self._decision
        failed = decision.failed if decision is not None and not decision.won else ()
        return tuple(self.children[position] for position in failed)

    @property
    def is_lost(self) -> bool:
        """Whether failures have lost it; if its children were cancelled, there was no race."""
        return any(
            child.outcome is not None and breaks_scope(child.outcome) for child in self.losers
        )

    def result(self, timeout: float | None = None) -> T:
        """Return what the join gives, waiting for it if need be; not in the children's own loop.

        Args:
            timeout: Seconds to wait; no longer than the join itself allows.

        Raises:
            TimeoutError: If it is not decided in time.
            ChildError: If it is lost by one child's end.
            ExceptionGroup: If it is lost by the ends of several.
            ValueError: If *timeout* is negative.
        """
        check_seconds("timeout", timeout)
        with self._waiting():
            for child in self.children:
                child.refuse_deadlock()
            self._require(wait_in_slices(self._decided, self._left(timeout)), timeout)
            answers = {at: self.children[at].answer() for at in self._ends_that_count()}
            return self._told(answers)

    async def aresult(self, timeout: float | None = None) -> T:
        """Return what the join gives, waiting for it in the running loop; see `result`."""
        check_seconds("timeout", timeout)
        with self._waiting():
            self._require(await wait_in_loop(self._decided, self._left(timeout)), timeout)
            answers = {at: await self.children[at].aanswer() for at in self._ends_that_count()}
            return self._told(answers)

    def __await__(self) -> Generator[Any, Any, T]:
        return self.aresult().__await__()

    def error(self) -> BaseException:
        """Return why it is lost, as far as that is known without asking anybody."""
        assert self._decision is not None
        ends = {at: self.children[at] for at in self._decision.failed}
        return self._why_lost({at: child.error(child.exception) for at, child in ends.items()})

    async def expire_in_time(self) -> None:
        """End a race whose time is over, whether or not somebody waits for it."""
        if not await wait_in_loop(self._decided, self._left(None)):
            self._expire()

    # -- inside -----------------------------------------------------------------------------

    def _note(self, position: int, child: Child[Any]) -> None:
        with self._lock:
            self._ends.append((position, self._counts_any_end or child.outcome == "completed"))
        self._decide()

    def _decide(self) -> None:
        with self._lock:
            if self._decision is not None:
                return
            self._decision = decide(self._rule, self._ends)
            if self._decision is None:
                return
        if self._is_race:
            self._cancel_losers(LOST_THE_RACE)
        self._decided.set_result(None)

    def _cancel_losers(self, reason: CancelReason) -> None:
        for child in self.children:
            if child.is_over:
                continue
            try:
                child.cancel_because(reason)
            except Exception:  # one must not keep the others running, nor who waits waiting
                logger.exception("Could not cancel child %r, which lost a race", child.name)

    def _left(self, timeout: float | None) -> float | None:
        left = min(math.inf if timeout is None else timeout, self._deadline - _clock.monotonic())
        return None if math.isinf(left) else max(0.0, left)

    def _require(self, is_decided: bool, timeout: float | None) -> None:
        if is_decided and not self._is_expired:
            return
        is_too_late = self._is_expired or _clock.monotonic() >= self._deadline
        limit = self._timeout if is_too_late else timeout
        if self._is_race and is_too_late:
            self._expire()
            self.delivered = True
        live = ", ".join(child.name for child in self.children if not child.is_over)
        going_on = f"; still going on: {live}" if live else ""
        raise TimeoutError(f"Not decided within {limit:g} s{going_on}")

    def _expire(self) -> None:
        with self._lock:
            if self._is_expired or self._decision is not None:
                return
            self._is_expired = True
        message = f"the race was not decided within {self._timeout:g} s"
        self._cancel_losers(CancelReason(source="lost_race", message=message))

    def _ends_that_count(self) -> tuple[int, ...]:
        assert self._decision is not None
        return self._decision.completed if self._decision.won else self._decision.failed

    def _told(self, answers: dict[int, Any]) -> T:
        """Give the answer to who has waited for it; only from then on it counts as heard."""
        assert self._decision is not None
        self.delivered = True
        for at in answers:
            self.children[at].was_heard = True
        if self._decision.won:
            return self._take(answers)
        raise self._why_lost(answers)

    def _why_lost(self, errors: dict[int, Any]) -> BaseException:
        if not self._raises_group:
            return errors[next(iter(errors))]  # type: ignore[no-any-return]
        lost = f"of {len(self.children)} children fewer than {self._rule.needed} completed"
        raised = list(errors.values())
        return ExceptionGroup(f"{lost}: {headline(raised)}", raised)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count as a waiter of every child."""
        with contextlib.ExitStack() as stack:
            for child in self.children:
                stack.enter_context(child.being_awaited())
            yield


def check(children: Iterable[Child[R]]) -> tuple[Child[R], ...]:
    """Return children as a tuple.

    Raises:
        TypeError: If one of them is none.
    """
    checked = tuple(children)
    for child in checked:
        if not isinstance(child, Child):
            raise TypeError(
                f"Only children can be joined, as `supervisor.spawn` returns them; got {child!r}"
            )
    return checked


class Joiners:
    """What a supervisor offers to wait for several children."""

    def __init__(self) -> None:
        self._races: list[Join[Any]] = []
        self._races_lock = threading.Lock()

    def gather(
        self,
        *children: Child[R],
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> Join[list[R]]:
        """Wait for all children, as `asyncio.gather` does.

        Args:
            *children: The children.
            timeout: Seconds from now that may be waited; `None` for as long as it takes.
            return_exceptions: Whether to wait for all and give errors in place of results,
                instead of raising the first.

        Returns:
            A handle: `await` it, or ask for its `result()`: all results, in the order given. It
            raises the first failure as soon as that is known; the others go on, or end, as
            *on_child_failure* says. On a `TimeoutError` all go on.

        Raises:
            ValueError: If *timeout* is negative.
        """
        return _gather(children, timeout, return_exceptions=return_exceptions)

    def first_completed(self, *children: Child[R], timeout: float | None = None) -> Join[R]:
        """Wait for the first child that ends, however it does, and cancel the others.

        Args:
            *children: The children; their failures are the race's, not the scope's.
            timeout: Seconds from now that may be waited; `None` for as long as it takes.

        Returns:
            A handle: `await` it, or ask for its `result()`: what that child returned. It raises
            what that child failed with; on a `TimeoutError` all are cancelled.

        Raises:
            ValueError: If there are no children, or *timeout* is negative.
        """
        rule = Rule(needed=1, tolerated=0)
        return self._race(children, rule, _only, timeout, raises_group=False)

    def first_success(self, *children: Child[R], timeout: float | None = None) -> Join[R]:
        """Wait for the first child that completes, and cancel the others.

        Args:
            *children: The children; their failures are the race's, not the scope's.
            timeout: Seconds from now that may be waited; `None` for as long as it takes.

        Returns:
            A handle: `await` it, or ask for its `result()`: what that child returned. If none
            completes, it raises an `ExceptionGroup` of all failures; on a `TimeoutError` all are
            cancelled.

        Raises:
            ValueError: If there are no children, or *timeout* is negative.

        Example:
            ```python
            fastest = await supervisor.first_success(spawn("eu/gpu"), spawn("us/gpu"))
            ```
        """
        distinct = len(dict.fromkeys(children))
        return self._race(children, Rule(needed=1, tolerated=distinct - 1), _only, timeout)

    def quorum(
        self, needed: int, *children: Child[R], timeout: float | None = None
    ) -> Join[list[R]]:
        """Wait until a number of children have completed, and cancel the others.

        Args:
            needed: How many have to complete.
            *children: The children; their failures are the race's, not the scope's. One that is
                given twice counts once.
            timeout: Seconds from now that may be waited; `None` for as long as it takes.

        Returns:
            A handle: `await` it, or ask for its `result()`: that many results, in the order in
            which they came. As soon as too many have failed it raises an `ExceptionGroup` of
            these; on a `TimeoutError` all are cancelled.

        Raises:
            ValueError: If *needed* is not a whole number, less than 1, or more than there are
                children, or *timeout* is negative.
        """
        if check_limit("needed", needed) is None:
            raise ValueError("needed must be a whole number, 1 or more; got None")
        rule = Rule(needed=needed, tolerated=len(dict.fromkeys(children)) - needed)
        return self._race(children, rule, lambda answers: list(answers.values()), timeout)

    def as_completed(
        self, children: Iterable[Child[R]], *, timeout: float | None = None
    ) -> AsCompleted[R]:
        """Give children in the order in which they end, however they do.

        Args:
            children: The children.
            timeout: Seconds from now that may be waited; `None` for as long as it takes.

        Returns:
            Something for `for`, and for `async for`. It raises `TimeoutError` if not all are over
            in time; those go on.

        Raises:
            ValueError: If *timeout* is negative.
        """
        return AsCompleted(check(children), check_seconds("timeout", timeout))

    @property
    def lost_races(self) -> list[Join[Any]]:
        """The races that were lost to failures, and that nobody has asked about."""
        return [race for race in self._races if race.is_lost and not race.delivered]

    def _race(
        self,
        children: Sequence[Child[Any]],
        rule: Rule,
        take: Callable[[dict[int, Any]], T],
        timeout: float | None,
        *,
        raises_group: bool = True,
    ) -> Join[T]:
        runners = tuple(dict.fromkeys(check(children)))
        if not 1 <= rule.needed <= len(runners):
            raise ValueError(
                f"{rule.needed} of {len(runners)} children cannot complete first: "
                f"give at least {max(1, rule.needed)}, and ask for at least one"
            )
        race = Join(
            runners,
            rule,
            take=take,
            timeout=check_seconds("timeout", timeout),
            is_race=True,
            raises_group=raises_group,
        )
        with self._races_lock:
            self._races = [*(each for each in self._races if not each.delivered), race]
        self._begin_race(race)
        return race

    def _begin_race(self, race: Join[Any]) -> None:
        """See to it that a race ends in time, and that its scope tells how if nobody asks."""


def _gather(
    children: Iterable[Child[R]], timeout: float | None, *, return_exceptions: bool
) -> Join[list[R]]:
    checked = check(children)
    return Join(
        checked,
        Rule(needed=len(checked), tolerated=0),
        take=lambda answers: [answers[at] for at in range(len(checked))],
        timeout=check_seconds("timeout", timeout),
        counts_any_end=return_exceptions,
    )


def _only(answers: dict[int, R]) -> R:
    (answer,) = answers.values()
    return answer


def _ended_at(entry: tuple[int, Child[Any]]) -> float:
    """Return when a child ended, so that a join of children that are over is decided justly."""
    ended = entry[1].ended_at
    return ended.timestamp() if ended is not None else math.inf


class AsCompleted(Generic[R]):
    """Gives children in the order in which they end: `for`, or `async for`.

    Returned by `supervisor.as_completed`, never built by hand.

    Args:
        children: The children.
        timeout: Seconds from now that may be waited; `None` for as long as it takes.
    """

    def __init__(self, children: Iterable[Child[R]], timeout: float | None) -> None:
        self._children = tuple(dict.fromkeys(children))
        self._timeout = timeout
        self._deadline = math.inf if timeout is None else _clock.monotonic() + timeout

    def __iter__(self) -> Iterator[Child[R]]:
        left = dict.fromkeys(self._children)
        over: queue.SimpleQueue[Child[R]] = queue.SimpleQueue()
        with self._telling(over.put):
            while left:
                for child in left:
                    child.refuse_deadlock()
                with self._waiting(left):
                    child = self._next(over, left)
                yield child

    async def __aiter__(self) -> AsyncIterator[Child[R]]:
        left = dict.fromkeys(self._children)
        over: asyncio.Queue[Child[R]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        with self._telling(lambda child: loop.call_soon_threadsafe(over.put_nowait, child)):
            while left:
                with self._waiting(left):
                    child = await self._anext(over, left)
                yield child

    @contextlib.contextmanager
    def _waiting(self, left: Iterable[Child[R]]) -> Iterator[None]:
        """Count as a waiter of every child that is left; who is given one may ask, or not."""
        with contextlib.ExitStack() as stack:
            for child in [*left]:
                stack.enter_context(child.being_awaited())
            yield

    def _next(self, over: queue.SimpleQueue[Child[R]], left: dict[Child[R], None]) -> Child[R]:
        while True:
            seconds = self._seconds_left()
            try:
                # In slices, open to interrupts.
                child = over.get(
                    timeout=min(math.inf if seconds is None else seconds, SLICE_SECONDS)
                )
            except queue.Empty:
                if seconds is not None and _clock.monotonic() >= self._deadline:
                    raise self._too_late(left) from None
            else:
                del left[child]
                return child

    async def _anext(self, over: asyncio.Queue[Child[R]], left: dict[Child[R], None]) -> Child[R]:
        await asyncio.sleep(0)  # who is over already is told of in the loop
        if over.empty():
            try:
                child = await asyncio.wait_for(over.get(), self._seconds_left())
            except asyncio.TimeoutError:
                raise self._too_late(left) from None
        else:
            child = over.get_nowait()
        del left[child]
        return child

    def _seconds_left(self) -> float | None:
        if math.isinf(self._deadline):
            return None
        return max(0.0, self._deadline - _clock.monotonic())

    def _too_late(self, left: Iterable[Child[R]]) -> TimeoutError:
        names = ", ".join(child.name for child in left)
        return TimeoutError(f"After {self._timeout:g} s these are not over: {names}")

    @contextlib.contextmanager
    def _telling(self, tell: Callable[[Child[R]], object]) -> Iterator[None]:
        def note(child: Child[R]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
                tell(child)

        for _, child in sorted(enumerate(self._children), key=_ended_at):
            child.add_done_callback(note)
        try:
            yield
        finally:
            for child in self._children:
                child.remove_done_callback(note)


class Children(list[Child[R]], Generic[R]):
    """The children of one `supervisor.map`, in the order of their parameters.

    A list, and what Prefect's `task.map` returns in spirit: `children.result()` and
    `await children` give all results.
    """

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        """Return all results, in order; see `Supervisor.gather`."""
        return self._gather(timeout, raise_on_failure).result()

    async def aresult(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        """Return all results, in order, waiting in the running loop."""
        return await self._gather(timeout, raise_on_failure)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all are over, whatever their outcomes.

        Args:
            timeout: Seconds after which to return all the same; `None` for as long as it takes.

        Raises:
            ValueError: If *timeout* is negative.
        """
        check_seconds("timeout", timeout)
        deadline = math.inf if timeout is None else _clock.monotonic() + timeout
        for child in self:
            left = deadline - _clock.monotonic()
            child.wait(None if math.isinf(left) else max(0.0, left))

    def __await__(self) -> Generator[Any, Any, list[R]]:
        return self.aresult().__await__()

    def _gather(self, timeout: float | None, raise_on_failure: bool) -> Join[list[R]]:
        return _gather(self, timeout, return_exceptions=not raise_on_failure)
