"""Brain extraction on every grid, and when it is skipped or refused."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import BrainNotExtracted, NoBrainMask
from app.pipeline.brain_extraction import BrainExtraction, ExtractionNetworks, extract_brain
from app.pipeline.findings import dice
from app.volume import Affine, FloatArray, Volume
from tests.support.grids import GRIDS, centroid_mm, tilted
from tests.support.heads import ORACLE, nothing, outline
from tests.support.phantom import brain, grid, head

SHAPE = (56, 68, 60)
WIDE = (76, 88, 80)
# Voxel (i, j, k) of a grid of 80 x 76 x 88 is voxel (75 - j, k, i) of one of 76 x 88 x 80.
MIRRORED = np.array([[0, -1, 0, 75], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
BRAIN_ML = 1354  # 4/3 pi 66 x 83 x 59 mm
ALL_LAYOUTS = [
    np.array([[axis, flip] for axis, flip in zip(order, flips, strict=True)])
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    for flips in np.array(np.meshgrid([1, -1], [1, -1], [1, -1])).T.reshape(-1, 3)
]


# `tests.support.grids.GRIDS` with room for skull and face.
WIDE_GRIDS = {
    "1.5 mm": ((152, 176, 160), grid((152, 176, 160), 1.5)),
    "thick axial": ((170, 200, 46), grid((170, 200, 46), (1.3, 1.3, 5.0))),
    "thick sagittal": ((44, 200, 180), grid((44, 200, 180), (5.0, 1.3, 1.3))),
    "oblique": (WIDE, tilted(grid(WIDE), 10, -15, 20)),
    "oblique, mirrored": ((80, 76, 88), tilted(grid(WIDE), -8, 12, 25) @ MIRRORED),
}

pytestmark = pytest.mark.usefixtures("small_cubes")


def extracted(volume: Volume, networks: ExtractionNetworks = ORACLE) -> BrainExtraction:
    result = extract_brain(volume, networks)
    assert isinstance(result, BrainExtraction), result
    return result


def truth(shape: tuple[int, int, int], affine: Affine) -> np.ndarray:
    return brain(shape, affine, texture=0).array > 370


# ---- extracted ---------------------------------------------------------------------------------


def test_voxels_outside_the_brain_become_background() -> None:
    scan = head(WIDE, grid(WIDE))
    found = extracted(scan)
    real = truth(WIDE, scan.affine)
    assert dice(found.mask, real) > 0.97
    assert found.volume_ml == pytest.approx(BRAIN_ML, rel=0.04)
    assert found.agreement > 0.95
    assert found.cut_cm2 == 0
    assert found.warnings == ()
    np.testing.assert_array_equal(found.volume.array[found.mask], scan.array[found.mask])
    assert (found.volume.array[~found.mask] == 0).all()
    np.testing.assert_array_equal(found.volume.affine, scan.affine)


@pytest.mark.parametrize("name", WIDE_GRIDS)
def test_brain_is_found_on_thick_oblique_and_mirrored_grids(name: str) -> None:
    shape, affine = WIDE_GRIDS[name]
    found = extracted(head(shape, affine))
    assert dice(found.mask, truth(shape, affine)) > 0.95
    assert centroid_mm(found.mask.astype(float), affine) == pytest.approx((0, 0, 0), abs=1.5)


@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=lambda o: "".join(f"{int(f):+}{int(a)}" for a, f in o))
def test_every_axis_layout_gives_the_same_mask(layout: np.ndarray) -> None:
    scan = head(SHAPE, grid(SHAPE))
    reoriented = Volume(
        nib.orientations.apply_orientation(scan.array, layout),
        scan.affine @ nib.orientations.inv_ornt_aff(layout, SHAPE),
    )
    expected = nib.orientations.apply_orientation(extracted(scan).mask, layout)
    np.testing.assert_array_equal(extracted(reoriented).mask, expected)


@settings(max_examples=15, deadline=None)
@given(
    degrees=st.tuples(*[st.floats(-25, 25)] * 3),
    spacing=st.tuples(*[st.floats(2.0, 5.0)] * 3),
    shift=st.tuples(*[st.floats(-12, 12)] * 3),
)
def test_brain_is_found_on_any_oblique_grid(
    degrees: tuple[float, ...], spacing: tuple[float, ...], shift: tuple[float, ...]
) -> None:
    x, y, z = (int(240 / s) for s in spacing)
    affine = tilted(grid((x, y, z), (spacing[0], spacing[1], spacing[2])), *degrees)
    affine[:3, 3] += shift
    found = extracted(head((x, y, z), affine))
    assert dice(found.mask, truth((x, y, z), affine)) > 0.92
    assert centroid_mm(found.mask.astype(float), affine) == pytest.approx((0, 0, 0), abs=2.5)


def test_background_may_have_any_value() -> None:
    """The darkest part of an MR scan is its background."""
    scan = head(WIDE, grid(WIDE))
    found = extracted(Volume(scan.array + 1000, scan.affine))
    assert (found.volume.array[~found.mask] == 1000).all()
    assert found.volume.array[found.mask].min() >= 1000


def test_mask_is_deterministic() -> None:
    scan = head(SHAPE, grid(SHAPE))
    assert extracted(scan).mask.tobytes() == extracted(scan).mask.tobytes()


# ---- skipped -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_skull_stripped_scan_is_not_extracted(name: str) -> None:
    reason = extract_brain(brain(*GRIDS[name]), ORACLE)
    assert isinstance(reason, NoBrainMask)
    assert "skull-stripped" in reason.found


def test_scan_of_few_slices_is_not_extracted() -> None:
    reason = extract_brain(head((76, 88, 6), grid((76, 88, 6), (3, 3, 20))), ExtractionNetworks(nothing, nothing))
    assert isinstance(reason, NoBrainMask)
    assert "76 x 88 x 6 voxels" in reason.found


# ---- refused -----------------------------------------------------------------------------------


def refused(networks: ExtractionNetworks, volume: Volume | None = None) -> str:
    with pytest.raises(BrainNotExtracted) as caught:
        extract_brain(volume or head(SHAPE, grid(SHAPE)), networks)
    return caught.value.found


def test_head_without_a_brain_is_refused() -> None:
    assert "no brain was found" in refused(ExtractionNetworks(nothing, outline))
    assert "no brain was found" in refused(ExtractionNetworks(outline, nothing))


def test_implausible_volume_is_refused() -> None:
    small = Volume(head(SHAPE, grid(SHAPE)).array, grid(SHAPE, 2.0))
    large = Volume(head(SHAPE, grid(SHAPE)).array, grid(SHAPE, 3.8))
    assert f"measures {BRAIN_ML * 8 / 27:.0f} ml"[:11] in refused(ORACLE, small)
    assert "ml" in refused(ORACLE, large)


def test_disagreement_of_the_networks_is_refused() -> None:
    def half(x: FloatArray) -> FloatArray:
        odds = outline(x)
        odds[..., : odds.shape[-1] // 2] = -5
        return odds

    assert "Dice of 0." in refused(ExtractionNetworks(outline, half))


def test_disconnected_brain_is_refused() -> None:
    def cut(x: FloatArray) -> FloatArray:
        odds = outline(x)
        middle = odds.shape[-1] * 2 // 3
        odds[..., middle : middle + 2] = -5
        return odds

    assert "is connected" in refused(ExtractionNetworks(outline, cut))


def test_brain_beyond_the_field_of_view_is_warned_about_or_refused() -> None:
    low, high = 14, 36
    scan = head(WIDE, grid(WIDE))
    affine = scan.affine.copy()

    def from_plane(first: int) -> Volume:
        moved = affine.copy()
        moved[:3, 3] += affine[:3, 2] * first
        return Volume(scan.array[:, :, first:], moved)

    first_plane = int(np.flatnonzero(extracted(scan).mask.any(axis=(0, 1)))[0])
    assert low < first_plane < high
    warned = extracted(from_plane(first_plane + 3))
    assert 10 < warned.cut_cm2 < 100
    assert f"over {warned.cut_cm2:.0f} cm2" in warned.warnings[0]
    assert "border of the field of view" in refused(ORACLE, from_plane(high))
