"""Access to every route: a new router without `require_token` fails here."""

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, FakeEngine

# Probes of a load balancer have no token. They return nothing of a scan.
PUBLIC = {"/livez", "/readyz"}


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[TestClient, str, str]]:
    store = tmp_path_factory.mktemp("store")
    app = create_app(Settings(store=str(store), token=SecretStr("secret"), drain_seconds=0), FakeEngine())
    client = TestClient(app, BASE_URL)
    paths = {path: operations for path, operations in app.openapi()["paths"].items() if path not in PUBLIC}
    return [(client, method, path) for path, operations in paths.items() for method in operations]


def test_every_route_but_the_probes_refuses_a_request_without_a_token(
    routes: list[tuple[TestClient, str, str]],
) -> None:
    assert {path for _, _, path in routes} >= {
        "/v1/scans",
        "/v1/scans/{job}/events",
        "/v1/models",
        "/v1/reviews",
        "/metrics",
    }
    for client, method, path in routes:
        url = (
            path.replace("{job}", "0" * 16 + "-" + "0" * 16)
            .replace("{name}", "mask.nii.gz")
            .replace("{model}", "x")
            .replace("{label}", "1")
        )
        assert client.request(method, url).status_code == 401, (method, path)
