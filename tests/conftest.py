"""One server and one runner for the whole session; a folder of its own for every test."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before Prefect is imported: what a developer's shell says must not reach a test.
for name in [name for name in os.environ if name.startswith(("PREFECT_", "OTEL_"))]:
    del os.environ[name]
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile the package
_HOME = tempfile.TemporaryDirectory(prefix="supervised-home-", ignore_cleanup_errors=True)
os.environ["PREFECT_HOME"] = _HOME.name
os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"

import pytest
from hypothesis import settings
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    temporary_settings,
)
from support.world import FLOWS, World, eventually

from supervised.testing import LocalServer, local_server, running

# The same examples every time, so that a failure is of the change at hand; `explore` draws others.
# No deadline: shared machines stall for longer than Hypothesis' 200 ms.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("fixed")

_RUNNER_ENV = {
    "PREFECT_RUNNER_POLL_FREQUENCY": "2",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_LOGGING_LEVEL": "INFO",
}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A Prefect server on SQLite with all its services."""
    home = tmp_path_factory.mktemp("prefect")
    with local_server(home=home, progress=_say("the Prefect server")) as started:
        settings = {
            PREFECT_API_URL: started.url,
            PREFECT_HOME: home,
            PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False,
        }
        with temporary_settings(settings):
            yield started


@pytest.fixture(scope="session")
def runner(server: LocalServer) -> Iterator[None]:
    """A runner that serves every flow of tests/flows/tree.py as *name/test*."""
    command = [sys.executable, "serve.py"]
    env = {**server.env, **_RUNNER_ENV}
    log = server.home / "runner.log"
    with running(command, env=env, log=log, cwd=FLOWS):
        eventually(
            lambda: "being served" in log.read_text(errors="replace"),
            seconds=90,
            what="the deployments are served",
        )
        yield


@pytest.fixture
def world(server: LocalServer, tmp_path: Path) -> Iterator[World]:
    """The server, with a folder in which this test's processes leave their marks."""
    with get_client(sync_client=True) as client:
        world = World(server, tmp_path, client)
        yield world
        world.end_all()


@pytest.fixture
def deployed(world: World, runner: None) -> World:
    """The world, with the deployments being served."""
    return world


def pytest_configure() -> None:
    """Take SIGTERM like Ctrl-C: whoever ends the tests ends the server and runner with them."""
    # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything that asks for a server is marked, so that the fast suite can leave it out."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A failed test shows what its runs and processes did, while they can still be asked."""
    report = yield
    world = getattr(item, "funcargs", {}).get("world")
    if world is not None and report.when == "call" and report.failed:
        report.sections += world.evidence()
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    """Show how long children have outlived their parents."""
    rows = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "kill matrix"
    ]
    if rows:
        terminalreporter.section("seconds that children have outlived their parent")
    for kind, way, seconds in rows:
        slowest = max(seconds, key=seconds.get)
        cells = "  ".join(f"{name} {value:g}" for name, value in sorted(seconds.items()))
        terminalreporter.line(f"{kind}, {way}: slowest {slowest}, {seconds[slowest]:g} s")
        terminalreporter.line(f"    {cells}")


def _say(what: str):
    def progress(seconds: float) -> None:
        if int(seconds) % 5 == 0:
            sys.__stderr__.write(f"\rstarting {what}: {seconds:.0f} s ")
            sys.__stderr__.flush()

    return progress
