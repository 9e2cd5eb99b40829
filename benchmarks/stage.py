"""What the benchmarks play on: a throw-away server, runners of the test flows, perhaps a guard."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from prefect import flow
from prefect.client.orchestration import PrefectClient, SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from supervised.testing import LocalServer, local_server, running

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
sys.path.insert(0, str(TESTS))
from support.postgres import find_binaries, local_postgres  # noqa: E402
from support.world import World, eventually  # noqa: E402

DEPLOYMENTS = 12  # of a runner, tests/flows/serve.py
console = Console(stderr=True)


class Stage:
    """A server, and what serves and guards its deployments.

    Args:
        home: Where everything writes.
        server: The server.
        client: A client of it.
        stack: What ends it all.
    """

    def __init__(
        self,
        home: Path,
        server: LocalServer,
        client: SyncPrefectClient,
        stack: contextlib.ExitStack,
    ) -> None:
        self.home = home
        self.server = server
        self.client = client
        self._stack = stack

    def world(self) -> World:
        """Return the server with a folder for the marks of one tree."""
        return World(self.server, Path(tempfile.mkdtemp(dir=self.home)), self.client)

    def serve(self, name: str) -> psutil.Process:
        """Serve all test flows as *flow/name*."""
        env = {**self.server.env, "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
        log = self.home / f"{name}.log"
        command = [sys.executable, "serve.py", name]
        context = running(command, env=env, log=log, cwd=TESTS / "flows")
        process = self._stack.enter_context(context)
        eventually(lambda: self._is_served(name), seconds=90, what=f"{name} is served")
        return psutil.Process(process.pid)

    def _is_served(self, name: str) -> bool:
        found = [each for each in self.client.read_deployments() if each.name == name]
        return len(found) >= DEPLOYMENTS and all(each.status.value == "READY" for each in found)

    @contextlib.contextmanager
    def guard(self, *options: str) -> Iterator[Path]:
        """Run a guard, and yield the path of its log."""
        command = [sys.executable, "-m", "supervised.cli", "guard", *options]
        log = self.home / "guard.log"
        with running(command, env=self.server.env, log=log):
            yield log


@contextlib.contextmanager
def open_stage() -> Iterator[Stage]:
    """Start a server, and a runner of the test flows as *flow/test*."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        console.print("starting a server and a runner ...")
        server = stack.enter_context(local_server(home=home))
        stack.enter_context(temporary_settings({PREFECT_API_URL: server.url}))
        client = stack.enter_context(get_client(sync_client=True))
        stage = Stage(home, server, client, stack)
        stage.serve("test")
        yield stage


def spread(values: list[float]) -> str:
    """Return median and range, for people."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


DEPLOYMENT = "child/unserved"
_BULK = 50


@flow
def child(part: int = 0) -> None:
    """What the children would run, if anybody served them."""


async def deploy_child() -> None:
    """Make the deployment that nobody serves."""
    async with get_client() as client:
        flow_id = await client.create_flow(child)
        schema = {"title": "Parameters", "properties": {"part": {"type": "integer"}}}
        await client.create_deployment(flow_id, "unserved", parameter_openapi_schema=schema)


def children_in(state: str, parent: str) -> dict[str, object]:
    """Return a filter for the children of a run that are in a state."""
    return {
        "parent_flow_run_id": {"any_": [parent]},
        "state": {"type": {"any_": [state]}},
    }


async def set_children(
    client: PrefectClient, parent: str, before: str, after: str, count: int
) -> None:
    """Set the children of a run that are in one state to another, from outside."""
    body = {
        "flow_runs": children_in(before, parent),
        "state": {"type": after, "name": after.title()},
        "force": True,
        "limit": _BULK,
    }
    for _ in range(0, count, _BULK):
        await client.request("POST", "/flow_runs/bulk_set_state", json=body)


def parser(doc: str | None, *, repetitions: int | None = None) -> argparse.ArgumentParser:
    """Make a parser with the options that the scripts share."""
    made = argparse.ArgumentParser(description=doc)
    made.add_argument("--databases", nargs="*", default=databases(), choices=databases())
    if repetitions is not None:
        made.add_argument("--repetitions", type=int, default=repetitions)
    return made


def databases() -> list[str]:
    """Return the databases that a server can have on this machine."""
    return ["sqlite"] if find_binaries() is None else ["sqlite", "postgresql"]


@contextlib.contextmanager
def served(server: LocalServer, script: Path) -> Iterator[Stage]:
    """Run a script that serves deployments, and wait until it does."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(get_client(sync_client=True))
        env = {**server.env, "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
        log = server.home / f"{script.stem}.log"
        command = [sys.executable, script.name]
        stack.enter_context(running(command, env=env, log=log, cwd=script.parent))
        eventually(
            lambda: "being served" in log.read_text(errors="replace"),
            seconds=90,
            what=f"{script.name} serves its deployments",
        )
        yield Stage(server.home, server, client, stack)


@contextlib.contextmanager
def only_server(database: str, *, cascades: bool = False) -> Iterator[LocalServer]:
    """Start a server and nothing else; nothing marks runs as late that nobody serves.

    Unless it *cascades*, it does not look every 20 s either whether the parent of each live child
    has been cancelled (server/services/cancellation_cleanup.py): with 500 of them that takes 13 s
    of every 20, at the expense of whoever is measured then.
    """
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        settings = {"PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false"}
        if not cascades:
            settings["PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS"] = "3600"
        if database == "postgresql":
            url = stack.enter_context(local_postgres(find_binaries()))
            settings["PREFECT_API_DATABASE_CONNECTION_URL"] = url
        server = stack.enter_context(local_server(home=home, settings=settings))
        stack.enter_context(temporary_settings({PREFECT_API_URL: server.url}))
        yield server
