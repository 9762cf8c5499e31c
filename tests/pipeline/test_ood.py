"""Out-of-distribution check: another kind of scan is refused, a scan with a lesion is not."""

import numpy as np
import pytest

from app.errors import OutOfDistribution
from app.manifest import Manifest, Range
from app.pipeline.detect import detect
from app.pipeline.diffusion import Diffusion, EncodedView, KeyedNoise, Schedule
from app.pipeline.networks import Networks
from app.pipeline.ood import SAMPLED_SLICES, median_kl_ranges, outlier_slice_fraction
from app.volume import FloatArray, Volume
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
