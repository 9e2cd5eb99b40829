"""The command line: `supervised tree | cancel | orphans | reap | guard`.

Exit codes: 0 done; 1 a run could not be verified; 2 the command was wrong, or there is no such run;
3 the server could not be reached, or refused; 70 a bug of ours; 130 interrupted; 141 nobody reads
what is printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID  # noqa: TC003 - the command line is read off the annotations

import anyio
import attrs
import httpx
import uvicorn
from cyclopts import App, CycloptsError, Parameter, validators
from fastapi import FastAPI, Response
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table
from rich.tree import Tree

from supervised._api import open_orchestrator
from supervised._by_hand import cancel_tree
from supervised._errors import NO_API, NoApiError
from supervised._lease import LeaseReader
from supervised._orphans import find_for_certain
from supervised._text import first_line, text_of
from supervised._tree import Node, key_of, place, read_tree
from supervised._types import CancelReason
from supervised.guard import Guard

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from prefect.client.schemas.objects import FlowRun

    from supervised._api import PrefectOrchestrator
    from supervised._orphans import Orphan
    from supervised._types import Receipt, TeardownReport

DONE, UNVERIFIED, WRONG, UNREACHABLE = 0, 1, 2, 3
BUG, INTERRUPTED, UNREAD = 70, 130, 141  # as sysexits.h and shells have it
_WIDE = 10_000
_REFRESH_SECONDS = 1.0
_MESSAGE_LENGTH = 120
_CLOSE_SECONDS = 5.0
_COLOURS = {
    "COMPLETED": "green",
    "FAILED": "red",
    "CRASHED": "orange1",
    "CANCELLED": "bright_black",
    "CANCELLING": "yellow",
    "RUNNING": "bright_blue",
}


class _Console(Console):
    """Where a reader that has gone is an error, which `run` answers; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


app = App(
    name="supervised",
    console=_Console(),
    help="Look at, and end, the trees of runs that supervised flows launch.",
    version_flags=["--version"],
    result_action="return_value",
)
errors = Console(stderr=True)

AsJson = Annotated[bool, Parameter(name="--json", negative="")]
"""Print JSON instead of a table."""

Seconds = Annotated[float, Parameter(validator=validators.Number(gte=0))]
Interval = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Port = Annotated[int, Parameter(validator=validators.Number(gte=0, lte=65535))]


def main() -> None:
    """Run the command line."""
    sys.exit(run(sys.argv[1:]))


