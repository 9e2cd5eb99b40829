"""The demo's tree: a supervised root of two supervised mids of two plain leaves, and more.

`python flows.py` serves it. Every process writes its pid and its spans into $DEMO_FOLDER.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import prefect
import prefect.runtime
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from prefect import flow

from supervised import supervised_flow, supervisor

FOLDER = Path(os.environ.get("DEMO_FOLDER", "."))


def configure_tracing() -> None:
    """What an application does; the library itself only uses OpenTelemetry's API."""
    out = (FOLDER / f"{os.getpid()}.spans").open("a")
    exporter = ConsoleSpanExporter(out=out, formatter=lambda span: span.to_json(indent=None) + "\n")
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


if os.environ.get("PREFECT__FLOW_RUN_ID"):
    configure_tracing()


def leave_pid() -> None:
    (FOLDER / f"{prefect.runtime.flow_run.id}.pid").write_text(str(os.getpid()))


@flow
def score(part: int) -> int:
    """A plain Prefect flow that takes far too long."""
    leave_pid()
    for _ in range(3000):
        time.sleep(0.1)
    return part


@flow
async def watch_quota() -> None:
    """An inline child: it lives in its parent's process."""
    await asyncio.sleep(300)


@supervised_flow
def region(name: str) -> list[int]:
    """A supervised child with children of its own; sync, to show that it makes no difference."""
    leave_pid()
    parts = [
        supervisor.spawn("score/demo", {"part": part}, name=f"{name}-{part}") for part in (1, 2)
    ]
    return [part.result() for part in parts]


@supervised_flow
async def nightly() -> None:
    """The root."""
    leave_pid()
    supervisor.spawn(watch_quota)
    for name in ("north", "south"):
        supervisor.spawn("region/demo", {"name": name}, name=name)
    # The body returns at once; its scope waits for the children.


if __name__ == "__main__":
    prefect.serve(*(each.to_deployment("demo") for each in (nightly, region, score)), limit=20)
