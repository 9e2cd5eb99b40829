"""What is asked for in the same instant, asked for in one request, or acted upon in one go."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio
import attrs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Sequence

    from anyio.abc import TaskGroup

T = TypeVar("T")
R = TypeVar("R")
H = TypeVar("H", bound="Hashable")

_AT_ONCE = 2  # while one answer is being read, the server has something to do
_COLLECT_SECONDS = 0.01  # in which a loop that spawns has spawned dozens
_MOST_COLLECT_SECONDS = 0.1
_PATIENT_SECONDS = 0.5  # while a request is under way, which takes that long


class Batches(Generic[T, R]):
    """Collects items while a request is under way, and sends them all with the next one.

    One alone waits for next to nothing, and a thousand make a few requests, two of them under way
    at a time, instead of a thousand connections. Lives in one event loop; there is a task only
    while there is something to send.

    Args:
        send: Makes one request for items of one kind. Returns what each has led to, in their
            order: a result, or an exception. What it raises is what all of them have led to.
        limit: How many items one request may carry.
    """

    def __init__(
        self,
        send: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]],
        *,
        limit: int,
    ) -> None:
        self._send = send
        self._limit = limit
        self._waiting: dict[Hashable, deque[_Entry[T, R]]] = {}
        self._under_way: list[list[_Entry[T, R]]] = []
        self._news = asyncio.Event()  # something waits, or has been answered
        self._enough = asyncio.Event()  # a request is full, or has been answered
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, kind: Hashable, item: T) -> R:
        """Have an item sent together with others of its kind, and return what it has led to.

        Who is cancelled here before the item is sent takes it back; afterwards the request goes
        on for the sake of the others.

        Raises:
            Exception: What the item, or the whole request, has led to.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()
        queue = self._waiting.setdefault(kind, deque())
        queue.append(_Entry(item, answer, loop.time()))
        self._news.set()
        if len(queue) >= self._limit:
            self._enough.set()
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all())
        return await answer

    async def close(self) -> None:
        """Send nothing more; who still waits is cancelled."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender])
            self._give_up()  # a task that is cancelled before it began has no `finally`

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                async with anyio.create_task_group() as tasks:
                    await self._send_some(tasks)
        finally:
            self._give_up()

    def _give_up(self) -> None:
        self._sender = None
        # Those under way, too: a task that is cancelled before its first step answers nobody.
        for entry in itertools.chain(*self._waiting.values(), *self._under_way):
            entry.answer.cancel()
        self._waiting.clear()
        self._under_way.clear()

    async def _send_some(self, tasks: TaskGroup) -> None:
        """Send what waits, and what comes until the last answer is there."""
        while self._waiting or self._under_way:
            if self._waiting and len(self._under_way) < _AT_ONCE:
                await self._collect()
                self._under_way.append(batch := self._next_batch())
                tasks.start_soon(self._send_batch, batch)
                continue
            self._news.clear()
            await self._news.wait()

    async def _collect(self) -> None:
        """Let more come before the next request, until it is full or they have waited enough.

        What comes one by one while a request is under way is one request, too.
        """
        queue = next(iter(self._waiting.values()))  # of the kind that came first
        if self._under_way and len(queue) < self._limit:
            self._enough.clear()
            waited = asyncio.get_running_loop().time() - queue[0].since
            with anyio.move_on_after(_PATIENT_SECONDS - waited):
                await self._enough.wait()
        known = 0  # a loop that was busy has not yet let all of them come
        with anyio.move_on_after(_MOST_COLLECT_SECONDS):
            while known < (come := len(queue)) < self._limit:
                known = come
                await asyncio.sleep(_COLLECT_SECONDS)

    async def _send_batch(self, batch: list[_Entry[T, R]]) -> None:
        try:
            if batch:
                await self._answer(batch)
        finally:
            # Not by `remove`: the items may be parameters that cannot be compared.
            self._under_way = [each for each in self._under_way if each is not batch]
            self._news.set()
            self._enough.set()

    def _next_batch(self) -> list[_Entry[T, R]]:
        """Take what waits of the kind that came first, as much as one request may carry."""
        kind, queue = next(iter(self._waiting.items()))
        batch: list[_Entry[T, R]] = []
        while queue and len(batch) < self._limit:
            entry = queue.popleft()
            if not entry.answer.done():
                batch.append(entry)
        del self._waiting[kind]
        if queue:
            self._waiting[kind] = queue  # the other kinds have their turn first
        return batch

    async def _answer(self, batch: list[_Entry[T, R]]) -> None:
        answers = [entry.answer for entry in batch]
        pairs: Sequence[tuple[asyncio.Future[R], R | Exception]]
        try:
            results = await self._send([entry.item for entry in batch])
            pairs = list(zip(answers, results, strict=True))
        except Exception as exc:
            pairs = [(answer, exc) for answer in answers]
        except BaseException:  # the control plane ends: so does whoever waits
            for answer in answers:
                answer.cancel()
            raise
        for answer, result in pairs:
            if answer.done():
                continue
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)


@attrs.frozen(eq=False)
class _Entry(Generic[T, R]):
    """An item, who waits for what it leads to, and since when."""

    item: T
    answer: asyncio.Future[R]
    since: float


class Groups(Generic[H]):
    """Collects items for an instant, and has all of them acted upon together.

    That may take long, and nobody else waits for it: what comes meanwhile is another group. The
    more of them are under way, the longer the next one is collected, so that hundreds of items that
    come one after the other are a few groups, too. Lives in one event loop.

    Args:
        act: Does what is to be done for a group.
    """

    def __init__(self, act: Callable[[Sequence[H]], Awaitable[None]]) -> None:
        self._act = act
        self._next: _Group[H] = _Group()
        self._known: set[H] = set()
        self._under_way = 0

    async def add(self, item: H) -> None:
        """Have an item acted upon, unless it already is, and wait until its group has been.

        The task of the group's first does it for all: if that is cancelled, nobody does.
        """
        if item in self._known:
            return
        self._known.add(item)
        group = self._next
        group.items.append(item)
        if len(group.items) > 1:
            await group.is_over.wait()
            return
        try:
            await self._collect()
            await self._act_on(group.items)
        finally:
            self._known.difference_update(group.items)
            group.is_over.set()

    async def _collect(self) -> None:
        seconds = _COLLECT_SECONDS * (1 + self._under_way)
        try:
            await asyncio.sleep(min(seconds, _PATIENT_SECONDS))
        finally:
            self._next = _Group()

    async def _act_on(self, items: Sequence[H]) -> None:
        self._under_way += 1
        try:
            await self._act(items)
        finally:
            self._under_way -= 1


@attrs.define(eq=False)
class _Group(Generic[H]):
    """Items that are acted upon together, and whether that is over."""

    items: list[H] = attrs.field(factory=list)
    is_over: asyncio.Event = attrs.field(factory=asyncio.Event)
