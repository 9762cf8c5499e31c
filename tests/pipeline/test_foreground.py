"""Working inside a box changes nothing: compared with the plain way, over the whole volume."""

import numpy as np
import pytest
from scipy import ndimage

from app.manifest import Residual
from app.pipeline.findings import label_findings
from app.pipeline.preprocess import FOREGROUND_LEVEL, background_level, bounding_box, foreground_mask
from app.volume import FloatArray

SHAPES = ((17, 19, 13), (16, 18, 1), (1, 20, 14), (14, 2, 15))


def texture(shape: tuple[int, ...], seed: int) -> FloatArray:
    """Blobs with holes, many of them at the border; in Fortran's order, as NIfTI's voxels lie."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.2)
    return np.asfortranarray(np.maximum(noise, 0).astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_the_foreground_is_that_of_the_whole_volume(shape: tuple[int, ...], seed: int) -> None:
    signal = texture(shape, seed)
    above = signal > FOREGROUND_LEVEL * np.percentile(signal, 99)
    labels, _ = ndimage.label(above)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = labels == sizes.argmax()
    expected = ndimage.binary_fill_holes(largest.squeeze()).reshape(shape)
    np.testing.assert_array_equal(foreground_mask(signal), expected)


def test_a_ring_one_voxel_thick_stays_open_in_a_volume_and_is_filled_in_a_slice() -> None:
    ring = np.zeros((9, 9, 5), np.float32)
    ring[2:7, 2:7, 2] = 1
    ring[3:6, 3:6, 2] = 0
    assert foreground_mask(ring).sum() == 16
    assert foreground_mask(ring[..., 2:3]).sum() == 25


@pytest.mark.parametrize("shape", SHAPES)
def test_the_background_is_the_median_of_the_faces(shape: tuple[int, ...]) -> None:
    array = texture(shape, 0) + np.float32(0.25)
    faces = [np.take(array, i, axis=axis).ravel() for axis in range(3) for i in (0, -1) if shape[axis] > 2]
    assert background_level(array) == float(np.median(np.concatenate(faces)))


def test_a_bounding_box_holds_all_and_no_more() -> None:
    mask = np.zeros((5, 6, 7), bool)
    assert mask[bounding_box(mask)].shape == (0, 0, 0)
    mask[1, 2, 6] = mask[3, 2, 4] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 3), slice(4, 7))


@pytest.mark.parametrize("seed", range(8))
def test_findings_are_those_of_the_whole_volume(seed: int) -> None:
    anomaly = texture((17, 19, 13), seed)
    anomaly[:3] = np.nan
    settings = Residual(
        reference="image",
        smoothing_mm=0.0,
        threshold=0.2,
        extent_threshold=0.1,
        healthy_false_positive_ml=1.0,
        min_lesion_ml=0.004,
    )
    inside, certain = anomaly > settings.extent_threshold, anomaly > settings.threshold
    labels, count = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(np.ones(labels.shape), labels, np.arange(1, count + 1))
    kept = [i + 1 for i in np.argsort(-sizes, kind="stable") if sizes[i] >= 4 and certain[labels == i + 1].any()]
    expected = np.zeros(labels.shape, np.int32)
    for rank, label in enumerate(kept):
        expected[labels == label] = rank + 1
    found, number = label_findings(anomaly, settings, 0.001)
    assert number == len(kept) > 1
    np.testing.assert_array_equal(found, expected)


def test_nothing_found_is_an_empty_map() -> None:
    settings = Residual(
        reference="image",
        smoothing_mm=0.0,
        threshold=9.0,
        extent_threshold=9.0,
        healthy_false_positive_ml=1.0,
        min_lesion_ml=0.0,
    )
    labels, number = label_findings(texture((5, 6, 7), 1), settings, 0.001)
    assert (labels.shape, labels.dtype, int(labels.sum()), number) == ((5, 6, 7), np.dtype(np.uint16), 0, 0)
