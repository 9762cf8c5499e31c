"""Pages of the dashboard: headers, caching, prefixes, and what they must not serve."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import SecretStr

from app.api import pages
from app.main import API_ROUTERS, create_app
from app.settings import Settings
from tests.api.support import BASE_URL, FakeEngine

ORIGINS = "https://b.example, https://A.example:8443"
PAGES = {
    "/": "index.html",
    "/scans/0f3a9c51b2d4e678-5e1b7a90c3d2f468": "viewer.html",
    "/scans/0f3a9c51b2d4e678-5e1b7a90c3d2f468/print": "print.html",
    "/embed/0f3a9c51b2d4e678-5e1b7a90c3d2f468": "viewer.html",
    "/models": "models.html",
}
SCRIPT = b"export const answer = 42;\n" * 100


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a small dashboard beside a file that it must not serve."""
    folder = tmp_path_factory.mktemp("dashboard").resolve()
    (folder / "secret.txt").write_text("secret")
    web = folder / "web"
    (web / "js").mkdir(parents=True)
    for name in set(PAGES.values()):
        (web / name).write_text(f"<!doctype html><title>{name}</title>")
    (web / "js" / "app.js").write_bytes(SCRIPT)
    (web / "notes.py").write_text("not a file of a page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "WEB_FOLDER", web)
        yield web


@pytest.fixture(scope="module", params=["", "/counterpart"])
def client(request: pytest.FixtureRequest, web: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Return a client of a service with a token, with and without a path prefix. The client sends no token."""
    settings = Settings(
        store=str(tmp_path_factory.mktemp("store")),
        token=SecretStr("secret"),
        root_path=request.param,
        cors_origins=ORIGINS,
        drain_seconds=0,
    )
    assert web.is_dir()
    with TestClient(create_app(settings, FakeEngine()), BASE_URL + request.param) as client:
        yield client


@pytest.mark.parametrize(("path", "name"), PAGES.items())
def test_page_needs_no_token_and_has_its_headers(client: TestClient, path: str, name: str) -> None:
    for method in ("GET", "HEAD"):
        page = client.request(method, path)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["referrer-policy"] == "no-referrer"
        assert page.headers["cross-origin-opener-policy"] == "same-origin"
        assert page.headers["cache-control"] == "no-cache"
        policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        embedded = path.startswith("/embed/")
        assert policy["frame-ancestors"] == ("https://a.example:8443 https://b.example" if embedded else "'none'")
        assert page.text == (f"<!doctype html><title>{name}</title>" if method == "GET" else "")


def test_nobody_may_embed_without_listed_origins(web: Path, tmp_path: Path) -> None:
    assert web.is_dir()
    client = TestClient(create_app(Settings(store=str(tmp_path)), FakeEngine()), BASE_URL)
    assert client.get("/embed/x").headers["content-security-policy"].endswith("frame-ancestors 'none'")


def test_asset_is_compressed_and_cached_by_its_content(client: TestClient, web: Path) -> None:
    plain = client.get("/web/js/app.js", headers={"Accept-Encoding": "identity"})
    assert (plain.content, plain.headers["content-type"]) == (SCRIPT, "text/javascript; charset=utf-8")
    assert "content-encoding" not in plain.headers
    packed = client.get("/web/js/app.js")
    assert (packed.headers["content-encoding"], packed.content) == ("gzip", SCRIPT)
    assert int(packed.headers["content-length"]) < len(SCRIPT) / 10
    for answer in (plain, packed):
        unchanged = client.get("/web/js/app.js", headers={"If-None-Match": f'"x", {answer.headers["etag"]}'})
        assert (unchanged.status_code, unchanged.content) == (304, b"")

    script = web / "js" / "app.js"
    script.write_bytes(b"changed")
    changed = client.get("/web/js/app.js", headers={"If-None-Match": plain.headers["etag"]})
    assert (changed.status_code, changed.content) == (200, b"changed")
    script.write_bytes(SCRIPT)


@pytest.mark.parametrize(
    ("accepted", "compressed"),
    [("gzip", True), ("br, gzip;q=0.5", True), ("gzip;q=0", False), ("gzip; q=0.000, br", False), ("br", False)],
)
def test_encoding_is_negotiated(client: TestClient, accepted: str, compressed: bool) -> None:  # noqa: FBT001
    answer = client.get("/web/js/app.js", headers={"Accept-Encoding": accepted})
    assert ("content-encoding" in answer.headers, answer.content) == (compressed, SCRIPT)


@pytest.mark.parametrize(
    "path",
    [
        "/none",
        "/web/none.js",
        "/web/",
        "/web/js",
        "/web/notes.py",
        "/web/%2e%2e/secret.txt",
        "/web/..%2fsecret.txt",
        "/web/%2fetc/hostname.txt",
        f"/web/{'x' * 300}.js",
        "/scans/x/y",
    ],
)
def test_everything_else_is_a_problem(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert answer.headers["content-type"] == "application/problem+json"


def test_other_methods_are_refused(client: TestClient) -> None:
    refused = client.post("/")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_only_pages_are_outside_the_openapi_document(client: TestClient) -> None:
    """A route outside of the document is not checked for its token (test_every_route_needs_a_token.py)."""
    routes = [route for router in API_ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    hidden = {route.path for route in routes if not route.include_in_schema}
    shells = {route.path for route in pages.router.routes if isinstance(route, APIRoute)}
    assert shells == {"/", "/scans/{job}", "/scans/{job}/print", "/embed/{job}", "/models", "/web/{path:path}"}
    documented = client.get("/openapi.json").json()["paths"]
    assert hidden - documented.keys() == shells


def test_compressed_content_is_reproducible(web: Path) -> None:
    asset = pages.find_asset("js/app.js")
    assert asset.compressed == gzip.compress((web / "js" / "app.js").read_bytes(), mtime=0)
