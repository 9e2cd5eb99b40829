"""Scenarios of tests/flows/traced.py, each played in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import attrs
from support.world import FLOWS, eventually

from supervised.testing import running

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from prefect.client.orchestration import SyncPrefectClient
    from support.otlp import Receiver, Span

    from supervised.testing import LocalServer

_SOON = 30  # seconds until what another process exports has arrived


@attrs.frozen
class Played:
    """What a scenario left behind: its own report, and its trace."""

    report: Mapping[str, Any]
    otlp: Receiver

    @property
    def run(self) -> str:
        """The id of the scenario's own run."""
        return self.report["run"]

    @property
    def process(self) -> int:
        """The process that it ran in."""
        return self.report["process"]

    @property
    def trace_id(self) -> str:
        """The trace that it was supervised in."""
        return eventually(
            lambda: self.otlp.trace_of(self.run), seconds=_SOON, what="a supervise span"
        )

    def child(self, name: str) -> Mapping[str, Any]:
        """What the parent knew of a child: *run*, *outcome* and *labels*."""
        return self.report["children"][name]

    def span(self, name: str) -> Span:
        """The one span of this name in the trace, once it is there."""
        eventually(
            lambda: name in {span.name for span in self.otlp.spans(self.trace_id)},
            seconds=_SOON,
            what=f"a span {name!r}",
        )
        return self.otlp.span(name, self.trace_id)

    def assert_tree(self, expected: str, **options: bool) -> None:
        """Assert what the trace looks like once all processes have exported."""
        expected = textwrap.dedent(expected).strip()
        with contextlib.suppress(AssertionError):
            eventually(
                lambda: self.otlp.tree(self.trace_id, **options) == expected,
                seconds=_SOON,
                what="the whole tree",
            )
        tree = self.otlp.tree(self.trace_id, **options)
        assert tree == expected, f"The trace looks like this:\n\n{tree}\n"


@attrs.frozen
class Stage:
    """A server to play on, and where the processes send their traces."""

    server: LocalServer
    otlp: Receiver
    endpoint: str
    folder: Path

    def play(self, scenario: str, *, traced: bool = True, **env: str) -> Played:
        """Play a scenario to its end, in a process with an SDK unless told otherwise."""
        folder = self.folder / f"{scenario}-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        ended = subprocess.run(
            [sys.executable, "traced.py", scenario, str(folder)],
            env=self.env(traced=traced, **env),
            cwd=FLOWS,
            capture_output=True,
            text=True,
            check=False,
            timeout=150,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        return Played(json.loads(ended.stdout.splitlines()[-1]), self.otlp)

    def env(self, *, traced: bool = True, **more: str) -> dict[str, str]:
        """The environment of a process that talks to the server and exports what it traces."""
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint} if traced else {}
        return {**self.server.env, **endpoint, **more}

    @contextlib.contextmanager
    def serving(self, name: str, client: SyncPrefectClient, **env: str) -> Iterator[None]:
        """Serve the flows as *flow/name*, from a runner whose flow processes are traced."""
        environment = self.env(PREFECT_RUNNER_POLL_FREQUENCY="1", **env)
        log = self.server.home / f"runner-{name}.log"
        command = [sys.executable, "serve_traced.py", name]

        def served() -> list[Any]:
            return [d for d in client.read_deployments() if d.name == name]

        with running(command, env=environment, log=log, cwd=FLOWS):
            eventually(lambda: len(served()) == 2, seconds=90, what="the flows are served")
            try:
                yield
            finally:
                for deployment in served():
                    client.delete_deployment(deployment.id)
