"""A test client of the service with a fake engine, one for each module."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, FakeEngine


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def client(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    store = tmp_path_factory.mktemp("store")
    settings = Settings(store=str(store), max_upload_mb=1, max_files=3, queue_limit=4, drain_seconds=0)
    with TestClient(create_app(settings, engine), BASE_URL) as client:
        yield client
