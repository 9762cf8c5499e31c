"""Tests of synthetic ellipses in a head CT, and of foreign patches in a brain."""

import numpy as np
import pytest
from scipy import ndimage

from app.pipeline.preprocess import foreground_mask_of
from app.volume import Volume
from tests.support.phantom import brain, grid
from training.lesion_insertion import insert_ellipses, insert_foreign_patch, segment_ct_brain

SPACING = (3.8, 3.8, 5.0)
AIR, BONE, BRAIN, VENTRICLE = -1000.0, 1200.0, 32.0, 3.0


@pytest.fixture
def head() -> Volume:
    """Return a skull around a brain with a ventricle, and a small neck below."""
    x, y, z = np.indices((64, 64, 12))
    radius = np.hypot((x - 32) / 0.8, y - 32)
    array = np.full(radius.shape, AIR, np.float32)
    array[radius < 23] = BONE
    array[radius < 20] = BRAIN
    array[radius < 3] = VENTRICLE
    neck = z < 3
    array[neck] = AIR
    array[neck & (radius < 6)] = BRAIN
    return Volume(array, np.diag([*SPACING, 1.0]))


def test_brain_is_inside_the_skull_with_its_ventricle(head: Volume) -> None:
    brain = segment_ct_brain(head)
    assert not brain[:, :, :3].any(), "a neck is not brain"
    assert brain[32, 32, 3:].all(), "a ventricle is part of the brain"
    assert not brain[head.array == BONE].any()
    inside = (head.array == BRAIN)[:, :, 3:]
    assert brain[:, :, 3:][inside].mean() > 0.9


@pytest.mark.parametrize("contrast", [0.35, -0.35])
def test_ellipses_change_only_the_brain_by_their_contrast(head: Volume, contrast: float) -> None:
    lesioned = insert_ellipses(head, 12.0, contrast, seed=1)
    change = lesioned.volume.array - head.array
    assert lesioned.truth.any()
    assert not lesioned.truth[~segment_ct_brain(head)].any()
    assert not change[~segment_ct_brain(head)].any()
    assert (np.sign(change[lesioned.truth]) == np.sign(contrast)).all()
    slices = np.any(lesioned.truth, axis=(0, 1))
    assert isinstance(slices, np.ndarray)
    assert not slices[:-1][slices[1:]].any(), "one slice in three has an ellipse"


def test_radius_determines_the_size_and_seed_the_position(head: Volume) -> None:
    ml = [insert_ellipses(head, mm, 0.35, seed=2).truth_ml for mm in (8.0, 16.0)]
    assert ml[1] > 2 * ml[0]
    again = insert_ellipses(head, 8.0, 0.35, seed=2)
    assert again.truth_ml == ml[0]
    assert not np.array_equal(again.truth, insert_ellipses(head, 8.0, 0.35, seed=3).truth)


def sphere(radius_mm: float) -> Volume:
    """Return a ball in MNI space, in the middle of the right half."""
    index = np.indices((60, 60, 60)) * 3.0 - 90
    centred = index - np.array([25, -20, 7])[:, None, None, None]
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = -90
    return Volume((np.linalg.norm(centred, axis=0) < radius_mm).astype(np.float32), affine)


def test_foreign_patch_is_tissue_of_another_place() -> None:
    scan = brain((70, 84, 64), grid((70, 84, 64), 2.0), texture=0.2)
    inside = foreground_mask_of(scan)
    lesioned = insert_foreign_patch(scan, sphere(14.0), seed=3)
    change = lesioned.volume.array - scan.array
    assert lesioned.truth_ml == pytest.approx(4 / 3 * np.pi * 1.4**3, rel=0.4)
    assert inside[lesioned.truth].all()
    assert not change[~inside].any()
    low, high = np.percentile(scan.array[inside], (2, 98))
    assert np.abs(change[lesioned.truth]).mean() > 0.15 * (high - low)
    # Far inside the edge, every value is one of the scan: nothing is shifted.
    core = ndimage.binary_erosion(lesioned.truth, iterations=3)
    assert core.any()
    distance = np.abs(lesioned.volume.array[core][:, None] - scan.array[inside]).min(axis=1)
    assert distance.max() < 1e-3 * (high - low)
    other = insert_foreign_patch(scan, sphere(14.0), seed=4)
    assert not np.array_equal(other.volume.array, lesioned.volume.array)
    again = insert_foreign_patch(scan, sphere(14.0), seed=3)
    assert np.array_equal(again.volume.array, lesioned.volume.array)
