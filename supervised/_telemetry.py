"""Spans and metrics. The only module that imports `opentelemetry`, and only its API.

Without an SDK every call ends in the API's no-ops, no label is written, and nothing else is
imported. Nothing here raises: telemetry must never change what a supervisor does.

```
<parent flow run>              Prefect
└─ supervise etl               INTERNAL  first spawn (back-dated to scope entry) → scope over
   ├─ child extract            INTERNAL  inline
   ├─ child load               CLIENT    deployment, awaited
   ├─ child audit              PRODUCER  detached at the spawn: ends when its run exists
   └─ teardown                 INTERNAL  only if something had to be cancelled
```

ERROR stands on a span exactly when the outcome is raised to the parent; the outcome itself is
always an attribute, because an intended cancellation leaves the status unset
(OpenTelemetry semantic conventions, recording errors).
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from opentelemetry import metrics, trace
from opentelemetry.context import attach, detach, set_value
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from typing_extensions import ParamSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from opentelemetry.context import Context
    from prefect.client.schemas.objects import State

    from supervised._types import CancelReason, Kind, TeardownReport

from supervised._log import get_logger
from supervised._text import sendable, text_of
from supervised._types import Outcome

logger = get_logger("prefect.supervised.telemetry")

P = ParamSpec("P")
R = TypeVar("R")

try:
    _VERSION = version("prefect-supervised")
except PackageNotFoundError:  # pragma: no cover - run from a checkout that is not installed
    _VERSION = "0"
_SCHEMA = "https://opentelemetry.io/schemas/1.44.0"
_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)

_tracer = trace.get_tracer("supervised", _VERSION, schema_url=_SCHEMA)
_meter = metrics.get_meter("supervised", _VERSION, schema_url=_SCHEMA)
# Explicitly W3C: the global propagator may be b3, and Prefect stores only a `traceparent`.
_propagator = TraceContextTextMapPropagator()

_child_duration = _meter.create_histogram(
    "supervised.child.duration",
    unit="s",
    description="Seconds from a child's launch to its end.",
    explicit_bucket_boundaries_advisory=_BUCKETS,
)
_teardown_duration = _meter.create_histogram(
    "supervised.teardown.duration",
    unit="s",
    description="Seconds that a teardown took.",
    explicit_bucket_boundaries_advisory=_BUCKETS,
)
_active = _meter.create_up_down_counter(
    "supervised.child.active", unit="{child}", description="Children that are not over."
)
_escalations = _meter.create_counter(
    "supervised.teardown.escalations",
    unit="{escalation}",
    description="Steps that teardown took beyond the first request.",
)


def _harmless(function: Callable[P, R]) -> Callable[P, R | None]:
    """Turn an exception into one debug line: spans are never worth a run."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return function(*args, **kwargs)
        except Exception:
            logger.debug("Telemetry failed in %s", function.__name__, exc_info=True)
            return None

    return guarded


def traceparent_of(span: Span) -> str | None:
    """Return the W3C traceparent of a span, or `None` if it is not a real one."""
    if not span.get_span_context().is_valid:
        return None
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context=trace.set_span_in_context(span))
    return carrier.get("traceparent")


def current_context(labels: Mapping[str, Any], label_key: str) -> Context:
    """Return the context a scope's span belongs in.

    That is the current span, which is Prefect's own span of the run; with Prefect's telemetry
    switched off, the span whose traceparent the run's labels carry.
    """
    current = trace.set_span_in_context(trace.get_current_span())
    traceparent = labels.get(label_key)
    if trace.get_current_span().get_span_context().is_valid or not isinstance(traceparent, str):
        return current
    return _propagator.extract({"traceparent": traceparent}, context=current)


@contextlib.contextmanager
def in_trace_of(labels: Mapping[str, Any], label_key: str) -> Iterator[None]:
    """Continue the trace that a run's labels name, unless a span is current already."""
    if label_key not in labels or trace.get_current_span().get_span_context().is_valid:
        yield
        return
    token = attach(current_context(labels, label_key))
    try:
        yield
    finally:
        detach(token)


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Keep an HTTP instrumentation from adding a span for each poll."""
    token = attach(set_value("suppress_instrumentation", True))
    try:
        yield
    finally:
        detach(token)


@contextlib.contextmanager
def within(span: Span) -> Iterator[None]:
    """Make a span current, so that the requests inside belong to it."""
    with trace.use_span(span, record_exception=False, set_status_on_exception=False):
        yield


class SupervisorSpan:
    """The `supervise` span of one scope and the counts it ends with."""

    def __init__(
        self,
        *,
        flow_name: str,
        flow_run_id: str,
        function: str,
        on_child_failure: str,
        grace_seconds: float,
        context: Context,
        start_ns: int,
    ) -> None:
        self._counts: dict[str, int] = {}
        self.culprit: ChildSpan | None = None  # the child whose failure ends the others
        self.span = _start(
            f"supervise {flow_name}",
            context=context,
            start_time=start_ns,
            attributes={
                "supervised.policy.on_failure": on_child_failure,
                "supervised.grace_seconds": grace_seconds,
                "prefect.flow.name": flow_name,
                "prefect.flow_run.id": flow_run_id,
                "code.function.name": function,
            },
        )

    @property
    def context(self) -> Context:
        """The context in which the children's spans start."""
        return trace.set_span_in_context(self.span)

    def count(self, what: str) -> None:
        """Count one child under *spawned* or under its outcome."""
        self._counts[what] = self._counts.get(what, 0) + 1

    @_harmless
    def end(
        self, *, outcome: str, reason: CancelReason | None, raised: BaseException | None
    ) -> None:
        """End the span; *raised* is what the scope raises, unless that is a cancellation."""
        self.span.set_attributes(
            {f"supervised.children.{name}": self._counts.get(name, 0) for name in _COUNTED}
        )
        self.span.set_attribute("supervised.outcome", outcome)
        if reason is not None:
            self.span.set_attribute("supervised.cancel.source", reason.source)
        if raised is not None:
            self.span.set_attribute("error.type", _qualified_name(raised))
            self.span.set_status(Status(StatusCode.ERROR, text_of(raised)[:256]))
        self.span.end()


