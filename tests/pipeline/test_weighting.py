"""What a difference is worth where it was found, worked out by hand."""

import numpy as np
import pytest

from app.manifest import Manifest
from app.pipeline import diffusion, residual
from app.pipeline.detect import detect
from app.pipeline.networks import Networks
from tests.support.phantom import brain, with_lesion

RESIDUAL = np.full((1, 8, 8), 0.2, dtype=np.float32)
FLAT = np.full((1, 8, 8), 0.7, dtype=np.float32)


def test_without_settings_a_residual_is_itself() -> None:
    kl = np.full((1, 2, 2), 9.0, dtype=np.float32)
    assert residual.weight_residual(RESIDUAL, FLAT, kl, kl > 0, 0.0, by_kl=False) is RESIDUAL


def test_the_residual_is_divided_by_floor_and_contrast() -> None:
    kl = np.ones((1, 2, 2), dtype=np.float32)
    np.testing.assert_allclose(residual.weight_residual(RESIDUAL, FLAT, kl, kl > 0, 0.1, by_kl=False), 2.0, rtol=1e-2)
    stripes = FLAT.copy()
    stripes[:, :, ::2] = 0.3
    got = residual.weight_residual(RESIDUAL, stripes, kl, kl > 0, 0.1, by_kl=False)
    # Two or three of five columns are dark: a standard deviation of 0.4 sqrt(6 / 25).
    np.testing.assert_allclose(got[:, :, 2:-2], 0.2 / (0.1 + 0.4 * np.sqrt(6) / 5), rtol=1e-3)


def test_local_contrast_is_the_standard_deviation_of_a_window_in_the_slice() -> None:
    image = np.random.default_rng(8).random((3, 12, 10)).astype(np.float32)
    contrast = residual.local_contrast(image)
    assert contrast[1, 6, 5] == pytest.approx(image[1, 4:9, 3:8].std(), rel=1e-4)
    np.testing.assert_array_equal(contrast[1:2], residual.local_contrast(image[1:2]))


def test_the_residual_is_multiplied_by_the_surprise() -> None:
    kl = np.array([[[1.0, 3.0]]], dtype=np.float32)
    residual = np.full((1, 4, 8), 0.5, dtype=np.float32)
    got = residual.weight_residual(residual, residual, kl, kl > 0, 0.0, by_kl=True)
    assert got[0, 1].tolist() == pytest.approx([0.5, 0.5, 0.625, 0.875, 1.125, 1.375, 1.5, 1.5])


def test_eroding_takes_the_outermost_pixels_of_each_slice() -> None:
    foreground = np.zeros((2, 9, 9), dtype=bool)
    foreground[0, 2:7, 2:7] = True
    expected = np.zeros_like(foreground)
    expected[0, 3:6, 3:6] = True
    np.testing.assert_array_equal(residual.erode_foreground(foreground, 1), expected)
    assert residual.erode_foreground(foreground, 2).sum() == 1
    assert residual.erode_foreground(foreground, 0) is foreground


def test_an_eroded_rim_is_not_judged(networks: Networks, manifest: Manifest) -> None:
    settings = manifest.residual.model_copy(update={"erosion": 2})
    d = detect(brain(), networks, manifest.model_copy(update={"residual": settings}))
    judged = residual.erode_foreground(d.slices.foreground, 2) & d.analysed[:, None, None]
    np.testing.assert_array_equal(np.isfinite(d.anomaly), judged)


def test_a_weighed_map_is_the_plain_one_weighed(networks: Networks, manifest: Manifest) -> None:
    scan = with_lesion(brain(), (25.0, 10.0, 20.0))
    settings = manifest.residual.model_copy(update={"weighted_by_kl": True})
    plain = detect(scan, networks, manifest)
    weighed = detect(scan, networks, manifest.model_copy(update={"residual": settings}))
    np.testing.assert_array_equal(plain.latent_mask, weighed.latent_mask)
    # In the middle of the lesion, where latents are foreground all around.
    hit = np.unravel_index(np.nanargmax(plain.anomaly), plain.anomaly.shape)
    surprise = residual.upsample(np.nan_to_num(plain.kl[hit[0]])[None] / manifest.kl.threshold, (64, 56))[0]
    assert weighed.anomaly[hit] == pytest.approx(plain.anomaly[hit] * surprise[hit[1:]], rel=1e-4)


def test_a_map_weighed_by_intensity_is_the_plain_one_times_the_slices(networks: Networks, manifest: Manifest) -> None:
    scan = with_lesion(brain(), (25.0, 10.0, 20.0))
    settings = manifest.residual.model_copy(update={"weighted_by_intensity": True})
    plain = detect(scan, networks, manifest)
    weighed = detect(scan, networks, manifest.model_copy(update={"residual": settings}))
    assert manifest.residual.smoothing_mm == 0
    assert np.nanmax(plain.anomaly) > 0
    np.testing.assert_allclose(weighed.anomaly, plain.anomaly * plain.slices.x[:, 0], rtol=1e-6)


def test_what_lies_beside_the_head_does_not_weigh(networks: Networks, manifest: Manifest) -> None:
    """The KL of background latents says nothing: it must not reach into the head by up-sampling."""
    settings = manifest.residual.model_copy(update={"weighted_by_kl": True})
    weighted = manifest.model_copy(update={"residual": settings})
    scan = with_lesion(brain(), (0.0, 68.0, 0.0))
    expected = detect(scan, networks, weighted)

    def encode(x: np.ndarray) -> np.ndarray:
        z0 = networks.encode(x)
        dark = x.reshape(len(x), 16, 4, 14, 4).max(axis=(2, 4)) == 0
        return np.where(dark[:, None], np.float32(50), z0)

    other = detect(scan, Networks(encode, networks.denoise, networks.decode), weighted)
    np.testing.assert_array_equal(other.latent_mask, expected.latent_mask)
    np.testing.assert_array_equal(other.anomaly, expected.anomaly)