class NoSuchRunError(Exception):
    """The id that was given is no flow run's."""


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors are one line on standard error."""
    try:
        code = app(arguments, exit_on_error=False, print_error=False)
        with contextlib.suppress(AttributeError):  # under `>&-` there is no standard output
            sys.stdout.flush()
    except BrokenPipeError:
        # Or Python would fail once more when it flushes what is left, and tell of that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except Exception as exc:
        if (said := _explained(_only(exc))) is not None:
            return _complain(*said)
        traceback.print_exc()
        return BUG
    return code if isinstance(code, int) else DONE


def _only(exc: BaseException) -> BaseException:
    """Return the exception that a group carries, if it carries one only."""
    inner: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    return _only(inner[0]) if len(inner) == 1 else exc


def _explained(exc: BaseException) -> tuple[str, int] | None:
    """Return what to tell of an error and the exit code; `None` for a bug of ours."""
    if isinstance(exc, (CycloptsError, NoSuchRunError)):
        return str(exc), WRONG
    if isinstance(exc, NoApiError):
        return str(exc), UNREACHABLE
    if isinstance(exc, PrefectHTTPStatusError):
        return _refusal(exc), UNREACHABLE
    if isinstance(exc, httpx.TransportError):
        url = PREFECT_API_URL.value()
        return f"The Prefect server at {url} does not answer: {exc!r}", UNREACHABLE
    if isinstance(exc, (json.JSONDecodeError, ValidationError, httpx.InvalidURL, OverflowError)):
        why = first_line(text_of(exc))
        return f"PREFECT_API_URL does not lead to a Prefect server: {why}", UNREACHABLE
    return None


def _complain(text: str, code: int) -> int:
    errors.print(f"supervised: {text}", style="red", soft_wrap=True, markup=False, highlight=False)
    return code


def _refusal(exc: PrefectHTTPStatusError) -> str:
    status = exc.response.status_code
    if status in {401, 403}:
        return f"The Prefect server refused ({status}): check PREFECT_API_KEY, or the auth string"
    return f"The Prefect server answered {status}: {exc.response.text[:200]}"


def _with_api(act: Callable[[PrefectOrchestrator], Awaitable[int]]) -> int:
    if not PREFECT_API_URL.value():
        # Prefect would start a server for this command alone, and there is nothing on that.
        raise NoApiError(NO_API)

    async def run() -> int:
        async with open_orchestrator() as api:
            return await act(api)

    return anyio.run(run)


# -- tree -----------------------------------------------------------------------------------------


@app.command
def tree(run: UUID, /, *, once: bool = False, as_json: AsJson = False) -> int:
    """Show a run and everything below it; on a terminal, until all of it is over.

    Args:
        run: Id of any flow run: a supervised one, or a plain one.
        once: Show it once, also on a terminal.
        as_json: Print JSON.
    """

    async def show(api: PrefectOrchestrator) -> int:
        node = await _tree(api, run)
        if as_json:
            _print_json(_node_json(node))
        elif once or not _console().is_terminal:
            _console().print(_drawn(node))
        else:
            await _follow(api, node)
        return DONE

    return _with_api(show)


async def _tree(api: PrefectOrchestrator, run_id: UUID) -> Node:
    node = await read_tree(api, run_id)
    if node is None:
        raise NoSuchRunError(f"There is no flow run {run_id}. List runs with: prefect flow-run ls")
    return node


async def _follow(api: PrefectOrchestrator, node: Node) -> None:
    with Live(_drawn(node), console=_console(), auto_refresh=False) as live:
        while any(each.is_live for _, each in node.walk()):
            await anyio.sleep(_REFRESH_SECONDS)
            node = await _tree(api, node.run.id)
            live.update(_drawn(node), refresh=True)


def _drawn(node: Node, into: Tree | None = None) -> Tree:
    state = node.run.state
    colour = _COLOURS.get(state.type.value, "white") if state is not None else "white"
    name = state.name if state is not None else "unknown"
    told = f" [dim]{_escaped(state.message)}[/]" if state is not None and state.message else ""
    label = (
        f"{_escaped(node.run.name)} [{colour}]{name}[/] [dim]{_age(node.run)} {place(node.run)} "
        f"{node.run.id}[/]{told}"
    )
    drawn = Tree(label) if into is None else into.add(label)
    for child in node.below:
        _drawn(child, drawn)
    return drawn


def _escaped(text: str | None) -> str:
    return escape(text.splitlines()[0][:_MESSAGE_LENGTH]) if text else ""


def _age(flow_run: FlowRun) -> str:
    begin = flow_run.start_time or flow_run.created
    if begin is None:
        return "-"
    end = flow_run.end_time or datetime.now(timezone.utc)
    return f"{(end - begin).total_seconds():.0f} s"


def _node_json(node: Node) -> dict[str, Any]:
    return {**_run_json(node.run), "below": [_node_json(child) for child in node.below]}


def _run_json(flow_run: FlowRun) -> dict[str, Any]:
    state = flow_run.state
    return {
        "id": str(flow_run.id),
        "name": flow_run.name,
        "key": key_of(flow_run),
        "state": state.name if state is not None else None,
        "type": state.type.value if state is not None else None,
        "message": state.message if state is not None else None,
        "start_time": flow_run.start_time.isoformat() if flow_run.start_time else None,
        "end_time": flow_run.end_time.isoformat() if flow_run.end_time else None,
        "where": place(flow_run),
    }


# -- cancel ---------------------------------------------------------------------------------------


@app.command
def cancel(
    run: UUID,
    /,
    *,
    subtree: bool = False,
    dry_run: bool = False,
    grace_seconds: Seconds = 20.0,
    as_json: AsJson = False,
) -> int:
    """Cancel a run with everything below it, all levels at once, and verify that it ends.

    Args:
        run: Id of any flow run; it may be over already, and its tree still alive.
        subtree: Leave the run itself alone.
        dry_run: Only show what would be cancelled.
        grace_seconds: Seconds to wait for the runs to end.
        as_json: Print JSON.
    """

    async def act(api: PrefectOrchestrator) -> int:
        node = await _tree(api, run)
        live = [each.run for depth, each in node.walk() if each.is_live and (depth or not subtree)]
        if dry_run:
            _list_runs(live, as_json=as_json, title="would be cancelled")
            return DONE
        reason = CancelReason(source="explicit", message="it was cancelled from the command line")
        with _progress(f"cancelling {len(live)} run(s)", quiet=as_json):
            report = await cancel_tree(
                api, node, reason=reason, grace_seconds=grace_seconds, with_top=not subtree
            )
        code = _report([report] if report.receipts else [], as_json=as_json)
        if code == UNVERIFIED:
            _complain(f"some may still be alive. Look again with: supervised tree {run}", code)
        return code

    try:
        return _with_api(act)
    except KeyboardInterrupt:
        told = f"Interrupted. What was asked to end goes on ending: supervised tree {run}"
        return _complain(told, INTERRUPTED)


# -- orphans --------------------------------------------------------------------------------------


@app.command
def orphans(*, as_json: AsJson = False) -> int:
    """List live runs whose parent is over or lost, and that should have ended with it.

    Args:
        as_json: Print JSON.
    """

    async def act(api: PrefectOrchestrator) -> int:
        with _progress("looking for signs of life", quiet=as_json):
            found = await find_for_certain(api, LeaseReader())
        _list_orphans(found, as_json=as_json)
        return DONE

    return _with_api(act)


@app.command
def reap(*, dry_run: bool = False, grace_seconds: Seconds = 20.0, as_json: AsJson = False) -> int:
    """End all orphans with everything below them.

    Args:
        dry_run: Only list them.
        grace_seconds: Seconds that ending the orphans of one parent may take.
        as_json: Print JSON.
    """
    if dry_run:
        return orphans(as_json=as_json)

    async def act(api: PrefectOrchestrator) -> int:
        service = Guard(api, grace_seconds=grace_seconds)
        with _progress("ending orphans", quiet=as_json):
            reports = await service.look_for_certain()
        return _report(reports, as_json=as_json)

    return _with_api(act)


# -- guard ----------------------------------------------------------------------------------------


@app.command
def guard(
    *,
    once: bool = False,
    interval: Interval = 30.0,
    grace_seconds: Seconds = 20.0,
    health_port: Port = 0,
    health_host: str = "127.0.0.1",
) -> int:
    """Watch for orphans and end them, until told to stop.

    Args:
        once: Look once and end; for cron.
        interval: Seconds between two looks when nothing is heard.
        grace_seconds: Seconds that ending the orphans of one parent may take.
        health_port: Answer GET /health on this port, with 200 or 503.
        health_host: The address to answer on; a container's is 0.0.0.0.
    """

    async def act(api: PrefectOrchestrator) -> int:
        service = Guard(api, interval_seconds=interval, grace_seconds=grace_seconds)
        if once:
            return _report(await service.look_for_certain(), as_json=False)
        if not health_port:
            await _guard_until_told(service)
            return DONE
        try:
            listening = socket.create_server((health_host, health_port))
        except OSError as exc:
            return _complain(f"Cannot answer on {health_host}:{health_port}: {exc}", WRONG)
        with listening, answering_health(service, listening):
            await _guard_until_told(service)
        return DONE

    return _with_api(act)


async def _guard_until_told(service: Guard) -> None:
    """Guard until SIGTERM or Ctrl-C."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.run)
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                tasks.cancel_scope.cancel()


