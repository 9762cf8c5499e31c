"""A CT's intensities by a window of Hounsfield units."""

import numpy as np
import pytest
from scipy import ndimage

from app.pipeline.preprocess import to_slices
from app.volume import Volume
from tests.support.grids import PREPROCESSING, reference
from tests.support.phantom import brain, grid

WINDOW = PREPROCESSING.model_copy(update={"window": (0.0, 80.0), "intensity_percentile": None, "intensity_level": None})


def head_ct(outside: float = -1000.0, bone: float = 1500.0) -> Volume:
    """A skull around a brain of 20 to 60 HU, in air; the phantom's own shape."""
    phantom, _ = reference()
    inner = ndimage.binary_erosion(phantom.array > 0, iterations=3)
    hounsfield = np.where(inner, 20 + 40 * phantom.array / phantom.array.max(), bone)
    array = np.where(phantom.array > 0, hounsfield, np.float32(-1000)).astype(np.float32)
    array[:3] = outside
    return Volume(array, phantom.affine)


def test_a_window_maps_its_ends_to_zero_and_one() -> None:
    volume = head_ct()
    slices = to_slices(volume, WINDOW)
    placement = slices.grid
    assert (placement.background, placement.scale) == (0.0, 80.0)
    inner = ndimage.binary_erosion(slices.foreground, iterations=5)
    hounsfield = placement.sample_volume(volume.array)
    np.testing.assert_allclose(slices.x[:, 0][inner], hounsfield[inner] / 80, atol=1e-5)
    assert slices.x[:, 0][slices.foreground & (hounsfield > 1400)].min() > 0.95
    assert slices.x[:, 0][~slices.foreground].max() == 0


def test_a_window_does_not_depend_on_what_else_is_in_the_scan() -> None:
    """A percentile would: twice the bone, and the brain is another."""
    one, two = (to_slices(head_ct(bone=bone), WINDOW).x for bone in (1500.0, 3000.0))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("outside", [-1024.0, -2000.0, -3024.0])
def test_what_lies_outside_the_field_of_view_is_air(outside: float) -> None:
    """Many scanners mark it by a number far below air, and do not always say so."""
    expected, found = to_slices(head_ct(), WINDOW), to_slices(head_ct(outside), WINDOW)
    np.testing.assert_array_equal(found.x, expected.x)
    np.testing.assert_array_equal(found.foreground, expected.foreground)


def test_bone_does_not_shine_into_the_brain() -> None:
    """Thin slices are smoothed to the model's: cut at the window, bone weighs as much as 80 HU and no more."""
    phantom, affine = brain((104, 128, 96), grid((104, 128, 96), 1.5)), grid((104, 128, 96), 1.5)
    inner = ndimage.binary_erosion(phantom.array > 0, iterations=6)
    array = np.where(phantom.array > 0, np.where(inner, 40.0, 1500.0), -1000.0).astype(np.float32)
    slices = to_slices(Volume(array, affine), WINDOW)
    deep = slices.grid.sample_volume(ndimage.binary_erosion(inner).astype(np.float32)) > 0.999
    assert deep.sum() > 10_000
    assert slices.x[:, 0][deep].max() < 0.56  # 0.5 is 40 HU; smoothed before it is cut, it would be above 0.7
