"""Acquisitions of one series that overlap."""

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import UID

from app.errors import CounterpartError, IrregularSlices, NotAVolume
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import Series, make_datasets, reorient, save


def acquire(volume: Volume, ranges: list[range]) -> list[FileDataset]:
    """Return the slices of a CT in acquisitions. The values of each acquisition are larger by its index."""
    slices = []
    for number, chosen in enumerate(ranges):
        changed = Volume(volume.array + number, volume.affine)
        datasets = make_datasets(changed, Series(modality="CT"))
        for k in chosen:
            datasets[k].AcquisitionNumber = number + 3
            datasets[k].SOPInstanceUID = datasets[k].file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.{number + 3}.{k}")
            slices.append(datasets[k])
    return slices


@pytest.mark.parametrize(
    ("ranges", "boundary", "left_out"),
    [
        ([range(9), range(8, 14)], 9, "1 of 6 images of acquisition 4"),
        ([range(6), range(4, 14)], 4, "2 of 6 images of acquisition 3"),
        ([range(7), range(6, 14)], 6, "1 of 7 images of acquisition 3"),
    ],
    ids=["the first is longer", "the second is longer", "nearly equal"],
)
def test_ranges_that_overlap_are_joined_on_request(
    tmp_path: Path, read_scan: Read, volume: Volume, ranges: list[range], boundary: int, left_out: str
) -> None:
    save(tmp_path / "s", acquire(volume, ranges))
    with pytest.raises(IrregularSlices, match=r"show the same region.*" + left_out) as refused:
        read_scan(tmp_path / "s")
    assert "geometry=resample" in refused.value.advice
    scan = read_scan(tmp_path / "s", geometry="resample")
    expected = reorient(volume, "axial")[0].copy()
    expected[:, :, boundary:] += 1
    np.testing.assert_array_equal(scan.volume.array, expected)
    (note,) = scan.source.notes
    assert note.startswith(f"Left out: {left_out} (axial, z ")
    assert len(scan.source.instances) == 14


def test_a_repetition_is_refused_with_its_name(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "s", acquire(volume, [range(14), range(4, 9)]))
    with pytest.raises(IrregularSlices, match="5 of 5 images of acquisition 4") as refused:
        read_scan(tmp_path / "s", geometry="resample")
    assert "AcquisitionNumber" in refused.value.advice
    assert "resample" not in refused.value.advice


def test_interleaved_images_of_a_shorter_acquisition_are_not_mixed_in(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    slices = acquire(volume, [range(9), range(6, 14)])
    for dataset in slices[9:]:  # two of them are then between slices of the first acquisition
        dataset.ImagePositionPatient[2] = float(dataset.ImagePositionPatient[2]) + 0.9
    slices[9].ImagePositionPatient = slices[6].ImagePositionPatient
    save(tmp_path / "s", slices)
    scan = read_scan(tmp_path / "s", geometry="resample")
    assert scan.source.notes[0].startswith("Left out: 2 of 8 images of acquisition 4")
    np.testing.assert_array_equal(scan.volume.array[:, :, :9], reorient(volume, "axial")[0][:, :, :9])


@pytest.mark.parametrize(
    ("ranges", "numbered", "error"),
    [
        ([range(9), range(8, 14)], False, IrregularSlices),
        ([range(14), range(14)], True, NotAVolume),
    ],
    ids=["without numbers", "a time series"],
)
def test_other_repeated_images_are_refused(
    tmp_path: Path,
    read_scan: Read,
    volume: Volume,
    ranges: list[range],
    numbered: bool,  # noqa: FBT001
    error: type[CounterpartError],
) -> None:
    slices = acquire(volume, ranges)
    if not numbered:
        for dataset in slices:
            del dataset.AcquisitionNumber
    save(tmp_path / "s", slices)
    with pytest.raises(error, match=r"2 images|more than one image"):
        read_scan(tmp_path / "s", geometry="resample")
