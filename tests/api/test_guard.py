"""Requests that a web page of another site can send, and characters that no parameter needs."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.api.server import RequestGuard
from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, URL, FakeEngine, fake_scan

TOKEN = "a-long-random-value"  # noqa: S105


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "127.8.8.8"])
def test_loopback_host_is_accepted(client: TestClient, host: str) -> None:
    assert client.get(URL, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["attacker.example", "127.0.0.1.attacker.example:8000", "localhost@attacker.example", "", "10.0.0.1", "[::2]"],
)
def test_other_host_is_refused_without_a_token(client: TestClient, host: str) -> None:
    for path in (URL, "/metrics", "/docs", "/openapi.json", "/livez"):
        answer = client.get(path, headers={"Host": host})
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_host")
        assert "attacker" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://attacker.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    ],
)
def test_request_of_another_site_is_refused_without_a_token(
    client: TestClient, engine: FakeEngine, headers: dict[str, str]
) -> None:
    analysed = len(engine.inferences)
    for method, path in (("POST", URL), ("DELETE", f"{URL}/{'0' * 16}-{'0' * 16}"), ("OPTIONS", URL)):
        answer = client.request(method, path, content=fake_scan(name="forged"), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
    assert len(engine.inferences) == analysed


def test_own_page_and_a_link_to_it_are_accepted(client: TestClient) -> None:
    own = {"Origin": BASE_URL, "Sec-Fetch-Site": "same-origin"}
    assert client.get("/v1/models", headers=own).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/docs", headers=link).status_code == 200


def guard(**arguments: object) -> RequestGuard:
    return RequestGuard(create_app, Settings(**arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hosts", "host", "path", "accepted"),
    [
        ("", "scanner.example", URL, True),
        ("scanner.example", "scanner.example:8000", URL, True),
        ("a.example, Scanner.example", "SCANNER.example", URL, True),
        ("scanner.example", "127.0.0.1:8000", URL, True),
        ("[2001:db8::1]", "[2001:db8::1]:8000", URL, True),
        ("scanner.example", "attacker.example", URL, False),
        ("scanner.example", "", URL, False),
        ("scanner.example", "10.0.0.7:8000", "/readyz", True),
        ("scanner.example", "10.0.0.7:8000", "/metrics", True),
    ],
)
def test_listed_hosts_are_accepted_with_a_token(hosts: str, host: str, path: str, accepted: bool) -> None:  # noqa: FBT001
    scope = {"query_string": b"", "path": path, "method": "GET", "headers": [(b"host", host.encode())]}
    check = guard(hosts=hosts, token=TOKEN)._check
    if accepted:
        check(scope)
    else:
        with pytest.raises(Exception, match="COUNTERPART_HOSTS"):
            check(scope)


@pytest.mark.parametrize(
    "path", [f"{URL}?model=t%001", f"{URL}?code=%00", f"{URL}?after=%00", "/v1/models/%00", f"{URL}?state=%00"]
)
def test_nul_is_a_bad_request(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert client.post(f"{URL}?series=1%00", content=fake_scan()).status_code == 400


@pytest.mark.parametrize("path", ["/livez", "/docs", URL, f"{URL}/none", "/nothing", f"{URL}?model=%00"])
def test_browsers_must_not_guess_the_media_type(client: TestClient, path: str) -> None:
    assert client.get(path).headers["x-content-type-options"] == "nosniff"


def test_no_redirect_repeats_the_host_of_the_caller(client: TestClient) -> None:
    answer = client.get(f"{URL}/", follow_redirects=False)
    assert (answer.status_code, "location" in answer.headers) == (404, False)


def test_no_span_leaves_the_service(tmp_path: Path) -> None:
    """The spans of FastAPI contain query strings."""
    app = create_app(Settings(store=str(tmp_path)), FakeEngine())
    telemetry = getattr(app, "_native_telemetry", None)
    assert telemetry is None or not telemetry.enabled()
