"""Traces of OpenTelemetry: a span for each request over HTTP, under whoever called it, and in it one for each prompt.

Knows vLLM's names of attributes. Refuses to know requests before they have ended, and to connect anywhere but to the endpoint.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from jaxpaged.errors import ConfigError
from jaxpaged.server.endings import spans
from jaxpaged.server.metrics import NO_ROUTE
from jaxpaged.streams import Stream
from jaxpaged.version import __version__

if TYPE_CHECKING:
    from jaxpaged.server.watching import Account

_SEND_S = 2.0  # for one batch; the server's end waits for the last one
# One of ours -> vLLM's (vllm/tracing).
_LATENCIES = {
    "request_queue_time": "gen_ai.latency.time_in_queue",
    "e2e_request_latency": "gen_ai.latency.e2e",
    "request_prefill_time": "gen_ai.latency.time_in_model_prefill",
    "request_decode_time": "gen_ai.latency.time_in_model_decode",
    "request_inference_time": "gen_ai.latency.time_in_model_inference",
}


class Tracer:
    """Makes the spans of a request when it has ended, from what was written down. Its provider is its own, not the process's."""

    def __init__(self, model_name: str, exporter: Any, *, clock: Any = time.monotonic):
        """`exporter` takes finished spans, on a thread of its own; `clock` is the engine's."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._model_name, self._clock = model_name, clock
        resource = Resource({"service.name": "jaxpaged", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxpaged", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def trace(self, scope: dict[str, Any], account: Account, route: str | None) -> None:
        """Make the spans of one request."""
        from opentelemetry import trace

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        carried = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        parent = self._propagator.extract(carried)
        now_ns, now_s = time.time_ns(), self._clock()
        of_http = {
            "http.request.method": scope["method"][:16],
            "http.route": route or NO_ROUTE,
            "http.response.status_code": account.status,
            "gen_ai.request.id": account.request_id or "",
        }
        server, client = trace.SpanKind.SERVER, trace.SpanKind.INTERNAL
        name = f"{of_http['http.request.method']} {of_http['http.route']}"
        outer = self._tracer.start_span(name, parent, server, of_http, start_time=account.began_ns)
        if account.status >= 500:
            outer.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(outer, parent)
        for stream in account.streams:
            began_ns = now_ns - int((now_s - stream.request.arrival_s) * 1e9)
            end_s = stream.times.ended_s or now_s
            one = self._tracer.start_span("llm_request", inside, client, self._attributes(stream), start_time=began_ns)
            if stream.error is not None:
                one.set_status(trace.StatusCode.ERROR)
            one.end(now_ns - int((now_s - end_s) * 1e9))
        outer.end(now_ns)

    def _attributes(self, stream: Stream) -> dict[str, Any]:
        request, params = stream.request, stream.request.params
        found: dict[str, Any] = {
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.id": request.request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.num_sequences": len(stream.live.outputs),
            "gen_ai.usage.prompt_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.completion_tokens": stream.num_generated,
        }
        if params.max_tokens is not None:
            found["gen_ai.request.max_tokens"] = params.max_tokens
        times = stream.times
        if times.first_token_s:
            found["gen_ai.latency.time_to_first_token"] = times.first_token_s - request.arrival_s
        if times.ended_s:
            found |= {_LATENCIES[name]: value for name, value in spans(stream).items()}
        return found

    def close(self) -> None:
        """Send what has not been sent, for some seconds at most."""
        self._provider.shutdown()


def otlp_tracer(endpoint: str, model_name: str, *, clock: Any = time.monotonic) -> Tracer:
    """A tracer that sends to an OTLP collector over HTTP. Raises ConfigError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_S)
    except ImportError:
        raise ConfigError("otlp_traces_endpoint: needs the OpenTelemetry SDK: pip install 'jaxpaged[otel]'") from None
    return Tracer(model_name, exporter, clock=clock)
