"""Traces, as a collector on a loopback socket gets them."""

from __future__ import annotations

import asyncio
import http.server
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("fastapi", "uvicorn", "httptools", "httpx2", "prometheus_client"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from asgi import ask  # noqa: E402
from running import running  # noqa: E402

from jaxpaged.async_llm import AsyncLLM  # noqa: E402
from jaxpaged.config import ConfigError  # noqa: E402
from jaxpaged.server.app import build_app  # noqa: E402
from jaxpaged.server.options import ServerOptions  # noqa: E402

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An endpoint, and the bodies that came to it."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
        server.shutdown()


def spans_of(bodies: list[bytes]) -> list[dict[str, Any]]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found = []
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {one.key: one.value.string_value for one in resource.resource.attributes}
            assert names["service.name"] == "jaxpaged"
            for scope in resource.scope_spans:
                for span in scope.spans:
                    attributes = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}
                    ids = {"trace": span.trace_id.hex(), "id": span.span_id.hex(), "parent": span.parent_span_id.hex()}
                    times = {"start": span.start_time_unix_nano, "end": span.end_time_unix_nano, "code": span.status.code}
                    found.append({"name": span.name, "attributes": attributes, **ids, **times})
    return found


def test_spans_come_to_the_collector_under_their_caller(model: AsyncLLM, collector: tuple[str, list[bytes]]):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")
    endpoint, bodies = collector
    with running(model, otlp_traces_endpoint=endpoint) as server, server.client(traceparent=f"00-{TRACE}-{PARENT}-01") as client:
        body = {"prompt": ["One day", "Two"], "max_tokens": 3, "ignore_eos": True, "temperature": 0.5}
        assert client.post("/v1/completions", json=body, headers={"x-request-id": "mine"}).status_code == 200
        assert client.post("/v1/completions", json={"prompt": 5}).status_code == 400
        assert client.get("/live").status_code == 200
    # The server's end has sent what was there.
    found = spans_of(bodies)
    outer, refused = (one for one in found if one["name"] == "POST /v1/completions")
    inner = [one for one in found if one["name"] == "llm_request"]
    assert len(found) == 4 and all(one["trace"] == TRACE for one in found)
    assert outer["parent"] == refused["parent"] == PARENT and {one["parent"] for one in inner} == {outer["id"]}
    assert outer["attributes"]["http.response.status_code"] == 200 and outer["attributes"]["gen_ai.request.id"] == "mine"
    assert refused["attributes"]["http.response.status_code"] == 400
    for one in inner:
        said = one["attributes"]
        assert said["gen_ai.usage.completion_tokens"] == 3 and said["gen_ai.request.max_tokens"] == 3
        assert said["gen_ai.request.temperature"] == 0.5 and said["gen_ai.response.model"] == "demo"
        latency = {name.removeprefix("gen_ai.latency."): value for name, value in said.items() if ".latency." in name}
        assert 0 <= latency["time_in_queue"] <= latency["time_to_first_token"] <= latency["e2e"]
        assert latency["time_in_model_prefill"] + latency["time_in_model_decode"] <= latency["time_in_model_inference"]
        assert latency["e2e"] == pytest.approx((one["end"] - one["start"]) / 1e9, abs=1e-3)
        # Two clocks are read one after the other.
        assert outer["start"] - 10**7 <= one["start"] < one["end"] <= outer["end"] + 10**7


def test_a_collector_that_is_not_there_holds_nobody_up(model: AsyncLLM, caplog: pytest.LogCaptureFixture):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")
    app = build_app(model, ServerOptions(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces"))
    body = b'{"prompt": "One day", "max_tokens": 2}'
    started = time.monotonic()
    assert asyncio.run(ask(app, "POST", "/v1/completions", body))[0] == 200
    app.state.tracer.close()
    assert time.monotonic() - started < 10


def test_without_an_endpoint_there_is_no_tracer(model: AsyncLLM):
    assert build_app(model).state.tracer is None


def test_without_the_extra_it_is_refused(model: AsyncLLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"jaxpaged\[otel\]"):
        build_app(model, ServerOptions(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces"))
