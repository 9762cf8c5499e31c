"""Order, affine and irregularities of a stack of slices."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset

from app.errors import IrregularSlices, NotAVolume
from app.ingest.dicom.geometry import Plane, arrange_slices
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import RAS_TO_LPS, Series, make_datasets, save, shift_slice, tilt_gantry
from tests.support.dicom import Plane as PlaneName
from tests.support.geometry import make_affine

Change = Callable[[list[FileDataset]], object]


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda s: s.pop(5), ["Slice 6 of 14 is missing", "between slices 5 and 7 is 4.0 mm"]),
        (
            lambda s: [s.pop(5) for _ in range(3)],
            ["Slices 6 to 8 of 14 are missing", "between slices 5 and 9 is 8.0 mm"],
        ),
        (lambda s: [s.pop(k) for k in (9, 5)], ["Slice 6 of 14 is missing", "1 more gap"]),
        (lambda s: shift_slice(s, 5, (0, 0, 0.7)), ["1.3 to 2.7 mm", "2.7 mm between slices 5 and 6 of 14"]),
        (tilt_gantry, ["12.5 degrees", "gantry tilt", "5.8 mm"]),
    ],
    ids=["one missing", "three missing", "two gaps", "uneven", "tilt"],
)
def test_irregular_stacks_are_refused_with_their_place(
    tmp_path: Path, read_scan: Read, volume: Volume, change: Change, fragments: list[str]
) -> None:
    slices = make_datasets(volume)
    change(slices)
    save(tmp_path / "s", slices)
    with pytest.raises(IrregularSlices) as refused:
        read_scan(tmp_path / "s")
    assert all(fragment in refused.value.found for fragment in fragments)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    count=st.integers(2, 40),
    missing=st.integers(0, 38),
)
def test_any_stack_is_sorted_and_located(
    angles: tuple[float, float, float], spacing: tuple[float, float, float], count: int, missing: int
) -> None:
    lps = RAS_TO_LPS @ make_affine(spacing, angles)
    orientation = (*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1]))
    positions = [lps[:3, 3] + k * lps[:3, 2] for k in range(count)]
    planes = [Plane(tuple(position), orientation, (spacing[1], spacing[0]), None) for position in positions]
    shuffled = np.random.default_rng(count).permutation(count)
    arrangement = arrange_slices([planes[k] for k in shuffled])
    np.testing.assert_array_equal(shuffled[arrangement.order], np.arange(count))
    np.testing.assert_allclose(arrangement.affine, RAS_TO_LPS @ lps, atol=1e-9)
    assert arrangement.faults == ()
    if 0 < missing < count - 1 and count > 4:  # with three slices left, neither gap is the usual one
        (fault,) = arrange_slices([plane for k, plane in enumerate(planes) if k != missing]).faults
        assert fault.startswith(f"Slice {missing + 1} of {count} is missing")


@pytest.mark.parametrize(("plane", "end"), [("sagittal", "from left to right"), ("coronal", "from front to back")])
def test_slices_are_counted_from_a_named_end(
    tmp_path: Path, read_scan: Read, volume: Volume, plane: PlaneName, end: str
) -> None:
    slices = make_datasets(volume, Series(plane=plane))
    del slices[3]
    save(tmp_path / "s", slices)
    with pytest.raises(IrregularSlices, match=rf"Slice 4 of .*\(counted {end}\)"):
        read_scan(tmp_path / "s")


def test_rounded_positions_are_regular(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(Volume(volume.array, make_affine((0.9, 1.1, 0.625))))
    for dataset in slices:
        dataset.ImagePositionPatient = [round(float(v), 2) for v in dataset.ImagePositionPatient]
    save(tmp_path / "s", slices)
    assert read_scan(tmp_path / "s").volume.spacing[2] == pytest.approx(0.625, abs=0.001)


@pytest.mark.parametrize("geometry", ["refuse", "resample"])
def test_a_time_series_is_refused(tmp_path: Path, read_scan: Read, volume: Volume, geometry: str) -> None:
    slices = [*make_datasets(volume), *make_datasets(volume, Series(name="later"))]
    for dataset in slices:
        dataset.SeriesInstanceUID = slices[0].SeriesInstanceUID
    save(tmp_path / "s", slices)
    with pytest.raises(NotAVolume, match="2 images at each of 14 positions"):
        read_scan(tmp_path / "s", geometry=geometry)


def test_one_repeated_position_is_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    repeated = make_datasets(volume, Series(name="later"))[6]
    repeated.SeriesInstanceUID = slices[0].SeriesInstanceUID
    save(tmp_path / "s", [*slices, repeated])
    with pytest.raises(IrregularSlices, match=r"1 of 14 positions.* position 7"):
        read_scan(tmp_path / "s")


def test_gaps_between_thin_slices_are_noted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "s", make_datasets(volume)[::4])
    scan = read_scan(tmp_path / "s")
    assert scan.volume.spacing[2] == pytest.approx(8)
    (note,) = scan.source.notes
    assert "2.00 mm thick and 8.00 mm apart" in note


def test_one_slice_is_read_with_a_note(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    (path,) = save(tmp_path / "s", make_datasets(volume)[5:6])
    scan = read_scan(path)
    assert scan.volume.shape == (32, 34, 1)
    np.testing.assert_allclose(scan.volume.spacing, [0.9, 1.1, 2.0])
    assert len(scan.source.notes) == 1
