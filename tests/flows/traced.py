"""Flows for the traces, in processes that export them: `python traced.py SCENARIO FOLDER`.

Without `OTEL_EXPORTER_OTLP_ENDPOINT` no SDK is configured, or even imported.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import prefect
import prefect.runtime
from opentelemetry import trace
from prefect import flow
from tree import asked, mark

from supervised import supervised_flow, supervisor

tracer = trace.get_tracer("work")


def configure_sdk():
    from opentelemetry import metrics
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return  # a runner loads this file more than once
    resource = Resource.create({"process.pid": os.getpid()})
    tracers = TracerProvider(resource=resource)
    # Each span at once, because processes are killed here.
    tracers.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(tracers)
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(), export_interval_millis=200)
    metrics.set_meter_provider(MeterProvider([reader], resource=resource))


def propagate_as_b3():
    from b3 import SingleHeaderB3
    from opentelemetry.propagate import set_global_textmap

    set_global_textmap(SingleHeaderB3())


if "OTEL_EXPORTER_OTLP_ENDPOINT" in os.environ:
    configure_sdk()
if "TRACED_B3" in os.environ:
    propagate_as_b3()


def tell(folder, what):
    (Path(folder) / what).touch()


def pids(folder):
    """The processes of the children that have left their mark."""
    return [int(text) for path in Path(folder).glob("*.pid") if (text := path.read_text())]


# -- children -----------------------------------------------------------------------------------


@flow
def leaf(folder: str, seconds: float = 0) -> None:
    with tracer.start_as_current_span("leaf work"):
        if seconds < 0:
            raise ValueError("no time is left")
        mark(folder)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)


@flow
async def extract(folder: str) -> str:
    with tracer.start_as_current_span("extract work"):
        return "rows"


@flow
def crunch(folder: str) -> str:
    with tracer.start_as_current_span("crunch work"):
        return "numbers"


@flow
async def endless(folder: str) -> None:
    tell(folder, "endless")
    await asyncio.sleep(300)


@flow(timeout_seconds=2.5)
async def limited(folder: str) -> None:
    await asyncio.sleep(300)


@flow
async def bad(folder: str) -> None:
    # A run that is at work is known to be only once the server was asked.
    (far,) = (child for child in CHILDREN if child.name == "far")
    await until(lambda: asked(folder, "endless") and pids(folder) and far.state.is_running())
    raise ValueError("part 0 is bad")


@supervised_flow
async def mid(folder: str, until_told: str = "") -> str:
    with tracer.start_as_current_span("mid work"):
        pass
    await until(lambda: not until_told or asked(folder, until_told))
    return await supervisor.spawn(extract, {"folder": folder}, name="step")


SERVED = [leaf, mid]


# -- scenarios ----------------------------------------------------------------------------------

CHILDREN = []
RUN = {}


def begin(folder):
    RUN["run"] = str(prefect.runtime.flow_run.id)
    RUN["folder"] = folder


def spawn(target, name, *, parameters=None, **options):
    parameters = {"folder": RUN["folder"], **(parameters or {})}
    child = supervisor.spawn(target, parameters, name=name, **options)
    CHILDREN.append(child)
    return child


async def until(question, seconds=120):
    end = time.monotonic() + seconds
    while not question():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        await asyncio.sleep(0.05)


def later():
    """When nothing of a test will still be running."""
    return datetime.now(timezone.utc) + timedelta(hours=1)


@supervised_flow(flow_run_name="day")
async def day(folder: str) -> None:
    """Everything goes well."""
    begin(folder)
    children = [spawn(extract, "extract"), spawn(crunch, "crunch")]
    spawn("leaf/traced", "audit", on_parent="detach")
    load = spawn("mid/traced", "load", parameters={"until_told": "seen"})
    await until(lambda: load.state.is_running() or load.is_over)  # as seen from here
    tell(folder, "seen")
    for child in [*children, load]:
        await child


@supervised_flow(flow_run_name="night")
async def night(folder: str) -> None:
    """One child fails while an inline and a deployed sibling are at work."""
    begin(folder)
    spawn(endless, "near")
    spawn("leaf/traced", "far", parameters={"seconds": 300})
    spawn(bad, "bad")


@supervised_flow(flow_run_name="evening", on_child_failure="wait")
async def evening(folder: str) -> None:
    """Children run out of time, and one is not needed any more."""
    begin(folder)
    spawn(endless, "near", timeout_seconds=1)
    spawn("leaf/traced", "far", timeout_seconds=1, scheduled_time=later())
    spawn(limited, "limited")
    await asyncio.sleep(3)
    unneeded = spawn(endless, "unneeded")
    await until(lambda: unneeded.flow_run_id)
    unneeded.cancel("nobody needs it")


@supervised_flow(flow_run_name="storm", on_child_failure="wait")
async def storm(folder: str) -> None:
    """One deployed child is killed, another fails."""
    begin(folder)
    spawn("leaf/traced", "killed", parameters={"seconds": 300})
    spawn("leaf/traced", "wrong", parameters={"seconds": -1})
    await until(lambda: pids(folder))
    os.kill(pids(folder)[0], signal.SIGKILL)


@supervised_flow(flow_run_name="noon")
async def noon(folder: str) -> None:
    """Inline children on two levels, and a deployed one that never starts."""
    begin(folder)
    waiting = spawn("leaf/traced", "waiting", scheduled_time=later())
    assert await spawn(extract, "extract") == "rows"
    assert await spawn(mid, "mid") == "rows"
    await until(lambda: waiting.flow_run_id)
    waiting.cancel()


@supervised_flow(flow_run_name="dusk")
async def dusk(folder: str) -> None:
    """A supervised child in another process, and nothing else."""
    begin(folder)
    await spawn("mid/untraced", "load")


def report():
    return {
        **RUN,
        "process": os.getpid(),
        "has_sdk": "opentelemetry.sdk" in sys.modules,
        "children": {
            child.name: {
                "run": str(child.flow_run_id),
                "outcome": child.outcome,
                # As the request that created the run was answered.
                "labels": child.flow_run.labels,
            }
            for child in CHILDREN
        },
    }


SCENARIOS = {scenario.name: scenario for scenario in (day, night, evening, storm, noon, dusk)}

if __name__ == "__main__":
    scenario, folder = sys.argv[1:]
    with contextlib.suppress(Exception):  # how it ended is in the run and on the span
        asyncio.run(SCENARIOS[scenario](folder))
    print(json.dumps(report()))
