"""Writer of an enhanced multi-frame image of a volume (PS3.3 A.36, A.38).

The position of each frame is in the functional group of the frame.
"""

from collections.abc import Sequence

import numpy as np
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import EnhancedCTImageStorage, EnhancedMRImageStorage

from app.volume import Volume
from tests.support.dicom import DEFAULT_SERIES, Series, make_datasets


def make_enhanced(
    volume: Volume, series: Series = DEFAULT_SERIES, echoes_ms: Sequence[float | None] = (None,)
) -> FileDataset:
    """Return one image with all slices in a shuffled order, once for every echo.

    The values of each echo are half of those of the echo before.
    """
    slices = make_datasets(volume, series)
    head = slices[0]
    head.SOPClassUID = EnhancedCTImageStorage if series.modality == "CT" else EnhancedMRImageStorage
    head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID
    frames = [(k, echo) for echo in range(len(echoes_ms)) for k in range(len(slices))]
    frames = [frames[i] for i in np.random.default_rng(0).permutation(len(frames))]
    groups = []
    for k, echo in frames:
        group = Dataset()
        position = _item(ImagePositionPatient=slices[k].ImagePositionPatient)
        group.PlanePositionSequence = [position]
        if echoes_ms[echo] is not None:
            group.MREchoSequence = [_item(EffectiveEchoTime=echoes_ms[echo])]
        groups.append(group)
    shared = Dataset()
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=head.ImageOrientationPatient)]
    shared.PixelMeasuresSequence = [_item(PixelSpacing=head.PixelSpacing, SliceThickness=head.SliceThickness)]
    if "RescaleSlope" in head:
        rescale = _item(RescaleSlope=head.RescaleSlope, RescaleIntercept=head.RescaleIntercept, RescaleType="US")
        shared.PixelValueTransformationSequence = [rescale]
        del head.RescaleSlope, head.RescaleIntercept
    pixels = [dataset.pixel_array for dataset in slices]
    head.PixelData = b"".join((pixels[k] >> echo).tobytes() for k, echo in frames)
    del head.ImagePositionPatient, head.ImageOrientationPatient, head.PixelSpacing, head.SliceThickness
    head.NumberOfFrames = len(frames)
    head.SharedFunctionalGroupsSequence, head.PerFrameFunctionalGroupsSequence = [shared], groups
    return head


def _item(**values: object) -> Dataset:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item
