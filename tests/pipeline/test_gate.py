"""A scan that is unknown everywhere is refused, and one with a lesion is not."""

import numpy as np
import pytest

from app.errors import OutOfDistribution
from app.manifest import Manifest, Range
from app.pipeline import diffusion
from app.pipeline.detect import detect
from app.pipeline.diffusion import EncodedView, KeyedNoise, Schedule
from app.pipeline.networks import Networks
from app.pipeline.ood import SAMPLED_SLICES, median_kl_ranges, outlier_slice_fraction
from app.volume import FloatArray, Volume
from tests.support.bundle import with_part
from tests.support.oracle import GaussianDenoiser
from tests.support.phantom import with_lesion


@pytest.mark.parametrize("side", ["low", "high"])
def test_the_gate_refuses_a_reconstruction_error_on_both_sides(
    healthy: Volume, networks: Networks, manifest: Manifest, side: str
) -> None:
    value = detect(healthy, networks, manifest).scores.reconstruction
    detect(healthy, networks, with_part(manifest, "gate", reconstruction=Range(low=value * 0.99, high=value * 1.01)))
    beyond = Range(low=value * 1.01, high=1.0) if side == "low" else Range(low=0.0, high=value * 0.99)
    with pytest.raises(OutOfDistribution) as caught:
        detect(healthy, networks, with_part(manifest, "gate", reconstruction=beyond))
    assert f"its reconstruction error is {value:.3g}" in caught.value.found


def test_the_gate_refuses_what_no_slice_of_is_typical(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    """Below the range, the greatest of the slices counts; above it, the least."""
    least, greatest = detect(healthy, networks, manifest).scores.median_kl_range[0]
    assert least < 0.9 * greatest
    for low, high in ((greatest * 0.99, 1.0), (0.0, least * 1.01)):
        detect(healthy, networks, with_part(manifest, "gate", median_kl_range=(Range(low=low, high=high),)))
    for low, high in ((greatest * 1.01, 1.0), (0.0, least * 0.99)):
        with pytest.raises(OutOfDistribution) as caught:
            detect(healthy, networks, with_part(manifest, "gate", median_kl_range=(Range(low=low, high=high),)))
        assert f"the median KL of its slices at t = 500 spans {least:.3g} to {greatest:.3g}" in caught.value.found


def test_the_gate_counts_latents_so_that_a_tumour_passes(
    healthy: Volume, sick: Volume, networks: Networks, manifest: Manifest
) -> None:
    worst = np.nanmax(detect(healthy, networks, manifest).kl)
    gated = with_part(manifest, "gate", latent=Range(low=0.0, high=float(worst)), max_fraction_out=0.1)
    assert 0 < detect(sick, networks, gated).scores.outlier_fraction < 0.1
    huge = with_lesion(healthy, (0.0, 0.0, 0.0), 55.0, 0.45)
    with pytest.raises(OutOfDistribution, match="outside the healthy range, at most 10% are accepted"):
        detect(huge, networks, gated)


def test_the_gate_counts_slices_that_look_like_no_healthy_one(
    healthy: Volume, networks: Networks, manifest: Manifest
) -> None:
    slices = detect(healthy, networks, manifest).scores.slices
    odd = with_part(manifest, "calibration", slice_score=Range(low=0.0, high=float(np.quantile(slices, 0.4))))
    assert outlier_slice_fraction(slices, odd.calibration.slice_score) == pytest.approx(0.6, abs=0.03)
    detect(healthy, networks, odd)  # nobody asked
    detect(healthy, networks, with_part(odd, "gate", max_slices_out=0.7))
    with pytest.raises(OutOfDistribution, match=r"5\d% of its slices have a mean KL outside 0 to .*at most 50%"):
        detect(healthy, networks, with_part(odd, "gate", max_slices_out=0.5))
    assert outlier_slice_fraction(np.array([0.1, np.nan], np.float32), Range(low=0, high=1)) == 0.5, (
        "no score is not a healthy one"
    )


def test_few_slices_are_asked_one_by_one(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    """Extremes over eight slices say nothing of one slice: a healthy one lies between them."""
    least, greatest = detect(healthy, networks, manifest).scores.median_kl_range[0]
    never = with_part(manifest, "gate", median_kl_range=(Range(low=greatest * 2, high=greatest * 3),))
    middle = healthy.array.shape[2] // 2
    few = Volume(healthy.array[:, :, middle : middle + 1], healthy.affine)
    scores = detect(few, networks, manifest).scores
    assert len(scores.slices) < SAMPLED_SLICES
    assert least / 2 < scores.median_kl_range[0][0] < greatest * 2
    with pytest.raises(OutOfDistribution, match="the median KL of its slices"):
        detect(few, networks, never)  # a gate that does not ask slices has nothing else
    own = Range(low=0.9 * float(scores.slices.min()), high=1.1 * float(scores.slices.max()))
    asked = with_part(with_part(never, "gate", max_slices_out=0.5), "calibration", slice_score=own)
    detect(few, networks, asked)
    with pytest.raises(OutOfDistribution, match="the median KL of its slices"):
        detect(healthy, networks, asked)  # enough slices: both are asked
    higher = with_part(asked, "calibration", slice_score=Range(low=2 * own.high, high=3 * own.high))
    with pytest.raises(OutOfDistribution, match="100% of its slices") as caught:
        detect(few, networks, higher)
    assert caught.value.advice.startswith("Send the whole series: one slice, or a few, say little.")


def test_what_is_typical_is_seen_slice_by_slice() -> None:
    schedule = Schedule.linear(1000, 0.0015, 0.0195)
    z0 = np.random.default_rng(2).standard_normal((4, 1, 8, 8), dtype=np.float32)
    healthy = diffusion.Diffusion(
        schedule, GaussianDenoiser(schedule, np.zeros(1), np.ones(1)), KeyedNoise(7, (1, 8, 8))
    )
    inside = np.ones((4, 8, 8), dtype=bool)

    def median_kl_range(latents: FloatArray, of: slice = slice(0, 4)) -> tuple[float, float]:
        known = np.arange(4)[of]
        return median_kl_ranges(EncodedView(latents[of], inside[of], known, latents[of], inside[of], healthy), (100,))[
            0
        ]

    each = [typical(z0, slice(i, i + 1)) for i in range(4)]
    assert all(least == greatest for least, greatest in each)
    assert typical(z0) == pytest.approx((min(each)[0], max(each)[0]))
    diseased = z0.copy()
    diseased[np.argmax(each, axis=0)[0]] += 5
    assert typical(diseased)[0] == pytest.approx(min(each)[0])
    assert typical(z0 + np.float32(5))[0] > 5 * min(each)[0], "what is unknown everywhere is unknown in its best slice"


def test_a_model_gone_wrong_is_refused_and_never_read_as_healthy(
    healthy: Volume, networks: Networks, manifest: Manifest
) -> None:
    def nan(z_t: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.asarray(z_t * np.nan * t[0], dtype=np.float32)

    with pytest.raises(OutOfDistribution, match="the median KL of its slices at t = 500 spans nan to nan"):
        detect(healthy, Networks(networks.encode, nan, networks.decode), manifest)
