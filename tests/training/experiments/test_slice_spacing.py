"""Estimate of the slice spacing from the shape of a head."""

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("torch")

from app.volume import FloatArray, Volume
from training.config import ROOT, Config
from training.experiments.slice_spacing import (
    AREA_SHARES,
    Estimate,
    estimate,
    head_profile,
    heights_of_shares,
    page,
    section_areas,
)

pytestmark = pytest.mark.training

RADIUS_MM = 80.0


def ball(slice_mm: float, pixel_mm: float = 2.0, lowest_mm: float = -60.0) -> FloatArray:
    """Return axial slices (Z, H, W) of a ball, from `lowest_mm` to its top."""
    in_plane = np.arange(-96, 96, pixel_mm)
    heights = np.arange(lowest_mm, 100, slice_mm)
    z, y, x = np.meshgrid(heights, in_plane, in_plane, indexing="ij")
    return np.where(x**2 + y**2 + z**2 < RADIUS_MM**2, np.float32(100), np.float32(0))


def reference() -> np.ndarray:
    """Return the heights of the shares relative to the top of the ball: its sections have the area pi (R^2 - z^2)."""
    heights: np.ndarray = RADIUS_MM * np.sqrt(1 - np.array(AREA_SHARES)) - RADIUS_MM
    return heights


def test_areas_are_shares_of_the_largest_section() -> None:
    areas = section_areas(ball(10.0, lowest_mm=0.0))
    assert areas[0] == areas.max() == 1
    assert areas[4] == pytest.approx(1 - 40**2 / RADIUS_MM**2, abs=0.02)
    assert areas[-1] == 0


def test_heights_of_shares_are_those_of_the_ball() -> None:
    heights = np.arange(-60, 100, 5.0)
    found = heights_of_shares(heights, section_areas(ball(5.0)))
    np.testing.assert_allclose(found - RADIUS_MM, reference(), atol=2)


def test_share_above_the_highest_slice_has_no_height() -> None:
    slices = ball(5.0)[: int((60 + 50) / 5)]
    found = heights_of_shares(np.arange(len(slices), dtype=np.float64), section_areas(slices))
    np.testing.assert_array_equal(np.isnan(found), reference() > 45 - RADIUS_MM)


@pytest.mark.parametrize("axes", ["RAS", "PSR", "LPI"])
def test_profile_is_that_of_the_axial_sections(axes: str) -> None:
    """An ellipsoid with three different half axes has another profile along each of them."""
    shape, spacing, half_axes = (90, 80, 70), np.array([2.0, 2.5, 3.0]), np.array([60.0, 80.0, 95.0])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    position = np.moveaxis(np.indices(shape), 0, -1) * spacing + affine[:3, 3]
    inside = ((position / half_axes) ** 2).sum(axis=-1) < 1
    image = nib.Nifti1Image(np.where(inside, np.float32(100), np.float32(0)), affine)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    )
    found = head_profile(Volume(np.asarray(turned.dataobj, np.float32), np.asarray(turned.affine)))
    expected = half_axes[2] * np.sqrt(1 - np.array(AREA_SHARES)) - half_axes[2]
    np.testing.assert_allclose(found, expected, atol=4)


@pytest.mark.parametrize("slice_mm", [2.0, 3.0, 5.0, 7.5])
@pytest.mark.parametrize("pixel_mm", [2.0, 3.0])
def test_estimated_spacing_is_the_true_one(slice_mm: float, pixel_mm: float) -> None:
    assert estimate(ball(slice_mm, pixel_mm), 30, reference()).spacing_mm == pytest.approx(slice_mm, rel=0.05)


@pytest.mark.parametrize("top_mm", [50.0, 60.0])
def test_estimated_height_above_a_stack_is_the_missing_one(top_mm: float) -> None:
    slices = ball(5.0)[: int((60 + top_mm) / 5) + 1]
    assert estimate(slices, 30, reference()).above_mm == pytest.approx(RADIUS_MM - top_mm, abs=2)


def test_stack_that_shows_too_little_of_the_head_has_no_estimate() -> None:
    assert np.isnan(estimate(ball(5.0)[:12], 30, reference()).spacing_mm), "it ends below the vertex"
    assert np.isnan(estimate(ball(5.0, lowest_mm=20.0), 30, reference()).spacing_mm), "it begins above the widest part"


def test_page_has_a_row_for_each_spacing_of_the_configuration() -> None:
    config = Config.load(ROOT / "training" / "configs" / "flair.toml")
    known = [Estimate(20, 7.0, 15.0), Estimate(22, 8.0, 25.0), Estimate(60, 3.5, 20.0)]
    text = page(config, [*known, Estimate(60, float("nan"), 20.0)])
    assert "| 1 to 23 | 2 of 2 | 7.2 | 7.5 | 7.8 | 7.5 |" in text
    assert "| 43 to 64 | 1 of 2 | 3.5 | 3.5 | 3.5 | 3 |" in text
    assert "| 65 to 90 | 0 of 0 |  |  |  | 2 |" in text
    assert "20 mm in the median, 19 and 21 mm at the quartiles" in text
