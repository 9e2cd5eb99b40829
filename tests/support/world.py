"""A real server with real runners, and questions to ask of it."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID, uuid4

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.states import Cancelling, Scheduled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prefect.client.schemas.objects import FlowRun

    from supervised.testing import LocalServer

T = TypeVar("T")
FLOWS = Path(__file__).parents[1] / "flows"


_PAUSE_SECONDS = 0.05


def eventually(question: Callable[[], T], *, seconds: float, what: str) -> T:
    """Ask until the answer is true, or fail saying what was waited for.

    A third of the time at most: what is waited for needs the server, and the CPU.
    """
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        answer = question()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"Not within {seconds:g} s: {what}; last answer: {answer!r}")
        # Processes and servers tell nobody when they are done, so there is no event to wait for.
        time.sleep(max(_PAUSE_SECONDS, 2 * (time.monotonic() - asked)))


class World:
    """One server, and a folder in which the processes of its runs leave their marks."""

    def __init__(self, server: LocalServer, folder: Path, client: SyncPrefectClient) -> None:
        self.server = server
        self.folder = folder
        self.client = client
        self._since = datetime.now(timezone.utc)
        self._logged = _size(self._log)

    # -- acting ---------------------------------------------------------------------------

    def start(self, deployment: str, **parameters: Any) -> FlowRun:
        found = self.client.read_deployment_by_name(deployment)
        return self.client.create_flow_run_from_deployment(
            found.id,
            parameters={"folder": str(self.folder), **parameters},
            state=Scheduled(),
            idempotency_key=str(uuid4()),
        )

    def cancel(self, run_id: UUID) -> None:
        self.client.set_flow_run_state(run_id, Cancelling())

    def tell(self, what: str) -> None:
        (self.folder / what).touch()

    # -- asking ---------------------------------------------------------------------------

    def run(self, run_id: UUID) -> FlowRun:
        return self.client.read_flow_run(run_id)

    def tree(self, root: UUID) -> list[FlowRun]:
        """The root and all that stands below it, by Prefect's own parent links."""
        runs, frontier = [self.run(root)], [root]
        while frontier:
            below = self.client.read_flow_runs(
                flow_run_filter=FlowRunFilter.model_validate(
                    {"parent_flow_run_id": {"any_": [str(run_id) for run_id in frontier]}}
                )
            )
            runs += below
            frontier = [run.id for run in below]
        return runs

    def pids(self) -> dict[str, int]:
        """Pids by run id, of all that have started."""
        found = {}
        for path in self.folder.glob("*.pid"):
            if text := path.read_text():
                found[path.stem] = int(text)
        return found

    def alive(self) -> dict[str, int]:
        """Pids by run id, of those whose process still is that run's."""
        return {run_id: pid for run_id, pid in self.pids().items() if _is_alive(pid)}

    def started(self, count: int) -> bool:
        return len(self.alive()) >= count

    def wait_for_start(self, count: int, seconds: float = 120) -> None:
        eventually(
            lambda: self.started(count), seconds=seconds, what=f"{count} processes have started"
        )

    def is_over(self, root: UUID) -> bool:
        return all(run.state is not None and run.state.is_final() for run in self.tree(root))

    def end_all(self) -> None:
        """End what a failed test left behind, so that the next one starts from nothing."""
        for pid in self.alive().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()

    def states(self, root: UUID) -> dict[str, str]:
        return {f"{run.name} {run.id}": str(run.state_name) for run in self.tree(root)}

    # -- telling why a test has failed ----------------------------------------------------

    def evidence(self) -> list[tuple[str, str]]:
        """Sections for the report: the runs since the start, what their processes have logged."""
        logs = [(log.name, log.read_text(errors="replace")) for log in self.folder.glob("*.log")]
        if self._log.exists():
            logs.append((self._log.name, self._log.read_text(errors="replace")[self._logged :]))
        shown = [(name, "\n".join(text.splitlines()[-200:])) for name, text in logs]
        return [("runs", "\n".join(self._histories())), *shown]

    def _histories(self) -> Iterator[str]:
        since = {"expected_start_time": {"after_": self._since}}
        pids, alive = self.pids(), self.alive()
        for run in self.client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(since)):
            life = "lives" if str(run.id) in alive else "does not live"
            yield f"{run.id} {run.name}: process {pids.get(str(run.id))} {life}"
            for state in self.client.read_flow_run_states(run.id):
                yield f"    {state.timestamp:%T.%f} {state.name} {state.message or ''}"

    @property
    def _log(self) -> Path:
        return self.server.home / "runner.log"


def _size(file: Path) -> int:
    return len(file.read_text(errors="replace")) if file.exists() else 0


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
