"""The service with a real bundle: tiny ONNX graphs, a real scan in, its mask out."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from nibabel.spatialimages import SpatialImage

from app.main import create_app
from app.settings import Settings
from app.volume import Volume
from tests.support.dicom import write_series, zipped
from tests.support.phantom import brain, with_lesion
from tests.support.segmentation import segment_points


@pytest.fixture(scope="module")
def client(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    store = tmp_path_factory.mktemp("store")
    settings = Settings(store=str(store), models=tiny_models, threads=1, drain_seconds=0)
    with TestClient(create_app(settings)) as client:
        yield client


def send_series(client: TestClient, folder: Path, volume: Volume) -> dict[str, Any]:
    archive = zipped(folder / "series.zip", write_series(folder / "series", volume))
    answer = client.post("/v1/scans", content=archive.read_bytes(), headers={"Prefer": "wait=120"})
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def test_a_dicom_scan_has_a_segmentation_and_a_structured_report(client: TestClient, tmp_path: Path) -> None:
    job = send_series(client, tmp_path, with_lesion(brain(), (25.0, 10.0, 20.0)))
    links = job["links"]
    assert (links["segmentation"], links["structured_report"]) == (
        f"/v1/scans/{job['id']}/segmentation.dcm",
        f"/v1/scans/{job['id']}/report.dcm",
    )
    assert links["report"].endswith("/report.json")
    for link, modality in ((links["segmentation"], "SEG"), (links["structured_report"], "SR")):
        answer = client.get(link)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/dicom"
        made = pydicom.dcmread(BytesIO(answer.content))
        source = pydicom.dcmread(next((tmp_path / "series").iterdir()))
        assert (made.Modality, made.StudyInstanceUID) == (modality, source.StudyInstanceUID)
        assert client.head(link).headers["content-length"] == str(len(answer.content))
        part = client.get(link, headers={"Range": "bytes=128-131"})
        assert (part.status_code, part.content) == (206, b"DICM")
        assert client.get(link, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    (tmp_path / "segmentation.dcm").write_bytes(client.get(links["segmentation"]).content)
    found = segment_points(tmp_path / "segmentation.dcm")
    for finding in job["findings"]:
        centroid = np.diag([-1, -1, 1]) @ found[finding["label"]].mean(axis=0)
        assert centroid == pytest.approx(finding["centroid_mm"], abs=0.01)


def test_what_a_scan_does_not_have_is_told(client: TestClient, tmp_path: Path) -> None:
    healthy = send_series(client, tmp_path, brain())
    assert healthy["links"].keys() & {"segmentation", "structured_report"} == {"structured_report"}
    nib.save(nib.Nifti1Image(brain().array, brain().affine), tmp_path / "head.nii")
    content = (tmp_path / "head.nii").read_bytes()
    nifti = client.post("/v1/scans", content=content, headers={"Prefer": "wait=120"}).json()
    assert not nifti["links"].keys() & {"segmentation", "structured_report"}
    assert healthy["selection"] == {"by": "sequence", "certain": True, "warning": None}
    assert (nifti["selection"]["by"], nifti["selection"]["certain"]) == ("default", False)
    assert nifti["selection"]["warning"].startswith("The file says neither its modality nor its sequence")
    named = client.post("/v1/scans?model=tiny", content=content, headers={"Prefer": "wait=120"}).json()
    assert named["selection"] == {"by": "caller", "certain": True, "warning": None}
    listed = {job["id"]: job["links"] for job in client.get("/v1/scans").json()["scans"]}
    assert all(listed[job["id"]] == job["links"] for job in (healthy, nifti))
    for job, name, code in (
        (healthy, "segmentation.dcm", "no_lesion"),
        (nifti, "segmentation.dcm", "not_from_dicom"),
        (nifti, "report.dcm", "not_from_dicom"),
        (nifti, "brain.nii.gz", "no_brain_mask"),
    ):
        answer = client.get(f"/v1/scans/{job['id']}/{name}")
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == code
        assert answer.json()["advice"]
        assert client.head(f"/v1/scans/{job['id']}/{name}").status_code == 404


def test_a_scan_becomes_its_mask(client: TestClient, tmp_path: Path) -> None:
    head = brain()
    sent, fetched = tmp_path / "head.nii.gz", tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(head.array, head.affine), sent)
    answer = client.post("/v1/scans", content=sent.read_bytes(), headers={"Prefer": "wait=60"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "tiny-0.0.1"
    links = answer.json()["links"]
    fetched.write_bytes(client.get(links["mask"]).content)
    report = client.get(links["report"]).json()
    assert client.get(links["preview"]).content.startswith(b"\x89PNG")
    assert client.get("/readyz").json()["models"] == ["tiny-0.0.1"]
    mask = nib.load(fetched)
    assert isinstance(mask, SpatialImage)
    assert mask.shape == head.shape
    assert np.array_equal(mask.affine, head.affine)
    assert report["lesion_volume_ml"] == answer.json()["lesion_volume_ml"]
    assert int(np.asarray(mask.dataobj).sum()) * head.voxel_ml == report["lesion_volume_ml"]
