"""The proofs of scripts/, in their short form; docs/operations.md has the long ones."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from scripts.prove_cluster import prove as prove_cluster
from scripts.prove_contract import prove as prove_contract
from scripts.prove_hostile import prove as prove_hostile
from scripts.prove_kill import prove as prove_kill
from scripts.prove_soak import prove as prove_soak
from scripts.servers import find_postgres, postgres
from scripts.try_operations import attempt

pytestmark = pytest.mark.proof
needs_postgres = pytest.mark.skipif(find_postgres() is None, reason="no PostgreSQL server: apt-get install postgresql")


def test_no_scan_is_lost_to_kill_9(tmp_path: Path) -> None:
    assert prove_kill(tmp_path, kills=2, database=None, seed=1)


@needs_postgres
def test_no_scan_is_lost_to_kill_9_on_postgresql(tmp_path: Path) -> None:
    with postgres() as database:
        assert prove_kill(tmp_path, kills=2, database=database, seed=2)


@needs_postgres
def test_a_cluster_loses_none_and_publishes_none_twice(tmp_path: Path) -> None:
    assert prove_cluster(tmp_path, count=10, kills=1)


def test_the_answers_are_those_of_the_document(tmp_path: Path) -> None:
    assert prove_contract(tmp_path, examples=2, seed=0)


def test_hostile_uploads_are_answered(tmp_path: Path) -> None:
    assert prove_hostile(tmp_path / "in" / "here", mib=64)


def test_mixed_traffic_leaves_memory_files_and_answers_as_they_are(tmp_path: Path) -> None:
    assert prove_soak(tmp_path, minutes=1.5)


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=needs_postgres)])
def test_the_operators_steps_do_what_they_say(tmp_path: Path, shared: bool) -> None:  # noqa: FBT001
    with ExitStack() as servers:
        attempt(tmp_path, servers, shared=shared)
