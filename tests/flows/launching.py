"""Flows for processes of their own: some launch, one is tried twice, one is slow to be started."""

import asyncio
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from prefect import flow
from tree import asked, mark

from supervised import Restart, supervised_flow, supervisor

tries = []


reached, released = threading.Event(), threading.Event()


@dataclass
class Slow:
    """A parameter that holds up whoever pickles it, until it is released."""

    def __reduce__(self):
        reached.set()
        assert released.wait(120)
        return Slow, ()


@flow(validate_parameters=False)
def takes(slow, folder):
    (Path(folder) / "began").touch()
    time.sleep(300)


@flow
def takes_a_number(number: int):
    return number


@flow(retries=1)
def dies_when_retried():
    tries.append(1)
    if len(tries) == 1:
        raise KeyError("of the first try")
    os._exit(9)


@supervised_flow
def launches(deployment, folder):
    """Spawn a deployment, and leave a file with this process's id under the run's."""
    child = supervisor.spawn(deployment)
    while child.flow_run_id is None:
        time.sleep(0.05)
    mark(folder)
    time.sleep(300)


@supervised_flow(on_parent="cancel", on_child_failure="ignore")
async def keeps(deployment, folder, restarts):
    parameters = {"deployment": deployment, "folder": folder}
    restart = Restart(max=restarts) if restarts else None
    child = supervisor.spawn(launches, parameters, isolation="process", restart=restart)
    while not asked(folder, "finish"):
        await asyncio.sleep(0.05)
    return child.restarts
