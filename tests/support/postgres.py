"""A throw-away PostgreSQL from the binaries that are installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervised.testing._local import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0


def find_binaries() -> Path | None:
    """Return the folder of PostgreSQL's programs; the newest if there are several."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    folders = Path("/usr/lib/postgresql").glob("*/bin")
    return max(folders, key=lambda path: float(path.parent.name), default=None)


@contextlib.contextmanager
def local_postgres(binaries: Path) -> Iterator[str]:
    """Run a PostgreSQL of its own in a temporary folder.

    Args:
        binaries: Where its programs are.

    Yields:
        What Prefect's server is to connect to.
    """
    who = _user()
    folder = Path(tempfile.mkdtemp(prefix="supervised-pg-"))
    if who:
        shutil.chown(folder, who["user"], who["group"])
    try:
        data, port = folder / "data", free_port()
        create = ["initdb", "-D", data, "-U", "prefect", "-A", "trust", "--no-sync", "-E", "UTF8"]
        _run(binaries, create, cwd=folder, **who)
        options = [
            "-c",
            "fsync=off",
            "-c",
            "max_connections=200",
            "-c",
            "listen_addresses=127.0.0.1",
        ]
        command = [binaries / "postgres", "-D", data, "-p", str(port), "-k", folder, *options]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **who)
        try:
            _wait_until_ready(binaries, port)
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # its fast shutdown
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_STOP_SECONDS)
            server.kill()
            server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _user() -> dict[str, Any]:
    """Return who it is to run as: it refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam("postgres")
    return {"user": entry.pw_uid, "group": entry.pw_gid}


def _run(binaries: Path, command: list[Any], **options: Any) -> None:
    command[0] = binaries / command[0]
    subprocess.run(command, check=True, capture_output=True, timeout=_START_SECONDS, **options)


def _wait_until_ready(binaries: Path, port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    command = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect"]
    while subprocess.run(command, check=False, capture_output=True).returncode != 0:
        if time.monotonic() > deadline:
            raise RuntimeError("PostgreSQL did not start")
        time.sleep(0.1)  # it tells nobody when it is ready
