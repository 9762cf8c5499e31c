"""The shipped head CT model on a real series with a tilted gantry and uneven spacing."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.runtime.bundle import find_bundles, shipped_models
from training.data import unpack_archive

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not find_bundles(shipped_models()), reason="no bundle is shipped in this checkout"),
]

COUNTERPART = (sys.executable, "-c", "from app.cli import main; main()")
# A healthy head has findings of a few millilitres. A broken model would find hundreds.
MAX_FOUND_ML = 50


@pytest.fixture(scope="module")
def series(real_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ge")
    unpack_archive(real_scans / "dicom" / "ge_ct_head_human_28.tar.xz", folder)
    return folder


def _detect(series: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*COUNTERPART, "detect", str(series), "--json", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_tilted_series_is_refused_without_resampling(series: Path, tmp_path: Path) -> None:
    done = _detect(series, "-o", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("irregular_slices")


def test_resampled_series_is_analysed(series: Path, tmp_path: Path) -> None:
    done = _detect(series, "-o", str(tmp_path), "--geometry", "resample")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["id"].startswith("headct-")
    assert 0 < sum(f["volume_ml"] for f in report["findings"]) < MAX_FOUND_ML

    mask, anomaly = nib.load(tmp_path / "mask.nii.gz"), nib.load(tmp_path / "anomaly.nii.gz")
    assert isinstance(mask, nib.Nifti1Image)
    assert isinstance(anomaly, nib.Nifti1Image)
    assert mask.shape == anomaly.shape
    np.testing.assert_array_equal(mask.affine, anomaly.affine)
    assert np.asarray(mask.dataobj).any()
    # Every finding is on the grid of the mask.
    for finding in report["findings"]:
        voxel = np.linalg.inv(mask.affine) @ [*finding["centroid_mm"], 1]
        assert (voxel[:3] >= -0.5).all()
        assert (voxel[:3] <= np.array(mask.shape) - 0.5).all()
