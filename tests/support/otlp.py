"""A receiver of OTLP over HTTP that forgets nothing, and shows traces as indented text."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import attrs
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status as ProtoStatus

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

Attributes = Mapping[str, Any]


@attrs.frozen(kw_only=True)
class Event:
    """Something that happened during a span."""

    name: str
    attributes: Attributes


@attrs.frozen(kw_only=True)
class Link:
    """A span of any trace that another one points at."""

    span_id: str
    attributes: Attributes


@attrs.frozen(kw_only=True)
class Span:
    """One span as it was exported."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    kind: str
    status: str
    description: str
    start: int
    end: int
    attributes: Attributes
    events: tuple[Event, ...]
    links: tuple[Link, ...]
    scope: str
    scope_version: str
    resource: Attributes

    @property
    def outcome(self) -> str | None:
        """How it ended, in the library's words; `None` for spans of others."""
        return self.attributes.get("supervised.outcome")

    @property
    def process(self) -> int:
        """The process that exported it."""
        return self.resource["process.pid"]

    @property
    def event_names(self) -> list[str]:
        """The names of its events, in order."""
        return [event.name for event in self.events]


@attrs.frozen(kw_only=True)
class Point:
    """One data point of a metric: a sum's value, or a histogram's count."""

    name: str
    unit: str
    value: float
    attributes: Attributes
    bounds: tuple[float, ...]
    process: int


class Receiver:
    """All that was exported to one endpoint."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._points: list[Point] = []

    # -- asking ---------------------------------------------------------------------------

    def spans(self, trace_id: str | None = None, *, scope: str | None = None) -> list[Span]:
        """The spans so far by their start, of one trace or one library if asked."""
        with self._lock:
            found = list(self._spans)
        return sorted(
            (s for s in found if trace_id in {None, s.trace_id} and scope in {None, s.scope}),
            key=lambda span: span.start,
        )

    def span(self, name: str, trace_id: str | None = None) -> Span:
        """The only span of this name."""
        (span,) = [s for s in self.spans(trace_id) if s.name == name]
        return span

    def trace_of(self, flow_run_id: str) -> str | None:
        """The trace in which a run was supervised."""
        for span in self.spans(scope="supervised"):
            run = span.attributes.get("prefect.flow_run.id")
            if span.name.startswith("supervise ") and run == flow_run_id:
                return span.trace_id
        return None

    def tree(self, trace_id: str, *, kind: bool = False, outcome: bool = False) -> str:
        """The spans of a trace as indented text, siblings in the order of their start.

        A span whose parent never arrived stands at the margin behind a question mark.
        """
        spans = self.spans(trace_id)
        known = {span.span_id for span in spans}
        below: dict[str | None, list[Span]] = defaultdict(list)
        for span in spans:
            below[span.parent_id if span.parent_id in known else None].append(span)

        def lines(parent: str | None, indent: str) -> Iterator[str]:
            for span in below[parent]:
                lost = "? " if parent is None and span.parent_id is not None else ""
                yield indent + lost + _line(span, kind=kind, outcome=outcome)
                yield from lines(span.span_id, indent + "  ")

        return "\n".join(lines(None, ""))

    def points(self, name: str, process: int) -> list[Point]:
        """The data points of a metric that a process exported, in the order of arrival."""
        with self._lock:
            return [p for p in self._points if p.name == name and p.process == process]

    # -- receiving ------------------------------------------------------------------------

    def take_spans(self, body: bytes) -> None:
        """Keep the spans of one request."""
        request = ExportTraceServiceRequest.FromString(body)
        spans = [
            _span(span, scoped.scope, _attributes(of.resource.attributes))
            for of in request.resource_spans
            for scoped in of.scope_spans
            for span in scoped.spans
        ]
        with self._lock:
            self._spans += spans

    def take_metrics(self, body: bytes) -> None:
        """Keep the data points of one request."""
        request = ExportMetricsServiceRequest.FromString(body)
        points = [
            point
            for of in request.resource_metrics
            for scoped in of.scope_metrics
            for metric in scoped.metrics
            for point in _points(metric, _attributes(of.resource.attributes)["process.pid"])
        ]
        with self._lock:
            self._points += points


@contextlib.contextmanager
def receiving() -> Iterator[tuple[Receiver, str]]:
    """Receive on a free port of the loopback interface; yields what arrives, and the endpoint."""
    receiver = Receiver()
    takes = {"/v1/traces": receiver.take_spans, "/v1/metrics": receiver.take_metrics}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            takes[self.path](body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="otlp-receiver", daemon=True)
    thread.start()
    try:
        yield receiver, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _line(span: Span, *, kind: bool, outcome: bool) -> str:
    line = span.name
    if kind:
        line += f" {span.kind}"
    if outcome and span.outcome is not None:
        line += f" {span.outcome}"
        line += f" {span.status}" if span.status != "UNSET" else ""
    return line


def _span(span: ProtoSpan, scope: Any, resource: Attributes) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        kind=ProtoSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        status=ProtoStatus.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        description=span.status.message,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(
            Event(name=event.name, attributes=_attributes(event.attributes))
            for event in span.events
        ),
        links=tuple(
            Link(span_id=link.span_id.hex(), attributes=_attributes(link.attributes))
            for link in span.links
        ),
        scope=scope.name,
        scope_version=scope.version,
        resource=resource,
    )


def _points(metric: Any, process: int) -> Iterator[Point]:
    data = getattr(metric, metric.WhichOneof("data"))
    for point in data.data_points:
        is_histogram = hasattr(point, "bucket_counts")
        yield Point(
            name=metric.name,
            unit=metric.unit,
            value=point.count if is_histogram else point.as_double or point.as_int,
            attributes=_attributes(point.attributes),
            bounds=tuple(point.explicit_bounds) if is_histogram else (),
            process=process,
        )


def _attributes(pairs: list[KeyValue]) -> Attributes:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    which = value.WhichOneof("value")
    if which is None:
        return None
    if which == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, which)
