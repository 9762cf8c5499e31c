"""Preprocessing: the same head gives the same slices on every grid."""

from functools import cache
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as run
from hypothesis import strategies as st
from nibabel import affines, orientations
from scipy import ndimage

from app.errors import ConstantVoxels, WrongFieldOfView
from app.pipeline.preprocess import (
    FOREGROUND_LEVEL,
    Slices,
    background_level,
    bounding_box,
    foreground_cm2,
    foreground_mask,
    to_slices,
)
from app.volume import FloatArray, Volume
from tests.support.grids import CORNER_MM, GRIDS, PREPROCESSING, preprocessed, reference
from tests.support.phantom import brain, grid, with_lesion

LAYOUTS = [
    np.column_stack([axes, flips]).astype(float)
    for axes in permutations(range(3))
    for flips in product((1, -1), repeat=3)
]


def reoriented(volume: Volume, layout: np.ndarray) -> Volume:
    """Store the same voxels along other axes."""
    array = orientations.apply_orientation(volume.array, layout)
    return Volume(array, volume.affine @ orientations.inv_ornt_aff(layout, volume.shape))


@cache
def reference_back() -> np.ndarray:
    _, slices = reference()
    return slices.grid.to_volume(slices.x[:, 0])


# ---- geometry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(orientations.ornt2axcodes(layout)))
def test_every_axis_layout_gives_the_same_slices(layout: np.ndarray) -> None:
    volume, expected = reference()
    other = reoriented(volume, layout)
    slices = to_slices(other, PREPROCESSING)
    # Coordinates are computed in another order, so float32 rounds differently.
    np.testing.assert_allclose(slices.x, expected.x, atol=2e-6)
    np.testing.assert_array_equal(slices.foreground, expected.foreground)
    back = slices.grid.to_volume(slices.x[:, 0])
    np.testing.assert_allclose(back, orientations.apply_orientation(reference_back(), layout), atol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_slices_equal_the_sampled_phantom(name: str) -> None:
    """Compared two pixels inside the surface."""
    _, slices = preprocessed(name)
    on = slices.grid
    truth = brain(on.shape, on.affine).array / on.scale
    inner = ndimage.binary_erosion(slices.foreground, iterations=2)
    difference = np.abs(slices.x[:, 0] - truth)[inner]
    # Linear interpolation and anti-aliasing flatten a texture of 19 mm and the edges of tissues.
    assert difference.mean() < 0.004
    assert difference.max() < 0.05
    # The background is exactly 0, and the foreground is the head except for some surface pixels.
    assert slices.x[:, 0][~slices.foreground].max() == 0.0
    assert (slices.foreground != (truth > 0.35)).mean() < 0.02


@pytest.mark.parametrize("name", GRIDS)
def test_stack_is_centred_on_the_head_along_ras(name: str) -> None:
    on = to_slices(brain(*GRIDS[name], centre_mm=(4.0, -3.0, 2.0)), PREPROCESSING).grid
    np.testing.assert_array_equal(on.affine[:3, :3], [[0, 0, 3], [0, 3, 0], [3, 0, 0]])
    middle = affines.apply_affine(on.affine, (np.array(on.shape) - 1) / 2)
    spacing = affines.voxel_sizes(GRIDS[name][1]).max()
    assert middle == pytest.approx([4.0, -3.0, 2.0], abs=spacing / 2)


def test_scan_on_the_slice_grid_is_only_scaled() -> None:
    _, slices = reference()
    on = slices.grid
    assert slices.x.shape == (40, 1, 64, 56)
    assert affines.apply_affine(on.affine, [0, 0, 0]) == pytest.approx(CORNER_MM)
    truth = brain(on.shape, on.affine).array / on.scale
    np.testing.assert_allclose(slices.x[:, 0][slices.foreground], truth[slices.foreground], atol=1e-6)


@given(st.integers(0, 2**32 - 1))
@run(max_examples=5)
def test_rounded_affine_gives_the_same_slices(seed: int) -> None:
    """NIfTI stores float32 and DICOM stores decimal strings. Ties must be broken the same way.

    This head is 117 mm tall in 3 mm slices, and every pixel lies half-way between 1.5 mm voxels.
    """
    volume, expected = half_way()
    noise = np.random.default_rng(seed).normal(0, 1e-6, (3, 4))
    affine = volume.affine.copy()
    affine[:3] += noise
    slices = to_slices(Volume(volume.array, affine), PREPROCESSING)
    assert slices.x.shape == expected.x.shape
    np.testing.assert_array_equal(slices.foreground, expected.foreground)
    np.testing.assert_allclose(slices.x, expected.x, atol=1e-3)


@cache
def half_way() -> tuple[Volume, Slices]:
    shape = (92, 116, 81)
    volume = brain(shape, grid(shape, 1.5))
    return volume, to_slices(volume, PREPROCESSING)


def test_stack_has_a_slice_at_each_end_of_the_head() -> None:
    _, slices = half_way()
    assert len(slices.x) == 40  # 117 mm / 3 mm + 1
    assert affines.apply_affine(slices.grid.affine, [0, 0, 0])[2] == pytest.approx(-58.5)
    assert foreground_cm2(slices, PREPROCESSING)[20] == pytest.approx(np.pi * 6.6 * 8.3, rel=0.02)


# ---- intensities -------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "offset"), [(3.0, 0.0), (0.001, 0.0), (1.0, -1024.0), (0.5, 4000.0)])
def test_units_of_the_scan_have_no_influence(gain: float, offset: float) -> None:
    volume, expected = reference()
    slices = to_slices(Volume(volume.array * np.float32(gain) + np.float32(offset), volume.affine), PREPROCESSING)
    np.testing.assert_allclose(slices.x, expected.x, atol=1e-3)
    np.testing.assert_array_equal(slices.foreground, expected.foreground)
    assert slices.grid.background == offset
    assert slices.grid.scale == pytest.approx(expected.grid.scale * gain, rel=1e-4)
    level = np.percentile(volume.array[volume.array > 0], 98.0)
    assert slices.grid.scale == pytest.approx(gain * level / 0.75, rel=0.01)


def test_percentile_is_mapped_to_its_level() -> None:
    _, slices = reference()
    assert np.percentile(slices.x[:, 0][slices.foreground], 98.0) == pytest.approx(0.75, abs=0.01)


def test_values_above_the_range_are_clipped() -> None:
    volume, _ = reference()
    x = to_slices(with_lesion(volume, (20, 0, 0), 12, 3.0), PREPROCESSING).x
    assert x.max() == 1.0
    assert x.min() == 0.0


def test_larger_field_of_view_changes_little() -> None:
    volume, expected = reference()
    affine = volume.affine.copy()
    affine[:3, 3] -= 3 * 25
    slices = to_slices(Volume(np.pad(volume.array, 25), affine), PREPROCESSING)
    assert slices.x.shape == expected.x.shape
    # The foreground level depends on a percentile of the whole volume, so some surface pixels change.
    assert (slices.foreground != expected.foreground).sum() < 20
    assert np.abs(slices.x - expected.x).mean() < 1e-4


def test_foreground_includes_holes_and_excludes_specks() -> None:
    volume, expected = reference()
    array = with_lesion(volume, (20, 10, 0), 12, 0.0).array.copy()
    array[0:2, 0:2, 0:2] = 700
    slices = to_slices(Volume(array, volume.affine), PREPROCESSING)
    np.testing.assert_array_equal(slices.foreground, expected.foreground)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.6, 1.35])
