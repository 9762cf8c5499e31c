"""The shipped model for non-commercial use over HTTP: refused unless it is allowed and requested by name."""

import gzip
import sys
from pathlib import Path

import httpx2
import nibabel as nib
import numpy as np
import pytest

from app.export.outputs import write_nifti
from app.pipeline.findings import dice
from app.runtime.bundle import find_bundles, shipped_models
from tests.api.service_process import run_service
from tests.api.support import URL, wait_for_state
from training.config import ROOT, Config
from training.image_archive import TumourScan, load_tumour_scan

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not any(path.match("flair-[0-9]*") for path in find_bundles(shipped_models())),
        reason="flair is not shipped in this checkout",
    ),
]

COUNTERPART = (sys.executable, "-c", "from app.cli import main; main()", "serve")
# A test patient with a large tumour that lies within the analysed slices.
PATIENT = "TCGA_HT_7882_19970125"
MIN_DICE = 0.75
# Shorter than the timeout of the client.
WAIT = {"Prefer": "wait=60"}


@pytest.fixture(scope="module")
def patient(real_scans: Path) -> TumourScan:
    assert real_scans.exists()
    return load_tumour_scan(Config.load(ROOT / "training" / "configs" / "flair.toml"), PATIENT)


@pytest.fixture(scope="module")
def scan(patient: TumourScan, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("scan") / "flair.nii.gz"
    write_nifti(path, patient.volume.array, patient.volume.affine, 1, "")
    return path.read_bytes()


def _image(answer: httpx2.Response) -> nib.Nifti1Image:
    image = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    assert isinstance(image, nib.Nifti1Image)
    return image


def test_model_is_refused_unless_allowed(scan: bytes, tmp_path: Path) -> None:
    with run_service(tmp_path / "store", tmp_path / "log", COUNTERPART) as service:
        answer = service.http.post(f"{URL}?model=flair", content=scan)
    assert (answer.status_code, answer.json()["code"]) == (403, "non_commercial_model")
    assert "COUNTERPART_ALLOW_NONCOMMERCIAL" in answer.json()["advice"]


def test_allowed_model_finds_a_tumour(scan: bytes, patient: TumourScan, tmp_path: Path) -> None:
    with run_service(tmp_path / "store", tmp_path / "log", COUNTERPART, allow_noncommercial="true") as service:
        unnamed = service.http.post(URL, content=scan, headers=WAIT).json()
        job = service.http.post(f"{URL}?model=flair", content=scan).json()["id"]
        wait_for_state(service.http, job, "succeeded")
        url = f"{URL}/{job}"
        report = service.http.get(f"{url}/report.json").json()
        mask, anomaly = (_image(service.http.get(f"{url}/{name}.nii.gz")) for name in ("mask", "anomaly"))
    # Without a name, the file is analysed or refused as T1, because it does not state its sequence.
    assert not str(unnamed.get("model")).startswith("flair"), unnamed
    assert report["model"]["id"].startswith("flair-")
    assert report["research_use_only"] is True
    assert all(bytes(image.header["descrip"]).rstrip(b"\0").endswith(b"research use only") for image in (mask, anomaly))
    assert dice(np.asarray(mask.dataobj) > 0, patient.truth) > MIN_DICE
