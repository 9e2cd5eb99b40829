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
        lines, ids = [line for line, _ in requests], [found for _, found in requests if found]
        runs = [self._client.read_flow_run(UUID(run_id)) for run_id in dict.fromkeys(ids)]
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
            lines,
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


@contextlib.contextmanager
def _requests() -> Iterator[list[tuple[str, str | None]]]:
    """Collect every request to the API, with the id of the flow run that it gives a state."""
    seen: list[tuple[str, str | None]] = []
    sync, asynchronous = (
        httpx.HTTPTransport.handle_request,
        httpx.AsyncHTTPTransport.handle_async_request,
    )

    def note(request: httpx.Request) -> None:
        path = request.url.path
        if path.endswith("/logs/"):
            return  # sent now and then, by a thread of Prefect's
        run = _SET_STATE.search(path)
        seen.append((_line(request) + " @" + threading.current_thread().name, run.group(1) if run else None))

    def handle(self: Any, request: httpx.Request) -> httpx.Response:
        note(request)
        return sync(self, request)

    async def handle_async(self: Any, request: httpx.Request) -> httpx.Response:
        note(request)
        return await asynchronous(self, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx.HTTPTransport, "handle_request", handle)
        patch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle_async)
        yield seen


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

    handler, loggers = Collector(), [logging.getLogger("prefect")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _normal(text: str | None, names: dict[str, str]) -> str | None:
    if text is None:
        return None
    text = _ID.sub("{id}", text)
    for name, stand_in in names.items():
        text = text.replace(name, stand_in)
    return re.sub(r"\d+\.\d{3,}", "{seconds}", re.sub(r"http://\S+", "{url}", text))


def _threads() -> set[str]:
    return {re.sub(r"\d+", "#", thread.name) for thread in threading.enumerate()}


def _left_behind(before: set[str]) -> set[str]:
    """Return the threads that a run leaves, once its short-lived ones have had time to end."""
    end = time.monotonic() + 5
    while (left := _threads() - before) and time.monotonic() < end:
        time.sleep(0.02)
    return left