@contextlib.contextmanager
def answering_health(service: Guard, listening: socket.socket) -> Iterator[None]:
    """Answer on one route, with what an orchestrator of containers asks of a service."""
    api = FastAPI()

    @api.get("/health")
    def health(response: Response) -> dict[str, bool | int]:
        response.status_code = 200 if service.is_healthy else 503
        return {"healthy": service.is_healthy, "unverified": service.unverified}

    server = uvicorn.Server(uvicorn.Config(api, log_level="warning"))
    # In a thread it leaves the signals to us.
    thread = threading.Thread(
        target=server.run, args=([listening],), name="supervised-health", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_CLOSE_SECONDS)


# -- printing -------------------------------------------------------------------------------------


def _console() -> Console:
    """Return where tables go: off a terminal, lines are as long as what they tell."""
    console = _Console()
    return console if console.is_terminal else _Console(width=_WIDE)


def _ids() -> Column:
    return Column("id", no_wrap=True, overflow="ignore")  # half of one is of no use


def _progress(what: str, *, quiet: bool) -> Any:
    return errors.status(what, spinner="line") if not quiet else contextlib.nullcontext()


def _list_runs(runs: list[FlowRun], *, as_json: bool, title: str) -> None:
    if as_json:
        _print_json([_run_json(each) for each in runs])
        return
    table = Table("run", "state", "age", "where", _ids(), title=f"{len(runs)} run(s) {title}")
    for each in runs:
        table.add_row(each.name, str(each.state_name), _age(each), place(each), str(each.id))
    _console().print(table)


def _list_orphans(found: list[Orphan], *, as_json: bool) -> None:
    if as_json:
        rows = [{**_run_json(o.run), "parent": str(o.parent_id), "why": o.why} for o in found]
        _print_json(rows)
        return
    table = Table("run", "state", "age", _ids(), "why", title=f"{len(found)} orphan(s)")
    for each in found:
        run = each.run
        table.add_row(run.name, str(run.state_name), _age(run), str(run.id), each.why)
    _console().print(table)


def _report(reports: list[TeardownReport], *, as_json: bool) -> int:
    if as_json:
        _print_json([_receipt_json(r) for report in reports for r in report.receipts])
    else:
        for report in reports:
            _console().print(str(report), markup=False, highlight=False, soft_wrap=True)
        if not reports:
            _console().print("nothing was alive")
    return DONE if all(report.ok for report in reports) else UNVERIFIED


def _receipt_json(receipt: Receipt) -> dict[str, Any]:
    return attrs.asdict(receipt, value_serializer=lambda _, __, value: _plain(value))


def _plain(value: object) -> object:
    return value if isinstance(value, (str, int, float, type(None), list, tuple)) else str(value)


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
