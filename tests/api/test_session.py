"""Sessions of browsers: the cookie, its end, requests of other sites, and the login at an issuer."""

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from fastapi.testclient import TestClient

from app.api.tokens import TokenFile
from app.main import create_app
from app.settings import Settings
from tests.api.service_process import API_ONLY, run_service
from tests.api.support import BASE_URL, URL, FakeEngine, fake_scan
from tests.support.issuer import AUDIENCE, CLIENT, TestIssuer, run_issuer

TOKEN = "a-long-random-value"  # noqa: S105
CSRF = {"X-Counterpart-CSRF": "1"}
JOB = "0" * 16 + "-" + "0" * 16


@contextmanager
def run(tmp_path: Path, base_url: str = BASE_URL, **settings: Any) -> Iterator[TestClient]:
    app = create_app(Settings(store=str(tmp_path / "store"), drain_seconds=0, **settings), FakeEngine())
    with TestClient(app, base_url, follow_redirects=False) as client:
        yield client


def log_in(client: TestClient, token: str = TOKEN) -> httpx2.Response:
    return client.post("/session", json={"token": token}, headers=CSRF)


def test_without_access_control_everybody_on_this_machine_has_all_scopes(tmp_path: Path) -> None:
    with run(tmp_path) as client:
        state = {"actor": "anonymous", "scopes": ["send", "read", "erase", "metrics", "admin"], "login": "none"}
        assert client.get("/session").json() == state
        answer = client.post("/session", json={"token": "any"}, headers=CSRF)
        assert (answer.json(), answer.headers.get("set-cookie")) == (state, None)


def test_session_begins_and_ends(tmp_path: Path) -> None:
    with run(tmp_path, token=TOKEN) as client:
        assert client.get("/session").json() == {"actor": None, "scopes": [], "login": "token"}
        assert client.get("/session", headers={"Authorization": f"Bearer {TOKEN}"}).json()["actor"] == "token"
        wrong = client.get("/session", headers={"Authorization": "Bearer geheim"})
        assert (wrong.status_code, wrong.json()["code"]) == (401, "unauthorised")
        refused = log_in(client, "geheim")
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorised")
        assert "geheim" not in refused.text
        answer = log_in(client)
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly; Max-Age=43200; Path=/; SameSite=strict" in cookie
        assert "Secure" not in cookie
        assert TOKEN not in cookie
        assert client.get("/session").json() == answer.json()
        assert answer.json()["actor"] == "token"
        assert client.get(URL).status_code == 200
        assert client.delete("/session", headers=CSRF).status_code == 204
        assert client.get(URL).status_code == 401


@pytest.mark.parametrize(
    ("base_url", "public_url"), [("https://localhost", None), (BASE_URL, "https://reader.example/counterpart")]
)
def test_cookie_is_secure_over_https(tmp_path: Path, base_url: str, public_url: str | None) -> None:
    with run(tmp_path, base_url, token=TOKEN, public_url=public_url) as client:
        assert "; Secure" in log_in(client).headers["set-cookie"]


@pytest.mark.parametrize(
    ("headers", "accepted"),
    [
        (CSRF, True),
        (CSRF | {"Origin": BASE_URL, "Sec-Fetch-Site": "same-origin"}, True),
        (CSRF | {"Origin": "https://reader.example", "Sec-Fetch-Site": "same-origin"}, True),
        ({}, False),
        ({"X-Counterpart-CSRF": "0"}, False),
        ({"Origin": BASE_URL, "Sec-Fetch-Site": "same-origin"}, False),
        (CSRF | {"Origin": "https://other.example"}, False),
        (CSRF | {"Origin": "null"}, False),
        (CSRF | {"Sec-Fetch-Site": "cross-site"}, False),
        (CSRF | {"Sec-Fetch-Site": "same-site"}, False),
    ],
)
def test_unsafe_methods_with_a_cookie_need_the_own_origin(
    tmp_path: Path,
    headers: dict[str, str],
    accepted: bool,  # noqa: FBT001
) -> None:
    with run(tmp_path, token=TOKEN, public_url="https://reader.example/counterpart") as client:
        cookie = {"Cookie": log_in(client).headers["set-cookie"].partition(";")[0]}
        client.cookies.clear()
        answers = [
            client.post(URL, content=fake_scan(), headers=cookie | headers),
            client.delete(f"{URL}/{JOB}", headers=cookie | headers),
        ]
        assert [answer.status_code for answer in answers] == ([202, 404] if accepted else [403, 403])
        if not accepted:
            assert answers[0].json()["code"] == "foreign_origin"
            assert client.post("/session", json={"token": TOKEN}, headers=headers).status_code == 403
        # A bearer token needs no header, because a browser adds none on its own.
        assert client.delete(f"{URL}/{JOB}", headers={"Authorization": f"Bearer {TOKEN}"} | headers).status_code == 404


