"""An async parent that fans out to deployments and merges their results.

    python flows.py          serve the child and run the parent once
    python flows.py serve    serve parent and child until stopped

Both need a Prefect server, and PREFECT_API_URL to say where it is.
"""

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import prefect
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from supervised import supervised_flow, supervisor
from supervised.testing import running

START_SECONDS = 60


@flow(persist_result=True)
def score(part: int) -> float:
    """One part of the work. It runs in a process of its own, so its result has to be stored."""
    time.sleep(1)
    return part / 10


@supervised_flow(max_concurrent=3, grace_seconds=15)
async def nightly(parts: int = 4) -> float:
    """Score every part, three at a time, and add the scores up."""
    children = [
        supervisor.spawn("score/local", {"part": part}, name=f"score-{part}")
        for part in range(parts)
    ]
    scores = {child.name: await child for child in children}
    for name, value in scores.items():
        print(f"{name}: {value}")
    return sum(scores.values())


def serve() -> None:
    prefect.serve(score.to_deployment("local"), nightly.to_deployment("local"), limit=8)


def wait_until_served() -> None:
    deadline = time.monotonic() + START_SECONDS
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(ObjectNotFound):
                # A runner that stops leaves its deployments behind, paused.
                if not client.read_deployment_by_name("score/local").paused:
                    return
            time.sleep(0.2)
    raise SystemExit(f"score/local is not served after {START_SECONDS} s")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "runner.log"
        with running([sys.executable, __file__, "serve"], env=os.environ, log=log):
            wait_until_served()
            print(f"total: {asyncio.run(nightly()):.1f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        main()
