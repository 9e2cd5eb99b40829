"""What the documentation shows, works: see `support.docs` for what its blocks say of themselves."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prefect.client.schemas.filters import LogFilter
from prefect.states import Cancelling, Scheduled
from support.docs import PAGES, ROOT, Block, blocks, python_blocks, title
from support.world import World, eventually

from supervised.testing import LocalServer, running

if TYPE_CHECKING:
    from collections.abc import Iterator

TUTORIAL = ROOT / "docs" / "tutorial.md"
RUNNABLE = [
    page
    for page in PAGES
    if page != TUTORIAL and any(block.what in {"run", "test"} for block in python_blocks(page))
]


@contextlib.contextmanager
def serving(block: Block, folder: Path, server: LocalServer) -> Iterator[None]:
    log = folder / f"{block.name}.log"
    env = {**server.env, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with running([sys.executable, block.name], env=env, log=log, cwd=folder):
        eventually(
            lambda: "being served" in log.read_text(errors="replace"),
            seconds=90,
            what=f"{block.place} is served",
        )
        yield


def end(block: Block, folder: Path, server: LocalServer) -> None:
    command = [sys.executable, block.name]
    if block.what == "test":
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", block.name]
    ended = subprocess.run(
        command,
        env={**server.env, "PYTHONIOENCODING": "utf-8"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert ended.returncode == 0, f"{block.place}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    assert_printed(block, ended.stdout)


def assert_printed(block: Block, output: str) -> None:
    lines = iter(output.splitlines())
    for expected in block.expected:
        assert expected in lines, f"{block.place}: {expected!r} is not in\n{output}"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", RUNNABLE, ids=title)
def test_what_a_page_shows_runs(page: Path, server: LocalServer, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for block in python_blocks(page):
            if not block.what:
                continue
            (tmp_path / block.name).write_text(block.text)
            if block.what == "serve":
                stack.enter_context(serving(block, tmp_path, server))
            elif block.what != "file":
                end(block, tmp_path, server)


@pytest.mark.timeout(400)
def test_the_tutorial_ends_with_the_report_that_it_shows(world: World) -> None:
    (block,) = [block for block in python_blocks(TUTORIAL) if block.what]
    (world.folder / block.name).write_text(block.text)
    with serving(block, world.folder, world.server):
        deployment = world.client.read_deployment_by_name("nightly/tutorial")
        root = world.client.create_flow_run_from_deployment(deployment.id, state=Scheduled())
        eventually(
            lambda: [run.state.is_running() for run in world.tree(root.id)] == [True] * 5,
            seconds=90,
            what="five runs are running",
        )
        world.client.set_flow_run_state(root.id, Cancelling())
        eventually(lambda: world.is_over(root.id), seconds=60, what="all runs are over")
        eventually(
            lambda: {run.state_name for run in world.tree(root.id)} == {"Cancelled"},
            seconds=60,
            what="all are Cancelled, also what its runner came late for",
        )
        said = eventually(
            lambda: [log.message for log in logs(world, root.id) if "Teardown" in log.message],
            seconds=30,
            what="the report is in the log",
        )
    assert shape(said[0]) == shape(shown_report())


def logs(world: World, run_id):
    only = LogFilter.model_validate({"flow_run_id": {"any_": [str(run_id)]}})
    return world.client.read_logs(only)


def shown_report() -> str:
    return next(
        block.text for block in blocks(TUTORIAL) if block.text.startswith("Teardown of 'nightly'")
    )


def shape(report: str) -> list[str]:
    """A report without what differs from run to run: ids, times, and steps of escalation."""
    head, *receipts = report.strip().splitlines()
    summary = re.sub(r" [0-9a-f.-]+ \(.*\) took [0-9.]+ s", "", head)
    return [summary, *sorted(" ".join(receipt.split()[:2]) for receipt in receipts)]
