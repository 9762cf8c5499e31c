"""Access to every route: a new route without `require(scope)` fails here."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import APIRouter
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from app.api import health, pages
from app.api.tokens import SCOPES, Scope, TokenFile
from app.main import API_ROUTERS, create_app
from app.settings import Settings
from tests.api.support import BASE_URL, FakeEngine

JOB = "0" * 16 + "-" + "0" * 16
# Probes of a load balancer have no token. The routes of a session begin and end one. None returns anything of a scan.
PUBLIC = {"/livez", "/readyz", "/session", "/login", "/login/callback"}
# Pages have no data: their scripts call the API.
PUBLIC |= {route.path for route in pages.router.routes if isinstance(route, APIRoute)}


def dicomweb_paths() -> list[str]:
    """Return the paths of QIDO-RS and WADO-RS."""
    study, series = "/dicomweb/studies/{study}", "/dicomweb/studies/{study}/series/{series}"
    instance = f"{series}/instances/{{instance}}"
    searches = ["/dicomweb/studies", "/dicomweb/series", "/dicomweb/instances", f"{study}/series", f"{study}/instances"]
    retrievals = [f"{path}{end}" for path in (study, series, instance) for end in ("", "/metadata")]
    return [*searches, f"{series}/instances", *retrievals, f"{instance}/frames/{{frames}}"]


# The scope of each route. A new route needs a line.
EXPECTED: dict[tuple[str, str], Scope] = {
    ("POST", "/v1/scans"): "send",
    ("GET", "/v1/scans"): "read",
    ("GET", "/v1/scans/{job}"): "read",
    ("GET", "/v1/scans/{job}/events"): "read",
    ("GET", "/v1/scans/{job}/{name}"): "read",
    ("HEAD", "/v1/scans/{job}/{name}"): "read",
    ("POST", "/v1/scans/{job}/cancel"): "erase",
    ("DELETE", "/v1/scans/{job}"): "erase",
    ("POST", "/v1/scans/sample"): "send",
    ("GET", "/v1/scans/{job}/reviews"): "read",
    ("PUT", "/v1/scans/{job}/reviews/{label}"): "read",
    ("DELETE", "/v1/scans/{job}/reviews/{label}"): "read",
    ("GET", "/v1/reviews"): "read",
    ("GET", "/v1/models"): "read",
    ("GET", "/v1/models/{model}"): "read",
    ("POST", "/v1/scans/{job}/deliveries/retry"): "send",
    ("POST", "/dicomweb/studies"): "send",
    ("POST", "/dicomweb/studies/{study}"): "send",
    **{("GET", path): "read" for path in dicomweb_paths()},
    ("GET", "/metrics"): "metrics",
    ("GET", "/v1/audit"): "admin",
    ("GET", "/v1/tokens"): "admin",
    ("GET", "/v1/webhooks/failed"): "admin",
    ("POST", "/v1/webhooks/failed/{webhook}/retry"): "admin",
}


def scopes_of(dependant: Dependant) -> Iterator[Scope]:
    for dependency in dependant.dependencies:
        if (scope := getattr(dependency.call, "scope", None)) is not None:
            yield scope
        yield from scopes_of(dependency)


def list_routes() -> Iterator[tuple[str, str, list[Scope]]]:
    routers: tuple[APIRouter, ...] = (*API_ROUTERS, health.router)
    for router in routers:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            for method in route.methods or ():
                yield method, route.path, list(scopes_of(route.dependant))


def test_every_route_but_the_public_ones_has_one_scope() -> None:
    for method, path, scopes in list_routes():
        if path in PUBLIC:
            assert scopes == [], path
        else:
            assert len(scopes) == 1, (method, path)
            is_result = path.startswith("/v1/scans/{job}/") and "." in path
            key = (method, "/v1/scans/{job}/{name}" if is_result else path)
            assert scopes == [EXPECTED[key]], key


def test_every_call_of_a_scan_has_an_action_for_the_audit_trail() -> None:
    for router in API_ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            if route.path.startswith("/v1/scans"):
                actions = {getattr(dependency.call, "action", None) for dependency in route.dependant.dependencies}
                assert actions - {None}, (route.methods, route.path)


def request_all(client: TestClient, headers: dict[str, str]) -> Iterator[tuple[str, str, Scope, int]]:
    for method, path, scopes in list_routes():
        if path not in PUBLIC:
            url = path.replace("{job}", JOB).replace("{model}", "x").replace("{label}", "1")
            url = re.sub(r"\{(study|series|instance|frames)\}", "1", url)
            yield method, path, scopes[0], client.request(method, url, headers=headers).status_code


def test_every_route_refuses_a_request_without_a_token_and_without_its_scope(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens")
    tokens = {scope: file.create(f"only-{scope}", [scope]) for scope in SCOPES}
    settings = Settings(store=str(tmp_path / "store"), tokens=tmp_path / "tokens", drain_seconds=0)
    with TestClient(create_app(settings, FakeEngine()), BASE_URL) as client:
        for method, path, _, status in request_all(client, {}):
            assert status == 401, (method, path)
        for held, token in tokens.items():
            for method, path, needed, status in request_all(client, {"Authorization": f"Bearer {token}"}):
                assert (status == 403) == (held != needed), (method, path, held)
                assert status != 401


def test_openapi_names_the_scope_of_each_route(tmp_path: Path) -> None:
    document = create_app(Settings(store=str(tmp_path)), FakeEngine()).openapi()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "session"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path in PUBLIC:
                assert all(not scopes for entry in operation.get("security", []) for scopes in entry.values())
                continue
            is_result = path.startswith("/v1/scans/{job}/") and "." in path
            scope = EXPECTED[method.upper(), "/v1/scans/{job}/{name}" if is_result else path]
            assert operation["security"] == [{"bearer": [scope]}, {"session": [scope]}]


@pytest.mark.parametrize("path", ["/livez", "/session"])
def test_public_routes_answer_without_a_token(tmp_path: Path, path: str) -> None:
    settings = Settings(store=str(tmp_path), token="secret", drain_seconds=0)  # noqa: S106
    with TestClient(create_app(settings, FakeEngine()), BASE_URL) as client:
        assert client.get(path).status_code == 200
