"""Help for testing supervised flows: throw-away servers and runners, with real processes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import httpx
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["LocalServer", "local_server", "running"]

_START_SECONDS = 120.0
_STOP_SECONDS = 15.0
_DRAIN_SECONDS = 10
_PORTS = range(20_000, 32_000)  # below those that Linux gives to whoever asks for any


@attrs.frozen
class LocalServer:
    """A Prefect server that belongs to a test.

    Args:
        url: Its API, for `PREFECT_API_URL`.
        home: Its `PREFECT_HOME`, with the database.
        env: What a process needs in its environment to talk to it.
    """

    url: str
    home: Path
    env: Mapping[str, str]


@contextlib.contextmanager
def local_server(
    *,
    home: Path | None = None,
    port: int | None = None,
    settings: Mapping[str, str] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Iterator[LocalServer]:
    """Run a Prefect server on a free port of the loopback interface, and stop it.

    It has all services, the cascade of cancellations included, which the ephemeral server of
    `prefect.testing.utilities.prefect_test_harness` lacks.

    Args:
        home: Where it keeps its database; a temporary folder by default.
        port: Where it listens; a free port by default.
        settings: Further Prefect settings as environment variables.
        progress: Called about twice a second with the seconds waited so far.

    Yields:
        The server, ready to answer.

    Raises:
        RuntimeError: If it does not answer within two minutes; the message carries its log.

    Example:
        ```python
        with local_server() as server, temporary_settings({PREFECT_API_URL: server.url}):
            nightly()
        ```
    """
    with contextlib.ExitStack() as stack:
        if home is None:
            folder = tempfile.TemporaryDirectory(prefix="supervised-", ignore_cleanup_errors=True)
            home = Path(stack.enter_context(folder))
        port = port or free_port()
        url = f"http://127.0.0.1:{port}/api"
        # Prefect's runners keep flows in a folder of a fixed name below the temporary one, which
        # on a shared machine belongs to whoever was there first.
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        # The profile's API URL must not win over the server's own.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        env |= {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "TMPDIR": str(home / "tmp"),
            **(settings or {}),
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui"]
        log = home / "server.log"
        process = stack.enter_context(
            running([*command, "--host", "127.0.0.1", "--port", str(port)], env=env, log=log)
        )
        _wait_until_healthy(url, process, log, progress)
        try:
            yield LocalServer(url, home, env)
        finally:
            # What this process has still to send would else be retried for a minute at exit.
            APILogWorker.drain_all(timeout=_DRAIN_SECONDS)
            EventsWorker.drain_all(timeout=_DRAIN_SECONDS)


@contextlib.contextmanager
def running(
    command: list[str], *, env: Mapping[str, str], log: Path, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, and end the whole group afterwards.

    Args:
        command: The command and its arguments.
        env: Its whole environment.
        log: File that its output is appended to.
        cwd: The folder it runs in; the current one by default.

    Yields:
        The process.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop_group(process)


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the leader to end, then end what is left of its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], log: Path, progress: Callable[[float], None]
) -> None:
    began = time.monotonic()
    while (waited := time.monotonic() - began) < _START_SECONDS and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2).is_success:
                return
        progress(waited)
        time.sleep(0.4)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"The Prefect server at {url} did not start:\n{tail}")


def free_port() -> int:
    """Return a port that nobody is given by chance before it is bound, which may take seconds."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"No port from {_PORTS.start} to {_PORTS.stop} is free")
