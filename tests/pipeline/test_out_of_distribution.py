"""Tests of the out-of-distribution check and its scores."""

import numpy as np
import pytest

from app.errors import OutOfDistribution
from app.manifest import Manifest, Range
from app.pipeline.detect import detect
from app.pipeline.diffusion import Diffusion, EncodedView, KeyedNoise, Networks, Schedule
from app.pipeline.out_of_distribution import (
    SAMPLED_SLICES,
    check_white_matter,
    median_kl_ranges,
    outlier_slice_fraction,
    solidities,
    white_matter_contrast,
)
from app.volume import BoolArray, FloatArray, Volume
from tests.support.bundle import with_part
from tests.support.oracle import GaussianDenoiser
from tests.support.phantom import with_lesion


@pytest.mark.parametrize("side", ["low", "high"])
def test_reconstruction_error_is_checked_on_both_sides(
    healthy: Volume, networks: Networks, manifest: Manifest, side: str
) -> None:
    value = detect(healthy, networks, manifest).scores.reconstruction
    around = Range(low=value * 0.99, high=value * 1.01)
    detect(healthy, networks, with_part(manifest, "ood", reconstruction_range=around))
    beyond = Range(low=value * 1.01, high=1.0) if side == "low" else Range(low=0.0, high=value * 0.99)
    with pytest.raises(OutOfDistribution, match=f"reconstruction error is {value:.3g}"):
        detect(healthy, networks, with_part(manifest, "ood", reconstruction_range=beyond))


def test_range_of_the_median_kl_must_overlap_the_healthy_range(
    healthy: Volume, networks: Networks, manifest: Manifest
) -> None:
    smallest, largest = detect(healthy, networks, manifest).scores.median_kl_range[0]
    assert smallest < 0.9 * largest
    for low, high in ((largest * 0.99, 1.0), (0.0, smallest * 1.01)):
        detect(healthy, networks, with_part(manifest, "ood", median_kl_range=(Range(low=low, high=high),)))
    for low, high in ((largest * 1.01, 1.0), (0.0, smallest * 0.99)):
        with pytest.raises(OutOfDistribution, match=f"median KL .* t = 500 is {smallest:.3g} to {largest:.3g}"):
            detect(healthy, networks, with_part(manifest, "ood", median_kl_range=(Range(low=low, high=high),)))


def test_large_fraction_of_outlier_latents_is_refused(
    healthy: Volume, volume_with_lesion: Volume, networks: Networks, manifest: Manifest
) -> None:
    largest = np.nanmax(detect(healthy, networks, manifest).kl)
    strict = with_part(manifest, "ood", latent_kl_range=Range(low=0.0, high=float(largest)), max_outlier_fraction=0.1)
    assert 0 < detect(volume_with_lesion, networks, strict).scores.outlier_fraction < 0.1
    huge = with_lesion(healthy, (0.0, 0.0, 0.0), 55.0, 0.45)
    with pytest.raises(OutOfDistribution, match="of its latents"):
        detect(huge, networks, strict)