class ChildSpan:
    """The span of one child, ended exactly once."""

    def __init__(
        self,
        parent: SupervisorSpan,
        *,
        name: str,
        kind: Kind,
        flow_name: str,
        deployment_name: str | None,
        generation: int,
        detached: bool,
        start_ns: int,
        earlier: ChildSpan | None = None,
    ) -> None:
        self._parent = parent
        self._start_ns = start_ns
        self._labels = {"supervised.child.kind": kind, "prefect.flow.name": flow_name}
        attributes: dict[str, str | int] = {
            "supervised.child.name": name,
            "supervised.child.kind": kind,
            "supervised.attempt": generation + 1,
            "prefect.flow.name": flow_name,
        }
        if deployment_name is not None:
            attributes["prefect.deployment.name"] = deployment_name
        self.span: Span = _start(
            f"child {name}",
            context=parent.context,
            kind=_span_kind(kind, detached=detached),
            attributes=attributes,
            start_time=start_ns,
            links=[trace.Link(earlier.span.get_span_context())] if earlier is not None else None,
        )
        self._ended = False
        self._has_run = False
        self._asked_because: str | None = None
        parent.count("spawned")
        _active.add(1, {"supervised.child.kind": kind})

    @property
    def traceparent(self) -> str | None:
        """What the child's run must carry for its own spans to nest under this one."""
        return traceparent_of(self.span)

    @_harmless
    def rename(self, flow_name: str, deployment_name: str) -> None:
        """Fill in what only the server could tell about a deployment."""
        self._labels["prefect.flow.name"] = flow_name
        self.span.set_attribute("prefect.flow.name", flow_name)
        self.span.set_attribute("prefect.deployment.name", deployment_name)

    @_harmless
    def created(self, flow_run_id: str) -> None:
        """Record that the run exists."""
        self.span.set_attribute("prefect.flow_run.id", flow_run_id)
        self.span.add_event("supervised.child.created")

    @_harmless
    def running(self) -> None:
        """Record that the run began."""
        if not (self._has_run or self._ended):  # reads may overtake each other
            self._has_run = True
            self.span.add_event("supervised.child.running")

    @_harmless
    def cancel_requested(self, reason: CancelReason) -> None:
        """Record who asked for the cancellation, and why."""
        if self._ended:  # detached: its span told of the handing over
            return
        self._asked_because = reason.message
        self.span.set_attribute("supervised.cancel.source", reason.source)
        self.span.add_event(
            "supervised.cancel.requested", {"source": reason.source, "reason": reason.message}
        )
        if reason.source == "sibling_failed" and self._parent.culprit is not None:
            self.cancelled_by(self._parent.culprit)

    @_harmless
    def cancel_acknowledged(self) -> None:
        """Record that the server accepted the request."""
        if not self._ended:
            self.span.add_event("supervised.cancel.acknowledged")

    @_harmless
    def escalated(self, step: str, waited_seconds: float) -> None:
        """Record a step beyond the first request."""
        if self._ended:
            return
        self.span.set_attribute("supervised.escalated", True)
        self.span.add_event(
            "supervised.teardown.escalated", {"to": step, "waited_s": round(waited_seconds, 3)}
        )

    @_harmless
    def cancelled_by(self, sibling: ChildSpan) -> None:
        """Link to the sibling whose failure cancelled this child."""
        context = sibling.span.get_span_context()
        if context.is_valid:
            self.span.add_link(context, {"supervised.link": "cancelled_by"})

    @_harmless
    def end(
        self,
        outcome: Outcome,
        *,
        state: State | None,
        exception: BaseException | None,
        end_ns: int,
        raised: BaseException | None = None,
    ) -> None:
        """End the span with the child's outcome; further calls do nothing."""
        if self._ended:
            return
        self._ended = True
        error = _qualified_name(raised) if raised is not None else _error_type(outcome, exception)
        try:
            self._mark(outcome, state, exception or raised, error)
        finally:
            self.span.end(end_ns)
            self._count_end(outcome, error, end_ns)

    def _count_end(self, outcome: str, error: str | None, end_ns: int) -> None:
        self._parent.count(outcome)
        _active.add(-1, {"supervised.child.kind": self._labels["supervised.child.kind"]})
        labels = {**self._labels, "supervised.outcome": outcome}
        if error is not None:
            labels["error.type"] = error
        _child_duration.record((end_ns - self._start_ns) / 1e9, labels)

    def _mark(
        self,
        outcome: Outcome,
        state: State | None,
        exception: BaseException | None,
        error: str | None,
    ) -> None:
        self.span.set_attribute("supervised.outcome", outcome)
        if state is not None:
            self.span.set_attribute("prefect.state.type", state.type.value)
            self.span.set_attribute("prefect.state.name", state.name or state.type.value)
        if outcome == "detached":
            self.span.add_event("supervised.child.detached")
        if outcome == "abandoned":
            self.span.add_event("supervised.child.abandoned")
        if error is None:
            return
        self.span.set_attribute("error.type", error)
        if exception is not None:
            with contextlib.suppress(Exception):
                _record(self.span, exception)
        stated = state.message if state else None
        message = (
            (exception is not None and text_of(exception))
            or stated
            or self._asked_because
            or outcome
        )
        self.span.set_status(Status(StatusCode.ERROR, message[:256]))