def test_head_of_another_size_is_refused(scale: float) -> None:
    shape = (66, 80, 60)
    with pytest.raises(WrongFieldOfView) as caught:
        to_slices(brain(shape, grid(shape), scale=scale), PREPROCESSING)
    right_left = float(caught.value.found.split("measures ")[1].split(" x ")[0])
    assert right_left == pytest.approx(132 * scale, abs=6)  # two voxels
    assert caught.value.advice == PREPROCESSING.advice


def test_too_tall_foreground_is_refused() -> None:
    shape = (52, 64, 80)
    array = np.zeros(shape, dtype=np.float32)
    array[8:-8, 8:-8, 1:-1] = 500
    with pytest.raises(WrongFieldOfView, match="tall"):
        to_slices(Volume(array, grid(shape)), PREPROCESSING)


def test_head_in_a_very_large_field_of_view_is_found() -> None:
    volume, slices = reference()
    small = np.zeros((270, 270, 270), dtype=np.float32)
    corner = np.array([100, 90, 120])
    x, y, z = (slice(int(a), int(a) + n) for a, n in zip(corner, volume.shape, strict=True))
    small[x, y, z] = volume.array
    assert np.mean(small > 0) < 0.01
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ corner
    found = to_slices(Volume(small, affine), PREPROCESSING)
    np.testing.assert_array_equal(found.foreground, slices.foreground)
    # The percentile is over the foreground only. Sums of the smoothing differ in float32.
    np.testing.assert_allclose(found.x, slices.x, atol=1e-5)


