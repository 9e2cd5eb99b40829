"""A global propagator that is not W3C's, as sites with Zipkin have it."""

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import (
    TextMapPropagator,
    default_getter,
    default_setter,
)


class SingleHeaderB3(TextMapPropagator):
    """The `b3` header: trace id, span id and sampling in one."""

    def extract(self, carrier, context=None, getter=default_getter):
        header = getter.get(carrier, "b3")
        if not header:
            return context or Context()
        trace_id, span_id, *_ = header[0].split("-")
        span = trace.SpanContext(
            int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=trace.TraceFlags(1)
        )
        return trace.set_span_in_context(trace.NonRecordingSpan(span), context)

    def inject(self, carrier, context=None, setter=default_setter):
        span = trace.get_current_span(context).get_span_context()
        if span.is_valid:
            header = f"{trace.format_trace_id(span.trace_id)}-{trace.format_span_id(span.span_id)}"
            setter.set(carrier, "b3", f"{header}-1")

    @property
    def fields(self):
        return {"b3"}
