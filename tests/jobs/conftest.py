"""Servers of a cluster on loopback, and the stores of its machines."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.jobs.bucket import BucketStore
from tests.support.servers import BUCKET, find_postgres, postgres, s3


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    if find_postgres() is None:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    with postgres() as url:
        yield url


@pytest.fixture(scope="module")
def s3_environ() -> Iterator[dict[str, str]]:
    with s3() as environ:
        yield environ


@pytest.fixture
def open_bucket_store(
    s3_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], BucketStore]:
    """Return a function that opens the test's bucket store on a machine of a name."""
    for name, value in s3_environ.items():
        monkeypatch.setenv(name, value)

    def open_store(machine: str) -> BucketStore:
        store = BucketStore(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / machine)
        store.acquire_slot()
        return store

    return open_store
