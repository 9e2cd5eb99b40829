"""What a supervised run looks like in OpenTelemetry, printed to the console.

    python flow.py

It needs a Prefect server, PREFECT_API_URL to say where it is, and `opentelemetry-sdk`.
"""

import asyncio
import contextlib

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from prefect import flow

from supervised import ChildFailed, supervised_flow, supervisor


def one_line(span: ReadableSpan) -> str:
    attributes = span.attributes or {}
    details = [
        f"{name.removeprefix('supervised.')}={attributes[name]}"
        for name in ("supervised.outcome", "supervised.cancel.source", "error.type")
        if name in attributes
    ]
    place = f"{span.context.span_id:016x} below " + (
        f"{span.parent.span_id:016x}" if span.parent else "-" * 16
    )
    status = f"status={span.status.status_code.name}"
    return " ".join([f"{span.name:<14}", place, status, *details]) + "\n"


def configure_tracing() -> None:
    """The application configures the SDK; the library only uses OpenTelemetry's API."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=one_line)))
    trace.set_tracer_provider(provider)


@flow
async def extract() -> list[int]:
    return [1, 2, 3]


@flow
async def load(rows: list[int]) -> None:
    await asyncio.sleep(20 * len(rows))


@flow
async def audit(rows: list[int]) -> None:
    await asyncio.sleep(1)
    raise ValueError(f"{len(rows)} rows are not enough")


@supervised_flow(flow_run_name="etl")
async def etl() -> None:
    rows = await supervisor.spawn(extract, name="extract")
    supervisor.spawn(load, {"rows": rows}, name="load")
    await supervisor.spawn(audit, {"rows": rows}, name="audit")


if __name__ == "__main__":
    configure_tracing()
    with contextlib.suppress(ChildFailed):
        asyncio.run(etl())
