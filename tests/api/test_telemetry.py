"""Metrics and traces of requests and steps: templates of routes, and no path, query, header or text of an exception."""

import gzip
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient

import app.main
import app.service
from app.errors import MissingExtra
from app.jobs.traces import ExportedTraces, NoTraces, create_traces
from app.settings import Settings
from tests.api.support import BASE_URL, PATIENT_NAME, FakeEngine, fake_scan, send

export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="pip install 'counterpart[otel]'")
in_memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> Any:
    return in_memory.InMemorySpanExporter()


@pytest.fixture
def traced(
    exporter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    traces = ExportedTraces(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(app.service, "create_traces", lambda url: traces if url == "http://127.0.0.1:4318" else None)
    settings = Settings(store=str(tmp_path_factory.mktemp("store")), traces="http://127.0.0.1:4318")
    with TestClient(app.main.create_app(settings, FakeEngine()), BASE_URL, raise_server_exceptions=False) as client:
        yield client


def test_requests_and_steps_are_spans(traced: TestClient, exporter: Any) -> None:
    job = send(traced, query=f"?series={PATIENT_NAME}").json()["id"]
    traced.get(f"/v1/scans/{job}/report.json", headers={"traceparent": CALLER})
    traced.get(f"/v1/scans/{PATIENT_NAME}")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    steps = ["job infer", "job export", "job publish"]
    requests = ["POST /v1/scans", "GET /v1/scans/{job}/report.json", "GET /v1/scans/{job}"]
    assert set(spans) == {*steps, *requests}
    for name in steps:
        assert spans[name].attributes["counterpart.job"] == job
    assert spans["job infer"].attributes["counterpart.outcome"] == "succeeded"
    assert dict(spans["GET /v1/scans/{job}"].attributes) == {
        "http.request.method": "GET",
        "http.route": "/v1/scans/{job}",
        "http.response.status_code": 404,
    }
    assert f"{spans['GET /v1/scans/{job}/report.json'].context.trace_id:032x}" == CALLER.split("-")[1]


def test_spans_contain_no_text_of_the_caller_or_of_an_exception(
    traced: TestClient, exporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Idempotency-Key": PATIENT_NAME, "User-Agent": PATIENT_NAME}
    scan = fake_scan(raise_value_error=PATIENT_NAME)
    failed = traced.post(f"/v1/scans?series={PATIENT_NAME}", content=scan, headers={**headers, "Prefer": "wait=60"})
    assert failed.json()["code"] == "internal_error"
    traced.get(f"/{PATIENT_NAME}")
    traced.request(PATIENT_NAME.upper(), "/v1/scans")

    def fail(*_: object) -> None:
        raise RuntimeError(PATIENT_NAME)

    monkeypatch.setattr(traced.app.state.services.queue, "list_jobs", fail)  # type: ignore[attr-defined]
    assert traced.get("/v1/scans").status_code == 500
    spans = exporter.get_finished_spans()
    text = "".join(span.to_json() for span in spans)
    assert PATIENT_NAME.lower() not in text.lower()
    assert all(not span.events for span in spans)
    by_name = {span.name: span for span in spans}
    assert not by_name["GET /v1/scans"].status.is_ok
    assert by_name["job infer"].attributes["counterpart.outcome"] == "internal_error"
    assert {"GET none", "OTHER /v1/scans"} <= set(by_name)


def test_latency_is_counted_by_route_template(client: TestClient) -> None:
    job = send(client, name="latency").json()["id"]
    client.get(f"/v1/scans/{job}")
    client.get(f"/v1/{PATIENT_NAME}")
    text = client.get("/metrics").text
    counted = dict(re.findall(r"^counterpart_http_request_seconds_count\{(.+)\} ([\d.]+)$", text, re.MULTILINE))
    assert float(counted['method="GET",route="/v1/scans/{job}",status="200"']) >= 1
    assert float(counted['method="POST",route="/v1/scans",status="200"']) >= 1
    assert float(counted['method="GET",route="none",status="404"']) >= 1
    assert job not in text
    assert PATIENT_NAME not in text


def test_metrics_of_a_process_can_be_summed(client: TestClient) -> None:
    before = client.get("/metrics").text
    send(client, name="summed")
    send(client, name="summed")  # the same scan is the same job
    after = client.get("/metrics").text

    def value(text: str, name: str) -> float:
        return float(re.findall(rf"^{name} ([\d.e+]+)$", text, re.MULTILINE)[0])

    assert value(after, "counterpart_scans_received_total") - value(before, "counterpart_scans_received_total") == 1
    assert value(after, "counterpart_worker_busy") == 0
    assert value(after, "counterpart_worker_paused") == 0
    assert value(after, "process_resident_memory_bytes") > 1e6
    assert value(after, "process_cpu_seconds_total") > 0


class Collector(BaseHTTPRequestHandler):
    """Collector of traces that keeps what it receives."""

    received: list[tuple[str, bytes]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_spans_reach_a_collector_when_the_service_ends() -> None:
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        traces = create_traces(f"http://127.0.0.1:{server.server_port}/")
        with traces.span("job infer") as span:
            span.attributes["counterpart.step"] = "infer"
        traces.close()
        server.shutdown()
    ((path, body),) = Collector.received
    assert path == "/v1/traces"
    (resource,) = service.ExportTraceServiceRequest.FromString(gzip_or_plain(body)).resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "counterpart"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["job infer"]


def gzip_or_plain(body: bytes) -> bytes:
    return gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body


def test_traces_without_the_extra_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    assert isinstance(create_traces(None), NoTraces)
    with pytest.raises(MissingExtra, match=r"counterpart\[otel\]"):
        create_traces("http://127.0.0.1:4318")
