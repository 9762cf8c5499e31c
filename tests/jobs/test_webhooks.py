"""Webhooks: what is sent, how it is signed, and what happens when a target fails or a process dies."""

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from app.errors import InvalidSettings
from app.jobs import webhook_sender, webhooks
from app.jobs.database import connect, workflow_table
from app.jobs.metrics import Metrics
from app.jobs.webhook_sender import DeliveryFault, WebhookSender, find_addresses, post
from app.jobs.webhooks import PAUSES, Outbox
from app.main import create_app
from app.settings import Settings, decode_webhook_secret
from tests.api.service_process import SERVICE, run_service
from tests.api.support import BASE_URL, PATIENT_NAME, URL, WAIT, FakeEngine, fake_scan, wait_for_state

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105  # the example of the specification
KEY = decode_webhook_secret(SECRET)


@dataclass
class Receiver:
    """A target that records what it receives."""

    url: str = ""
    status: int = 204
    location: str = ""
    received: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    def wait(self, number: int, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while len(self.received) < number and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(self.received) >= number


@contextmanager
def receive(context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.received.append((self.path, dict(self.headers), body))
            self.send_response(receiver.status)
            if receiver.location:
                self.send_header("Location", receiver.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver.url = f"{'https' if context else 'http'}://127.0.0.1:{server.server_address[1]}/hook"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receive() as receiver:
        yield receiver


@pytest.fixture(params=["sqlite", "postgresql"])
def outbox(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Outbox]:
    url = f"sqlite:///{tmp_path}/jobs.sqlite" if request.param == "sqlite" else request.getfixturevalue("database")
    engine = connect(url)
    schema = "" if request.param == "sqlite" else "dbos."
    with engine.begin() as connection:
        if schema:
            connection.execute(sa.text("CREATE SCHEMA IF NOT EXISTS dbos"))
        columns = "workflow_uuid TEXT, name TEXT, status TEXT, updated_at BIGINT"
        connection.execute(sa.text(f"CREATE TABLE {schema}workflow_status ({columns})"))
    outbox = Outbox(engine)
    outbox.create_tables()
    yield outbox
    with engine.begin() as connection:
        for name in (f"{schema}workflow_status", "counterpart_webhooks", "counterpart_webhook_cursor"):
            connection.execute(sa.text(f"DROP TABLE {name}"))
    engine.dispose()


@pytest.fixture
def end_job(outbox: Outbox) -> Callable[..., None]:
    def end(job: str, status: str = "SUCCESS", name: str = "analyse_scan", seconds_ago: float = 0) -> None:
        values = {"workflow_uuid": job, "name": name, "status": status}
        values["updated_at"] = str(round((time.time() - seconds_ago) * 1000))
        workflows = workflow_table(outbox._database)
        with outbox._database.begin() as connection:
            connection.execute(workflows.insert().values({**values, "updated_at": int(values["updated_at"])}))

    return end


def sender(outbox: Outbox, *targets: str) -> WebhookSender:
    return WebhookSender(outbox, targets, KEY, frozenset(), Metrics())


def test_each_ended_job_is_one_message_for_each_target(outbox: Outbox, end_job: Callable[..., None]) -> None:
    end_job("old", seconds_ago=3600)
    outbox.collect(["a", "b"])
    for job, status in (("one", "SUCCESS"), ("two", "ERROR"), ("three", "CANCELLED"), ("four", "PENDING")):
        end_job(job, status)
    end_job("other", name="another workflow")
    for _ in range(3):
        Outbox(outbox._database).collect(["a", "b"])
    found = outbox.claim(100)
    assert sorted((m.job, m.state, m.target) for m in found) == sorted(
        (job, state, target)
        for job, state in (("one", "succeeded"), ("two", "failed"), ("three", "cancelled"))
        for target in ("a", "b")
    )
    assert len({message.id for message in found}) == 6
    assert {message.attempts for message in found} == {1}
    # Claimed messages belong to this process for a while.
    assert Outbox(outbox._database).claim(100) == []


def test_parallel_processes_claim_each_message_once(outbox: Outbox, end_job: Callable[..., None]) -> None:
    outbox.collect(["a"])
    for number in range(20):
        end_job(f"job-{number}")
    claimed: list[str] = []

    def work() -> None:
        mine = Outbox(outbox._database)
        mine.collect(["a"])
        while messages := mine.claim(3):
            claimed.extend(message.id for message in messages)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == 20


def test_job_is_collected_after_the_clock_was_ahead_for_one_poll(
    outbox: Outbox, end_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.collect(["a"])
    end_job("before")
    real = webhooks._now
    with monkeypatch.context() as patch:
        patch.setattr(webhooks, "_now", lambda: real() + 2 * 3_600_000)
        end_job("while it was ahead", seconds_ago=-2 * 3600)
        outbox.collect(["a"])
    end_job("after")
    for _ in range(2):
        outbox.collect(["a"])
    assert sorted(message.job for message in outbox.claim(100)) == ["after", "before", "while it was ahead"]
    # The process is down for an hour, in which another one ends a job. The cursor must not be in the future any more.
    monkeypatch.setattr(webhooks, "_now", lambda: real() + 3_600_000)
    end_job("while it was down", seconds_ago=-60)
    outbox.collect(["a"])
    assert "while it was down" in {message.job for message in outbox.claim(100)}


@pytest.mark.parametrize("days", [-60, 60])
def test_a_clock_that_is_wrong_by_months_for_one_poll_sends_no_old_job_and_loses_no_new_one(
    outbox: Outbox, end_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """The rows of old jobs are deleted, and jobs from before the first call never had one."""
    end_job("before webhooks were on", seconds_ago=3600)
    outbox.collect(["a"])
    real = webhooks._now
    with monkeypatch.context() as patch:
        patch.setattr(webhooks, "_now", lambda: real() + days * webhooks.DAY)
        outbox.collect(["a"])
    outbox.collect(["a"])
    assert outbox.claim(100) == []
    end_job("after")
    outbox.collect(["a"])
    assert [message.job for message in outbox.claim(100)] == ["after"]


def test_message_of_a_dead_process_is_sent_after_its_lease(
    outbox: Outbox, end_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.collect(["a"])
    end_job("one")
    outbox.collect(["a"])
    (first,) = outbox.claim(1)
    now = webhooks._now()
    monkeypatch.setattr(webhooks, "_now", lambda: now + webhooks.LEASE_SECONDS * 1000 + 1)
    (second,) = outbox.claim(1)
    assert (second.id, second.body, second.attempts) == (first.id, first.body, 2)


def test_attempt_that_lasted_longer_than_its_lease_does_not_change_the_outcome_of_the_next(
    outbox: Outbox, end_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.collect(["a"])
    end_job("one")
    outbox.collect(["a"])
    (slow,) = outbox.claim(1)
    now = webhooks._now()
    monkeypatch.setattr(webhooks, "_now", lambda: now + webhooks.LEASE_SECONDS * 1000 + 1)
    (second,) = outbox.claim(1)
    outbox.mark_delivered(second)
    outbox.mark_failed(slow, "no answer", give_up=True)
    assert outbox.count_failed() == 0


def test_target_that_answers_byte_by_byte_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.webhook_sender.ATTEMPT_SECONDS", 0.5, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                for _ in range(100):
                    connection.sendall(b"H")
                    time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(DeliveryFault, match="no answer"):
            post(f"http://127.0.0.1:{server.getsockname()[1]}/hook", b"{}", {}, frozenset())
        assert time.monotonic() - start < 5


def test_tables_are_created_by_several_processes_at_once(database: str) -> None:
    faults: list[Exception] = []
    engines = [connect(database) for _ in range(6)]
    with engines[0].begin() as connection:
        for name in ("counterpart_webhooks", "counterpart_webhook_cursor"):
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {name}"))
    barrier = threading.Barrier(len(engines))

    def create(engine: sa.Engine) -> None:
        engine.connect().close()
        barrier.wait()
        try:
            Outbox(engine).create_tables()
        except Exception as error:  # noqa: BLE001  # asserted below
            faults.append(error)

    threads = [threading.Thread(target=create, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine in engines:
        engine.dispose()
    assert faults == []


def test_failed_message_is_repeated_with_growing_pauses_then_given_up_then_retried(
    outbox: Outbox, end_job: Callable[..., None], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [webhooks._now()]
    monkeypatch.setattr(webhooks, "_now", lambda: clock[0])
    target = sender(outbox, receiver.url)
    outbox.collect([receiver.url])
    end_job("one")
    outbox.collect([receiver.url])
    receiver.status = 500
    pauses = []
    for _ in range(len(PAUSES) + 1):
        (message,) = outbox.claim(1)
        target.deliver(message)
        start = clock[0]
        with outbox._database.connect() as connection:
            clock[0] = connection.execute(sa.select(webhooks.table.c.due)).scalar_one()
        pauses.append((clock[0] - start) / 1000)
    assert all(0.8 * p <= pause <= 1.2 * p for p, pause in zip(PAUSES, pauses, strict=False))
    (failed,) = outbox.list_failed()
    assert (failed.attempts, failed.fault) == (len(PAUSES) + 1, "status 500")
    assert outbox.count_failed() == 1
    assert outbox.claim(1) == []
    ids = {headers["webhook-id"] for _, headers, _ in receiver.received}
    assert len(receiver.received) == len(PAUSES) + 1
    assert len(ids) == len({body for _, _, body in receiver.received}) == 1
    receiver.status = 200
    assert not outbox.retry("msg_unknown")
    assert outbox.retry(failed.id)
    target.deliver(outbox.claim(1)[0])
    assert outbox.list_failed() == []
    assert outbox.claim(1) == []


def test_signature_and_body_satisfy_the_reference_library(
    outbox: Outbox, end_job: Callable[..., None], receiver: Receiver
) -> None:
    outbox.collect([receiver.url])
    end_job("one", "ERROR")
    outbox.collect([receiver.url])
    sender(outbox, receiver.url).deliver(outbox.claim(1)[0])
    ((path, headers, body),) = receiver.received
    event: Any = Webhook(SECRET).verify(body, headers)
    assert path == "/hook"
    assert event == {
        "type": "scan.failed",
        "timestamp": event["timestamp"],
        "data": {"job": "one", "state": "failed"},
    }
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body + b" ", headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 32).verify(body, headers)


def test_removed_target_and_one_that_is_gone_get_no_further_attempt(
    outbox: Outbox, end_job: Callable[..., None], receiver: Receiver
) -> None:
    removed = "http://127.0.0.1:9/removed"
    outbox.collect([receiver.url, removed])
    end_job("one")
    outbox.collect([receiver.url, removed])
    receiver.status = 410
    for message in outbox.claim(2):
        sender(outbox, receiver.url).deliver(message)
    assert sorted(str(m.fault) for m in outbox.list_failed()) == [
        "status 410",
        "the target is no longer in COUNTERPART_WEBHOOKS",
    ]


def test_redirect_is_a_fault_and_is_not_followed(receiver: Receiver) -> None:
    with receive() as other:
        receiver.status, receiver.location = 307, other.url
        assert post(receiver.url, b"{}", {}, frozenset()) == 307
        assert other.received == []


@pytest.mark.parametrize(
    ("address", "accepted"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),  # noqa: S104
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("224.0.1.1", False),
        ("ff0e::1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::1", False),
    ],
)
def test_private_address_needs_a_listed_host(monkeypatch: pytest.MonkeyPatch, address: str, accepted: bool) -> None:  # noqa: FBT001
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443))])
    if accepted:
        assert find_addresses("hook.example", 443, frozenset()) == [address]
    else:
        with pytest.raises(DeliveryFault, match="private"):
            find_addresses("hook.example", 443, frozenset({"other.example"}))
    assert find_addresses("hook.example", 443, frozenset({"hook.example"})) == [address]


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 0)) for address in addresses])


