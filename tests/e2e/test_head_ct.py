"""The shipped model of head CT on a real series, tilted and unevenly spaced."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.runtime.bundle import find_bundles, shipped_models
from training.archives import unpack

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not find_bundles(shipped_models()), reason="no bundle is shipped in this checkout"),
]

COUNTERPART = (sys.executable, "-c", "from app.cli import main; main()")
# A healthy head shows a few millilitres in findings; a model that failed shows hundreds.
MOST_FOUND_ML = 50


@pytest.fixture(scope="module")
def series(real_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ge")
    unpack(real_scans / "dicom" / "ge_ct_head_human_28.tar.xz", folder)
    return folder


def _detect(series: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*COUNTERPART, "detect", str(series), "--json", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_tilted_series_is_refused_until_somebody_asks_for_resampling(series: Path, tmp_path: Path) -> None:
    done = _detect(series, "-o", str(tmp_path))
    assert done.returncode != 0
    assert "resample" in done.stdout + done.stderr


def test_head_ct_is_analysed_on_the_grid_that_the_report_names(series: Path, tmp_path: Path) -> None:
    done = _detect(series, "-o", str(tmp_path), "--geometry", "resample")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["id"].startswith("headct-")
    assert 0 < sum(f["volume_ml"] for f in report["findings"]) < MOST_FOUND_ML

    mask, residual = nib.load(tmp_path / "mask.nii.gz"), nib.load(tmp_path / "anomaly.nii.gz")
    assert isinstance(mask, nib.Nifti1Image)
    assert isinstance(residual, nib.Nifti1Image)
    assert mask.shape == residual.shape
    np.testing.assert_array_equal(mask.affine, residual.affine)
    assert np.asarray(mask.dataobj).any()
    for finding in report["findings"]:
        voxel = np.linalg.inv(mask.affine) @ [*finding["centroid_mm"], 1]
        assert (voxel[:3] >= -0.5).all()
        assert (voxel[:3] <= np.array(mask.shape) - 0.5).all(), "every finding lies on the mask's grid"