def test_large_fraction_of_outlier_slices_is_refused(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    slices = detect(healthy, networks, manifest).scores.slices
    odd = with_part(manifest, "calibration", slice_score=Range(low=0.0, high=float(np.quantile(slices, 0.4))))
    assert outlier_slice_fraction(slices, odd.calibration.slice_score) == pytest.approx(0.6, abs=0.03)
    detect(healthy, networks, odd)  # max_outlier_slice_fraction is not set
    detect(healthy, networks, with_part(odd, "ood", max_outlier_slice_fraction=0.7))
    with pytest.raises(OutOfDistribution, match="of its slices have a mean KL"):
        detect(healthy, networks, with_part(odd, "ood", max_outlier_slice_fraction=0.5))


def test_outline_with_deep_gaps_is_refused(networks: Networks, manifest: Manifest) -> None:
    """A disc is convex. The bars of a grid with gaps, as of fingers, fill a part of their hull."""
    rows, columns = np.mgrid[-60:60, -60:60]
    disc = (rows**2 + columns**2 < 55**2).astype(np.float32)
    gaps = disc * ((columns % 20 < 8) | (rows < -20))
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    strict = with_part(manifest, "ood", min_solidity=0.8)

    def scan(image: FloatArray) -> Volume:
        return Volume(np.repeat(image[:, :, None], 20, axis=2), affine)

    detect(scan(disc), networks, strict)
    missing = scan(disc)
    missing.array[:, :, 8:12] = 0  # no foreground in the middle slices
    detect(missing, networks, strict)
    with pytest.raises(OutOfDistribution, match=r"fills \d\d% of its convex hull, at least 80% are accepted"):
        detect(scan(gaps), networks, strict)


def brain_phantom(white: float, grey: float, fluid: float) -> tuple[FloatArray, BoolArray]:
    """Return slices (20, 96, 80) of 2 mm: a ventricle, a core of white matter, and folds of grey matter around it."""
    z, rows, columns = np.mgrid[-20:20:2, -96:96:2, -80:80:2]
    radius = np.sqrt((rows / 1.2) ** 2 + columns**2 + z**2)
    rng = np.random.default_rng(0)
    folds = np.where(rng.random(radius.shape) < 0.8, grey, white)
    x = np.where(radius < 36, white, folds) + rng.normal(0, 0.005, radius.shape)
    x = np.where(radius < 15, fluid, x)
    foreground = radius < 70
    return np.where(foreground, x, 0).astype(np.float32), foreground


def test_white_matter_contrast_is_above_one_only_in_t1() -> None:
    spacing = (2.0, 2.0, 2.0)
    t1 = white_matter_contrast(*brain_phantom(white=0.7, grey=0.5, fluid=0.15), spacing)
    weak = white_matter_contrast(*brain_phantom(white=0.7, grey=0.62, fluid=0.3), spacing)
    flair = white_matter_contrast(*brain_phantom(white=0.55, grey=0.62, fluid=0.1), spacing)
    t2 = white_matter_contrast(*brain_phantom(white=0.4, grey=0.55, fluid=0.75), spacing)
    assert t1 > weak > 1.04
    assert flair < 1
    assert t2 < 1


def test_cavity_does_not_change_the_white_matter_contrast() -> None:
    """A resection is filled with fluid: it is smooth, but it is not white matter."""
    x, foreground = brain_phantom(white=0.7, grey=0.5, fluid=0.15)
    whole = white_matter_contrast(x, foreground, (2.0, 2.0, 2.0))
    x[4:16, 20:40, 30:60] = 0.15
    assert white_matter_contrast(x, foreground, (2.0, 2.0, 2.0)) == pytest.approx(whole, abs=0.05)


def test_thin_foreground_has_no_white_matter_contrast() -> None:
    x = np.zeros((3, 20, 20), np.float32)
    x[:, 9:11] = 0.5
    assert np.isnan(white_matter_contrast(x, x > 0, (2.0, 2.0, 2.0)))


def test_scan_without_bright_white_matter_is_refused(manifest: Manifest) -> None:
    strict = with_part(manifest, "ood", min_white_matter_contrast=1.04).ood
    spacing = (2.0, 2.0, 2.0)
    check_white_matter(*brain_phantom(white=0.7, grey=0.5, fluid=0.15), strict, spacing)
    flair = brain_phantom(white=0.55, grey=0.62, fluid=0.1)
    with pytest.raises(OutOfDistribution, match=r"White matter has 0\.\d\d times") as caught:
        check_white_matter(*flair, strict, spacing)
    assert "T1-weighted series" in caught.value.advice
    check_white_matter(*flair, manifest.ood, spacing)  # not set: not checked


def test_solidity_is_that_of_plane_geometry() -> None:
    masks = np.zeros((4, 20, 20), np.bool_)
    masks[0, 5:10, 5:15] = True
    masks[1] = masks[0]
    masks[1, 7:9, 7:9] = False  # a ventricle is no gap of the outline
    masks[2, 2:18, 2:5] = masks[2, 2:5, 2:18] = True  # 87 pixels in a hull of 256 - 13 * 13 / 2
    np.testing.assert_allclose(solidities(masks), [1, 1, 87 / 171.5, np.nan], rtol=1e-6)


def test_slice_without_a_score_is_an_outlier() -> None:
    assert outlier_slice_fraction(np.array([0.1, np.nan], np.float32), Range(low=0, high=1)) == 0.5


def test_scan_of_few_slices_is_checked_slice_by_slice(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    """The range over the slices of a stack does not apply to a single slice."""
    smallest, largest = detect(healthy, networks, manifest).scores.median_kl_range[0]
    never = with_part(manifest, "ood", median_kl_range=(Range(low=largest * 2, high=largest * 3),))
    middle = healthy.array.shape[2] // 2
    few = Volume(healthy.array[:, :, middle : middle + 1], healthy.affine)
    scores = detect(few, networks, manifest).scores
    assert len(scores.slices) < SAMPLED_SLICES
    assert smallest / 2 < scores.median_kl_range[0][0] < largest * 2
    with pytest.raises(OutOfDistribution, match="median KL"):
        detect(few, networks, never)  # without a check of slices, the range is checked
    own = Range(low=0.9 * float(scores.slices.min()), high=1.1 * float(scores.slices.max()))
    by_slice = with_part(with_part(never, "ood", max_outlier_slice_fraction=0.5), "calibration", slice_score=own)
    detect(few, networks, by_slice)
    with pytest.raises(OutOfDistribution, match="median KL"):
        detect(healthy, networks, by_slice)  # enough slices: both are checked
    higher = with_part(by_slice, "calibration", slice_score=Range(low=2 * own.high, high=3 * own.high))
    with pytest.raises(OutOfDistribution, match="100% of its slices") as caught:
        detect(few, networks, higher)
    assert "whole series" in caught.value.advice


def test_median_kl_range_is_over_slices() -> None:
    schedule = Schedule.linear(1000, 0.0015, 0.0195)
    z0 = np.random.default_rng(2).standard_normal((4, 1, 8, 8), dtype=np.float32)
    diffusion = Diffusion(schedule, GaussianDenoiser(schedule, np.zeros(1), np.ones(1)), KeyedNoise(7, (1, 8, 8)))
    inside = np.ones((4, 8, 8), dtype=bool)

    def ranges(latents: FloatArray, of: slice = slice(0, 4)) -> tuple[float, float]:
        indices = np.arange(4)[of]
        view = EncodedView(latents[of], inside[of], indices, latents[of], inside[of], diffusion)
        return median_kl_ranges(view, (100,))[0]

    each = [ranges(z0, slice(i, i + 1)) for i in range(4)]
    assert all(smallest == largest for smallest, largest in each)
    assert ranges(z0) == pytest.approx((min(each)[0], max(each)[0]))
    diseased = z0.copy()
    diseased[np.argmax(each, axis=0)[0]] += 5
    assert ranges(diseased)[0] == pytest.approx(min(each)[0])
    assert ranges(z0 + np.float32(5))[0] > 5 * min(each)[0]


def test_network_that_returns_nan_is_refused(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    def nan(z_t: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.asarray(z_t * np.nan * t[0], dtype=np.float32)

    with pytest.raises(OutOfDistribution, match="nan to nan"):
        detect(healthy, Networks(networks.encode, nan, networks.decode), manifest)
