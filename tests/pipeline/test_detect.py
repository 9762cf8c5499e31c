"""The whole method on a synthetic head, with models that know its tissue exactly."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from nibabel import affines

from app.errors import Cancelled, WrongFieldOfView
from app.manifest import Manifest, Range, View
from app.pipeline import diffusion, residual
from app.pipeline.detect import Detection, detect, network_evaluations
from app.pipeline.diffusion import KeyedNoise, Schedule
from app.pipeline.networks import Networks
from app.pipeline.ood import SAMPLED_SLICES
from app.pipeline.residual import augment, invert_augmentation
from app.volume import Volume
from tests.support.bundle import with_part
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, grid, with_lesion


class Counter:
    """Models that count the slices they evaluate."""

    def __init__(self, networks: Networks) -> None:
        self.calls = {"encode": 0, "denoise": 0, "decode": 0}
        self.networks = Networks(*(partial(self._call, name, getattr(networks, name)) for name in self.calls))

    def _call(self, name: str, network: Any, *arrays: np.ndarray) -> np.ndarray:
        self.calls[name] += len(arrays[0])
        result: np.ndarray = network(*arrays)
        return result


@pytest.fixture(scope="module")
def found(sick: Volume, networks: Networks, manifest: Manifest) -> Detection:
    return detect(sick, networks, manifest)


def everything(d: Detection) -> bytes:
    arrays = (d.kl, d.latent_mask, d.counterpart, d.anomaly, d.scores.slices)
    return b"".join(a.tobytes() for a in arrays) + repr((d.scores.scan, d.scores.outlier_fraction)).encode()


# ---- a healthy scan ----------------------------------------------------------------------------


def test_a_healthy_scan_differs_nowhere(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    counter = Counter(networks)
    d = detect(healthy, counter.networks, manifest)
    assert not d.latent_mask.any()
    inside = d.slices.foreground & d.analysed[:, None, None]
    np.testing.assert_array_equal(d.anomaly[inside], 0)
    np.testing.assert_array_equal(d.counterpart[d.analysed], d.slices.x[d.analysed, 0])
    # The short cut: no reverse process, and no decoding but the gate's.
    k = int(d.analysed.sum())
    assert counter.calls == {"encode": k, "denoise": 3 * k + SAMPLED_SLICES, "decode": SAMPLED_SLICES}


def test_what_was_not_analysed_is_unknown_and_not_healthy(
    healthy: Volume, networks: Networks, manifest: Manifest
) -> None:
    d = detect(healthy, networks, manifest)
    area = d.slices.foreground.sum(axis=(1, 2)) * 0.09  # cm2 of a pixel of 3 mm
    np.testing.assert_array_equal(d.analysed, area >= 25)
    assert (~d.analysed).sum() == 4  # two at each end of the head
    np.testing.assert_array_equal(np.isnan(d.anomaly), ~(d.slices.foreground & d.analysed[:, None, None]))
    assert np.isnan(d.counterpart[~d.analysed]).all()
    assert np.isnan(d.kl[~d.analysed]).all()
    assert np.isfinite(d.kl[d.analysed]).any(axis=(1, 2)).all()


def test_scores_are_those_of_the_kl_map(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    d = detect(healthy, networks, with_part(manifest, "gate", latent=Range(low=1e-4, high=2e-3)))
    inside = d.kl[np.isfinite(d.kl)]
    assert d.scores.scan == pytest.approx(inside.mean(dtype=np.float64), rel=1e-5)
    assert d.scores.outlier_fraction == pytest.approx(((inside < 1e-4) | (inside > 2e-3)).mean())
    assert 0.1 < d.scores.outlier_fraction < 0.9
    # One score an analysed slice, in their order.
    np.testing.assert_allclose(d.scores.slices, np.nanmean(d.kl[d.analysed], axis=(1, 2)), rtol=1e-5)
    x, foreground = d.slices.x[d.analysed], d.slices.foreground[d.analysed]
    error = np.abs(networks.decode(networks.encode(x)) - x)[:, 0][foreground].mean()
    assert d.scores.reconstruction == pytest.approx(error, rel=0.1)  # of eight slices, not of all


# ---- a lesion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.5, 0.5])
def test_a_lesion_is_found_at_its_place(healthy: Volume, networks: Networks, manifest: Manifest, factor: float) -> None:
    d = detect(with_lesion(healthy, LESION_MM, RADIUS_MM, factor), networks, manifest)
    above = np.argwhere(d.anomaly > manifest.residual.threshold)
    points = affines.apply_affine(d.slices.grid.affine, above)
    # A latent is 12 mm wide: the middle of what it marks is good to a fraction of that.
    assert points.mean(axis=0) == pytest.approx(LESION_MM, abs=3.0)
    assert np.linalg.norm(points - LESION_MM, axis=1).max() < RADIUS_MM + 12
    ml = len(above) * 27 / 1000
    assert ml == pytest.approx(4 / 3 * np.pi * RADIUS_MM**3 / 1000, rel=0.35)
    # The prior's tissue takes its place.
    middle = tuple(np.round(affines.apply_affine(np.linalg.inv(d.slices.grid.affine), LESION_MM)).astype(int))
    assert d.counterpart[middle] == pytest.approx(0.70, abs=0.1)
    assert abs(d.slices.x[:, 0][middle] - 0.70) > 0.25


def test_slices_without_a_lesion_are_untouched(found: Detection) -> None:
    hit = found.latent_mask.any(axis=(1, 2))
    z = affines.apply_affine(found.slices.grid.affine, [[i, 0, 0] for i in np.flatnonzero(hit)])[:, 2]
    assert z.min() > LESION_MM[2] - RADIUS_MM - 3
    assert z.max() < LESION_MM[2] + RADIUS_MM + 3
    quiet = found.analysed & ~hit
    np.testing.assert_array_equal(found.counterpart[quiet], found.slices.x[quiet, 0])
    assert np.nanmax(found.anomaly[quiet]) == 0.0


def test_only_masked_slices_are_reversed(sick: Volume, networks: Networks, manifest: Manifest) -> None:
    counter = Counter(networks)
    d = detect(sick, counter.networks, manifest)
    k, hit = int(d.analysed.sum()), int(d.latent_mask.any(axis=(1, 2)).sum())
    assert 0 < hit < k
    assert counter.calls["denoise"] == network_evaluations(manifest, k, d.reversed) == 3 * k + 5 * hit + SAMPLED_SLICES
    assert counter.calls["encode"] == k
    # The gate's, the counterparts, and (for this manifest's residual) the reconstructions.
    assert counter.calls["decode"] == SAMPLED_SLICES + 2 * hit


def test_the_counterpart_changes_only_what_was_judged(networks: Networks, manifest: Manifest) -> None:
    """Near the surface the up-sampled mask reaches out of the head: nothing may be painted there."""
    at_surface = with_lesion(brain(), (50.0, 0.0, 0.0), RADIUS_MM, 1.5)
    for reference in ("image", "reconstruction"):
        d = detect(at_surface, networks, with_part(manifest, "residual", reference=reference))
        assert d.latent_mask.any()
        outside = ~d.slices.foreground & d.analysed[:, None, None]
        np.testing.assert_array_equal(d.counterpart[outside], d.slices.x[:, 0][outside])


def test_residual_against_the_image_or_the_reconstruction(sick: Volume, networks: Networks, manifest: Manifest) -> None:
    z_decoded = {}
    for reference in ("image", "reconstruction"):
        d = detect(sick, networks, with_part(manifest, "residual", reference=reference))
        z_decoded[reference] = d
    image, reconstruction = z_decoded["image"], z_decoded["reconstruction"]
    np.testing.assert_array_equal(image.latent_mask, reconstruction.latent_mask)
    hit = image.latent_mask.any(axis=(1, 2))
    own_error = np.abs(networks.decode(networks.encode(image.slices.x[hit])) - image.slices.x[hit])[:, 0]
    difference = np.abs(image.anomaly[hit] - reconstruction.anomaly[hit])
    assert (np.nan_to_num(difference) <= own_error + 1e-6).all()  # | |x - c| - |D - c| | <= |x - D|
    assert np.nanmax(difference) > 0.02


def test_smoothing_keeps_the_amount_and_lowers_the_peak(sick: Volume, networks: Networks, manifest: Manifest) -> None:
    plain = detect(sick, networks, manifest).anomaly
    smooth = detect(sick, networks, with_part(manifest, "residual", smoothing_mm=3.0)).anomaly
    assert np.nanmax(smooth) < np.nanmax(plain)
    assert np.nansum(smooth) == pytest.approx(np.nansum(plain), rel=0.05)
    np.testing.assert_array_equal(np.isnan(smooth), np.isnan(plain))


def test_the_noise_of_a_slice_is_keyed_by_its_place_in_the_stack(
    networks: Networks, manifest: Manifest, found: Detection
) -> None:
    """Neither by its place among the analysed slices, nor among those that are reversed."""
    hit = np.flatnonzero(found.latent_mask.any(axis=(1, 2)))
    schedule = Schedule.linear(1000, 0.0015, 0.0195)
    noise = KeyedNoise(manifest.seed, manifest.latent_shape)
    diffusion = diffusion.Diffusion(schedule, networks.denoise, noise)
    z0 = networks.encode(found.slices.x[hit])
    mask = found.latent_mask[hit]
    imagined = networks.decode(diffusion.inpaint(z0, mask, hit, diffusion, manifest.reverse.timesteps))[:, 0]
    expected = residual.masked_residual(networks.decode(z0)[:, 0], imagined, mask)
    inside = found.slices.foreground[hit]
    np.testing.assert_array_equal(found.anomaly[hit][inside], expected[inside])
    kl = diffusion.kl_map(z0, hit, diffusion, manifest.kl.timesteps)
    known = np.isfinite(found.kl[hit])
    np.testing.assert_array_equal(found.kl[hit][known], kl[known])


def test_a_scan_without_a_large_enough_slice_is_refused(networks: Networks, manifest: Manifest) -> None:
    shape = (52, 64, 48)
    array = np.zeros(shape, dtype=np.float32)
    array[4:-4, 30:32, 18:28] = 700  # two crossed walls: of a head's extent, without its area
    array[25:27, 4:-4, 18:28] = 700
    with pytest.raises(WrongFieldOfView, match=r"shows \d+ cm2") as caught:
        detect(Volume(array, grid(shape)), networks, manifest)
    assert "at least 25 cm2 of a skull-stripped brain" in caught.value.expected


# ---- the same bytes ----------------------------------------------------------------------------


def test_rerunning_and_batching_give_the_same_bytes(
    sick: Volume, networks: Networks, manifest: Manifest, found: Detection
) -> None:
    expected = everything(found)
    assert everything(detect(sick, networks, manifest)) == expected
    for size in (1, 7, 16):
        assert everything(detect(sick, networks.in_batches(size, lambda _: None), manifest)) == expected


def test_the_seed_is_the_manifests_unless_the_caller_has_one(
    sick: Volume, networks: Networks, manifest: Manifest, found: Detection
) -> None:
    assert everything(detect(sick, networks, manifest, seed=manifest.seed)) == everything(found)
    other = detect(sick, networks, manifest, seed=0)
    assert everything(other) != everything(found)
    assert other.scores.scan == pytest.approx(found.scores.scan, rel=0.1)


def test_cancelling_stops_between_evaluations(sick: Volume, networks: Networks, manifest: Manifest) -> None:
    counter = Counter(networks)
    seen = []

    def tick(slices: int) -> None:
        seen.append(slices)
        if len(seen) == 5:
            raise Cancelled("Asked to stop.", expected="-", advice="-")

    with pytest.raises(Cancelled):
        detect(sick, counter.networks.in_batches(8, tick), manifest)
    assert sum(counter.calls.values()) == sum(seen)
    assert counter.calls["decode"] == 0


# ---- several views -----------------------------------------------------------------------------

FOUR = (View(), View(mirrored=True, shift=(1, 1)), View(shift=(1, 1)), View(mirrored=True))


@pytest.fixture(scope="module")
def averaged(sick: Volume, networks: Networks, manifest: Manifest) -> tuple[Counter, Detection]:
    counter = Counter(networks)
    return counter, detect(sick, counter.networks, manifest.model_copy(update={"views": FOUR}))


def test_the_plain_view_decides_on_the_gate_and_the_kl(averaged: tuple[Counter, Detection], found: Detection) -> None:
    _, d = averaged
    np.testing.assert_array_equal(d.kl, found.kl)
    np.testing.assert_array_equal(d.latent_mask, found.latent_mask)
    assert d.scores.median_kl_range == found.scores.median_kl_range
    assert d.reversed[0] == found.reversed[0] == found.latent_mask.any(axis=(1, 2)).sum()


def test_views_are_averaged_where_they_belong(averaged: tuple[Counter, Detection], found: Detection) -> None:
    """The lesion lies to one side: a view that were not turned back would show a second one opposite."""
    _, d = averaged
    sides = [
        float(np.nansum(m.anomaly[:, :, columns])) for m in (d, found) for columns in (slice(0, 28), slice(28, 56))
    ]
    assert sides[0] == pytest.approx(sides[2], abs=0.02 * sides[3])
    assert sides[1] == pytest.approx(sides[3], rel=0.2)
    np.testing.assert_array_equal(np.isnan(d.anomaly), np.isnan(found.anomaly))
    assert not np.array_equal(d.anomaly, found.anomaly)


def test_each_view_is_counted(averaged: tuple[Counter, Detection], manifest: Manifest) -> None:
    counter, d = averaged
    k = int(d.analysed.sum())
    views = manifest.model_copy(update={"views": FOUR})
    assert counter.calls["denoise"] == network_evaluations(views, k, d.reversed)
    assert counter.calls["denoise"] == SAMPLED_SLICES + 4 * 3 * k + 5 * sum(d.reversed)
    assert counter.calls["encode"] == 4 * k


def test_a_view_is_turned_back_exactly() -> None:
    stack = np.random.default_rng(0).random((3, 6, 8))
    for view in (*FOUR, View(mirrored=True, shift=(2, -3))):
        np.testing.assert_array_equal(invert_augmentation(augment(stack, view), view), stack)
    np.testing.assert_array_equal(augment(stack, View(mirrored=True)), stack[..., ::-1])
    assert augment(stack, View(shift=(1, 0)))[0, 1, 0] == stack[0, 0, 0]
