"""Which frames make one regular stack, and what is said of those that do not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset

from app.errors import IrregularSlices, NotAVolume
from app.ingest.dicom.geometry import Plane
from app.ingest.dicom.geometry import arrange_slices
from app.volume import Volume
from tests.ingest.conftest import Read, placed
from tests.support.dicom import RAS_TO_LPS, Series, datasets, save
from tests.support.dicom import Plane as Named

Change = Callable[[list[FileDataset]], object]


def shift(slices: list[FileDataset], k: int, lps: tuple[float, float, float]) -> None:
    slices[k].ImagePositionPatient = [float(a) + b for a, b in zip(slices[k].ImagePositionPatient, lps, strict=True)]


def tilt(slices: list[FileDataset]) -> None:
    for k in range(len(slices)):
        shift(slices, k, (0, 2.0 * k * np.tan(np.radians(12.5)), 0))


ONE_GAP = "Slice 6 of 14 is missing: gap of 4.0 mm between 5 and 7 (counted from the feet up)"
UNEVEN = (
    "The slices are unevenly spaced: 1.3 to 2.7 mm, mostly 2.0 mm; 2.7 mm between slices 5 and 6 of 14 "
    "(counted from the feet up)."
)
TILTED = (
    "The slices are stacked at an angle of 12.5 degrees to their normal (gantry tilt): the farthest is shifted "
    "sideways by 5.8 mm."
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop(5),
            f"{ONE_GAP}.",
        ),
        (
            lambda s: [s.pop(5) for _ in range(3)],
            "Slices 6 to 8 of 14 are missing: gap of 8.0 mm between 5 and 9 (counted from the feet up).",
        ),
        (
            lambda s: [s.pop(k) for k in (9, 5)],
            f"{ONE_GAP}, and there is one more gap.",
        ),
        (
            lambda s: shift(s, 5, (0, 0, 0.7)),
            UNEVEN,
        ),
        (
            tilt,
            TILTED,
        ),
    ],
    ids=["one missing", "three missing", "two gaps", "uneven", "tilt"],
)
def test_irregular_stacks_are_refused_with_the_place(
    tmp_path: Path, read_scan: Read, volume: Volume, change: Change, message: str
) -> None:
    slices = datasets(volume)
    change(slices)
    save(tmp_path / "s", slices)
    with pytest.raises(IrregularSlices) as refused:
        read_scan(tmp_path / "s")
    assert refused.value.found == message


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    count=st.integers(2, 40),
    missing=st.integers(0, 38),
)
def test_any_stack_is_put_in_order_and_in_place(
    angles: tuple[float, float, float], spacing: tuple[float, float, float], count: int, missing: int
) -> None:
    """Whatever its orientation: its order, its affine, and whether a slice is missing."""
    lps = RAS_TO_LPS @ placed(spacing, angles)
    orientation = (*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1]))
    places = [lps[:3, 3] + k * lps[:3, 2] for k in range(count)]
    planes = [Plane(tuple(place), orientation, (spacing[1], spacing[0]), None) for place in places]
    shuffled = np.random.default_rng(count).permutation(count)
    arranged = arrange_slices([planes[k] for k in shuffled])
    np.testing.assert_array_equal(shuffled[arranged.order], np.arange(count))
    np.testing.assert_allclose(arranged.affine, RAS_TO_LPS @ lps, atol=1e-9)
    assert arranged.faults == ()
    if 0 < missing < count - 1 and count > 4:  # of two gaps, none is the usual one
        (fault,) = arrange_slices([plane for k, plane in enumerate(planes) if k != missing]).faults
        assert fault.startswith(f"Slice {missing + 1} of {count} is missing: gap of ")


@pytest.mark.parametrize(("plane", "end"), [("sagittal", "from left to right"), ("coronal", "from front to back")])
def test_the_count_starts_at_a_named_end(
    tmp_path: Path, read_scan: Read, volume: Volume, plane: Named, end: str
) -> None:
    slices = datasets(volume, Series(plane=plane))
    del slices[3]
    save(tmp_path / "s", slices)
    with pytest.raises(IrregularSlices, match=rf"Slice 4 of \d\d is missing: .*between 3 and 5 \(counted {end}\)"):
        read_scan(tmp_path / "s")


def test_positions_rounded_by_the_scanner_are_regular(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = datasets(Volume(volume.array, placed((0.9, 1.1, 0.625))))
    for dataset in slices:
        dataset.ImagePositionPatient = [round(float(v), 2) for v in dataset.ImagePositionPatient]
    save(tmp_path / "s", slices)
    assert read_scan(tmp_path / "s").volume.spacing[2] == pytest.approx(0.625, abs=0.001)


def test_a_time_series(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = [*datasets(volume), *datasets(volume, Series(name="later"))]
    for dataset in slices:
        dataset.SeriesInstanceUID = slices[0].SeriesInstanceUID
    save(tmp_path / "s", slices)
    with pytest.raises(NotAVolume, match="2 images at each of 14 positions"):
        read_scan(tmp_path / "s")


def test_one_position_twice(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = datasets(volume)
    again = datasets(volume, Series(name="later"))[6]
    again.SeriesInstanceUID = slices[0].SeriesInstanceUID
    save(tmp_path / "s", [*slices, again])
    with pytest.raises(IrregularSlices, match="1 of 14 positions hold more than one image: the first is position 7"):
        read_scan(tmp_path / "s")


def test_gaps_between_thin_slices_are_said(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "s", datasets(volume)[::4])
    scan = read_scan(tmp_path / "s")
    assert scan.volume.spacing[2] == pytest.approx(8)
    assert scan.source.notes == ("The slices are 2.00 mm thick and 8.00 mm apart: what lies between was not seen.",)


def test_one_slice(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    (path,) = save(tmp_path / "s", datasets(volume)[5:6])
    scan = read_scan(path)
    assert scan.volume.shape == (32, 34, 1)
    np.testing.assert_allclose(scan.volume.spacing, [0.9, 1.1, 2.0])
    assert "One single slice" in scan.source.notes[0]
