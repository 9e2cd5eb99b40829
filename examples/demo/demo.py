"""A parent is cancelled, and its whole tree goes with it: on a real server, in real processes.

Run it with `python3 dev.py demo`, which makes the environment. Exit code 0 means that every
process and every run of the tree is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.tree import Tree

from supervised.testing import LocalServer, local_server, running

HERE = Path(__file__).parent
PROCESSES = 7  # nightly, two regions, four scores
RUNS = 8  # and one inline child
console = Console()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-")))
        server = stack.enter_context(start_server())
        stack.enter_context(temporary_settings({PREFECT_API_URL: server.url}))
        client = stack.enter_context(get_client(sync_client=True))
        stack.enter_context(serve(server, client, folder))
        return Demo(client, folder).play()


@contextlib.contextmanager
def start_server() -> Iterator[LocalServer]:
    with contextlib.ExitStack() as stack:
        with waiting("starting a Prefect server (about 20 s)") as tell:
            server = stack.enter_context(local_server(progress=tell))
        console.print(f"Prefect server: {server.url}")
        yield server


@contextlib.contextmanager
def serve(server: LocalServer, client: SyncPrefectClient, folder: Path) -> Iterator[None]:
    env = {**server.env, "DEMO_FOLDER": str(folder), "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
    command = [sys.executable, "flows.py"]
    with running(command, env=env, log=folder / "runner.log", cwd=HERE):
        with waiting("serving three deployments") as tell:
            until(lambda: len(client.read_deployments()) == 3, 60, tell)
        yield


class Demo:
    def __init__(self, client: SyncPrefectClient, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.root: UUID | None = None
        self.began = time.monotonic()

    def play(self) -> int:
        deployment = self.client.read_deployment_by_name("nightly/demo")
        self.root = self.client.create_flow_run_from_deployment(deployment.id).id
        console.rule("before: the tree is running")
        if not self.show_until(self.all_running, seconds=120):
            console.print((self.folder / "runner.log").read_text()[-3000:], markup=False)
            console.rule("the tree did not start: see the runner's log above")
            return 1
        console.rule("prefect flow-run cancel, on the root only")
        self.began = time.monotonic()
        self.client.set_flow_run_state(self.root, Cancelling())
        self.show_until(self.all_over, seconds=60)
        self.show_spans()
        self.show_report()
        left = [str(pid) for pid in self.alive().values()]
        left += [run.name for run, _ in self.tree() if not is_over(run)]
        verdict = f"left over: {', '.join(left)}" if left else "nothing is left over"
        console.rule(verdict)
        return 1 if left else 0

    # -- questions --------------------------------------------------------------------------

    def tree(self) -> list[tuple[FlowRun, int]]:
        """Every run with its depth, parents before children."""
        assert self.root is not None
        runs, frontier, depth = [(self.client.read_flow_run(self.root), 0)], [self.root], 1
        while frontier:
            wanted = {"parent_flow_run_id": {"any_": [str(run_id) for run_id in frontier]}}
            below = self.client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))
            runs += [(run, depth) for run in sorted(below, key=lambda run: run.name)]
            frontier, depth = [run.id for run in below], depth + 1
        return runs

    def pids(self) -> dict[str, int]:
        found = {path.stem: path.read_text() for path in self.folder.glob("*.pid")}
        return {run_id: int(pid) for run_id, pid in found.items() if pid}

    def alive(self) -> dict[str, int]:
        return {run_id: pid for run_id, pid in self.pids().items() if is_alive(pid)}

    def all_running(self) -> bool:
        states = [run.state_name for run, _ in self.tree()]
        return len(self.alive()) == PROCESSES and states == ["Running"] * RUNS

    def all_over(self) -> bool:
        return not self.alive() and all(is_over(run) for run, _ in self.tree())

    # -- answers ----------------------------------------------------------------------------

    def show_until(self, condition: Callable[[], bool], *, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with Live(self.table(), console=console, transient=False) as live:
            while not condition() and time.monotonic() < deadline:
                live.update(self.table())
                time.sleep(0.2)
            live.update(self.table())
        if not console.is_terminal:
            console.print()
        return condition()

    def table(self) -> Table:
        table = Table(title=f"{time.monotonic() - self.began:.0f} s", title_justify="left")
        for heading in ("run", "where", "state", "process"):
            table.add_column(heading)
        alive, pids = self.alive(), self.pids()
        for run, depth in self.tree():
            pid = pids.get(str(run.id))
            process = (
                "" if pid is None else f"{pid} " + ("alive" if str(run.id) in alive else "gone")
            )
            where = "its own process" if run.deployment_id else "inside its parent"
            table.add_row("  " * depth + run.name, where, str(run.state_name), process)
        return table

    def show_spans(self) -> None:
        console.rule("the trace, across all processes")
        spans = [
            json.loads(line)
            for path in self.folder.glob("*.spans")
            for line in path.read_text().splitlines()
        ]
        by_parent: dict[str | None, list[dict[str, Any]]] = {}
        for span in sorted(spans, key=lambda span: span["start_time"]):
            by_parent.setdefault(span["parent_id"], []).append(span)
        top = Tree("trace")
        hang(top, by_parent, None)
        console.print(top)

    def show_report(self) -> None:
        console.rule("the teardown report, from the root's log")
        assert self.root is not None
        wanted = LogFilter.model_validate({"flow_run_id": {"any_": [str(self.root)]}})
        for log in self.client.read_logs(log_filter=wanted):
            if log.message.startswith("Teardown of"):
                console.print(log.message, highlight=False)


def hang(node: Tree, by_parent: dict[str | None, list[dict[str, Any]]], parent: str | None) -> None:
    for span in by_parent.get(parent, []):
        outcome = span["attributes"].get("supervised.outcome", "")
        kind = span["kind"].removeprefix("SpanKind.").lower()
        label = f"{span['name']} [dim]{kind}[/dim] {outcome}"
        hang(node.add(label), by_parent, span["context"]["span_id"])


def is_over(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Callable[[float], None]]:
    """Show a spinner with the seconds waited on a terminal; a line now and then elsewhere."""
    if console.is_terminal:
        with console.status(what) as status:
            yield lambda seconds: status.update(f"{what} {seconds:.0f} s")
        return
    console.print(f"{what} ...")
    told = [0.0]

    def tell(seconds: float) -> None:
        if seconds - told[0] >= 10:
            told[0] = seconds
            console.print(f"{what} ... {seconds:.0f} s")

    yield tell


def until(question: Callable[[], bool], seconds: float, tell: Callable[[float], None]) -> None:
    began = time.monotonic()
    while not question():
        waited = time.monotonic() - began
        if waited > seconds:
            raise SystemExit(f"gave up after {seconds:.0f} s")
        tell(waited)
        time.sleep(0.3)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been stopped")
        raise SystemExit(130) from None
