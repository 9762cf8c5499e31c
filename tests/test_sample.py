"""The sample scan: size, contrast, lesion and determinism."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from app import sample
from app.errors import MissingExtra
from app.sample import CENTRE_MM, CONTRAST, JITTER_MM, SEMI_AXES_MM, Sample, make_sample

# Difference between the volume of the voxelised ellipsoid and the formula.
VOLUME_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make_sample(tmp_path_factory.mktemp("sample"), seed=0)


def load(path: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    assert image.affine is not None
    return np.asarray(image.dataobj, dtype=np.float64), image.affine


def test_truth_is_the_ellipsoid(made: Sample) -> None:
    truth, affine = load(made.truth)
    assert set(np.unique(truth)) == {0, 1}
    formula = 4 / 3 * np.pi * np.prod(SEMI_AXES_MM) / 1000
    assert made.lesion_ml == pytest.approx(formula, rel=VOLUME_TOLERANCE)
    assert truth.sum() * np.linalg.det(affine) / 1000 == pytest.approx(made.lesion_ml)
    centroid = nib.affines.apply_affine(affine, np.argwhere(truth).mean(axis=0))
    assert np.abs([abs(centroid[0]), *centroid[1:]] - np.array(CENTRE_MM)).max() <= JITTER_MM + 0.1


def test_lesion_has_the_contrast(made: Sample) -> None:
    scan, _ = load(made.scan)
    truth, _ = load(made.truth)
    brain = scan > 0
    low, high = np.percentile(scan[brain], (2, 98))
    # The template is almost symmetric: the other side shows the intensity without the lesion.
    change = (scan[truth > 0].mean() - scan[np.flip(truth, 0) > 0].mean()) / (high - low)
    assert change == pytest.approx(CONTRAST, abs=0.06)


def test_brain_has_the_size_and_contrast_of_a_scan(made: Sample) -> None:
    scan, affine = load(made.scan)
    assert (scan > 0).sum() * np.linalg.det(affine) / 1000 == pytest.approx(1466, abs=5)
    shares = np.percentile(scan[scan > 0], (2, 25, 50, 75)) / np.percentile(scan[scan > 0], 98)
    # ds002748, first six subjects: .12 .42 .60 .78.
    np.testing.assert_allclose(shares, (0.12, 0.42, 0.60, 0.78), atol=0.06)


def test_bytes_depend_on_the_seed(made: Sample, tmp_path: Path) -> None:
    again, other = make_sample(tmp_path / "again", 0), make_sample(tmp_path / "other", 1)
    assert again.scan.read_bytes() == made.scan.read_bytes()
    assert again.truth.read_bytes() == made.truth.read_bytes()
    assert gzip.decompress(other.scan.read_bytes()) != gzip.decompress(made.scan.read_bytes())


def test_note_describes_the_scan(made: Sample) -> None:
    note = (made.scan.parent / "README.txt").read_text()
    assert "synthetic" in note
    assert "What to expect" in note
    assert "Copyright (C) 1993-2009 Louis Collins" in note
    assert f"{made.lesion_ml:.2f} ml" in note


def test_missing_nilearn_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sample, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"counterpart\[sample\]"):
        make_sample(tmp_path)
