"""Audit of requests: the life of one scan, who is named, what is left out, and what happens without a row."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app.api.tokens import TokenFile
from app.cli import app as command_line
from app.jobs.audit import AuditTrail
from app.main import create_app
from app.settings import Settings
from tests.api.service_process import API_ONLY, run_service
from tests.api.support import BASE_URL, PATIENT_NAME, URL, WAIT, FakeEngine, fake_scan
from tests.support.issuer import AUDIENCE, run_issuer

CSRF = {"X-Counterpart-CSRF": "1"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@contextmanager
def run(tmp_path: Path, **settings: Any) -> Iterator[TestClient]:
    app = create_app(Settings(store=str(tmp_path / "store"), drain_seconds=0, **settings), FakeEngine())
    with TestClient(app, BASE_URL, client=("10.0.0.7", 1234)) as client:
        yield client


def rows(client: TestClient) -> list[tuple[str, str, str]]:
    trail = client.app.state.auditor.trail  # type: ignore[attr-defined]
    return [(row.actor, row.action, row.outcome) for row in trail.read_all()]


def test_life_of_one_scan_is_complete(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens")
    scopes = {"gateway": ["send"], "reader": ["read"], "keeper": ["erase"], "auditor": ["admin"]}
    tokens = {name: bearer(file.create(name, granted)) for name, granted in scopes.items()}
    with run(tmp_path, tokens=tmp_path / "tokens") as client:
        job = client.post(URL, content=fake_scan(), headers=tokens["gateway"] | WAIT).json()["id"]
        client.get(URL, headers=tokens["reader"])
        client.get(f"{URL}/{job}", headers=tokens["reader"])
        client.get(f"{URL}/{job}/events", headers=tokens["reader"])
        client.get(f"{URL}/{job}/mask.nii.gz", headers=tokens["reader"])
        client.delete(f"{URL}/{job}", headers=tokens["reader"])
        client.post(f"{URL}/{job}/cancel", headers=tokens["keeper"])
        client.delete(f"{URL}/{job}", headers=tokens["keeper"])
        client.get(f"{URL}/{job}", headers=tokens["reader"])
        answer = client.get("/v1/audit", headers=tokens["auditor"])
        found = [json.loads(line) for line in answer.text.splitlines()]
        assert [(row["actor"], row["action"], row["outcome"], row["job"]) for row in found] == [
            ("token:gateway", "send", "begun", None),
            ("token:gateway", "send", "200", job),
            ("token:reader", "list", "200", None),
            ("token:reader", "show", "200", job),
            ("token:reader", "follow", "200", job),
            ("token:reader", "download", "200", job),
            ("token:reader", "erase", "403", job),
            ("token:keeper", "cancel", "begun", job),
            ("token:keeper", "cancel", "409", job),
            ("token:keeper", "erase", "begun", job),
            ("token:keeper", "erase", "204", job),
            ("token:reader", "show", "404", job),
        ]
        assert {row["address"] for row in found} == {"10.0.0.7"}
        assert [list(row) for row in found] == [["id", "time", "actor", "action", "job", "outcome", "address"]] * 12
        later = client.get(f"/v1/audit?after={found[-1]['id']}", headers=tokens["auditor"]).text
        assert [json.loads(line)["action"] for line in later.splitlines()] == ["export"]
        assert client.get("/v1/audit", headers=tokens["reader"]).status_code == 403


def test_polls_are_one_row_a_minute_and_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run(tmp_path) as client:
        job = client.post(URL, content=fake_scan(seconds=1.5)).json()["id"]
        seen = set()
        while "succeeded" not in seen:
            seen.add(client.get(f"{URL}/{job}").json()["state"])
            time.sleep(0.05)
        for _ in range(5):
            client.get(f"{URL}/{job}")
        assert rows(client).count(("anonymous", "show", "200")) == len(seen)
        monkeypatch.setattr("app.api.identity.REPEAT_SECONDS", 0.0)
        client.get(f"{URL}/{job}")
        assert rows(client).count(("anonymous", "show", "200")) == len(seen) + 1


def test_refused_tokens_and_logins_have_rows_and_probes_have_none(tmp_path: Path) -> None:
    with run(tmp_path, token="geheim") as client:  # noqa: S106
        for path in ("/livez", "/readyz", "/session", "/v1/models", URL):
            client.get(path)
        assert rows(client) == []
        for path in (URL, "/session", URL):
            client.get(path, headers=bearer("wrong"))
        client.get("/metrics", headers=bearer("geheim"))
        client.post("/session", json={"token": "wrong"}, headers=CSRF)
        client.post("/session", json={"token": "geheim"}, headers=CSRF)
        client.delete("/session", headers=CSRF)
        client.delete("/session", headers=CSRF)
        assert rows(client) == [
            ("unknown", "refuse", "401"),
            ("unknown", "login", "401"),
            ("token", "login", "200"),
            ("token", "logout", "204"),
        ]


def test_subject_of_an_issuer_is_in_the_trail_and_a_pseudonym_in_the_log(tmp_path: Path) -> None:
    with run_issuer() as issuer:
        oidc = {"oidc_issuer": issuer.url, "oidc_audience": AUDIENCE, "trusted_proxies": "127.0.0.1"}
        with run_service(tmp_path / "one", tmp_path / "log", API_ONLY, None, **oidc) as service:
            headers = bearer(issuer.sign(sub="m.muster", scope="read admin")) | {"X-Forwarded-For": "192.0.2.5"}
            assert service.http.get(f"{URL}/{'0' * 16}-{'1' * 16}", headers=headers).status_code == 404
            line = json.loads(service.http.get("/v1/audit", headers=headers).text.splitlines()[0])
            assert (line["actor"], line["address"]) == ("oidc:m.muster", "192.0.2.5")
        log = (tmp_path / "log").read_text()
        assert "muster" not in log
        (request,) = [entry for entry in map(json.loads, log.splitlines()) if entry.get("status") == 404]
        assert request["actor"].startswith("oidc:")
        assert request["job"] == f"{'0' * 16}-{'1' * 16}"


def test_forwarded_address_of_an_unknown_proxy_is_ignored(tmp_path: Path) -> None:
    with run_service(tmp_path / "one", tmp_path / "log", API_ONLY) as service:
        service.http.get(URL, headers={"X-Forwarded-For": "192.0.2.5"})
        line = json.loads(service.http.get("/v1/audit").text.splitlines()[0])
        assert line["address"] == "127.0.0.1"


def test_rows_hold_nothing_that_a_caller_wrote(tmp_path: Path) -> None:
    with run(tmp_path) as client:
        client.get(f"{URL}/{PATIENT_NAME}")
        client.delete(f"{URL}/{PATIENT_NAME}")
        client.get(f"{URL}?code={PATIENT_NAME}")
        files = {"file": (f"{PATIENT_NAME}.nii", fake_scan(name=PATIENT_NAME))}
        client.post(URL, files=files, headers={"Idempotency-Key": PATIENT_NAME})
        trail = client.app.state.auditor.trail  # type: ignore[attr-defined]
        found = list(trail.read_all())
        assert len(found) == 6
        assert PATIENT_NAME not in repr(found)
        assert [row.job for row in found[:3]] == [None] * 3


def test_without_a_row_nothing_is_read_and_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run(tmp_path) as client:
        job = client.post(URL, content=fake_scan(), headers=WAIT).json()["id"]
        client.get(URL)

        def hang(*_: object) -> None:
            time.sleep(3)

        with monkeypatch.context() as patch:
            patch.setattr(client.app.state.auditor._threads, "_seconds", 0.2)  # type: ignore[attr-defined]
            patch.setattr(AuditTrail, "write", hang)
            answers = [
                client.get(f"{URL}/{job}/mask.nii.gz"),
                client.get(f"{URL}/{job}/events"),
                client.get(f"{URL}/{job}"),
                client.delete(f"{URL}/{job}"),
                client.post(URL, content=fake_scan(name="other")),
            ]
            for answer in answers:
                assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable")
                assert answer.headers["retry-after"]
            assert f"counterpart_audit_failures_total {len(answers)}.0" in client.get("/metrics").text
            # What is not audited, what shows nothing, and what has a row of this minute are answered.
            assert client.get("/v1/models").status_code == 200
            assert client.get(f"{URL}/{job}/unknown").status_code == 404
            assert client.get(URL).status_code == 200
        assert len(client.get(URL).json()["scans"]) == 1
        assert client.get(f"{URL}/{job}/mask.nii.gz").status_code == 200


def test_scan_is_erased_although_the_row_before_does_not_fit_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    write, calls = AuditTrail.write, []
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL

    def fail_once(trail: AuditTrail, entry: Any) -> None:
        calls.append(entry)
        if len(calls) == 1:
            raise sa.exc.OperationalError("INSERT", {}, full)
        write(trail, entry)

    with run(tmp_path) as client:
        job = client.post(URL, content=fake_scan(), headers=WAIT).json()["id"]
        monkeypatch.setattr(AuditTrail, "write", fail_once)
        assert client.delete(f"{URL}/{job}").status_code == 204
        assert rows(client)[-1] == ("anonymous", "erase", "204")


def test_command_prints_the_trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run(tmp_path) as client:
        client.get(URL)
        client.get(f"{URL}/{'0' * 16}-{'1' * 16}")
    monkeypatch.setenv("COUNTERPART_STORE", str(tmp_path / "store"))
    lines = CliRunner().invoke(command_line, ["audit-log"]).output.splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["list", "show"]
    later = CliRunner().invoke(command_line, ["audit-log", "--after", "1"]).output
    assert later.splitlines() == lines[1:]


def test_refused_tokens_fill_the_trail_with_one_row_a_minute(tmp_path: Path) -> None:
    with run(tmp_path, token="geheim") as client:  # noqa: S106
        for number in range(5):
            client.get(f"{URL}/{number:016x}-{number:016x}", headers=bearer("wrong"))
        assert rows(client) == [("unknown", "refuse", "401")]


def test_a_reader_without_a_name_is_the_actor_of_the_login(tmp_path: Path) -> None:
    headers = bearer(TokenFile(tmp_path / "tokens").create("workstation", ["send", "read"]))
    with run(tmp_path, tokens=tmp_path / "tokens") as client:
        client.headers.update(headers)
        job = client.post(URL, content=fake_scan(), headers=WAIT).json()["id"]
        review = f"{URL}/{job}/reviews/1"
        assert client.put(review, json={"verdict": "right"}).json()["reader"] == "token:workstation"
        assert client.delete(review).status_code == 204
        assert client.get(f"{URL}/{job}/reviews").json()["history"] == []
        found = [(actor, outcome) for actor, action, outcome in rows(client) if action == "review"]
    outcomes = ("begun", "200", "begun", "204")
    assert found == [("token:workstation", outcome) for outcome in outcomes]


def test_only_an_administrator_changes_the_verdict_of_another_reader(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens")
    scopes = {"a": ["send", "read"], "b": ["read"], "chief": ["read", "admin"]}
    tokens = {name: bearer(file.create(name, granted)) for name, granted in scopes.items()}
    with run(tmp_path, tokens=tmp_path / "tokens") as client:
        job = client.post(URL, content=fake_scan(), headers=tokens["a"] | WAIT).json()["id"]
        review, reviews = f"{URL}/{job}/reviews/1", f"{URL}/{job}/reviews"
        assert (
            client.put(review, json={"verdict": "right", "reader": "token:a"}, headers=tokens["a"]).status_code == 200
        )
        for answer in (
            client.put(review, json={"verdict": "wrong", "reader": "token:a"}, headers=tokens["b"]),
            client.delete(f"{review}?reader=token:a", headers=tokens["b"]),
            client.delete(f"{review}?reader=", headers=tokens["b"]),
        ):
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
            assert "token:a" not in answer.text
        assert rows(client)[-1] == ("token:b", "review", "403")
        (kept,) = client.get(reviews, headers=tokens["b"]).json()["history"]
        assert (kept["verdict"], kept["reader"]) == ("right", "token:a")

        changed = client.put(review, json={"verdict": "unsure", "reader": "token:a"}, headers=tokens["chief"])
        assert (changed.status_code, changed.json()["reader"]) == (200, "token:a")
        assert client.delete(f"{review}?reader=token:a", headers=tokens["chief"]).status_code == 204
        assert client.get(reviews, headers=tokens["b"]).json()["history"] == []
