"""The service with a real bundle of tiny ONNX graphs: a scan in, its results out."""

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
from tests.api.support import BASE_URL, URL, WAIT
from tests.support.dicom import write_series, zip_files
from tests.support.phantom import brain, with_lesion
from tests.support.segmentation import segment_points


@pytest.fixture(scope="module")
def client(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    store = tmp_path_factory.mktemp("store")
    settings = Settings(store=str(store), models=tiny_models, threads=1, drain_seconds=0)
    with TestClient(create_app(settings), BASE_URL) as client:
        yield client


def analyse(client: TestClient, content: bytes, query: str = "") -> dict[str, Any]:
    answer = client.post(f"{URL}{query}", content=content, headers=WAIT)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def analyse_series(client: TestClient, folder: Path, volume: Volume) -> dict[str, Any]:
    archive = zip_files(folder / "series.zip", write_series(folder / "series", volume))
    return analyse(client, archive.read_bytes())


def nifti_bytes(path: Path, volume: Volume) -> bytes:
    nib.save(nib.Nifti1Image(volume.array, volume.affine), path)
    return path.read_bytes()


def test_dicom_scan_has_a_segmentation_and_a_structured_report(client: TestClient, tmp_path: Path) -> None:
    job = analyse_series(client, tmp_path, with_lesion(brain(), (25.0, 10.0, 20.0)))
    links, path = job["links"], f"{URL}/{job['id']}"
    assert links["segmentation"] == f"{path}/segmentation.dcm"
    assert links["structured_report"] == f"{path}/report.dcm"
    assert links["report"] == f"{path}/report.json"
    source = pydicom.dcmread(next((tmp_path / "series").iterdir()))
    for link, modality in ((links["segmentation"], "SEG"), (links["structured_report"], "SR")):
        answer = client.get(link)
        assert answer.headers["content-type"] == "application/dicom"
        made = pydicom.dcmread(BytesIO(answer.content))
        assert (made.Modality, made.StudyInstanceUID) == (modality, source.StudyInstanceUID)
        assert client.head(link).headers["content-length"] == str(len(answer.content))
    (tmp_path / "segmentation.dcm").write_bytes(client.get(links["segmentation"]).content)
    found = segment_points(tmp_path / "segmentation.dcm")
    for finding in job["findings"]:
        centroid = np.diag([-1, -1, 1]) @ found[finding["label"]].mean(axis=0)
        assert centroid == pytest.approx(finding["centroid_mm"], abs=0.01)


def test_absent_results_are_explained(client: TestClient, tmp_path: Path) -> None:
    healthy = analyse_series(client, tmp_path, brain())
    assert healthy["links"].keys() & {"segmentation", "structured_report"} == {"structured_report"}
    nifti = analyse(client, nifti_bytes(tmp_path / "head.nii", brain()))
    assert not nifti["links"].keys() & {"segmentation", "structured_report"}
    listed = {job["id"]: job["links"] for job in client.get(URL).json()["scans"]}
    assert all(listed[job["id"]] == job["links"] for job in (healthy, nifti))
    for job, name, code in (
        (healthy, "segmentation.dcm", "no_lesion"),
        (nifti, "segmentation.dcm", "not_from_dicom"),
        (nifti, "report.dcm", "not_from_dicom"),
        (nifti, "brain.nii.gz", "no_brain_mask"),
    ):
        answer = client.get(f"{URL}/{job['id']}/{name}")
        assert (answer.status_code, answer.json()["code"]) == (404, code)
        assert answer.headers["content-type"] == "application/problem+json"
        assert client.head(f"{URL}/{job['id']}/{name}").status_code == 404


def test_selection_of_the_model_is_shown(client: TestClient, tmp_path: Path) -> None:
    nifti = nifti_bytes(tmp_path / "head.nii", brain())
    jobs = {
        "sequence": analyse_series(client, tmp_path, brain()),
        "default": analyse(client, nifti),
        "caller": analyse(client, nifti, "?model=tiny"),
    }
    for by, job in jobs.items():
        selection = job["selection"]
        assert selection.pop("by") == by
        # One field states whether the scan surely fits, the other one a warning if not.
        assert (True in selection.values()) == (None in selection.values()) == (by != "default")
        warnings = client.get(job["links"]["report"]).json()["warnings"]
        assert job["warnings"] == client.get(job["links"]["self"]).json()["warnings"] == warnings
        assert any("may not fit" in warning for warning in warnings) == (by == "default")


def test_mask_has_the_grid_of_the_scan(client: TestClient, tmp_path: Path) -> None:
    head = brain()
    job = analyse(client, nifti_bytes(tmp_path / "head.nii.gz", head))
    assert job["model"] == "tiny-0.0.1"
    assert client.get(job["links"]["preview"]).content.startswith(b"\x89PNG")
    assert client.get("/readyz").json()["models"] == ["tiny-0.0.1"]
    (tmp_path / "mask.nii.gz").write_bytes(client.get(job["links"]["mask"]).content)
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert isinstance(mask, SpatialImage)
    assert mask.shape == head.shape
    assert np.array_equal(mask.affine, head.affine)
    report = client.get(job["links"]["report"]).json()
    assert report["lesion_volume_ml"] == job["lesion_volume_ml"]
    assert int(np.asarray(mask.dataobj).sum()) * head.voxel_ml == report["lesion_volume_ml"]
