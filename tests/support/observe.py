"""Everything about a flow run that somebody could notice, in a form that compares."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import re
import threading
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs
import httpx
import pytest
from prefect.client.schemas.objects import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prefect.client.orchestration import SyncPrefectClient

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# Where Prefect sends logs and events, now and then and for several runs at once.
_BACKGROUND = {"APILogWorkerThread", "EventsWorkerThread", "GlobalEventLoopThread"}
_BUSY = {408, 429, 502, 503}
_SET_STATE = re.compile(rf"/flow_runs/({_ID.pattern})/set_state$")


@attrs.frozen
class Observed:
    """What a run of a flow looked like from outside and, where it asked, from inside."""

    outcome: object
    states: list[tuple[str, str | None, str | None]]
    logs: list[str]
    requests: list[str]
    hooks: list[str]
    threads: list[set[str]]
    left_behind: set[str]


class Observer:
    """Watches runs; flows and hooks tell it what it cannot see."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self.hooks: list[str] = []
        self.threads: list[set[str]] = []

    def look(self) -> None:
        """Note the threads of this moment; called by the body of a flow."""
        self.threads.append(_threads())

    def hook(self, kind: str) -> Callable[..., None]:
        """Return a hook of the user that notes what it is called with."""

        def hook(flow: Any, flow_run: Any, state: Any) -> None:
            self.hooks.append(f"{kind}: {flow.name} {state.name} {flow_run.state.name}")

        hook.__name__ = f"{kind}_hook"
        return hook

    def observe(self, run: Callable[[], object]) -> Observed:
        """Run a flow and return all that can be seen of it."""
        self.hooks, self.threads = [], []
        before = _threads()
        with _requests() as requests, _log_lines() as logs:
            outcome = _outcome_of(run)
        ids = dict.fromkeys(r.flow_run_id for r in requests if r.flow_run_id is not None)
        runs = [self._client.read_flow_run(UUID(run_id)) for run_id in ids]
        names = {run.name: "{run}" for run in runs}
        states = [
            (run.state.type.value, run.state.name, _normal(run.state.message, names))
            for run in runs
            if run.state is not None
        ]
        return Observed(
            outcome,
            states,
            [_normal(line, names) or "" for line in logs],
            [request.line for request in requests],
            self.hooks,
            self.threads,
            _left_behind(before),
        )


def _outcome_of(run: Callable[[], object]) -> object:
    try:
        result = run()
    except BaseException as exc:
        return type(exc), str(exc)
    if isinstance(result, State):
        stored = result.result(raise_on_failure=False)
        assert not inspect.isawaitable(stored)
        shown = repr(stored) if isinstance(stored, BaseException) else stored
        return State, result.type, result.name, result.message, shown
    return result


@attrs.define
class _Request:
    line: str
    flow_run_id: str | None
    is_answered: bool = False


@contextlib.contextmanager
def _requests() -> Iterator[list[_Request]]:
    """Collect every request to the API, with the id of the flow run that it gives a state.

    What the server was too busy for is left out, because Prefect's client asks again.
    """
    seen: list[_Request] = []
    sync = httpx.HTTPTransport.handle_request
    asynchronous = httpx.AsyncHTTPTransport.handle_async_request

    def note(request: httpx.Request) -> _Request:
        run = _SET_STATE.search(request.url.path)
        noted = _Request(_line(request), run.group(1) if run else None)
        if threading.current_thread().name not in _BACKGROUND:
            seen.append(noted)
        return noted

    def handle(self: Any, request: httpx.Request) -> httpx.Response:
        noted = note(request)
        response = sync(self, request)
        noted.is_answered = response.status_code not in _BUSY
        return response

    async def handle_async(self: Any, request: httpx.Request) -> httpx.Response:
        noted = note(request)
        response = await asynchronous(self, request)
        noted.is_answered = response.status_code not in _BUSY
        return response

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx.HTTPTransport, "handle_request", handle)
        patch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle_async)
        yield seen
        seen[:] = [noted for noted in seen if noted.is_answered]


def _line(request: httpx.Request) -> str:
    """Say what a request is: where it goes, which fields it sends, and a state in words."""
    line = f"{request.method} {_ID.sub('{id}', request.url.path)}"
    body = json.loads(request.content) if request.content else {}
    if not isinstance(body, dict):
        return line
    if isinstance(state := body.get("state"), dict):
        line += f" {state.get('type')} {state.get('name')}"
    return f"{line} {','.join(sorted(body))}"


@contextlib.contextmanager
def _log_lines() -> Iterator[list[str]]:
    """Collect what Prefect and its users log; tracebacks are no part of a message."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.name} {record.getMessage()}")

    handler, logger = Collector(), logging.getLogger("prefect")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def _normal(text: str | None, names: dict[str, str]) -> str | None:
    if text is None:
        return None
    text = _ID.sub("{id}", text)
    for name, stand_in in names.items():
        text = text.replace(name, stand_in)
    return re.sub(r"\d+\.\d{3,}", "{seconds}", re.sub(r"http://\S+", "{url}", text))


def _threads() -> set[str]:
    return {re.sub(r"0x[0-9a-f]+|\d+", "#", thread.name) for thread in threading.enumerate()}


def _left_behind(before: set[str]) -> set[str]:
    """Return the threads that a run leaves, once its short-lived ones have had time to end."""
    end = time.monotonic() + 5
    while (left := _threads() - before) and time.monotonic() < end:
        time.sleep(0.02)
    return left