def test_head_darker_than_the_background_is_refused() -> None:
    volume, _ = reference()
    with pytest.raises(ConstantVoxels):
        to_slices(Volume(-volume.array, volume.affine), PREPROCESSING)


# ---- single slices -----------------------------------------------------------------------------


def crop(volume: Volume, first: int, count: int) -> Volume:
    shift = np.eye(4)
    shift[2, 3] = first
    return Volume(volume.array[:, :, first : first + count], volume.affine @ shift)


def test_single_slice_resembles_the_slice_of_the_whole_scan() -> None:
    volume, expected = reference()
    one = to_slices(crop(volume, 26, 1), PREPROCESSING)
    assert one.x.shape == (1, 1, 64, 56)
    z = affines.apply_affine(one.grid.affine, [0, 0, 0])[2]
    assert z == pytest.approx(affines.apply_affine(volume.affine, [0, 0, 26])[2])
    # The 98th percentile and the centre of the foreground differ a little.
    whole = expected.x[round((z - CORNER_MM[2]) / 3), 0]
    assert np.corrcoef(one.x.ravel(), whole.ravel())[0, 1] > 0.95
    assert one.foreground.sum() == pytest.approx((whole > 0).sum(), rel=0.02)


def test_hole_in_a_single_slice_is_foreground() -> None:
    volume, _ = reference()
    plain = to_slices(crop(volume, 26, 1), PREPROCESSING)
    holed = to_slices(crop(with_lesion(volume, (20, 10, 7), 12, 0.0), 26, 1), PREPROCESSING)
    np.testing.assert_array_equal(holed.foreground, plain.foreground)


def test_single_slice_is_restored() -> None:
    one = crop(reference()[0], 26, 1)
    slices = to_slices(one, PREPROCESSING)
    back = slices.grid.to_volume(slices.x[:, 0]) * slices.grid.scale
    inner = ndimage.binary_erosion(one.array[:, :, 0] > 0, iterations=3)[:, :, None]
    np.testing.assert_allclose(back[inner], one.array[inner], atol=25)  # of 800, after two interpolations


def test_single_sagittal_slice_is_refused() -> None:
    volume, _ = reference()
    with pytest.raises(WrongFieldOfView):
        to_slices(Volume(volume.array[26:27], volume.affine), PREPROCESSING)


# ---- window of Hounsfield units ----------------------------------------------------------------

WINDOW = PREPROCESSING.model_copy(update={"window": (0.0, 80.0), "intensity_percentile": None, "intensity_level": None})


def head_ct(outside: float = -1000.0, bone: float = 1500.0) -> Volume:
    """Return a skull around a brain of 20 to 60 HU in air, with the shape of the phantom."""
    phantom, _ = reference()
    inner = ndimage.binary_erosion(phantom.array > 0, iterations=3)
    hounsfield = np.where(inner, 20 + 40 * phantom.array / phantom.array.max(), bone)
    array = np.where(phantom.array > 0, hounsfield, np.float32(-1000)).astype(np.float32)
    array[:3] = outside
    return Volume(array, phantom.affine)


