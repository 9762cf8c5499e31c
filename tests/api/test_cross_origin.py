"""Calls from web pages of other origins: with listed origins, without, and with a token."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError

from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, URL, FakeEngine, fake_scan

LISTED = "https://dashboard.example"
FOREIGN = ("https://attacker.example", "http://dashboard.example", "https://dashboard.example:8443", "null")
# A browser states the site of the page with each request.
PAGE = {"Origin": LISTED, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
PREFLIGHT = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "authorization,content-type"}


def create_client(folder: Path, **settings: object) -> TestClient:
    """Return a client of a service that has not started. Its jobs cannot be read."""
    app = create_app(Settings(store=str(folder), drain_seconds=0, **settings), FakeEngine())
    return TestClient(app, BASE_URL)


@pytest.fixture(scope="module", params=[None, "secret"], ids=["without token", "with token"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    token = request.param and SecretStr(request.param)
    folder = tmp_path_factory.mktemp("store")
    with create_client(folder, cors_origins=f"{LISTED},http://b.example", token=token) as client:
        client.headers["Authorization"] = "Bearer secret"
        yield client


def test_page_of_a_listed_origin_can_use_the_api(client: TestClient) -> None:
    preflight = client.options(f"{URL}/x/reviews/1", headers=PAGE | PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == LISTED
    assert "PUT" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()

    sent = client.post(URL, content=fake_scan(name="cross"), headers=PAGE | {"Prefer": "wait=100"})
    assert (sent.status_code, sent.headers["access-control-allow-origin"]) == (200, LISTED)
    assert "Origin" in sent.headers["vary"]
    assert "access-control-allow-credentials" not in sent.headers
    exposed = sent.headers["access-control-expose-headers"].lower()
    assert {"location", "etag", "retry-after"} <= set(exposed.split(", "))
    problem = client.get(f"{URL}/none", headers=PAGE)
    assert (problem.status_code, problem.headers["access-control-allow-origin"]) == (404, LISTED)


@pytest.mark.parametrize("origin", FOREIGN)
def test_page_of_another_origin_cannot_read_an_answer(client: TestClient, origin: str) -> None:
    for method, headers in (("GET", {}), ("OPTIONS", PREFLIGHT), ("POST", {})):
        answer = client.request(method, URL, headers={**PAGE, **headers, "Origin": origin})
        assert "access-control-allow-origin" not in answer.headers
        if client.app.state.services.settings.token is None:  # type: ignore[attr-defined]
            assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")


def test_listed_origin_needs_a_token_like_everybody(tmp_path: Path) -> None:
    client = create_client(tmp_path, cors_origins=LISTED, token=SecretStr("secret"))
    refused = client.get(URL, headers=PAGE)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, LISTED)


def test_without_listed_origins_no_page_can_read_an_answer(tmp_path: Path) -> None:
    client = create_client(tmp_path)
    for method in ("GET", "POST", "OPTIONS"):
        answer = client.request(method, URL, headers=PAGE | PREFLIGHT)
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origins",
    [
        *("*", "https://*.example", "dashboard.example", "https://a.example/", "https://a.example/x", "null"),
        *("ftp://a", "https://a b", "https://user@a.example", "https://a.example;script-src", "javascript:alert(1)"),
    ],
)
def test_only_origins_can_be_listed(origins: str) -> None:
    with pytest.raises(ValidationError, match="origins"):
        Settings(cors_origins=f"https://good.example,{origins}")


def test_origins_are_written_as_browsers_write_them() -> None:
    origins = "HTTPS://A.example:443, http://b.example:80,http://c.example:443,https://[::1]:8443,http://localhost:3000"
    assert Settings(cors_origins=origins).allowed_origins == {
        "https://a.example",
        "http://b.example",
        "http://c.example:443",
        "https://[::1]:8443",
        "http://localhost:3000",
    }
