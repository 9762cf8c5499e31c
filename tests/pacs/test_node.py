"""The node as a process: a scan of a scanner comes back in a PACS, whatever is killed; refusals at the start."""

import json
import sys
from pathlib import Path

import httpx2
import pytest

from app.analysis import AnalysisRequest
from app.errors import InvalidSettings, NonCommercialModel, UnsafeExposure
from app.ingest.dicom.storage import read_identifiers
from app.main import run_node
from app.pacs.node import create_request
from app.pacs.spool import Sender
from app.settings import Settings
from tests.api.support import FakeEngine
from tests.pacs.support import hand_over_case, make_slices, read_request
from tests.proofs.deployment import deploy
from tests.support.external_tools import require_tool, run_or_skip
from tests.support.servers import free_port

CHECKOUT = Path(__file__).resolve().parents[2]


def test_nothing_is_lost_if_programs_are_killed() -> None:
    prove("tests.proofs.node", "--kills", "3", "--load", "1")


def test_every_dicom_result_reaches_a_pacs() -> None:
    prove("tests.proofs.delivery")


def prove(*arguments: str) -> None:
    done = run_or_skip([sys.executable, "-m", *arguments], cwd=CHECKOUT, timeout=900)
    assert "PASSED" in done.stdout


def test_a_series_that_cannot_be_analysed_is_a_failed_job(tmp_path: Path) -> None:
    storescu, port = require_tool("storescu"), free_port()
    paths = []
    for number, dataset in enumerate(make_slices(count=12)):
        paths.append(tmp_path / f"{number}.dcm")
        if number != 5:
            dataset.save_as(paths[-1], enforce_file_format=True)
    with deploy(tmp_path, node_port=str(port), node_quiet_seconds="0.5") as deployment:
        service, node = deployment.start("serve"), deployment.start("node")
        service.wait_until_ready()
        node.wait_until_ready()
        storescu("-aec", "COUNTERPART", "127.0.0.1", port, *[path for path in paths if path.exists()])
        with httpx2.Client(base_url=service.url, timeout=60) as client:
            while not (jobs := client.get("/v1/scans?state=failed").json()["scans"]):
                pass
        assert [job["problem"]["code"] for job in jobs] == ["irregular_slices"]
        metrics = httpx2.get(f"{node.url}/metrics").text
        assert httpx2.get(f"{node.url}/v1/scans").status_code == 404
    assert 'counterpart_node_series_total{kind="new"} 1.0' in metrics
    assert 'counterpart_node_instances_total{status="0000"} 11.0' in metrics
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (ended,) = [record for record in records if record["event"] == "association ended"]
    assert (ended["aet"], ended["instances"], ended["outcome"]) == ("STORESCU", 11, "released")
    (handed,) = [record for record in records if record["event"] == "series handed over"]
    assert (handed["job"], handed["instances"]) == (jobs[0]["id"], 11)


def test_options_of_a_node_are_those_of_its_jobs(tmp_path: Path) -> None:
    bundles = FakeEngine().manifests
    assert create_request(Settings(), bundles) == AnalysisRequest()
    settings = Settings(node_model=bundles[0].name, node_geometry="resample")
    request = create_request(settings, bundles)
    assert request == AnalysisRequest(model=bundles[0].name, geometry="resample")
    with hand_over_case(tmp_path, request=request) as case:
        dataset = make_slices()[0]
        dataset.save_as(case.spool.receiving / "x.dcm", enforce_file_format=True)
        path = case.spool.receiving / "x.dcm"
        case.spool.add(path, read_identifiers(path), Sender("CT", "10.0.0.5"))
        case.hand_over.run_once()
        assert read_request(case.jobs()[0]) == request


def test_a_model_that_cannot_be_used_stops_the_node() -> None:
    bundles = FakeEngine().manifests
    with pytest.raises(InvalidSettings, match="COUNTERPART_NODE_MODEL"):
        create_request(Settings(node_model="none"), bundles)
    licence = bundles[0].licence.model_copy(update={"non_commercial": True})
    restricted = bundles[0].model_copy(update={"licence": licence})
    settings = {"node_model": restricted.id}
    with pytest.raises(NonCommercialModel):
        create_request(Settings(**settings), [restricted])
    assert create_request(Settings(**settings, allow_noncommercial=True), [restricted]).model == restricted.id


def test_other_machines_need_a_list_of_callers(tmp_path: Path) -> None:
    settings = Settings(store=str(tmp_path), port=0, node_host="0.0.0.0")  # noqa: S104
    with pytest.raises(UnsafeExposure, match="COUNTERPART_NODE_PEERS"):
        run_node(settings)