class TeardownSpan:
    """The span of one teardown, with one event for each step."""

    def __init__(
        self, parent: SupervisorSpan, *, reason: CancelReason, live: int, grace_seconds: float
    ) -> None:
        self._reason = reason
        self.span = _start(
            "teardown",
            context=parent.context,
            attributes={
                "supervised.cancel.source": reason.source,
                "supervised.children.live": live,
                "supervised.grace_seconds": grace_seconds,
            },
        )

    @_harmless
    def step(self, name: str, count: int) -> None:
        """Record one step and how many runs it concerned."""
        self.span.add_event(f"supervised.teardown.{name}", {"supervised.children": count})

    @_harmless
    def end(self, report: TeardownReport) -> None:
        """End the span with what the report says."""
        steps = [step for receipt in report.receipts for step in receipt.escalations]
        for step in steps:
            _escalations.add(1, {"supervised.escalation": step})
        outcome = "completed" if report.ok else "abandoned"
        self.span.set_attributes(
            {
                "supervised.escalations": len(steps),
                "supervised.children.abandoned": len(report.unverified),
                "supervised.outcome": outcome,
            }
        )
        if not report.ok:
            self.span.set_attribute("error.type", "supervised.TeardownError")
            self.span.set_status(Status(StatusCode.ERROR, "children left unverified"))
        self.span.end()
        labels = {"supervised.cancel.source": self._reason.source, "supervised.outcome": outcome}
        _teardown_duration.record(report.seconds, labels)


_COUNTED = ("spawned", *get_args(Outcome))


def _span_kind(kind: Kind, *, detached: bool) -> SpanKind:
    if detached:
        return SpanKind.PRODUCER
    return SpanKind.INTERNAL if kind == "inline" else SpanKind.CLIENT


def _error_type(outcome: Outcome, exception: BaseException | None) -> str | None:
    if outcome == "failed":
        return _qualified_name(exception) if exception is not None else "prefect.Failed"
    by_outcome = {
        "crashed": "prefect.Crashed",
        "timed_out": "timeout",
        "abandoned": "supervised.TeardownError",
    }
    return by_outcome.get(outcome)


def _qualified_name(exception: BaseException) -> str:
    kind = type(exception)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    module = "supervised" if kind.__module__ == "supervised._errors" else kind.__module__
    return f"{module}.{kind.__qualname__}"


def _record(span: Span, exception: BaseException) -> None:
    """Record an exception; exporters drop an attribute that is no Unicode, and log a traceback."""
    lines = traceback.format_exception(type(exception), exception, exception.__traceback__)
    told = {"exception.message": text_of(exception), "exception.stacktrace": "".join(lines)}
    span.record_exception(exception, attributes=_sendable(told))


def _sendable(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: sendable(value) if isinstance(value, str) else value
        for name, value in attributes.items()
    }


def _start(name: str, *, attributes: Mapping[str, Any], **options: Any) -> Span:
    """Start a span; a processor or sampler of the user that fails costs the span, not the run.

    A name that is no Unicode would lose all spans that are exported together with this one.
    """
    try:
        return _tracer.start_span(sendable(name), attributes=_sendable(attributes), **options)
    except Exception:
        logger.debug("Telemetry failed to start %r", name, exc_info=True)
        return trace.INVALID_SPAN


__all__ = [
    "ChildSpan",
    "SupervisorSpan",
    "TeardownSpan",
    "current_context",
    "traceparent_of",
    "unobserved",
    "within",
]
