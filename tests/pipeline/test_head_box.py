"""Head box: every head is scaled to one size in the slices, and results are mapped back."""

import numpy as np
import pytest
from nibabel import affines
from scipy import ndimage

from app.errors import WrongFieldOfView
from app.manifest import HeadBox
from app.pipeline.preprocess import Slices, analysed_slices, fill_holes_by_slice, largest_head_box, to_slices
from app.volume import Affine, Volume
from tests.support.grids import GRIDS, PREPROCESSING, centroid_mm
from tests.support.phantom import HALF_AXES_MM, ball, brain, grid, with_lesion

SCALED = PREPROCESSING.model_copy(
    update={
        "head_box": HeadBox(rows=48, columns=40, foreground_level=0.3),
        "extent_mm": ((60.0, 80.0, 0.0), (240.0, 280.0, 300.0)),
    }
)
# Fraction of the half-axis of an ellipse at which the rows have a quarter of the full width.
BOXED = np.sqrt(1 - 0.25**2)
WINDOW = {"window": (0.0, 80.0), "intensity_percentile": None, "intensity_level": None}


def pixel_mm(slices: Slices) -> tuple[float, float]:
    """Return the spacing of rows and columns."""
    _, dy, dx = affines.voxel_sizes(slices.grid.affine)
    return float(dy), float(dx)


def box(slices: Slices) -> tuple[tuple[float, float], tuple[float, float]]:
    return largest_head_box(slices.foreground)


# ---- the box -----------------------------------------------------------------------------------


def test_box_is_that_of_the_largest_slice() -> None:
    stack = np.zeros((3, 20, 30), dtype=bool)
    stack[0, 2:4, 2:28] = True
    stack[1, 5:15, 6:26] = True
    stack[2, 1:19, 10:12] = True
    assert largest_head_box(stack) == ((9.5, 15.5), (10.0, 20.0))


def test_ears_and_nose_do_not_enlarge_the_box() -> None:
    stack = np.zeros((1, 40, 40), dtype=bool)
    stack[0, 10:30, 10:30] = True
    plain = largest_head_box(stack)
    stack[0, 18:22, 30:36] = True  # an ear, a fifth of the length of the head
    stack[0, 30:35, 19:21] = True
    assert largest_head_box(stack) == plain


def test_holes_are_filled_in_each_slice_independently() -> None:
    stack = np.ones((3, 9, 9), dtype=bool)
    stack[:, 4, 4] = False  # open above and below
    stack[1, :5, 4] = False  # and here to the side
    filled = fill_holes_by_slice(stack)
    assert filled[0].all()
    assert filled[2].all()
    assert filled[1].sum() == 76


# ---- one size ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.3])
def test_every_head_is_scaled_to_the_same_size(scale: float) -> None:
    shape = (92, 110, 80)
    slices = to_slices(brain(shape, grid(shape, 2.0), scale=scale), SCALED)
    (row, column), (rows, columns) = box(slices)
    assert (rows, columns) == pytest.approx((48, 40), abs=1)
    assert (row, column) == pytest.approx((31.5, 27.5), abs=0.75)  # the middle of 64 x 56
    expected = 2 * scale * BOXED * HALF_AXES_MM[[1, 0]] / (48, 40)
    assert pixel_mm(slices) == pytest.approx(expected, rel=0.02)


def test_pixel_size_in_the_header_has_no_influence() -> None:
    """The pixel size of the training images is unknown."""
    volume = brain((92, 110, 40), grid((92, 110, 40), (2.0, 2.0, 3.0)))
    expected = to_slices(volume, SCALED)
    wrong = volume.affine.copy()
    wrong[:2] *= 0.85
    found = to_slices(Volume(volume.array, wrong), SCALED)
    assert found.x.shape == expected.x.shape
    # The box is measured in whole millimetres, and smoothing depends on the header.
    assert np.abs(found.x - expected.x).mean() < 0.01
    assert pixel_mm(found) == pytest.approx(np.array(pixel_mm(expected)) * 0.85, rel=0.02)


@pytest.mark.parametrize("name", GRIDS)
def test_slices_equal_the_sampled_phantom(name: str) -> None:
    volume = brain(*GRIDS[name])
    slices = to_slices(volume, SCALED)
    on = slices.grid
    truth = brain(on.shape, on.affine).array / on.scale
    inner = ndimage.binary_erosion(slices.foreground, iterations=2)
    difference = np.abs(slices.x[:, 0] - truth)[inner]
    assert difference.mean() < 0.01
    assert (slices.foreground != (truth > 0.3)).mean() < 0.03
    expected = 2 * BOXED * HALF_AXES_MM[[1, 0]] / (48, 40)
    assert pixel_mm(slices) == pytest.approx(expected, rel=0.03)
    # The axes run along RAS+.
    assert np.count_nonzero(on.affine[:3, :3]) == 3
    assert (np.diag(on.affine[2::-1, :3]) > 0).all()


