"""Irregular slices on a regular grid: only by choice, and then in their place."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import affines
from pydicom.dataset import FileDataset

from app.errors import InvalidGeometry, IrregularSlices, NotAVolume, TooManyVoxels
from app.ingest.reader import Limits
from app.ingest.dicom.geometry import Plane
from app.ingest.dicom.resample import resample, plan_grid
from app.volume import Affine, FloatArray, Volume
from tests.ingest.conftest import Read, placed
from tests.ingest.test_stack import shift, tilt
from tests.support.dicom import Series, datasets, save, scanned

OBLIQUE = (0.2, -0.35, 0.5)
# Grey values per millimetre: a linear image is what linear interpolation keeps exactly.
SLOPES = np.array([1.7, -2.3, 3.1])


def linear(affine: Affine, shape: tuple[int, ...]) -> FloatArray:
    """A value for each place in RAS+ mm."""
    points = affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return np.asarray(points @ SLOPES + 500, dtype=np.float32)


def irregular_planes(shifts: list[tuple[float, float]], gaps: list[float]) -> list[Plane]:
    """Oblique slices of 1.2 x 0.8 mm pixels."""
    turned = placed((1, 1, 1), OBLIQUE)[:3, :3]
    distances = np.concatenate([[0], np.cumsum(gaps)])
    orientation = (*turned[:, 0], *turned[:, 1])
    places = [turned @ [u, v, d] + [-20, 30, 7] for (u, v), d in zip(shifts, distances, strict=True)]
    return [Plane(tuple(place), orientation, (1.2, 0.8), None) for place in places]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    shifts=st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=2, max_size=7),
    gaps=st.lists(st.floats(0.5, 9), min_size=6, max_size=6),
)
def test_a_linear_image_keeps_its_value_in_every_place(shifts: list[tuple[float, float]], gaps: list[float]) -> None:
    planes = irregular_planes(shifts, gaps[: len(shifts) - 1])
    columns, rows = 30, 26
    index = np.moveaxis(np.indices((columns, rows)), 0, -1)  # (columns, rows, 2)
    turned = np.array(planes[0].orientation).reshape(2, 3)
    slices = [
        (np.array(p.position) + (index * (0.8, 1.2)) @ turned) @ (SLOPES * [-1, -1, 1]) + 500  # LPS
        for p in planes
    ]
    onto = plan_grid(planes, columns, rows)
    found = resample(np.stack(slices, axis=-1).astype(np.float32), onto)
    # Where every slice reaches, whatever its shift.
    middle = (slice(11 - onto.corner[0], 18 - onto.corner[0]), slice(8 - onto.corner[1], 17 - onto.corner[1]))
    np.testing.assert_allclose(found[middle], linear(onto.affine, onto.shape)[middle], atol=0.01)
    assert onto.shape[0] >= columns
    assert onto.shape[1] >= rows
    # It spans the slices, to less than one new distance.
    thick = float(onto.distances[-1])
    assert thick - onto.spacing - 0.01 <= (onto.shape[2] - 1) * onto.spacing <= thick + 0.01


Change = Callable[[list[FileDataset]], object]
IRREGULAR: list[tuple[str, Change, str]] = [
    ("tilt", tilt, "(gantry tilt)"),
    ("one missing", lambda s: s.pop(5), "Slice 6 of 14 is missing"),
    ("uneven", lambda s: shift(s, 5, (0, 0, 0.7)), "unevenly spaced"),
]


@pytest.mark.parametrize(("change", "said"), [case[1:] for case in IRREGULAR], ids=[case[0] for case in IRREGULAR])
def test_only_by_choice_and_then_it_is_said(
    tmp_path: Path, read_scan: Read, volume: Volume, change: Change, said: str
) -> None:
    smooth = Volume(linear(volume.affine, volume.shape), volume.affine)
    slices = datasets(smooth, Series(modality="CT"))
    change(slices)
    if said == "(gantry tilt)":  # the picture moves with its slice: what is at one place stays there
        for k, dataset in enumerate(slices):
            array = scanned(smooth, "axial")[0]
            moved = array[:, :, k].T - SLOPES[1] * 2.0 * k * np.tan(np.radians(12.5)) + 1024
            dataset.PixelData = np.round(moved).astype(np.int16).tobytes()
    elif said == "unevenly spaced":
        moved = slices[5].pixel_array + SLOPES[2] * 0.7
        slices[5].PixelData = np.round(moved).astype(np.int16).tobytes()
    paths = save(tmp_path / "s", slices)
    with pytest.raises(IrregularSlices, match="resample") as refused:
        read_scan(tmp_path / "s")
    assert said in refused.value.found
    scan = read_scan(tmp_path / "s", geometry="resample")
    assert scan.source.resampled
    assert refused.value.found in " ".join(scan.source.notes)
    assert scan.source.notes[-1].startswith("Resampled by choice (geometry=resample): linearly")
    assert scan.source.instances == tuple(paths)
    middle = np.s_[8:-8, 8:-12, :]
    expected = linear(scan.volume.affine, scan.volume.shape)
    assert np.abs(scan.volume.array - expected)[middle].max() <= 1.01  # stored as whole numbers
    np.testing.assert_allclose(scan.volume.spacing, [0.9, 1.1, 2.0], atol=1e-6)


def test_a_regular_series_is_not_resampled(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "s", datasets(volume))
    scan = read_scan(tmp_path / "s", geometry="resample")
    np.testing.assert_array_equal(scan.volume.array, scanned(volume, "axial")[0])
    assert (scan.source.resampled, scan.source.notes) == (False, ())


def test_several_images_at_a_place_are_refused_all_the_same(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = [*datasets(volume), *datasets(volume, Series(name="later"))]
    for dataset in slices:
        dataset.SeriesInstanceUID = slices[0].SeriesInstanceUID
    save(tmp_path / "s", slices)
    with pytest.raises(NotAVolume):
        read_scan(tmp_path / "s", geometry="resample")


def test_positions_that_would_need_a_huge_grid(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = datasets(volume)
    shift(slices, 3, (1e6, 0, 0))
    save(tmp_path / "s", slices)
    with pytest.raises(InvalidGeometry, match="several times their own width"):
        read_scan(tmp_path / "s", geometry="resample")
    far = datasets(volume)
    for dataset in far[7:]:
        dataset.ImagePositionPatient[2] += 1e7
    save(tmp_path / "s", far)
    with pytest.raises(TooManyVoxels):
        read_scan(tmp_path / "s", geometry="resample", limits=Limits(max_voxels=10_000_000))