def test_window_is_mapped_to_0_and_1() -> None:
    volume = head_ct()
    slices = to_slices(volume, WINDOW)
    assert (slices.grid.background, slices.grid.scale) == (0.0, 80.0)
    inner = ndimage.binary_erosion(slices.foreground, iterations=5)
    hounsfield = slices.grid.sample_volume(volume.array)
    np.testing.assert_allclose(slices.x[:, 0][inner], hounsfield[inner] / 80, atol=1e-5)
    assert slices.x[:, 0][slices.foreground & (hounsfield > 1400)].min() > 0.95
    assert slices.x[:, 0][~slices.foreground].max() == 0


def test_values_in_a_window_do_not_depend_on_bone() -> None:
    one, two = (to_slices(head_ct(bone=bone), WINDOW).x for bone in (1500.0, 3000.0))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("outside", [-1024.0, -2000.0, -3024.0])
def test_values_below_air_are_treated_as_air(outside: float) -> None:
    """Many scanners mark voxels outside the field of view by such a value."""
    expected, found = to_slices(head_ct(), WINDOW), to_slices(head_ct(outside), WINDOW)
    np.testing.assert_array_equal(found.x, expected.x)
    np.testing.assert_array_equal(found.foreground, expected.foreground)


def test_bone_does_not_raise_the_brain_by_smoothing() -> None:
    """The scan is clipped to the window before it is smoothed."""
    phantom, affine = brain((104, 128, 96), grid((104, 128, 96), 1.5)), grid((104, 128, 96), 1.5)
    inner = ndimage.binary_erosion(phantom.array > 0, iterations=6)
    array = np.where(phantom.array > 0, np.where(inner, 40.0, 1500.0), -1000.0).astype(np.float32)
    slices = to_slices(Volume(array, affine), WINDOW)
    deep = slices.grid.sample_volume(ndimage.binary_erosion(inner).astype(np.float32)) > 0.999
    assert deep.sum() > 10_000
    assert slices.x[:, 0][deep].max() < 0.56  # 0.5 is 40 HU. Smoothed before clipping, it would be above 0.7.


# ---- foreground --------------------------------------------------------------------------------

SHAPES = ((17, 19, 13), (16, 18, 1), (1, 20, 14), (14, 2, 15))


def texture(shape: tuple[int, ...], seed: int) -> FloatArray:
    """Return blobs with holes, many of them at the border, in Fortran order as in NIfTI."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.2)
    return np.asfortranarray(np.maximum(noise, 0).astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_foreground_equals_that_of_the_whole_volume(shape: tuple[int, ...], seed: int) -> None:
    signal = texture(shape, seed)
    above = signal > FOREGROUND_LEVEL * np.percentile(signal, 99)
    labels, _ = ndimage.label(above)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = labels == sizes.argmax()
    expected = ndimage.binary_fill_holes(largest.squeeze()).reshape(shape)
    np.testing.assert_array_equal(foreground_mask(signal), expected)


def test_ring_is_filled_in_a_single_slice_only() -> None:
    ring = np.zeros((9, 9, 5), np.float32)
    ring[2:7, 2:7, 2] = 1
    ring[3:6, 3:6, 2] = 0
    assert foreground_mask(ring).sum() == 16
    assert foreground_mask(ring[..., 2:3]).sum() == 25


@pytest.mark.parametrize("shape", SHAPES)
def test_background_is_the_median_of_the_faces(shape: tuple[int, ...]) -> None:
    array = texture(shape, 0) + np.float32(0.25)
    faces = [np.take(array, i, axis=axis).ravel() for axis in range(3) for i in (0, -1) if shape[axis] > 2]
    assert background_level(array) == float(np.median(np.concatenate(faces)))


def test_bounding_box_contains_the_mask() -> None:
    mask = np.zeros((5, 6, 7), bool)
    assert mask[bounding_box(mask)].shape == (0, 0, 0)
    mask[1, 2, 6] = mask[3, 2, 4] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 3), slice(4, 7))
