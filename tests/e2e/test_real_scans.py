"""The shipped T1 model on real scans: command line, HTTP, NIfTI and DICOM give the same mask."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import nibabel as nib
import numpy as np
import pytest

from app.pipeline.findings import dice
from app.runtime.bundle import find_bundles, shipped_models
from app.volume import Volume
from tests.api.service_process import run_service
from tests.api.support import URL, wait_for_state
from tests.support.dicom import write_series, zip_files

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not find_bundles(shipped_models()), reason="no bundle is shipped in this checkout"),
]

SUBJECTS = ("sub-61", "sub-30")
# Label of the inserted lesion, which is the largest finding.
LESION = 1
# A peak below this multiple of the threshold may be above it in one file and below it in the other.
CLOSE = 1.05
COUNTERPART = (sys.executable, "-c", "from app.cli import main; main()")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    folder = tmp_path_factory.mktemp("service")
    with run_service(folder / "store", folder / "log", (*COUNTERPART, "serve")) as running:
        yield running.http


def _scan_path(real_scans: Path, subject: str) -> Path:
    return real_scans / "t1_ds002748" / f"{subject}_T1w.nii.gz"


def _detect(scan: Path, out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*COUNTERPART, "detect", str(scan), "-o", str(out), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _load(path: Path) -> nib.Nifti1Image:
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return image


@pytest.mark.parametrize("subject", SUBJECTS)
def test_command_line_and_http_give_the_same_mask(
    subject: str, real_scans: Path, service: httpx2.Client, tmp_path: Path
) -> None:
    scan = _scan_path(real_scans, subject)
    report = _detect(scan, tmp_path)
    job = wait_for_state(service, service.post(URL, content=scan.read_bytes()).json()["id"], "succeeded")
    mask = service.get(f"{URL}/{job['id']}/mask.nii.gz").content
    assert mask == (tmp_path / "mask.nii.gz").read_bytes()
    assert [f["centroid_mm"] for f in job["findings"]] == [f["centroid_mm"] for f in report["findings"]]

    mask_image, scan_image = _load(tmp_path / "mask.nii.gz"), _load(scan)
    assert mask_image.shape == scan_image.shape
    assert mask_image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask_image.affine, scan_image.affine)


def test_nifti_and_dicom_give_the_same_finding(real_scans: Path, tmp_path: Path) -> None:
    """DICOM rounds the voxels, so only a finding whose peak is close to the threshold may differ."""
    image = _load(_scan_path(real_scans, "sub-61"))
    # Insert a lesion that every version of the model finds.
    voxels = np.asarray(image.dataobj, dtype=np.float32)
    centre = np.argwhere(voxels > 0).mean(axis=0)
    ball = np.linalg.norm((np.indices(voxels.shape).T - centre) * nib.affines.voxel_sizes(image.affine), axis=-1).T < 9
    voxels[ball & (voxels > 0)] = np.percentile(voxels[voxels > 0], 99.5)
    nib.save(nib.Nifti1Image(voxels, image.affine), tmp_path / "scan.nii")

    files = write_series(tmp_path / "series", Volume(voxels, image.affine))
    archive = zip_files(tmp_path / "series.zip", files)
    for scan, name in ((tmp_path / "scan.nii", "nifti"), (archive, "dicom")):
        report = _detect(scan, tmp_path / name)
        threshold, peaks = report["threshold"], [f["peak_score"] for f in report["findings"]]
        assert all(peak < CLOSE * threshold for peak in peaks[1:])
    from_nifti, from_dicom = (_load(tmp_path / name / "labels.nii.gz") for name in ("nifti", "dicom"))

    # The series has other axes, so each of its voxels is looked up on the grid of the NIfTI file.
    to_nifti = np.linalg.inv(from_nifti.affine) @ from_dicom.affine
    index = np.indices(from_dicom.shape).reshape(3, -1)
    nifti_index = np.rint(to_nifti[:3, :3] @ index + to_nifti[:3, 3:]).astype(int)
    nifti_mask = np.asarray(from_nifti.dataobj)[tuple(nifti_index)].reshape(from_dicom.shape) == LESION
    dicom_mask = np.asarray(from_dicom.dataobj) == LESION
    assert dicom_mask.sum() > 1000
    assert dice(dicom_mask, nifti_mask) >= 0.98

    centroids = [
        nib.affines.apply_affine(m.affine, np.argwhere(np.asarray(m.dataobj) == LESION)).mean(axis=0)
        for m in (from_nifti, from_dicom)
    ]
    assert np.linalg.norm(centroids[0] - centroids[1]) < 0.5
