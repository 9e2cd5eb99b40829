"""Spans and metrics: what an outcome looks like to whoever reads the traces."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from datetime import datetime, timezone
from uuid import uuid4

import pytest
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import INVALID_SPAN, SpanKind, StatusCode
from prefect.client.schemas.objects import State, StateType
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from supervised import ChildCancelled, ChildFailed, TeardownError
from supervised._telemetry import (
    ChildSpan,
    SupervisorSpan,
    TeardownSpan,
    current_context,
    traceparent_of,
    unobserved,
    within,
)
from supervised._types import CancelReason, Receipt, TeardownReport

LABEL = "__OTEL_TRACEPARENT"
START = 1_700_000_000_000_000_000
SECOND = 1_000_000_000
ASKED = CancelReason(source="explicit", message="its handle was cancelled")
SIBLING = CancelReason(source="sibling_failed", message="sibling 'a' failed: boom", child="a")
DEADLINE = CancelReason(source="deadline", message="its deadline of 3 s was exceeded")


class OwnError(Exception):
    """An exception with a module, unlike the builtins."""


class UnprintableError(Exception):
    """An exception of a user who did not test its text."""

    def __str__(self):
        raise RuntimeError("no text")


class Saboteur(SpanProcessor):
    """A span processor of a user, which fails while it is told to."""

    active = False

    def on_start(self, span, parent_context=None):
        if self.active:
            raise RuntimeError("no span today")


class Telescope:
    """What the SDK has seen since the test began."""

    def __init__(self):
        self.saboteur = Saboteur()
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader(
            preferred_temporality={
                Counter: AggregationTemporality.DELTA,
                Histogram: AggregationTemporality.DELTA,
            }
        )
        self._tracers = TracerProvider()
        self._tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._tracers.add_span_processor(self.saboteur)
        # The process takes one provider of each kind, once.
        trace.set_tracer_provider(self._tracers)
        metrics.set_meter_provider(MeterProvider([self._reader], shutdown_on_exit=False))

    def clear(self):
        self._exporter.clear()
        self._reader.get_metrics_data()

    def spans(self):
        """Every span that has ended, by name."""
        return {span.name: span for span in self._exporter.get_finished_spans()}

    def span(self, name):
        (span,) = [s for s in self._exporter.get_finished_spans() if s.name == name]
        return span

    def tree(self):
        """The ended spans as indented text, siblings in the order of their start."""
        below = defaultdict(list)
        for span in sorted(self._exporter.get_finished_spans(), key=lambda s: s.start_time):
            below[span.parent.span_id if span.parent else None].append(span)

        def lines(parent, indent):
            for span in below[parent]:
                yield f"{indent}{span.name} {span.kind.name} {span.status.status_code.name}"
                yield from lines(span.context.span_id, indent + "  ")

        return list(lines(None, ""))

    def points(self, name):
        """The data points of one instrument since the last look, with their labels."""
        data = self._reader.get_metrics_data()
        found = [
            metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
        ]
        return [(dict(point.attributes), point) for m in found for point in m.data.data_points]

    def active(self, kind):
        """How many children are counted as not over."""
        points = self.points("supervised.child.active")
        return sum(p.value for labels, p in points if labels == {"supervised.child.kind": kind})


@pytest.fixture(scope="session")
def sdk():
    return Telescope()


@pytest.fixture
def seen(sdk):
    sdk.clear()
    yield sdk
    sdk.saboteur.active = False


@pytest.fixture
def scope(seen):
    return a_scope()


def a_scope(**overrides):
    options = {
        "flow_name": "etl",
        "flow_run_id": "run-1",
        "function": "flows.etl",
        "on_child_failure": "cancel_siblings",
        "grace_seconds": 20.0,
        "context": otel_context.Context(),
        "start_ns": START,
    }
    return SupervisorSpan(**{**options, **overrides})


def a_child(scope, **overrides):
    options = {
        "name": "load",
        "kind": "deployment",
        "flow_name": "load",
        "deployment_name": "load/gpu",
        "generation": 0,
        "detached": False,
        "start_ns": START + SECOND,
    }
    return ChildSpan(scope, **{**options, **overrides})


def end(child, outcome, *, state=None, exception=None, seconds=3):
    child.end(outcome, state=state, exception=exception, end_ns=START + (1 + seconds) * SECOND)


def a_report(*receipts, seconds=2.0):
    return TeardownReport(
        flow_name="etl",
        flow_run_id=uuid4(),
        cause="failed",
        reason="boom",
        started_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
        seconds=seconds,
        receipts=receipts,
    )


def a_receipt(status="cancelled", escalations=()):
    return Receipt(
        name="load", flow_run_id=uuid4(), status=status, reason="", escalations=escalations
    )


# -- the table of outcomes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "state", "exception", "status", "error_type", "description"),
    [
        ("completed", Completed(), None, StatusCode.UNSET, None, None),
        (
            "failed",
            Failed(message="bad"),
            ValueError("boom"),
            StatusCode.ERROR,
            "ValueError",
            "boom",
        ),
        (
            "failed",
            Failed(message="bad"),
            OwnError("boom"),
            StatusCode.ERROR,
            f"{__name__}.OwnError",
            "boom",
        ),
        ("failed", Failed(message="bad"), None, StatusCode.ERROR, "prefect.Failed", "bad"),
        ("failed", None, None, StatusCode.ERROR, "prefect.Failed", "failed"),
        (
            "crashed",
            Crashed(message="SIGKILL"),
            None,
            StatusCode.ERROR,
            "prefect.Crashed",
            "SIGKILL",
        ),
        (
            "timed_out",
            Cancelled(message="deadline of 3 s exceeded"),
            None,
            StatusCode.ERROR,
            "timeout",
            "deadline of 3 s exceeded",
        ),
        ("cancelled", Cancelled(message="asked"), None, StatusCode.UNSET, None, None),
        (
            "cancelled",
            Crashed(),
            asyncio.CancelledError(),
            StatusCode.UNSET,
            None,
            None,
        ),
        (
            "abandoned",
            Running(),
            None,
            StatusCode.ERROR,
            "supervised.TeardownError",
            "abandoned",
        ),
        ("detached", Running(), None, StatusCode.UNSET, None, None),
    ],
)
def test_each_outcome_has_its_status_and_its_error_type(
    seen, scope, *, outcome, state, exception, status, error_type, description
):
    end(a_child(scope), outcome, state=state, exception=exception)
    span = seen.span("child load")
    assert outcome == span.attributes["supervised.outcome"]
    assert status is span.status.status_code
    assert error_type == span.attributes.get("error.type")
    assert span.status.description == description


@pytest.mark.parametrize(
    ("cancel_reason", "status", "error_type"),
    [
        (None, StatusCode.ERROR, "supervised.ChildCancelled"),
        (ASKED, StatusCode.UNSET, None),
        (SIBLING, StatusCode.UNSET, None),
    ],
    ids=["by a third party", "by its handle", "with its siblings"],
)
def test_a_cancellation_is_an_error_where_nobody_of_us_asked_and_the_parent_hears_of_it(
    seen, scope, make_child, until, *, cancel_reason, status, error_type
):
    child = make_child()
    child.span = a_child(scope)
    if cancel_reason is not None:
        child.mark_cancel(cancel_reason)

    async def parent():
        waiter = asyncio.ensure_future(child.aresult())
        await until(lambda: child.is_awaited)
        child.settle("cancelled", state=Cancelled())
        with pytest.raises(ChildCancelled):
            await waiter

    asyncio.run(parent())
    span = seen.span("child load")
    assert span.attributes["supervised.outcome"] == "cancelled"
    assert status is span.status.status_code
    assert error_type == span.attributes.get("error.type")


def test_a_cancellation_that_the_parent_does_not_hear_of_is_no_error(seen, scope, make_child):
    child = make_child()
    child.span = a_child(scope)
    child.settle("cancelled", state=Cancelled())
    assert seen.span("child load").status.status_code is StatusCode.UNSET


def test_a_child_that_exceeded_its_deadline_timed_out_on_its_span_too(seen, scope, make_child):
    child = make_child()
    child.span = a_child(scope)
    child.mark_cancel(DEADLINE)
    child.settle("cancelled", state=Cancelled(message="its deadline of 3 s was exceeded"))
    span = seen.span("child load")
    assert span.attributes["supervised.outcome"] == "timed_out"
    assert span.attributes["supervised.cancel.source"] == "deadline"
    assert span.attributes["error.type"] == "timeout"
    assert "deadline of 3 s" in span.status.description


@pytest.mark.parametrize(
    ("kind", "detached", "span_kind"),
    [
        ("inline", False, SpanKind.INTERNAL),
        ("deployment", False, SpanKind.CLIENT),
        ("deployment", True, SpanKind.PRODUCER),
    ],
)
def test_the_kind_says_where_the_child_runs_and_whether_it_is_awaited(
    seen, scope, kind, detached, span_kind
):
    end(a_child(scope, kind=kind, detached=detached), "completed")
    assert span_kind is seen.span("child load").kind


@pytest.mark.parametrize("message", ["x" * 300, "é" * 300])
def test_a_status_keeps_the_first_256_characters(seen, scope, message):
    end(a_child(scope), "failed", exception=ValueError(message))
    scope.end(outcome="failed", reason=None, raised=ValueError(message))
    for span in seen.spans().values():
        assert message[:256] == span.status.description


def test_a_failure_is_recorded_once_on_the_child_that_failed(seen, scope):
    error = ValueError("boom")
    end(a_child(scope), "failed", exception=error)
    scope.end(outcome="failed", reason=None, raised=error)
    (event,) = [e for e in seen.span("child load").events if e.name == "exception"]
    assert event.attributes["exception.type"] == "ValueError"
    assert "exception" not in [e.name for e in seen.span("supervise etl").events]


@pytest.mark.parametrize("outcome", ["abandoned", "detached"])
def test_what_became_of_a_child_that_lives_on_is_an_event(seen, scope, outcome):
    end(a_child(scope), outcome, state=Running())
    assert f"supervised.child.{outcome}" in [e.name for e in seen.span("child load").events]


# -- the tree -----------------------------------------------------------------------------------


def test_a_scope_reads_as_a_tree(seen):
    scope = a_scope()
    failed = a_child(scope, name="extract", kind="inline", start_ns=START + SECOND)
    cancelled = a_child(scope, name="load", start_ns=START + 2 * SECOND)
    detached = a_child(scope, name="audit", detached=True, start_ns=START + 3 * SECOND)
    teardown = TeardownSpan(scope, reason=SIBLING, live=1, grace_seconds=20.0)
    end(detached, "detached")
    end(failed, "failed", exception=ValueError("boom"))
    end(cancelled, "cancelled")
    teardown.end(a_report(a_receipt()))
    scope.end(outcome="failed", reason=SIBLING, raised=ValueError("boom"))
    assert seen.tree() == [
        "supervise etl INTERNAL ERROR",
        "  child extract INTERNAL ERROR",
        "  child load CLIENT UNSET",
        "  child audit PRODUCER UNSET",
        "  teardown INTERNAL UNSET",
    ]


def test_a_scope_stands_below_the_span_it_is_given_and_begins_when_the_scope_did(seen):
    tracer = trace.get_tracer("prefect")
    with tracer.start_as_current_span("etl-run") as run:
        scope = a_scope(context=current_context({}, LABEL))
    scope.end(outcome="completed", reason=None, raised=None)
    span = seen.span("supervise etl")
    assert run.get_span_context().span_id == span.parent.span_id
    assert span.start_time == START


def test_a_child_begins_and_ends_when_it_is_told(seen, scope):
    end(a_child(scope), "completed", seconds=3)
    span = seen.span("child load")
    assert (span.start_time, span.end_time) == (START + SECOND, START + 4 * SECOND)


def test_spans_say_which_library_made_them(seen, scope):
    end(a_child(scope), "completed")
    made_by = seen.span("child load").instrumentation_scope
    assert made_by.name == "supervised"
    assert made_by.version
    assert made_by.schema_url.startswith("https://opentelemetry.io/schemas/")


# -- the supervisor's span ----------------------------------------------------------------------


def test_a_scope_says_what_it_supervises_and_how(seen, scope):
    scope.end(outcome="completed", reason=None, raised=None)
    attributes = seen.span("supervise etl").attributes
    assert {
        "supervised.policy.on_failure": "cancel_siblings",
        "supervised.grace_seconds": 20.0,
        "prefect.flow.name": "etl",
        "prefect.flow_run.id": "run-1",
        "code.function.name": "flows.etl",
        "supervised.outcome": "completed",
    }.items() <= attributes.items()


def test_a_scope_counts_its_children_by_outcome(seen, scope):
    for outcome in ["completed", "completed", "failed", "cancelled", "abandoned", "timed_out"]:
        end(a_child(scope), outcome)
    scope.end(outcome="failed", reason=None, raised=None)
    attributes = seen.span("supervise etl").attributes
    counts = {
        name.removeprefix("supervised.children."): value
        for name, value in attributes.items()
        if name.startswith("supervised.children.")
    }
    assert counts == {
        "spawned": 6,
        "completed": 2,
        "failed": 1,
        "crashed": 0,
        "timed_out": 1,
        "cancelled": 1,
        "abandoned": 1,
        "detached": 0,
    }


@pytest.mark.parametrize(
    ("outcome", "reason", "raised", "status", "error_type"),
    [
        ("completed", None, None, StatusCode.UNSET, None),
        ("cancelled", ASKED, None, StatusCode.UNSET, None),
        ("failed", None, ValueError("boom"), StatusCode.ERROR, "ValueError"),
        ("failed", None, OwnError("boom"), StatusCode.ERROR, f"{__name__}.OwnError"),
        (
            "failed",
            SIBLING,
            ChildFailed("failed: boom", child="a"),
            StatusCode.ERROR,
            "supervised.ChildFailed",
        ),
        (
            "failed",
            None,
            ChildCancelled("was cancelled.", child="a"),
            StatusCode.ERROR,
            "supervised.ChildCancelled",
        ),
        (
            "cancelled",
            ASKED,
            TeardownError(a_report(a_receipt("unverified"))),
            StatusCode.ERROR,
            "supervised.TeardownError",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_scope_is_an_error_exactly_when_it_raises(
    seen, scope, *, outcome, reason, raised, status, error_type
):
    scope.end(outcome=outcome, reason=reason, raised=raised)
    span = seen.span("supervise etl")
    assert outcome == span.attributes["supervised.outcome"]
    assert (reason and reason.source) == span.attributes.get("supervised.cancel.source")
    assert status is span.status.status_code
    assert error_type == span.attributes.get("error.type")


# -- the child's span ---------------------------------------------------------------------------


def test_a_child_says_what_it_is_from_the_start(seen, scope):
    child = a_child(scope, generation=2)
    assert dict(child.span.attributes) == {
        "supervised.child.name": "load",
        "supervised.child.kind": "deployment",
        "supervised.attempt": 3,
        "prefect.flow.name": "load",
        "prefect.deployment.name": "load/gpu",
    }
    end(child, "completed")


def test_an_inline_child_has_no_deployment(seen, scope):
    end(a_child(scope, kind="inline", deployment_name=None), "completed")
    assert "prefect.deployment.name" not in seen.span("child load").attributes


def test_the_story_of_a_child_is_told_in_events(seen, scope):
    child = a_child(scope)
    child.created("run-2")
    child.running()
    child.cancel_requested(SIBLING)
    child.cancel_acknowledged()
    child.escalated("closed", 4.56789)
    end(child, "cancelled", state=Cancelled())
    span = seen.span("child load")
    assert [event.name for event in span.events] == [
        "supervised.child.created",
        "supervised.child.running",
        "supervised.cancel.requested",
        "supervised.cancel.acknowledged",
        "supervised.teardown.escalated",
    ]
    told = {event.name: dict(event.attributes) for event in span.events}
    assert told["supervised.cancel.requested"] == {
        "source": "sibling_failed",
        "reason": "sibling 'a' failed: boom",
    }
    assert told["supervised.teardown.escalated"] == {"to": "closed", "waited_s": 4.568}
    assert {
        "prefect.flow_run.id": "run-2",
        "prefect.state.type": "CANCELLED",
        "prefect.state.name": "Cancelled",
        "supervised.cancel.source": "sibling_failed",
        "supervised.escalated": True,
    }.items() <= span.attributes.items()


def test_a_handle_tells_its_span_what_happens_to_it(seen, scope, make_child):
    child = make_child()
    child.span = a_child(scope)
    child.observe(Running())
    child.observe(State(type=StateType.RUNNING, name="Retrying"))
    child.mark_cancel(ASKED)
    child.mark_cancel(SIBLING)
    child.mark_acknowledged()
    child.mark_acknowledged()
    child.settle("cancelled", state=Cancelled())
    child.settle("completed")
    assert [event.name for event in seen.span("child load").events] == [
        "supervised.child.running",
        "supervised.cancel.requested",
        "supervised.cancel.acknowledged",
    ]


def test_a_deployment_known_by_id_gets_its_names_later(seen, scope):
    child = a_child(scope, flow_name="0f1e", deployment_name="0f1e")
    child.rename("load", "load/gpu")
    end(child, "completed")
    attributes = seen.span("child load").attributes
    assert attributes["prefect.flow.name"] == "load"
    assert attributes["prefect.deployment.name"] == "load/gpu"
    ((labels, _),) = seen.points("supervised.child.duration")
    assert labels["prefect.flow.name"] == "load"


def test_a_cancelled_child_links_to_the_sibling_that_failed(seen, scope):
    failed, cancelled = a_child(scope, name="a"), a_child(scope, name="b")
    cancelled.cancelled_by(failed)
    end(failed, "failed")
    end(cancelled, "cancelled")
    (link,) = seen.span("child b").links
    assert seen.span("child a").context.span_id == link.context.span_id
    assert dict(link.attributes) == {"supervised.link": "cancelled_by"}


def test_a_child_ends_once(seen, scope):
    child = a_child(scope)
    end(child, "failed")
    end(child, "completed")
    scope.end(outcome="failed", reason=None, raised=None)
    assert seen.span("child load").attributes["supervised.outcome"] == "failed"
    assert seen.span("supervise etl").attributes["supervised.children.completed"] == 0
    ((labels, point),) = seen.points("supervised.child.duration")
    assert (labels["supervised.outcome"], point.count) == ("failed", 1)


# -- the teardown's span ------------------------------------------------------------------------


def test_a_teardown_tells_its_steps_and_ends_well_when_every_run_is_known_to_be_over(seen, scope):
    teardown = TeardownSpan(scope, reason=ASKED, live=3, grace_seconds=20.0)
    teardown.step("requested", 3)
    teardown.end(a_report(a_receipt(), a_receipt("forced", ("nudged", "closed")), a_receipt()))
    span = seen.span("teardown")
    (event,) = span.events
    assert event.name == "supervised.teardown.requested"
    assert dict(event.attributes) == {"supervised.children": 3}
    assert dict(span.attributes) == {
        "supervised.cancel.source": "explicit",
        "supervised.children.live": 3,
        "supervised.grace_seconds": 20.0,
        "supervised.escalations": 2,
        "supervised.children.abandoned": 0,
        "supervised.outcome": "completed",
    }
    assert span.status.status_code is StatusCode.UNSET


def test_a_teardown_that_leaves_a_run_unverified_is_an_error(seen, scope):
    teardown = TeardownSpan(scope, reason=ASKED, live=2, grace_seconds=20.0)
    teardown.end(a_report(a_receipt(), a_receipt("unverified")))
    span = seen.span("teardown")
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "supervised.TeardownError"
    assert span.attributes["supervised.outcome"] == "abandoned"
    assert span.attributes["supervised.children.abandoned"] == 1


# -- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "exception", "error_type"),
    [
        ("completed", None, None),
        ("failed", OwnError("boom"), f"{__name__}.OwnError"),
        ("failed", None, "prefect.Failed"),
        ("crashed", None, "prefect.Crashed"),
        ("timed_out", None, "timeout"),
        ("cancelled", None, None),
        ("abandoned", None, "supervised.TeardownError"),
        ("detached", None, None),
    ],
)
def test_the_duration_of_a_child_is_labelled_as_its_span(
    seen, scope, outcome, exception, error_type
):
    end(a_child(scope), outcome, exception=exception, seconds=3)
    ((labels, point),) = seen.points("supervised.child.duration")
    expected = {
        "supervised.child.kind": "deployment",
        "prefect.flow.name": "load",
        "supervised.outcome": outcome,
    }
    assert labels == (expected if error_type is None else {**expected, "error.type": error_type})
    assert (point.count, point.sum) == (1, 3.0)


def test_durations_are_counted_from_a_tenth_of_a_second_to_a_day(seen, scope):
    end(a_child(scope), "completed")
    ((_, point),) = seen.points("supervised.child.duration")
    assert (point.explicit_bounds[0], point.explicit_bounds[-1]) == (0.1, 86400)


def test_children_are_active_from_their_spawn_to_their_end(seen, scope):
    before = {kind: seen.active(kind) for kind in ("inline", "deployment")}
    children = [a_child(scope), a_child(scope), a_child(scope, kind="inline")]
    assert seen.active("deployment") - before["deployment"] == 2
    assert seen.active("inline") - before["inline"] == 1
    for child in children:
        end(child, "completed")
        end(child, "completed")
    assert before == {kind: seen.active(kind) for kind in ("inline", "deployment")}


@pytest.mark.parametrize(
    ("status", "outcome"), [("cancelled", "completed"), ("unverified", "abandoned")]
)
def test_the_duration_of_a_teardown_is_labelled_by_its_source_and_outcome(
    seen, scope, status, outcome
):
    teardown = TeardownSpan(scope, reason=SIBLING, live=1, grace_seconds=20.0)
    teardown.end(a_report(a_receipt(status), seconds=2.5))
    ((labels, point),) = seen.points("supervised.teardown.duration")
    assert labels == {"supervised.cancel.source": "sibling_failed", "supervised.outcome": outcome}
    assert (point.count, point.sum) == (1, 2.5)


def test_escalations_are_counted_by_step(seen, scope):
    teardown = TeardownSpan(scope, reason=ASKED, live=2, grace_seconds=20.0)
    teardown.end(
        a_report(a_receipt("forced", ("nudged", "closed")), a_receipt("forced", ("nudged",)))
    )
    points = seen.points("supervised.teardown.escalations")
    assert {tuple(labels.values()): point.value for labels, point in points} == {
        ("nudged",): 2,
        ("closed",): 1,
    }


# -- propagation --------------------------------------------------------------------------------


def test_a_child_hands_on_its_own_place_in_the_trace(seen, scope):
    child = a_child(scope)
    own = child.span.get_span_context()
    version, trace_id, span_id, _flags = child.traceparent.split("-")
    assert (version, trace_id, span_id) == ("00", f"{own.trace_id:032x}", f"{own.span_id:016x}")
    resumed = current_context({LABEL: child.traceparent}, LABEL)
    found = trace.get_current_span(resumed).get_span_context()
    assert (own.trace_id, own.span_id, True) == (found.trace_id, found.span_id, found.is_remote)


def test_the_current_span_wins_over_what_the_labels_carry(seen, scope):
    labels = {LABEL: a_child(scope).traceparent}
    with trace.get_tracer("prefect").start_as_current_span("etl-run") as run:
        found = trace.get_current_span(current_context(labels, LABEL))
    assert found is run


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {LABEL: None},
        {LABEL: 7},
        {LABEL: True},
        {LABEL: ""},
        {LABEL: "00-nonsense"},
        {LABEL: f"00-{'0' * 32}-{'0' * 16}-01"},
    ],
    ids=str,
)
def test_labels_without_a_usable_place_mean_a_trace_of_its_own(seen, labels):
    span = trace.get_current_span(current_context(labels, LABEL))
    assert not span.get_span_context().is_valid


def test_a_span_that_is_not_real_has_no_place_to_hand_on():
    assert traceparent_of(INVALID_SPAN) is None


def test_polls_are_hidden_from_http_instrumentation_and_nothing_else_is():
    def is_hidden():
        return otel_context.get_value("suppress_instrumentation") is True

    with pytest.raises(OwnError), unobserved():
        assert is_hidden()
        raise OwnError
    assert not is_hidden()


def test_requests_within_a_span_belong_to_it_and_their_failures_do_not_colour_it(seen, scope):
    child = a_child(scope)
    with pytest.raises(OwnError), within(child.span):
        assert trace.get_current_span() is child.span
        raise OwnError
    assert trace.get_current_span() is INVALID_SPAN
    end(child, "completed")
    span = seen.span("child load")
    assert (span.status.status_code, span.events) == (StatusCode.UNSET, ())


# -- harmless -----------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["failed", "crashed"])
def test_an_exception_without_a_text_still_ends_the_child_on_every_count(seen, scope, outcome):
    before = seen.active("deployment")
    child = a_child(scope)
    end(child, outcome, exception=UnprintableError())
    assert outcome == seen.span("child load").attributes["supervised.outcome"]
    assert before == seen.active("deployment")


def test_an_exception_without_a_text_still_ends_the_scope(seen, scope):
    scope.end(outcome="failed", reason=None, raised=UnprintableError())
    assert seen.span("supervise etl").attributes["supervised.outcome"] == "failed"


def test_what_is_no_unicode_does_not_lose_the_spans_that_are_exported_with_it(seen):
    odd = "\udce9t\udce9.csv"  # what Python makes of the name of a file in another encoding
    scope = a_scope()
    child = a_child(scope, name=odd)
    child.cancel_requested(CancelReason(source="explicit", message=odd))
    end(child, "failed", exception=OSError(odd))
    scope.end(outcome="failed", reason=None, raised=OSError(odd))
    exported = encode_spans(seen.spans().values()).SerializeToString()
    assert exported.count(b"\\udce9t\\udce9.csv") >= 6


@pytest.mark.parametrize(
    "begin",
    [
        lambda scope: a_scope(),
        a_child,
        lambda scope: TeardownSpan(scope, reason=ASKED, live=1, grace_seconds=20.0),
    ],
    ids=["scope", "child", "teardown"],
)
def test_a_users_span_processor_that_fails_is_no_reason_not_to_supervise(seen, scope, begin):
    seen.saboteur.active = True
    assert begin(scope) is not None


def test_a_child_whose_span_could_not_begin_can_be_told_everything(seen, scope):
    seen.saboteur.active = True
    child = a_child(scope)
    assert child.traceparent is None
    child.created("run-2")
    child.running()
    child.cancel_requested(ASKED)
    child.cancel_acknowledged()
    end(child, "cancelled", state=Cancelled())


def test_without_an_sdk_nothing_of_it_is_imported_and_no_label_is_written():
    script = """
        import sys
        from opentelemetry.context import Context
        from supervised._telemetry import ChildSpan, SupervisorSpan
        import supervised

        scope = SupervisorSpan(
            flow_name="etl", flow_run_id="1", function="f", on_child_failure="wait",
            grace_seconds=1.0, context=Context(), start_ns=1,
        )
        child = ChildSpan(
            scope, name="load", kind="inline", flow_name="load", deployment_name=None,
            generation=0, detached=False, start_ns=1,
        )
        assert child.traceparent is None
        child.end("failed", state=None, exception=ValueError("boom"), end_ns=2)
        scope.end(outcome="failed", reason=None, raised=ValueError("boom"))
        print([name for name in sys.modules if name.startswith("opentelemetry.sdk")])
    """
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=quiet,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "[]"