def test_session_has_the_scopes_of_its_token_and_ends_with_it(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens")
    token = file.create("reader", ["read"])
    with run(tmp_path, tokens=tmp_path / "tokens") as client:
        assert log_in(client, token).json() == {"actor": "token:reader", "scopes": ["read"], "login": "token"}
        assert client.get(URL).status_code == 200
        assert client.post(URL, content=fake_scan(), headers=CSRF).status_code == 403
        file.revoke("reader")
        assert client.get(URL).status_code == 401
        assert client.get("/session").json()["actor"] is None


def test_another_static_token_ends_the_sessions(tmp_path: Path) -> None:
    with run(tmp_path, token=TOKEN) as client:
        cookie = {"Cookie": log_in(client).headers["set-cookie"].partition(";")[0]}
    with run(tmp_path, token=TOKEN) as client:
        assert client.get(URL, headers=cookie).status_code == 200  # a restart ends nothing
    with run(tmp_path, token="another") as client:  # noqa: S106
        assert client.get(URL, headers=cookie).status_code == 401


def test_forged_changed_and_expired_cookies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run(tmp_path, token=TOKEN) as client:
        cookie = log_in(client).headers["set-cookie"].partition(";")[0].partition("=")[2]
        client.cookies.clear()
        content, _, signature = cookie.partition(".")
        fields = json.loads(base64.urlsafe_b64decode(content + "=="))
        fields["end"] += 1
        longer = base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")
        forged = [
            "x",
            ".",
            content,
            f"{content}.",
            f".{signature}",
            f"{longer}.{signature}",
            f"{content}.{'0' * 64}",
            "ä.ä",
        ]
        for value in forged:
            raw = f"counterpart_session={value}".encode("latin-1")
            assert client.get(URL, headers={b"cookie": raw}).status_code == 401, value
        # A cookie for another purpose has another signature.
        login = client.app.state.identity.values.sign("login", fields, 60)  # type: ignore[attr-defined]
        assert client.get(URL, headers={"Cookie": f"counterpart_session={login}"}).status_code == 401
        header = {"Cookie": f"counterpart_session={cookie}"}
        assert client.get(URL, headers=header).status_code == 200
        monkeypatch.setattr("app.api.cookies.time.time", lambda: fields["end"])
        assert client.get(URL, headers=header).status_code == 401


def test_session_works_in_another_process(tmp_path: Path) -> None:
    shared = {"token": TOKEN, "database": f"sqlite:///{tmp_path}/jobs.sqlite"}
    with (
        run_service(tmp_path / "one", tmp_path / "one.log", API_ONLY, None, **shared) as one,
        run_service(tmp_path / "two", tmp_path / "two.log", API_ONLY, None, **shared) as two,
    ):
        cookie = log_in(one.http).headers["set-cookie"].partition(";")[0]  # type: ignore[arg-type]
        assert two.http.get(URL, headers={"Cookie": cookie}).status_code == 200


def test_body_with_a_token_is_never_repeated(tmp_path: Path) -> None:
    with run(tmp_path, token=TOKEN) as client:
        for body in ({"tokens": TOKEN}, {"token": [TOKEN]}, {"token": TOKEN * 1000}):
            answer = client.post("/session", json=body, headers=CSRF)
            assert answer.status_code == 400
            assert TOKEN not in answer.text


def test_body_that_is_too_long_or_stops_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    async def stream_long(_: object) -> AsyncIterator[bytes]:
        for number in range(1000):
            read.append(number)
            yield bytes(1 << 16)

    async def stream_slow(_: object) -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    monkeypatch.setattr("app.api.upload.BODY_SECONDS", 0.2)
    with run(tmp_path, token=TOKEN) as client:
        for stream, status, code in ((stream_long, 413, "upload_too_large"), (stream_slow, 408, "upload_too_slow")):
            monkeypatch.setattr("starlette.requests.Request.stream", stream)
            answer = client.post("/session", content=b"", headers=CSRF)
            assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert len(read) < 10


# ---- login at an issuer ----


@pytest.fixture(scope="module")
def issuer() -> Iterator[TestIssuer]:
    with run_issuer() as issuer:
        yield issuer


@contextmanager
def run_with(issuer: TestIssuer, tmp_path: Path, **settings: Any) -> Iterator[TestClient]:
    oidc: dict[str, Any] = {"oidc_issuer": issuer.url, "oidc_audience": AUDIENCE, "oidc_client": CLIENT}
    with run(tmp_path, public_url="http://127.0.0.1/", **oidc, **settings) as client:
        yield client


def begin(client: TestClient) -> dict[str, str]:
    answer = client.get("/login", headers={"Host": "127.0.0.1"})
    assert answer.status_code == 303
    assert "SameSite=lax" in answer.headers["set-cookie"]
    return {name: values[0] for name, values in parse_qs(urlsplit(answer.headers["location"]).query).items()}


def test_bearer_jwt_of_the_issuer_is_accepted_with_its_scopes(tmp_path: Path, issuer: TestIssuer) -> None:
    with run_with(issuer, tmp_path) as client:
        headers = {"Authorization": f"Bearer {issuer.sign()}"}
        assert client.get(URL, headers=headers).status_code == 200
        assert client.post(URL, content=fake_scan(), headers=headers).status_code == 403
        state = client.get("/session", headers=headers).json()
        assert state == {"actor": "oidc:reader-1", "scopes": ["read"], "login": "oidc"}
        assert log_in(client, issuer.sign()).status_code == 200
        assert client.get(URL).status_code == 200
        expired = {"Authorization": f"Bearer {issuer.sign(exp=1)}"}
        assert client.get(URL, headers=expired).json()["found"] == "The token has expired."


def test_session_of_a_jwt_ends_with_the_jwt(
    tmp_path: Path, issuer: TestIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_with(issuer, tmp_path) as client:
        expires = int(time.time()) + 100
        answer = log_in(client, issuer.sign(exp=expires))
        max_age = re.search(r"Max-Age=(\d+);", answer.headers["set-cookie"])
        assert max_age is not None
        assert 0 < int(max_age[1]) <= 100
        header = {"Cookie": answer.headers["set-cookie"].partition(";")[0]}
        client.cookies.clear()
        assert client.get(URL, headers=header).status_code == 200
        monkeypatch.setattr("app.api.cookies.time.time", lambda: expires + 1.0)
        assert client.get(URL, headers=header).status_code == 401
        monkeypatch.undo()
        long = log_in(client, issuer.sign(exp=expires + 10 * 24 * 3600))
        assert "Max-Age=43200;" in long.headers["set-cookie"]


def test_login_by_code_and_pkce(tmp_path: Path, issuer: TestIssuer) -> None:
    with run_with(issuer, tmp_path, oidc_client_secret="geheim") as client:  # noqa: S106
        sent = begin(client)
        assert sent["redirect_uri"] == "http://127.0.0.1/login/callback"
        assert (sent["client_id"], sent["response_type"], sent["code_challenge_method"]) == (CLIENT, "code", "S256")
        issuer.tokens = {"id_token": issuer.sign(aud=CLIENT, nonce=sent["nonce"], scope="read send")}
        answer = client.get("/login/callback", params={"state": sent["state"], "code": "c0de"})
        assert answer.status_code == 200
        assert 'content="0;url=/"' in answer.text
        form = issuer.forms[-1]
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == sent["code_challenge"]
        assert (form["code"], form["client_secret"], form["redirect_uri"]) == ("c0de", "geheim", sent["redirect_uri"])
        state = client.get("/session").json()
        assert state == {"actor": "oidc:reader-1", "scopes": ["send", "read"], "login": "oidc"}
        # The login cookie is gone: the same answer is not accepted twice.
        again = client.get("/login/callback", params={"state": sent["state"], "code": "c0de"})
        assert (again.status_code, again.json()["code"]) == (401, "login_failed")


def test_scopes_may_come_from_the_access_token_of_the_same_subject(tmp_path: Path, issuer: TestIssuer) -> None:
    with run_with(issuer, tmp_path) as client:
        for subject, status in (("reader-1", 200), ("another", 403)):
            sent = begin(client)
            id_token = issuer.sign(aud=CLIENT, nonce=sent["nonce"], scope=None)
            issuer.tokens = {"id_token": id_token, "access_token": issuer.sign(sub=subject)}
            answer = client.get("/login/callback", params={"state": sent["state"], "code": "c"})
            assert answer.status_code == status, subject


@pytest.mark.parametrize(
    ("changes", "query"),
    [
        ({"nonce": "another"}, {}),
        ({"nonce": None}, {}),
        ({"aud": AUDIENCE}, {}),
        ({"exp": 1}, {}),
        ({}, {"state": "another"}),
        ({}, {"state": ""}),
        ({}, {"code": "", "error": "access_denied"}),
    ],
)
def test_login_that_is_not_this_browsers_own_is_refused(
    tmp_path: Path, issuer: TestIssuer, changes: dict[str, Any], query: dict[str, str]
) -> None:
    with run_with(issuer, tmp_path) as client:
        sent = begin(client)
        issuer.tokens = {"id_token": issuer.sign(**({"aud": CLIENT, "nonce": sent["nonce"]} | changes))}
        answer = client.get("/login/callback", params={"state": sent["state"], "code": "c"} | query)
        assert (answer.status_code, answer.json()["code"]) == (401, "login_failed")
        assert client.get("/session").json()["actor"] is None


def test_login_without_settings_is_404_and_without_an_issuer_503(tmp_path: Path, issuer: TestIssuer) -> None:
    with run(tmp_path, token=TOKEN) as client:
        assert client.get("/login").status_code == 404
    issuer.status = 500
    try:
        with run_with(issuer, tmp_path) as client:
            answer = client.get("/login")
            assert (answer.status_code, answer.json()["code"]) == (503, "identity_unavailable")
            jwt_answer = client.get(URL, headers={"Authorization": f"Bearer {issuer.sign()}"})
            assert jwt_answer.status_code == 503
            assert jwt_answer.headers["retry-after"]
    finally:
        issuer.status = 200
