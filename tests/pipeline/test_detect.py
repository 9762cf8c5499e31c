"""Default method on a synthetic head, with networks that predict its tissue exactly."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from nibabel import affines

from app.errors import Cancelled, WrongFieldOfView
from app.manifest import Manifest, Range, View
from app.pipeline.detect import Detection, detect, network_evaluations
from app.pipeline.diffusion import Diffusion, KeyedNoise, Networks, Schedule, inpaint, kl_map
from app.pipeline.out_of_distribution import SAMPLED_SLICES
from app.pipeline.scores import masked_residual
from app.volume import Volume
from tests.support.bundle import with_part
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, grid, with_lesion


class Counter:
    """Networks that count the slices they evaluate."""

    def __init__(self, networks: Networks) -> None:
        self.calls = {"encode": 0, "denoise": 0, "decode": 0}
        self.networks = Networks(*(partial(self._call, name, getattr(networks, name)) for name in self.calls))

    def _call(self, name: str, network: Any, *arrays: np.ndarray) -> np.ndarray:
        self.calls[name] += len(arrays[0])
        result: np.ndarray = network(*arrays)
        return result


# ---- healthy scan ------------------------------------------------------------------------------


def test_healthy_scan_has_no_difference(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    counter = Counter(networks)
    d = detect(healthy, counter.networks, manifest)
    assert not d.latent_mask.any()
    inside = d.slices.foreground & d.analysed[:, None, None]
    np.testing.assert_array_equal(d.anomaly[inside], 0)
    np.testing.assert_array_equal(d.counterpart[d.analysed], d.slices.x[d.analysed, 0])
    # Nothing is reversed, and only the out-of-distribution check decodes.
    k = int(d.analysed.sum())
    assert counter.calls == {"encode": k, "denoise": 3 * k + SAMPLED_SLICES, "decode": SAMPLED_SLICES}


def test_slices_with_little_foreground_are_not_analysed(
    healthy: Volume, networks: Networks, manifest: Manifest
) -> None:
    d = detect(healthy, networks, manifest)
    area = d.slices.foreground.sum(axis=(1, 2)) * 0.09  # cm2 of a pixel of 3 mm
    np.testing.assert_array_equal(d.analysed, area >= 25)
    assert (~d.analysed).sum() == 4  # two at each end of the head
    np.testing.assert_array_equal(np.isnan(d.anomaly), ~(d.slices.foreground & d.analysed[:, None, None]))
    assert np.isfinite(d.kl[d.analysed]).any(axis=(1, 2)).all()


def test_scores_are_those_of_the_kl_map(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    d = detect(healthy, networks, with_part(manifest, "ood", latent_kl_range=Range(low=1e-4, high=2e-3)))
    inside = d.kl[np.isfinite(d.kl)]
    assert d.scores.scan == pytest.approx(inside.mean(dtype=np.float64), rel=1e-5)
    assert d.scores.outlier_fraction == pytest.approx(((inside < 1e-4) | (inside > 2e-3)).mean())
    assert 0.1 < d.scores.outlier_fraction < 0.9
    np.testing.assert_allclose(d.scores.slices, np.nanmean(d.kl[d.analysed], axis=(1, 2)), rtol=1e-5)
    x, foreground = d.slices.x[d.analysed], d.slices.foreground[d.analysed]
    error = np.abs(networks.decode(networks.encode(x)) - x)[:, 0][foreground].mean()
    assert d.scores.reconstruction == pytest.approx(error, rel=0.1)  # of eight slices, not of all


# ---- lesion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.5, 0.5])
def test_lesion_is_found_at_its_position(
    healthy: Volume, networks: Networks, manifest: Manifest, factor: float
) -> None:
    d = detect(with_lesion(healthy, LESION_MM, RADIUS_MM, factor), networks, manifest)
    above = np.argwhere(d.anomaly > manifest.residual.threshold)
    points = affines.apply_affine(d.slices.grid.affine, above)
    # A latent is 12 mm wide, so the centroid is accurate to a fraction of that.
    assert points.mean(axis=0) == pytest.approx(LESION_MM, abs=3.0)
    assert np.linalg.norm(points - LESION_MM, axis=1).max() < RADIUS_MM + 12
    ml = len(above) * 27 / 1000
    assert ml == pytest.approx(4 / 3 * np.pi * RADIUS_MM**3 / 1000, rel=0.35)
    # The counterpart has the tissue of the prior.
    middle = tuple(np.round(affines.apply_affine(np.linalg.inv(d.slices.grid.affine), LESION_MM)).astype(int))
    assert d.counterpart[middle] == pytest.approx(0.70, abs=0.1)
    assert abs(d.slices.x[:, 0][middle] - 0.70) > 0.25


def test_slices_without_a_lesion_are_unchanged(found: Detection) -> None:
    hit = found.latent_mask.any(axis=(1, 2))
    z = affines.apply_affine(found.slices.grid.affine, [[i, 0, 0] for i in np.flatnonzero(hit)])[:, 2]
    assert z.min() > LESION_MM[2] - RADIUS_MM - 3
    assert z.max() < LESION_MM[2] + RADIUS_MM + 3
    other = found.analysed & ~hit
    np.testing.assert_array_equal(found.counterpart[other], found.slices.x[other, 0])
    assert np.nanmax(found.anomaly[other]) == 0.0


def test_only_masked_slices_are_reversed(volume_with_lesion: Volume, networks: Networks, manifest: Manifest) -> None:
    counter = Counter(networks)
    d = detect(volume_with_lesion, counter.networks, manifest)
    k, hit = int(d.analysed.sum()), int(d.latent_mask.any(axis=(1, 2)).sum())
    assert 0 < hit < k
    assert (
        counter.calls["denoise"]
        == network_evaluations(manifest, k, d.reversed_slices)
        == 3 * k + 5 * hit + SAMPLED_SLICES
    )
    assert counter.calls["encode"] == k
    assert counter.calls["decode"] == SAMPLED_SLICES + hit


def test_counterpart_does_not_change_outside_the_foreground(networks: Networks, manifest: Manifest) -> None:
    """Near the surface, the up-sampled mask reaches beyond the head."""
    d = detect(with_lesion(brain(), (50.0, 0.0, 0.0), RADIUS_MM, 1.5), networks, manifest)
    assert d.latent_mask.any()
    outside = ~d.slices.foreground & d.analysed[:, None, None]
    np.testing.assert_array_equal(d.counterpart[outside], d.slices.x[:, 0][outside])


def test_noise_is_keyed_by_the_index_in_the_stack(networks: Networks, manifest: Manifest, found: Detection) -> None:
    """The position among the analysed slices, or among the reversed ones, has no influence."""
    hit = np.flatnonzero(found.latent_mask.any(axis=(1, 2)))
    noise = KeyedNoise(manifest.seed, manifest.latent_shape)
    diffusion = Diffusion(Schedule.from_settings(manifest.schedule), networks.denoise, noise)
    z0, mask = networks.encode(found.slices.x[hit]), found.latent_mask[hit]
    decoded = networks.decode(inpaint(z0, mask, hit, diffusion, manifest.reverse.timesteps))[:, 0]
    expected = masked_residual(found.slices.x[hit, 0], decoded, mask)
    inside = found.slices.foreground[hit]
    np.testing.assert_array_equal(found.anomaly[hit][inside], expected[inside])
    kl = kl_map(z0, hit, diffusion, manifest.kl.timesteps)
    known = np.isfinite(found.kl[hit])
    np.testing.assert_array_equal(found.kl[hit][known], kl[known])


def test_scan_without_a_large_slice_is_refused(networks: Networks, manifest: Manifest) -> None:
    shape = (52, 64, 48)
    array = np.zeros(shape, dtype=np.float32)
    array[4:-4, 30:32, 18:28] = 700  # two crossed walls: the extent of a head, but not its area
    array[25:27, 4:-4, 18:28] = 700
    with pytest.raises(WrongFieldOfView, match="cm2"):
        detect(Volume(array, grid(shape)), networks, manifest)


def test_cancelling_stops_between_evaluations(
    volume_with_lesion: Volume, networks: Networks, manifest: Manifest
) -> None:
    counter = Counter(networks)
    batches = []

    def on_batch(slices: int) -> None:
        batches.append(slices)
        if len(batches) == 5:
            raise Cancelled("Cancelled.", expected="-", advice="-")

    with pytest.raises(Cancelled):
        detect(volume_with_lesion, counter.networks.in_batches(8, on_batch), manifest)
    assert sum(counter.calls.values()) == sum(batches)
    assert counter.calls["decode"] == 0


# ---- several views -----------------------------------------------------------------------------

FOUR = (View(), View(mirrored=True, shift=(1, 1)), View(shift=(1, 1)), View(mirrored=True))


@pytest.fixture(scope="module")
def averaged(volume_with_lesion: Volume, networks: Networks, manifest: Manifest) -> tuple[Counter, Detection]:
    counter = Counter(networks)
    return counter, detect(volume_with_lesion, counter.networks, manifest.model_copy(update={"views": FOUR}))


def test_kl_map_and_scores_are_those_of_the_identity_view(
    averaged: tuple[Counter, Detection], found: Detection
) -> None:
    _, d = averaged
    np.testing.assert_array_equal(d.kl, found.kl)
    np.testing.assert_array_equal(d.latent_mask, found.latent_mask)
    assert d.scores.median_kl_range == found.scores.median_kl_range
    assert d.reversed_slices[0] == found.reversed_slices[0] == found.latent_mask.any(axis=(1, 2)).sum()


def test_residuals_are_averaged_in_the_identity_view(averaged: tuple[Counter, Detection], found: Detection) -> None:
    """The lesion is on one side. A mirrored residual would appear on the other side."""
    _, d = averaged
    sides = [
        float(np.nansum(m.anomaly[:, :, columns])) for m in (d, found) for columns in (slice(0, 28), slice(28, 56))
    ]
    assert sides[0] == pytest.approx(sides[2], abs=0.02 * sides[3])
    assert sides[1] == pytest.approx(sides[3], rel=0.2)
    np.testing.assert_array_equal(np.isnan(d.anomaly), np.isnan(found.anomaly))
    assert not np.array_equal(d.anomaly, found.anomaly)


def test_evaluations_of_all_views_are_counted(averaged: tuple[Counter, Detection], manifest: Manifest) -> None:
    counter, d = averaged
    k = int(d.analysed.sum())
    views = manifest.model_copy(update={"views": FOUR})
    assert counter.calls["denoise"] == network_evaluations(views, k, d.reversed_slices)
    assert counter.calls["denoise"] == SAMPLED_SLICES + 4 * 3 * k + 5 * sum(d.reversed_slices)
    assert counter.calls["encode"] == 4 * k
