"""Independent reader of DICOM Segmentations: pydicom and the equation of PS3.3, without highdicom."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset

Points = npt.NDArray[np.float64]


def segment_points(path: Path) -> dict[int, Points]:
    """Return the LPS millimetres of every voxel of each segment, (V, 3), by segment number.

    BINARY pixels have one bit, the least significant first, and frames have no padding (PS3.5 8.1.1). The position of a
    pixel is equation C.7.6.2.1-1 of PS3.3.
    """
    dataset = pydicom.dcmread(path)
    assert dataset.SegmentationType == "BINARY"
    shape = (int(dataset.NumberOfFrames), int(dataset.Rows), int(dataset.Columns))
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    pixels = bits[: np.prod(shape)].reshape(shape)
    assert not bits[np.prod(shape) : 8 * (-(-np.prod(shape) // 8))].any()
    points = defaultdict(list)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for frame, image in zip(dataset.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        number = _group(frame, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber
        orientation = np.array(_group(frame, shared, "PlaneOrientationSequence").ImageOrientationPatient, float)
        row_spacing, column_spacing = map(float, _group(frame, shared, "PixelMeasuresSequence").PixelSpacing)
        position = np.array(_group(frame, shared, "PlanePositionSequence").ImagePositionPatient, float)
        rows, columns = np.nonzero(image)
        along_row, along_column = (columns * column_spacing)[:, None], (rows * row_spacing)[:, None]
        points[number].append(position + along_row * orientation[:3] + along_column * orientation[3:])
    return {int(number): np.concatenate(parts) for number, parts in points.items()}


def _group(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    item: Dataset = (frame if keyword in frame else shared)[keyword][0]
    return item
