"""Servers of the cluster, on loopback."""

from collections.abc import Iterator

import pytest

from tests.support.servers import find_postgres, postgres, s3


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    if find_postgres() is None:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    with postgres() as url:
        yield url


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3() as environ:
        yield environ
