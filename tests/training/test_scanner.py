"""Another scanner's image: sharper or smoother, noisier, of the same head and nothing else."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from app.volume import FloatArray
from training.config import AugmentationConfig, ScannerConfig
from training.data import augment
from training.scanner import another_scanner

CONFIG = ScannerConfig(share=0.5, noise=0.0, blur_pixels=0.5, sharpen=1.0)


def head() -> FloatArray:
    """An even disc with stripes of two pixels, (4, 96, 80)."""
    rows, columns = np.mgrid[-1:1:96j, -1:1:80j]
    stripes = 0.5 + 0.1 * ((np.arange(80) // 2) % 2)
    return np.repeat(np.where(rows**2 + columns**2 < 0.7, stripes, 0).astype(np.float32)[None], 4, axis=0)


def detail(x: FloatArray) -> float:
    """What a small Gaussian takes away, well inside the head."""
    inner = ndimage.binary_erosion(x > 0, iterations=4, structure=np.ones((1, 3, 3)))
    return float(np.abs(x - ndimage.gaussian_filter(x, (0, 1, 1)))[inner].mean())


def test_it_is_smoother_or_sharper_within_what_the_configuration_allows() -> None:
    x = head()
    shares = [detail(another_scanner(x, CONFIG, np.random.default_rng(i))) / detail(x) for i in range(60)]
    assert 0.75 < min(shares) < 0.85
    assert 1.5 < max(shares) < 2.1
    assert np.mean(np.array(shares) <= 1) == pytest.approx(0.5, abs=0.2)


def test_noise_has_the_strength_that_was_drawn() -> None:
    config = ScannerConfig(share=1.0, noise=0.04, blur_pixels=0.0, sharpen=0.0)
    x = head()
    strengths = [float((another_scanner(x, config, np.random.default_rng(i)) - x)[x > 0].std()) for i in range(60)]
    assert max(strengths) == pytest.approx(0.04, rel=0.1)
    assert np.mean(strengths) == pytest.approx(0.02, rel=0.2)


def test_the_background_and_the_edge_stay() -> None:
    x = np.where(head() > 0, np.float32(0.5), np.float32(0))
    config = ScannerConfig(share=1.0, noise=0.0, blur_pixels=1.0, sharpen=1.0)
    for i in range(10):
        np.testing.assert_allclose(another_scanner(x, config, np.random.default_rng(i)), x, atol=1e-5)


def test_a_share_of_the_training_slices_comes_from_another_scanner_the_same_for_the_same_seed() -> None:
    still = AugmentationConfig(rotate_degrees=0, scale=0, shift_pixels=0, gain=0, gamma=0, scanner=CONFIG)
    x = torch.from_numpy(np.repeat(head()[:1], 200, axis=0)[:, None])
    y = augment(x, still, np.random.default_rng(3))
    assert torch.equal(y, augment(x, still, np.random.default_rng(3)))
    as_it_was = [torch.allclose(a, x[0], atol=1e-4) or torch.allclose(a, x[0].flip(-1), atol=1e-4) for a in y]
    # A Gaussian of a fraction of a pixel changes nothing either.
    assert np.mean(as_it_was) == pytest.approx(0.5 + 0.25 * 0.3, abs=0.1)
