"""Short forms of the proofs. docs/operations.md has the long forms."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.sample import make_sample
from tests.proofs import cluster, contract, hostile, identity, image, kill, operations, soak, streams
from tests.support.external_tools import run_or_skip
from tests.support.servers import find_postgres

pytestmark = pytest.mark.proof
needs_postgres = pytest.mark.skipif(find_postgres() is None, reason="no PostgreSQL server: apt-get install postgresql")


def test_every_scan_survives_kill_9(tmp_path: Path) -> None:
    assert kill.prove(tmp_path, kills=2, seed=1)


@needs_postgres
def test_every_scan_survives_kill_9_on_postgresql(tmp_path: Path) -> None:
    assert kill.prove(tmp_path, kills=2, seed=2, database="postgresql")


@pytest.mark.skipif(bool(identity.missing_programs()), reason=f"not installed: {identity.missing_programs()}")
def test_oidc_provider_browser_and_mutual_tls(tmp_path: Path) -> None:
    assert identity.prove(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0 or not all(map(shutil.which, image.PROGRAMS)), reason="no root, or no buildah")
def test_the_image_is_built_and_runs(tmp_path: Path) -> None:
    scan = make_sample(tmp_path / "sample", 0).scan
    command = [sys.executable, "-m", "tests.proofs.image", "--scan", str(scan), "--out", str(tmp_path / "result")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_postgres
def test_cluster_completes_every_scan_and_publishes_it_once(tmp_path: Path) -> None:
    assert cluster.prove(tmp_path, scans=10, kills=1)


def test_answers_conform_to_the_openapi_document(tmp_path: Path) -> None:
    assert contract.prove(tmp_path, examples=2)


def test_hostile_uploads_get_the_right_answers(tmp_path: Path) -> None:
    assert hostile.prove(tmp_path, mib=64)


def test_mixed_traffic_leaves_memory_and_files_flat(tmp_path: Path) -> None:
    assert soak.prove(tmp_path, minutes=1.5)


def test_event_streams_do_not_slow_status_calls_down(tmp_path: Path) -> None:
    assert streams.prove(tmp_path)


def test_no_series_and_no_object_is_lost_between_scanner_and_pacs() -> None:
    run_or_skip([sys.executable, "-m", "tests.proofs.node", "--kills", "10"])


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=needs_postgres)])
def test_operators_steps_work_as_documented(tmp_path: Path, shared: bool) -> None:  # noqa: FBT001
    assert operations.prove(tmp_path, shared=shared)
