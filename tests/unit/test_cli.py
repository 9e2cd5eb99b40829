"""What the command line says when it is used wrongly, or the server does not play along."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from supervised import cli
from supervised.guard import Guard
from supervised.testing import FakePrefect

RUN = "0c4be0a8-0b5c-4a6c-8a43-1f6a4a3e5a11"
COMMANDS = [["tree", RUN], ["cancel", RUN], ["orphans"], ["reap"], ["guard", "--once"]]


@contextlib.contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """Run a server that gives one answer to everything; yield its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET  # noqa: N815 - the names that http.server looks for

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/api"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was complained about, which must be one line."""
    complaints = [line for line in capsys.readouterr().err.splitlines() if "supervised:" in line]
    assert len(complaints) == 1
    return complaints[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_refuses_is_one_clear_line(status, command, capsys):
    with answering(status, '{"detail": "no"}') as url, temporary_settings({PREFECT_API_URL: url}):
        assert cli.run(command) == cli.UNREACHABLE
    line = said(capsys)
    assert f"refused ({status})" in line
    assert "PREFECT_API_KEY" in line


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_server_that_is_not_well_is_one_clear_line(command, capsys):
    settings = {PREFECT_CLIENT_MAX_RETRIES: 0}
    with answering(500, "it burns") as url, temporary_settings({PREFECT_API_URL: url, **settings}):
        assert cli.run(command) == cli.UNREACHABLE
    assert "answered 500: it burns" in said(capsys)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_address_that_is_no_prefect_server_is_one_clear_line(command, capsys):
    with answering(200, "<html>") as url, temporary_settings({PREFECT_API_URL: url}):
        assert cli.run(command) == cli.UNREACHABLE
    assert "does not lead to a Prefect server" in said(capsys)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("body", ["{}", "[1]", '"ready"'])
def test_answers_that_are_not_prefects_are_one_clear_line(body, command, capsys):
    with answering(200, body) as url, temporary_settings({PREFECT_API_URL: url}):
        assert cli.run(command) == cli.UNREACHABLE
    assert "does not lead to a Prefect server" in said(capsys)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_server_is_started_to_look_at(command, capsys):
    """Nothing is on it, and who is on call would read that all is well."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert cli.run(command) == cli.UNREACHABLE
    assert "prefect config set PREFECT_API_URL" in said(capsys)


def test_a_reader_that_has_gone_is_no_error_of_ours():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "supervised.cli", "--help"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (cli.UNREAD, "")


def test_a_bug_is_told_with_its_place_and_not_as_a_run_that_may_be_alive(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_with_api", lambda act: 1 // 0)
    assert cli.run(["orphans"]) == cli.BUG
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["tree"],
        ["tree", "not-an-id"],
        ["cancel", RUN, "--grace-seconds", "-1"],
        ["reap", "--grace-seconds", "soon"],
        ["guard", "--interval", "0"],
        ["guard", "--interval", "nan"],
        ["guard", "--health-port", "70000"],
        ["orphans", "--no-such-option"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_one_clear_line_and_nothing_is_done(command, capsys):
    assert cli.run(command) == cli.WRONG
    assert said(capsys)


def test_a_guard_is_healthy_while_it_can_look_at_the_server():
    with FakePrefect() as prefect:
        guard = Guard(prefect.connect(), interval_seconds=10, grace_seconds=5)
        with (
            socket.create_server(("127.0.0.1", 0)) as listening,
            cli.answering_health(guard, listening),
        ):
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/health"
            assert httpx.get(url, timeout=60).status_code == 503
            guard.looked_at = time.monotonic()  # not by the clock of the simulation
            healthy = httpx.get(url, timeout=60)
            assert (healthy.status_code, healthy.json()) == (
                200,
                {"healthy": True, "unverified": 0},
            )
