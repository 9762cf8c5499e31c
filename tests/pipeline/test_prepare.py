"""Volume -> slices: the same head, wherever the scanner put its axes."""

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
from app.manifest import Manifest
from app.pipeline.preprocess import Slices, foreground_cm2, to_slices
from app.volume import Volume
from tests.support.grids import CORNER_MM, GRIDS, PREPROCESSING, prepared, reference
from tests.support.phantom import brain, grid, with_lesion

LAYOUTS = [
    np.column_stack([axes, flips]).astype(float)
    for axes in permutations(range(3))
    for flips in product((1, -1), repeat=3)
]


def relaid(volume: Volume, layout: np.ndarray) -> Volume:
    """The same voxels in the same places, stored along other axes: nibabel's own tools."""
    array = orientations.apply_orientation(volume.array, layout)
    return Volume(array, volume.affine @ orientations.inv_ornt_aff(layout, volume.shape))


@cache
def reference_back() -> np.ndarray:
    _, slices = reference()
    return slices.grid.to_volume(slices.x[:, 0])


# ---- there -------------------------------------------------------------------------------------


def test_48_layouts_are_48() -> None:
    assert len({tuple(layout.ravel()) for layout in LAYOUTS}) == 48


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(orientations.ornt2axcodes(layout)))
def test_every_axis_layout_gives_the_same_slices_and_the_same_way_back(layout: np.ndarray) -> None:
    volume, expected = reference()
    other = relaid(volume, layout)
    slices = to_slices(other, PREPROCESSING)
    # Coordinates are reckoned in another order: float32 rounding, and no more.
    np.testing.assert_allclose(slices.x, expected.x, atol=2e-6)
    np.testing.assert_array_equal(slices.foreground, expected.foreground)
    back = slices.grid.to_volume(slices.x[:, 0])
    np.testing.assert_allclose(back, orientations.apply_orientation(reference_back(), layout), atol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_slices_show_the_head_itself(name: str) -> None:
    """Two pixels inside the surface, against the phantom sampled straight on the stack."""
    _, slices = prepared(name)
    placement = slices.grid
    truth = brain(placement.shape, placement.affine).array / placement.scale
    inner = ndimage.binary_erosion(slices.foreground, iterations=2)
    difference = np.abs(slices.x[:, 0] - truth)[inner]
    # Linear interpolation and anti-aliasing flatten a texture of 19 mm and the edges of tissues.
    assert difference.mean() < 0.004
    assert difference.max() < 0.05
    # Where nothing lies, exactly 0; and what is foreground is the head, its surface pixels aside.
    assert slices.x[:, 0][~slices.foreground].max() == 0.0
    assert (slices.foreground != (truth > 0.35)).mean() < 0.02


@pytest.mark.parametrize("name", GRIDS)
def test_the_stack_lies_on_the_head_along_ras(name: str) -> None:
    placement = to_slices(brain(*GRIDS[name], centre_mm=(4.0, -3.0, 2.0)), PREPROCESSING).grid
    np.testing.assert_array_equal(placement.affine[:3, :3], [[0, 0, 3], [0, 3, 0], [3, 0, 0]])
    middle = affines.apply_affine(placement.affine, (np.array(placement.shape) - 1) / 2)
    spacing = affines.voxel_sizes(GRIDS[name][1]).max()
    assert middle == pytest.approx([4.0, -3.0, 2.0], abs=spacing / 2)


def test_on_its_own_grid_a_scan_is_only_scaled() -> None:
    _, slices = reference()
    placement = slices.grid
    assert slices.x.shape == (40, 1, 64, 56)
    assert affines.apply_affine(placement.affine, [0, 0, 0]) == pytest.approx(CORNER_MM)
    truth = brain(placement.shape, placement.affine).array / placement.scale
    np.testing.assert_allclose(slices.x[:, 0][slices.foreground], truth[slices.foreground], atol=1e-6)


@given(st.integers(0, 2**32 - 1))
@run(max_examples=5)
def test_an_affine_rounded_on_its_way_changes_nothing(seed: int) -> None:
    """NIfTI keeps float32 and DICOM decimal strings: ties must not fall another way.

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


def test_the_tall_head_has_a_slice_at_each_end() -> None:
    _, slices = half_way()
    assert len(slices.x) == 40  # 117 mm / 3 mm + 1
    assert affines.apply_affine(slices.grid.affine, [0, 0, 0])[2] == pytest.approx(-58.5)
    assert foreground_cm2(slices, PREPROCESSING)[20] == pytest.approx(np.pi * 6.6 * 8.3, rel=0.02)


# ---- intensities -------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "offset"), [(3.0, 0.0), (0.001, 0.0), (1.0, -1024.0), (0.5, 4000.0)])
def test_units_of_the_scan_do_not_matter(gain: float, offset: float) -> None:
    volume, expected = reference()
    slices = to_slices(Volume(volume.array * np.float32(gain) + np.float32(offset), volume.affine), PREPROCESSING)
    np.testing.assert_allclose(slices.x, expected.x, atol=1e-3)
    np.testing.assert_array_equal(slices.foreground, expected.foreground)
    assert slices.grid.background == offset
    assert slices.grid.scale == pytest.approx(expected.grid.scale * gain, rel=1e-4)
    level = np.percentile(volume.array[volume.array > 0], 98.0)
    assert slices.grid.scale == pytest.approx(gain * level / 0.75, rel=0.01)


def test_the_percentile_of_the_foreground_meets_its_level() -> None:
    _, slices = reference()
    assert np.percentile(slices.x[:, 0][slices.foreground], 98.0) == pytest.approx(0.75, abs=0.01)


def test_what_is_brighter_than_the_range_is_clipped() -> None:
    volume, _ = reference()
    x = to_slices(with_lesion(volume, (20, 0, 0), 12, 3.0), PREPROCESSING).x
    assert x.max() == 1.0
    assert x.min() == 0.0


def test_more_background_around_the_head_changes_little() -> None:
    volume, expected = reference()
    affine = volume.affine.copy()
    affine[:3, 3] -= 3 * 25
    slices = to_slices(Volume(np.pad(volume.array, 25), affine), PREPROCESSING)
    assert slices.x.shape == expected.x.shape
    # The level of the foreground follows a percentile of the whole volume: some surface pixels turn.
    assert (slices.foreground != expected.foreground).sum() < 20
    assert np.abs(slices.x - expected.x).mean() < 1e-4


def test_a_dark_hole_belongs_to_the_head_and_a_speck_beside_it_does_not() -> None:
    volume, expected = reference()
    array = with_lesion(volume, (20, 10, 0), 12, 0.0).array.copy()
    array[0:2, 0:2, 0:2] = 700
    slices = to_slices(Volume(array, volume.affine), PREPROCESSING)
    np.testing.assert_array_equal(slices.foreground, expected.foreground)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.6, 1.35])
def test_a_head_of_another_size_is_refused_with_its_size(scale: float) -> None:
    shape = (66, 80, 60)
    with pytest.raises(WrongFieldOfView) as caught:
        to_slices(brain(shape, grid(shape), scale=scale), PREPROCESSING)
    right_left = float(caught.value.found.split("measures ")[1].split(" x ")[0])
    assert right_left == pytest.approx(132 * scale, abs=6)  # two voxels
    assert "90 to 165 by 110 to 198 mm" in caught.value.expected
    assert caught.value.advice == PREPROCESSING.advice


def test_a_trunk_is_refused_for_its_height() -> None:
    shape = (52, 64, 80)
    array = np.zeros(shape, dtype=np.float32)
    array[8:-8, 8:-8, 1:-1] = 500
    with pytest.raises(WrongFieldOfView, match="at most 175 mm tall"):
        to_slices(Volume(array, grid(shape)), PREPROCESSING)


def test_a_head_in_a_field_of_view_a_hundred_times_as_large() -> None:
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
    # The intensity's percentile is over the foreground alone; only float32 sums of the smoothing differ.
    np.testing.assert_allclose(found.x, slices.x, atol=1e-5)


def test_a_black_thing_on_white_is_refused() -> None:
    volume, _ = reference()
    with pytest.raises(ConstantVoxels, match="brighter than its border"):
        to_slices(Volume(-volume.array, volume.affine), PREPROCESSING)


# ---- slices and slabs --------------------------------------------------------------------------


def cut(volume: Volume, first: int, count: int) -> Volume:
    shift = np.eye(4)
    shift[2, 3] = first
    return Volume(volume.array[:, :, first : first + count], volume.affine @ shift)


def test_a_single_slice_is_the_slice_of_the_whole_scan() -> None:
    volume, expected = reference()
    one = to_slices(cut(volume, 26, 1), PREPROCESSING)
    assert one.x.shape == (1, 1, 64, 56)
    z = affines.apply_affine(one.grid.affine, [0, 0, 0])[2]
    assert z == pytest.approx(affines.apply_affine(volume.affine, [0, 0, 26])[2])
    # Another 98th percentile, and a stack centred on this slice's own outline.
    whole = expected.x[round((z - CORNER_MM[2]) / 3), 0]
    assert np.corrcoef(one.x.ravel(), whole.ravel())[0, 1] > 0.95
    assert one.foreground.sum() == pytest.approx((whole > 0).sum(), rel=0.02)


def test_a_dark_hole_in_a_single_slice_is_judged_too() -> None:
    volume, _ = reference()
    plain = to_slices(cut(volume, 26, 1), PREPROCESSING)
    holed = to_slices(cut(with_lesion(volume, (20, 10, 7), 12, 0.0), 26, 1), PREPROCESSING)
    np.testing.assert_array_equal(holed.foreground, plain.foreground)


def test_a_single_slice_comes_back_whole() -> None:
    one = cut(reference()[0], 26, 1)
    slices = to_slices(one, PREPROCESSING)
    back = slices.grid.to_volume(slices.x[:, 0]) * slices.grid.scale
    inner = ndimage.binary_erosion(one.array[:, :, 0] > 0, iterations=3)[:, :, None]
    np.testing.assert_allclose(back[inner], one.array[inner], atol=25)  # of 800: two interpolations


def test_a_single_sagittal_slice_is_refused() -> None:
    volume, _ = reference()
    with pytest.raises(WrongFieldOfView, match="measures 0 x"):
        to_slices(Volume(volume.array[26:27], volume.affine), PREPROCESSING)


def test_nothing_is_written_into_the_scan(manifest: Manifest) -> None:
    volume, _ = reference()
    before = volume.array.copy()
    to_slices(volume, manifest.preparation)
    np.testing.assert_array_equal(volume.array, before)
