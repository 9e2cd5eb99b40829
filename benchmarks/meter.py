"""How many requests a process makes, how long things take, and a process for each of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import attrs
import httpx

T = TypeVar("T")


@attrs.define
class Meter:
    """What was used between the beginning of a block and its end, or until now.

    Args:
        began: When, by `time.perf_counter`.
        requests: How many, by method and path; ids are left out.
        ended: When the block ended.
    """

    began: float
    requests: Counter[str] = attrs.field(factory=Counter)
    ended: float | None = None

    @property
    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.began


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Count every HTTP request of this process, whichever thread makes it."""
    meter = Meter(time.perf_counter())
    send, asend = httpx.Client.send, httpx.AsyncClient.send

    def counted(self, request, *args, **options):
        meter.requests[_name(request)] += 1
        return send(self, request, *args, **options)

    async def acounted(self, request, *args, **options):
        meter.requests[_name(request)] += 1
        return await asend(self, request, *args, **options)

    httpx.Client.send, httpx.AsyncClient.send = counted, acounted
    try:
        yield meter
    finally:
        meter.ended = time.perf_counter()
        httpx.Client.send, httpx.AsyncClient.send = send, asend


def _name(request: httpx.Request) -> str:
    parts = [part if len(part) != 36 else "{id}" for part in request.url.path.split("/")]
    return f"{request.method} {'/'.join(parts)}"


def in_a_process_of_its_own(of: Callable[..., T], *given: object) -> T:
    """Call a function without what others have imported, set or left in memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(of, *given).result()
