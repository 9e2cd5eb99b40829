"""Flows that run in processes of their own, in a module of their own as users have them."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
from prefect import flow
from prefect.logging import get_run_logger

from supervised import supervised_flow, supervisor

cancelled = []


def note_cancellation(flow, run, state):
    (Path(run.parameters["folder"]) / "cancelled").write_text(state.message)


def note_crash(flow, run, state):
    (Path(run.parameters["folder"]) / "crashed").write_text(state.message)


def mark(folder):
    (Path(folder) / "pid").write_text(str(os.getpid()))


@flow
def pid_of():
    get_run_logger().info("hello from another process")
    return os.getpid()


@flow
async def pid_of_async():
    await asyncio.sleep(0)
    return os.getpid()


@flow
def sums(numbers: Iterable[int]):
    return sum(numbers)


class Locked(pydantic.BaseModel):
    """Has a lock of its own."""

    three: int = 3
    _lock: Any = pydantic.PrivateAttr(default_factory=threading.Lock)


@flow
def locks(model: Locked):
    with model._lock:
        return model.three


@flow
def raises():
    raise KeyError("no such part")


@flow
def returns_what_cannot_be_pickled():
    return sys._getframe()


@flow(on_cancellation=[note_cancellation], on_crashed=[note_crash])
def sleeps(folder):
    mark(folder)
    time.sleep(300)


@flow(on_cancellation=[note_cancellation])
async def sleeps_async(folder):
    mark(folder)
    await asyncio.sleep(300)


@flow
def ignores_signals(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark(folder)
    while True:
        time.sleep(1)


@supervised_flow
async def has_children(folder):
    supervisor.spawn(sleeps_async, {"folder": folder}, isolation="process")
    await asyncio.sleep(300)


@supervised_flow
async def keeps_one(folder):
    supervisor.spawn(sleeps, {"folder": folder}, isolation="process")
    await asyncio.sleep(300)


if __name__ == "__main__":
    asyncio.run(keeps_one(sys.argv[1]))
