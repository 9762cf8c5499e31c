"""A reader of DICOM Segmentations of its own: pydicom for the tags, PS3.3's formula, and nothing of highdicom."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset

Points = npt.NDArray[np.float64]


def segment_points(path: Path) -> dict[int, Points]:
    """LPS millimetres of every voxel of each segment, (V, 3).

    BINARY pixels are one bit each, least significant first, frames without padding (PS3.5 8.1.1); a
    pixel's place is equation C.7.6.2.1-1 of PS3.3.
    """
    dataset = pydicom.dcmread(path)
    assert dataset.SegmentationType == "BINARY"
    shape = (int(dataset.NumberOfFrames), int(dataset.Rows), int(dataset.Columns))
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    pixels = bits[: np.prod(shape)].reshape(shape)
    assert not bits[np.prod(shape) : 8 * (-(-np.prod(shape) // 8))].any()
    found = defaultdict(list)
    for frame, image in zip(dataset.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        shared = dataset.SharedFunctionalGroupsSequence[0]
        number = _of(frame, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber
        orientation = np.array(_of(frame, shared, "PlaneOrientationSequence").ImageOrientationPatient, float)
        between_rows, between_columns = map(float, _of(frame, shared, "PixelMeasuresSequence").PixelSpacing)
        position = np.array(_of(frame, shared, "PlanePositionSequence").ImagePositionPatient, float)
        rows, columns = np.nonzero(image)
        along_row, along_column = columns * between_columns, rows * between_rows
        found[number].append(position + along_row[:, None] * orientation[:3] + along_column[:, None] * orientation[3:])
    return {int(number): np.concatenate(parts) for number, parts in found.items()}


def _of(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    item: Dataset = (frame if keyword in frame else shared)[keyword][0]
    return item