def test_private_addresses_of_a_public_host_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "10.0.0.1", "1.1.1.1", "1.1.1.1")
    assert find_addresses("hook.example", 443, frozenset()) == ["1.1.1.1"]


def test_next_address_is_tried_if_the_first_one_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, tried = socket.create_connection, []

    def record(address: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(address[0])
        if address[0] == "1.1.1.1":
            raise ConnectionRefusedError
        return connect(("127.0.0.1", address[1]), timeout)

    with receive() as receiver:
        port = urlsplit(receiver.url).port
        with monkeypatch.context() as patch:
            resolve(patch, "1.1.1.1", "10.0.0.1", "8.8.8.8")
            assert find_addresses("hook.example", 80, frozenset()) == ["1.1.1.1", "8.8.8.8"]
        monkeypatch.setattr(webhook_sender, "find_addresses", lambda *_: ["1.1.1.1", "8.8.8.8"])
        monkeypatch.setattr("socket.create_connection", record)
        assert post(f"http://hook.example:{port}/hook", b"{}", {}, frozenset()) == 204
        assert tried == ["1.1.1.1", "8.8.8.8"]
        monkeypatch.setattr(webhook_sender, "find_addresses", lambda *_: ["1.1.1.1"])
        with pytest.raises(DeliveryFault, match="ConnectionRefusedError"):
            post(f"http://hook.example:{port}/hook", b"{}", {}, frozenset())


def test_certificate_of_the_target_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    extension = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *extension], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with receive(context) as receiver:
        with pytest.raises(DeliveryFault, match="certificate"):
            post(receiver.url, b"{}", {}, frozenset())
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert post(receiver.url, b"{}", {}, frozenset()) == 204
    assert len(receiver.received) == 1


