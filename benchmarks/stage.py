"""What the benchmarks play on: a throw-away server, runners of the test flows, perhaps a guard."""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from supervised.testing import LocalServer, local_server, running

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
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