# ---- back to the scan --------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_lesion_keeps_its_position(name: str, scale: float) -> None:
    shape, affine = GRIDS[name]
    at = (22.0, -20.0, 10.0)
    larger: Affine = np.diag([scale, scale, scale, 1.0]) @ affine
    healthy = brain(shape, larger, scale=scale)
    sick = with_lesion(healthy, at, 14.0 * scale, 0.4)
    plain = to_slices(healthy, SCALED)
    change = np.where(plain.grid.sample_volume(np.abs(sick.array - healthy.array)) > 100, 1.0, 0.0)
    assert centroid_mm(change, plain.grid.affine) == pytest.approx(at, abs=0.4 * max(pixel_mm(plain)))
    back = plain.grid.to_volume(change.astype(np.float32))
    assert back.shape == shape
    found = np.nan_to_num(back) > 0.5
    assert centroid_mm(found.astype(np.float32), larger) == pytest.approx(at, abs=1.5)
    truth = ball(healthy, at, 14.0 * scale)
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85


@pytest.mark.parametrize("name", GRIDS)
def test_slices_are_mapped_back_to_the_scan(name: str) -> None:
    volume = brain(*GRIDS[name])
    slices = to_slices(volume, SCALED)
    back = slices.grid.to_volume(slices.x[:, 0]) * slices.grid.scale
    inner = ndimage.binary_erosion(volume.array > 0, iterations=4) & np.isfinite(back)
    assert inner.sum() > 3000
    assert np.abs(back - volume.array)[inner].mean() < 12  # of 800, after two interpolations


# ---- CT, reach and intensities -----------------------------------------------------------------


def skull(skin_mm: float) -> Volume:
    """Return a skull around a brain of 35 HU, with 4 mm of fat and some skin around it."""
    shape = (180, 200, 60)
    affine = grid(shape, (1.0, 1.0, 3.0))
    array = np.full(shape, -1000.0, dtype=np.float32)
    for scale, value in ((66 + 4 + skin_mm, 50.0), (66 + 4, -100.0), (66, 1200.0), (58, 35.0)):
        array[brain(shape, affine, scale=scale / 66).array > 400] = value
    return Volume(array, affine)


def test_skin_does_not_enlarge_the_box() -> None:
    """With 4 mm pixels and a window for the brain, the head starts at the bone."""
    ct = SCALED.model_copy(update={**WINDOW, "spacing_mm": (4.0, 4.0, 4.0)})
    naked, covered = to_slices(skull(0.0), ct), to_slices(skull(2.0), ct)
    assert pixel_mm(covered) == pytest.approx(pixel_mm(naked), rel=0.01)
    expected = 2 * BOXED * HALF_AXES_MM[[1, 0]] / (48, 40)
    assert pixel_mm(covered) == pytest.approx(expected, rel=0.04)
    assert (covered.foreground != naked.foreground).mean() < 0.01
    assert covered.x[:, 0][~covered.foreground].max() == 0
    middle = covered.x[len(covered.x) // 2, 0, 26:38, 22:34]
    np.testing.assert_allclose(middle, 35 / 80, atol=1e-3)


def test_slices_below_the_reach_are_not_analysed() -> None:
    volume = brain((66, 80, 60))
    plain = to_slices(volume, SCALED)
    assert SCALED.head_box is not None
    reaching = SCALED.model_copy(update={"head_box": SCALED.head_box.model_copy(update={"reach_mm": 60.0})})
    everything, some = analysed_slices(plain, SCALED), analysed_slices(to_slices(volume, reaching), reaching)
    assert some[-1] == everything[-1]
    assert some[0] == len(plain.x) - 1 - 20  # 60 mm of 3 mm slices below the highest one
    assert everything[0] < some[0]


def test_neck_below_the_reach_does_not_scale_intensities() -> None:
    assert SCALED.head_box is not None
    reaching = SCALED.model_copy(update={"head_box": SCALED.head_box.model_copy(update={"reach_mm": 60.0})})
    volume = brain((66, 80, 60))
    bright = volume.array.copy()
    bright[:, :, :24] *= 1.5
    expected, found = to_slices(volume, reaching), to_slices(Volume(bright, volume.affine), reaching)
    top = analysed_slices(expected, reaching)[1:]
    assert found.grid.scale == pytest.approx(expected.grid.scale, rel=0.01)
    # The foreground level depends on a percentile of the whole volume, so some surface pixels change.
    both = found.foreground[top] & expected.foreground[top]
    np.testing.assert_allclose(found.x[top, 0][both], expected.x[top, 0][both], atol=0.01)
    assert both.sum() > 0.98 * expected.foreground[top].sum()


def test_head_outside_the_range_of_sizes_is_refused() -> None:
    with pytest.raises(WrongFieldOfView):
        to_slices(brain((66, 80, 60), scale=0.4), SCALED)