def test_nobody_listens() -> None:
    with pytest.raises(DeliveryFault, match="no answer"):
        post("http://127.0.0.1:9/", b"{}", {}, frozenset())


def test_targets_need_a_secret_and_https(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="WEBHOOK_SECRET"):
        create_app(Settings(store=str(tmp_path), webhooks="https://a.example"), FakeEngine())
    for url in ("http://a.example", "ftp://a.example", "https://u:p@a.example", "https://a.example?x=1", "a"):
        with pytest.raises(ValueError, match="https"):
            Settings(webhooks=f"https://ok.example,{url}")
    for secret in ("", "whsec_", "whsec_AAAA", SECRET.removeprefix("whsec_"), "whsec_not base64 at all, not even near"):
        with pytest.raises(ValueError, match="whsec_"):
            Settings(webhook_secret=secret or "x")
    assert SECRET not in Settings(webhook_secret=SECRET).format_value("webhook_secret")


# ---- the whole service ----


def test_service_sends_states_and_operators_see_and_retry_failures(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PAUSES", ())
    monkeypatch.setattr("app.jobs.webhook_sender.POLL_SECONDS", 0.2)
    settings = Settings(
        store=str(tmp_path),
        drain_seconds=0,
        webhooks=receiver.url,
        webhook_secret=SECRET,
        token="geheim",  # noqa: S106
    )
    headers = {"Authorization": "Bearer geheim"}
    receiver.status = 503
    with TestClient(create_app(settings, FakeEngine()), BASE_URL, headers=headers) as client:
        time.sleep(1)  # the first look: older jobs have no events
        files = {"file": (f"{PATIENT_NAME}.nii", fake_scan(name=PATIENT_NAME))}
        job = client.post(URL, files=files, headers=WAIT).json()["id"]
        receiver.wait(1)
        deadline = time.monotonic() + 60
        while not (failed := client.get("/v1/webhooks/failed").json()["webhooks"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [(w["job"], w["state"], w["attempts"], w["fault"]) for w in failed] == [
            (job, "succeeded", 1, "status 503")
        ]
        time.sleep(0.5)
        assert "counterpart_webhooks_dead 1.0" in client.get("/metrics").text
        receiver.status = 204
        path = f"/v1/webhooks/failed/{failed[0]['id']}/retry"
        assert client.post(path).status_code == 202
        receiver.wait(2)
        while client.get("/v1/webhooks/failed").json()["webhooks"] and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        assert 'counterpart_webhooks_total{outcome="delivered"} 1.0' in client.get("/metrics").text
        assert client.post(path).status_code == 404
    for _, sent, body in receiver.received:
        event: Any = Webhook(SECRET).verify(body, sent)
        assert event["data"] == {"job": job, "state": "succeeded"}
        assert PATIENT_NAME not in json.dumps(sent) + body.decode()


def test_event_survives_kill_9(tmp_path: Path, receiver: Receiver) -> None:
    """The first process ends while the target does not answer. The next one delivers."""
    options = {"webhooks": receiver.url, "webhook_secret": SECRET}
    receiver.status = 500
    with run_service(tmp_path, tmp_path / "log", SERVICE, None, **options) as service:
        time.sleep(3)
        job = service.http.post(URL, content=fake_scan()).json()["id"]
        wait_for_state(service.http, job, "succeeded")
        receiver.wait(1)
        time.sleep(1)  # until the fault is recorded; otherwise, the next process waits for the lease
    before = len(receiver.received)
    receiver.status = 200
    with run_service(tmp_path, tmp_path / "log", SERVICE, None, **options):
        receiver.wait(before + 1)
        time.sleep(3)
    assert len(receiver.received) == before + 1
    assert len({headers["webhook-id"] for _, headers, _ in receiver.received}) == 1
    assert SECRET not in (tmp_path / "log").read_text()
