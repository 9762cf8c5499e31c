"""Resampling of irregular slices."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import affines
from pydicom.dataset import FileDataset

from app.errors import InvalidGeometry, IrregularSlices, TooManyVoxels
from app.ingest.dicom.geometry import Plane
from app.ingest.dicom.resample import plan_grid, resample
from app.ingest.reader import Limits
from app.volume import Affine, FloatArray, Volume
from tests.ingest.conftest import Read
from tests.support.dicom import Series, make_datasets, reorient, save, shift_slice, tilt_gantry
from tests.support.geometry import OBLIQUE, SPACING, make_affine

# Grey values per millimetre of a linear image, which linear interpolation reproduces exactly.
SLOPES = np.array([1.7, -2.3, 3.1])


def linear_image(affine: Affine, shape: tuple[int, ...]) -> FloatArray:
    """Return the values of the linear image on a grid."""
    points = affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return np.asarray(points @ SLOPES + 500, dtype=np.float32)


def irregular_planes(shifts: list[tuple[float, float]], gaps: list[float]) -> list[Plane]:
    """Return the planes of oblique slices with pixels of 1.2 x 0.8 mm."""
    rotation = make_affine((1, 1, 1), OBLIQUE)[:3, :3]
    distances = np.concatenate([[0], np.cumsum(gaps)])
    orientation = (*rotation[:, 0], *rotation[:, 1])
    positions = [rotation @ [u, v, d] + [-20, 30, 7] for (u, v), d in zip(shifts, distances, strict=True)]
    return [Plane(tuple(position), orientation, (1.2, 0.8), None) for position in positions]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    shifts=st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=2, max_size=7),
    gaps=st.lists(st.floats(0.5, 9), min_size=6, max_size=6),
)
def test_a_linear_image_keeps_its_value_at_every_position(shifts: list[tuple[float, float]], gaps: list[float]) -> None:
    planes = irregular_planes(shifts, gaps[: len(shifts) - 1])
    columns, rows = 30, 26
    index = np.moveaxis(np.indices((columns, rows)), 0, -1)  # (columns, rows, 2)
    directions = np.array(planes[0].orientation).reshape(2, 3)
    slices = [
        (np.array(p.position) + (index * (0.8, 1.2)) @ directions) @ (SLOPES * [-1, -1, 1]) + 500  # LPS
        for p in planes
    ]
    grid = plan_grid(planes, columns, rows)
    found = resample(np.stack(slices, axis=-1).astype(np.float32), grid)
    # The region that every slice covers.
    middle = (slice(11 - grid.corner[0], 18 - grid.corner[0]), slice(8 - grid.corner[1], 17 - grid.corner[1]))
    np.testing.assert_allclose(found[middle], linear_image(grid.affine, grid.shape)[middle], atol=0.01)
    assert grid.shape[0] >= columns
    assert grid.shape[1] >= rows
    # The grid covers the extent of the slices up to less than one new slice spacing.
    extent = float(grid.distances[-1])
    assert extent - grid.spacing - 0.01 <= (grid.shape[2] - 1) * grid.spacing <= extent + 0.01


Change = Callable[[list[FileDataset]], object]
IRREGULAR: list[tuple[str, Change, str]] = [
    ("tilt", tilt_gantry, "gantry tilt"),
    ("one missing", lambda s: s.pop(5), "Slice 6 of 14 is missing"),
    ("uneven", lambda s: shift_slice(s, 5, (0, 0, 0.7)), "slice spacing varies"),
]


@pytest.mark.parametrize(("change", "fault"), [case[1:] for case in IRREGULAR], ids=[case[0] for case in IRREGULAR])
def test_irregular_slices_are_resampled_only_on_request(
    tmp_path: Path, read_scan: Read, volume: Volume, change: Change, fault: str
) -> None:
    smooth = Volume(linear_image(volume.affine, volume.shape), volume.affine)
    slices = make_datasets(smooth, Series(modality="CT"))
    change(slices)
    if fault == "gantry tilt":  # shift the pixels, so that the image stays at its position
        for k, dataset in enumerate(slices):
            array = reorient(smooth, "axial")[0]
            moved = array[:, :, k].T - SLOPES[1] * 2.0 * k * np.tan(np.radians(12.5)) + 1024
            dataset.PixelData = np.round(moved).astype(np.int16).tobytes()
    elif fault == "slice spacing varies":
        moved = slices[5].pixel_array + SLOPES[2] * 0.7
        slices[5].PixelData = np.round(moved).astype(np.int16).tobytes()
    paths = save(tmp_path / "s", slices)
    with pytest.raises(IrregularSlices) as refused:
        read_scan(tmp_path / "s")
    assert fault in refused.value.found
    scan = read_scan(tmp_path / "s", geometry="resample")
    assert scan.source.resampled
    assert refused.value.found in " ".join(scan.source.notes)
    assert "geometry=resample" in scan.source.notes[-1]
    assert scan.source.instances == tuple(paths)
    middle = np.s_[8:-8, 8:-12, :]
    expected = linear_image(scan.volume.affine, scan.volume.shape)
    assert np.abs(scan.volume.array - expected)[middle].max() <= 1.01  # the slices are stored as whole numbers
    np.testing.assert_allclose(scan.volume.spacing, SPACING, atol=1e-6)


def test_a_regular_series_is_not_resampled(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "s", make_datasets(volume))
    scan = read_scan(tmp_path / "s", geometry="resample")
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    assert (scan.source.resampled, scan.source.notes) == (False, ())


def test_positions_that_need_a_huge_grid_are_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    shift_slice(slices, 3, (1e6, 0, 0))
    save(tmp_path / "s", slices)
    with pytest.raises(InvalidGeometry):
        read_scan(tmp_path / "s", geometry="resample")
    far = make_datasets(volume)
    for dataset in far[7:]:
        dataset.ImagePositionPatient[2] += 1e7
    save(tmp_path / "s", far)
    with pytest.raises(TooManyVoxels):
        read_scan(tmp_path / "s", geometry="resample", limits=Limits(max_voxels=10_000_000))
