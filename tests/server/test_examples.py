"""The examples do what they say, each in a process of its own, against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from supervised.testing import LocalServer

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.timeout(300)


def output_of(example: str, server: LocalServer, cwd: Path) -> list[str]:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / example)],
        env=dict(server.env),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout.splitlines()


def shown_in(readme: str) -> list[str]:
    """The output that a README shows."""
    text = (EXAMPLES / readme).read_text()
    (shown,) = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return shown.splitlines()


def test_the_orchestrator_merges_the_results_of_its_deployments(
    server: LocalServer, tmp_path: Path
) -> None:
    printed = output_of("orchestrator/flows.py", server, tmp_path)
    assert shown_in("orchestrator/README.md") == printed


def test_the_sync_flow_gives_up_the_shards_that_are_not_needed(
    server: LocalServer, tmp_path: Path
) -> None:
    assert output_of("sync_flow/flow.py", server, tmp_path) == [
        "search-0: cancelled",
        "search-3000: completed",
        "search-6000: cancelled",
        "found: 3100",
    ]


def test_the_traced_run_prints_one_tree_of_spans(server: LocalServer, tmp_path: Path) -> None:
    printed = output_of("tracing/flow.py", server, tmp_path)
    assert sorted(map(without_ids, shown_in("tracing/README.md"))) == sorted(
        map(without_ids, printed)
    )
    assert paths(printed) == {
        "etl",
        "etl / supervise etl",
        "etl / supervise etl / child audit",
        "etl / supervise etl / child audit / audit",
        "etl / supervise etl / child extract",
        "etl / supervise etl / child extract / extract",
        "etl / supervise etl / child load",
        "etl / supervise etl / child load / load",
        "etl / supervise etl / teardown",
    }


def without_ids(line: str) -> str:
    return re.sub(r"\b[0-9a-f]{16}\b", "", line)


def paths(lines: list[str]) -> set[str]:
    """Where each span stands, as the names from the root down to it."""
    spans = {}
    for line in lines:
        found = re.match(r"(?P<name>.{14}) (?P<id>[0-9a-f]{16}) below (?P<below>\S{16}) ", line)
        assert found is not None, line
        spans[found["id"]] = found["name"].strip(), found["below"]

    def path(span: str) -> str:
        name, below = spans[span]
        return f"{path(below)} / {name}" if below in spans else name

    return {path(span) for span in spans}
